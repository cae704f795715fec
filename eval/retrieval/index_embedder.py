"""Demonstrations chosen by an index: its vectors and its encoder compare images, in place of the evaluated model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from eval.inference.engine import Engine
from eval.inference.model import FlamingoResponder
from eval.retrieval.encoder import DualEncoder, FlamingoEncoder, load_encoder
from eval.retrieval.index import VectorIndex
from eval.task import EncodedImage


class IndexEmbedder:
    """An `Embedder` that takes the vectors of images in the index from there and encodes the others.

    An index of a Flamingo has to be of the evaluated one; of another encoder, which is loaded, it may be any.
    """

    def __init__(self, folder: str, engine: Engine, device: str) -> None:
        """Open the index and check its encoder. Raises UserError if that has changed since."""
        self._index = VectorIndex(Path(folder))
        kind, name = self._index.encoder["kind"], self._index.encoder["name"]
        encoder: DualEncoder
        if kind == "flamingo":
            assert isinstance(engine.responder, FlamingoResponder)
            encoder = FlamingoEncoder("the evaluated model", engine.responder)
        else:
            encoder = load_encoder(name, device)
        self._index.check_encoder(encoder)
        self._encoder = encoder
        self.taken, self.encoded = 0, 0

    @property
    def name(self) -> str:
        """What compares images in this run, for the results."""
        return f"index {self._index.encoder['kind']} {self._encoder.key[:16]}"

    @property
    def description(self) -> dict[str, object]:
        """How many vectors came from the index, for the results."""
        return {
            "folder": str(self._index.folder),
            "encoder": self._index.encoder,
            "rows": len(self._index),
            "taken": self.taken,
            "encoded": self.encoded,
        }

    @cached_property
    def _rows(self) -> dict[str, int]:
        return self._index.rows_by_sha256()

    def __call__(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """Return (N, E) vectors of length 1."""
        rows = np.array([self._rows.get(image.sha256, -1) for image in images], dtype=np.int64)
        known, missing = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        vectors = np.empty((len(images), self._index.vectors.shape[1]), dtype=np.float32)
        vectors[known] = self._index.vectors[rows[known]]
        if len(missing):
            vectors[missing] = self._encoder.encode_images([images[int(at)] for at in missing])
        self.taken, self.encoded = self.taken + len(known), self.encoded + len(missing)
        return vectors
