"""A frozen encoder's tokens, computed once for each image: for training, which shows every image many times.

An image is known by its pixels after the transform, so another transform is another image. It is encoded on its own,
whatever else its batch holds: its tokens are then a function of the image alone, and a run that computes them, one that
reads them and one that goes on after a kill have the same bits.

Letters: N frames, C channels, S side in pixels, P patches, D width.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flamingo.vision.image_store import ImageStore, weights_hash

_CODE = (Path(__file__).parent / "encoder.py", Path(__file__))
_PACKAGES = ("torch", "transformers", "timm", "open_clip_torch")


class FrozenFeatures:
    """Tokens by frame, in memory or, given a `store`, in its folder; `encoded` and `reused` count frames.

    `limit` is in bytes of memory; beyond it images are encoded every time, which is said once.
    """

    def __init__(self, store: ImageStore | None = None, limit: int = 1 << 62) -> None:
        self._store, self._limit = store, limit
        self._known: dict[str, Tensor] = {}
        self._held = 0
        self._said = False
        self.encoded = self.reused = 0

    def __call__(
        self, frames: UInt8[Tensor, "N C S S"], encode: Callable[[Tensor], Tensor], precision: torch.dtype
    ) -> Float[Tensor, "N P D"]:
        """Return the tokens of frames; `encode` is called with each that is not known, (1, C, S, S)."""
        salt = f"{precision} {frames.device.type}".encode()
        new: dict[str, Tensor] = {}  # also what does not fit, for the frames of this call
        tokens = []
        for frame, host in zip(frames, frames.cpu().contiguous(), strict=True):
            hashed = hashlib.blake2b(salt, digest_size=32)
            hashed.update(host.numpy())  # without a copy
            digest = hashed.hexdigest()
            known = new.get(digest)
            if known is None:
                known = self._load(digest)
            if known is None:
                # In an evaluation's inference mode the tokens would be unfit for training afterwards.
                with torch.inference_mode(False), torch.no_grad():
                    known = encode(frame[None].clone())[0].clone()
                self.encoded += 1
                self._keep(digest, known)
            else:
                self.reused += 1
            new[digest] = known
            tokens.append(known.to(frames.device))
        return torch.stack(tokens)

    def _load(self, digest: str) -> Tensor | None:
        if self._store is None:
            return self._known.get(digest)
        return (self._store.read(digest) or {}).get("tokens")

    def _keep(self, digest: str, tokens: Tensor) -> None:
        if self._store is not None:
            kept = self._store.write(digest, {"tokens": tokens})
        else:
            size = tokens.numel() * tokens.element_size()
            if kept := self._held + size <= self._limit:
                self._known[digest] = tokens.cpu()
                self._held += size
        if not kept and not self._said:
            self._said = True
            print("the feature cache is full: further images are encoded every time", file=sys.stderr, flush=True)


def features_key(encoder: Any, transform: Any) -> str:
    """Return a hash of what an image's tokens depend on: the encoder's weights and options, and the transform."""
    options = (encoder.class_token, encoder.final_norm, encoder.image_size)
    return hashlib.sha256(f"{weights_hash(encoder)} {options} {transform}".encode()).hexdigest()


def folder_key(key: str) -> str:
    """Return the key of a folder of features: another version of this code or of a library may round differently."""
    digest = hashlib.sha256(key.encode())
    for file in _CODE:
        digest.update(file.read_bytes())
    digest.update(" ".join(version(package) for package in _PACKAGES).encode())
    return digest.hexdigest()
