"""Images are encoded once: in memory for a run, on disk for ever.

What the resampler gives does not depend on the prompt, so every task, number of shots, seed, strategy and ablation
shares it. On disk an image is one file under the hash of what encoded it (weights, preprocessing, precision, the code
of these) and its own SHA-256, written beside its place and moved there: processes share the folder without locks, and
what a kill left half-written is not found. When the folder is full, what was not used for longest goes.

Letters: N images, L latents, D their width, E width of an embedding.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.inference.distributed import Ranks
from eval.task import EncodedImage
from flamingo.errors import UserError
from flamingo.files import write_atomically

if TYPE_CHECKING:
    from eval.inference.protocol import Responder

MEMORY_BYTES = 4 << 30
"""Features kept in memory when there is a folder to read the others from."""
SUFFIX = ".safetensors"


class ImageStore:
    """Files `folder/key/ab/abcdef....safetensors`; at most `limit` bytes in all of `folder`."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self._root = folder
        self._folder = folder / key[:32]
        self._limit = limit
        self._used: set[Path] = set()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise UserError(
                f"cache={folder} cannot be used: {error}; give a folder that can be written, or null"
            ) from None

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / f"{sha256}{SUFFIX}"

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._root.rglob(f"*{SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def read(self, sha256: str) -> dict[str, Tensor] | None:
        """What was stored for an image; None if there is nothing or it cannot be read."""
        path = self._path(sha256)
        try:
            found = load_file(path)
            if path not in self._used:
                os.utime(path)
        except (OSError, SafetensorError):
            return None
        self._used.add(path)
        return found

    def write(self, sha256: str, tensors: dict[str, Tensor]) -> None:
        """Store an image, unless what this run uses fills the folder alone."""
        path = self._path(sha256)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._bytes + size > self._limit and not self._make_room(size):
            return
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            write_atomically(path, lambda temporary: save_file(copies, temporary), shared=True)
        except OSError as error:
            raise UserError(
                f"cache={self._root} cannot be written: {error}; make room, or give another folder"
            ) from None
        self._used.add(path)
        self._bytes += path.stat().st_size

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest until a tenth is free, nothing that this run uses."""
        files = sorted(self._files())
        self._bytes = sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in files:
            if self._bytes + size <= 0.9 * self._limit:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                self._bytes -= bytes_
        return self._bytes + size <= self._limit


class FeatureCache:
    """Features by SHA-256. `encoded` counts what the encoder was given, `shown` what prompts hold, in this process."""

    def __init__(
        self,
        responder: Responder,
        batch_size: int = 64,
        store: ImageStore | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._responder = responder
        self._batch_size = batch_size
        self._store = store
        self._memory_bytes = memory_bytes
        self._features: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._held = 0
        self.images: dict[str, EncodedImage] = {}
        self.shown = 0
        self.encoded = 0

    def see(self, images: Sequence[EncodedImage]) -> None:
        """Note images of a prompt, whether or not it must be run."""
        self.shown += len(images)
        for image in images:
            self.images.setdefault(image.sha256, image)

    def prepare(self, images: Sequence[EncodedImage], ranks: Ranks) -> None:
        """Encode what is missing, each process its share, where they have a folder to exchange it by."""
        if self._store is None or ranks.world == 1:
            return
        distinct = {image.sha256: image for image in images}
        self._fetch([image for sha256, image in sorted(distinct.items()) if ranks.owns(sha256)])
        ranks.barrier()

    def features(self, images: Sequence[EncodedImage]) -> Tensor:
        """(N, L, D), the missing ones encoded first. N = 0 gives (0, 0, 0)."""
        if not images:
            return torch.zeros(0, 0, 0)
        found = self._fetch(images)
        return torch.stack([found[image.sha256]["latents"] for image in images])

    def embeddings(self, images: Sequence[EncodedImage]) -> Tensor:
        """(N, E) float32 on the CPU, of length 1: what retrieval compares."""
        rows = []
        for start in range(0, len(images), 1024):  # bounds what is held at once
            some = images[start : start + 1024]
            found = self._fetch(some)
            rows += [found[image.sha256]["embedding"].float().cpu() for image in some]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    def _fetch(self, images: Iterable[EncodedImage]) -> dict[str, dict[str, Tensor]]:
        """Everything known of these images, from memory, from disk, or encoded now; all of it held by the caller."""
        wanted = {image.sha256: image for image in images}
        found: dict[str, dict[str, Tensor]] = {}
        missing: dict[int, list[EncodedImage]] = {}
        for sha256, image in wanted.items():
            known = self._features.get(sha256) or self._from_disk(sha256)
            if known is None:
                missing.setdefault(len(image.frames), []).append(image)
            else:
                self._keep(sha256, known)
                found[sha256] = known
        for group in missing.values():  # images of one call have the same number of frames
            for start in range(0, len(group), self._batch_size):
                found |= self._encode(group[start : start + self._batch_size])
        return found

    def _from_disk(self, sha256: str) -> dict[str, Tensor] | None:
        found = None if self._store is None else self._store.read(sha256)
        if found is None or not {"latents", "embedding"} <= found.keys():
            return None
        device = getattr(self._responder, "device", torch.device("cpu"))
        return found | {"latents": found["latents"].to(device)}

    def _encode(self, images: list[EncodedImage]) -> dict[str, dict[str, Tensor]]:
        embed: Any = getattr(self._responder, "encode_and_embed", None)
        if embed is None:
            latents = self._responder.encode(images)
            embeddings = latents.float().mean(1)
        else:
            latents, embeddings = embed(images)
        self.encoded += len(images)
        found = {}
        for image, own, embedding in zip(images, latents, embeddings, strict=True):
            # Cloned, or one image would keep the memory of its whole batch.
            found[image.sha256] = {"latents": own.clone(), "embedding": embedding.clone()}
            if self._store is not None:
                self._store.write(image.sha256, found[image.sha256])
            self._keep(image.sha256, found[image.sha256])
        return found

    def _keep(self, sha256: str, tensors: dict[str, Tensor]) -> None:
        if sha256 in self._features:
            self._features.move_to_end(sha256)
            return
        self._features[sha256] = tensors
        self._held += _bytes(tensors)
        while self._store is not None and self._held > self._memory_bytes and len(self._features) > 1:
            _, gone = self._features.popitem(last=False)
            self._held -= _bytes(gone)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
