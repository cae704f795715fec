"""Images are encoded once: in memory for a run, on disk permanently.

The resampler's output does not depend on the prompt, so every task, number of shots, seed, strategy and ablation shares
it. On disk an image is one file, under the hash of what encoded it (weights, preprocessing, precision and their code)
and its own SHA-256.

Letters: N images, L latents, D their width, E width of an embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eval.inference.protocol import Responder
from eval.task import EncodedImage
from flamingo.vision.image_store import ImageStore

MEMORY_BYTES = 4 << 30
"""Features kept in memory when there is a folder to read the others from."""


class FeatureCache:
    """Features by SHA-256. `encoded` counts the images encoded and `shown` the images in prompts, in this process."""

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
        """Count the images of a prompt, whether or not it has to be run."""
        self.shown += len(images)
        for image in images:
            self.images.setdefault(image.sha256, image)

    @property
    def stores(self) -> bool:
        """Whether features are also kept in a folder, through which processes exchange them."""
        return self._store is not None

    def counts(self) -> dict[str, int]:
        """Return the counts of images for the results."""
        return {"shown": self.shown, "distinct": len(self.images), "encoded": self.encoded}

    def features(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return (N, L, D) features, encoding the missing ones first. N = 0 gives (0, 0, 0)."""
        if not images:
            return torch.zeros(0, 0, 0)
        known = self.load(images)
        return torch.stack([known[image.sha256]["latents"] for image in images])

    def embeddings(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return (N, E) float32 embeddings of length 1 on the CPU, which retrieval compares."""
        rows = []
        for start in range(0, len(images), 1024):  # bounds what is held at once
            part = images[start : start + 1024]
            known = self.load(part)
            rows += [known[image.sha256]["embedding"].float().cpu() for image in part]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    def load(self, images: Iterable[EncodedImage]) -> dict[str, dict[str, Tensor]]:
        """Return the latents and embeddings of these images, from memory, from disk, or encoded now."""
        wanted = {image.sha256: image for image in images}
        loaded: dict[str, dict[str, Tensor]] = {}
        missing: dict[int, list[EncodedImage]] = {}
        for sha256, image in wanted.items():
            known = self._features.get(sha256) or self._from_disk(sha256)
            if known is None:
                missing.setdefault(len(image.frames), []).append(image)
            else:
                self._keep(sha256, known)
                loaded[sha256] = known
        for group in missing.values():  # images of one call have the same number of frames
            for start in range(0, len(group), self._batch_size):
                loaded |= self._encode(group[start : start + self._batch_size])
        return loaded

    def _from_disk(self, sha256: str) -> dict[str, Tensor] | None:
        tensors = None if self._store is None else self._store.read(sha256)
        if tensors is None or not {"latents", "embedding"} <= tensors.keys():
            return None
        return tensors | {"latents": tensors["latents"].to(self._responder.device)}

    def _encode(self, images: list[EncodedImage]) -> dict[str, dict[str, Tensor]]:
        latents, embeddings = self._responder.encode_and_embed(images)
        self.encoded += len(images)
        encoded = {}
        for image, own, embedding in zip(images, latents, embeddings, strict=True):
            # Cloned, or one image would keep the memory of its whole batch.
            encoded[image.sha256] = {"latents": own.clone(), "embedding": embedding.clone()}
            if self._store is not None:
                self._store.write(image.sha256, encoded[image.sha256])
            self._keep(image.sha256, encoded[image.sha256])
        return encoded

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
