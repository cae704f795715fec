"""Where a dataset's documents come from: four methods that the loader calls, and a list in memory that has them.

    lengths       how many samples there are, part by part
    key           where a sample comes from and what it is called, for logs
    read          a sample, its images still encoded
    fingerprint   what must not change when a run is resumed

A part is what lies together on the storage: `data.shard_store` has one for each tar, and the order (`data.order`)
shuffles over `block` parts at a time so that few are open at once. A store with random access has a single part.

    loader = MixLoader([DatasetSpec(name="mine", batch_size=8)], collate, stores={"mine": MemoryStore(documents)})
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from data.shards.document import Document, check_images, nodes_to_json
from data.shards.reader import RawSample, raw_sample


class DocumentStore(Protocol):
    """The samples of a dataset. Workers are forked with it, and the loader may read from a thread of its own."""

    def lengths(self) -> Sequence[int]:
        """Return the number of samples of each part."""

    def key(self, part: int, row: int) -> tuple[str, str]:
        """Return (name of the part, key of the sample) for logs and lists of bad samples."""

    def read(self, part: int, row: int, *, images: bool = True) -> RawSample:
        """Return a sample; `raw_sample` makes one of a `Document`. With `images=False` only its text will be used.

        Raises ContentError for a sample that another one should replace, and UserError for what must stop the run.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the samples and their numbering, as JSON values. A resumed run must have the same."""


class MemoryStore:
    """A list of documents, for notebooks and tests. Every document is used, whatever the `kind` of the dataset.

    Raises UserError for a document whose nodes name an image that it does not have.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = list(documents)
        digest = hashlib.sha256()
        for row, document in enumerate(self.documents):
            check_images(document.nodes, range(len(document.images)), f"document {row} (key {document.key!r})")
            for part in (nodes_to_json(document.nodes, {}), *document.images):
                digest.update(len(part).to_bytes(8, "little") + part)
        self._digest = digest.hexdigest()[:16]

    def lengths(self) -> list[int]:
        """Return the number of documents: a single part."""
        return [len(self.documents)]

    def key(self, part: int, row: int) -> tuple[str, str]:
        """Return ("memory", the document's key, or its row where it has none)."""
        return "memory", self.documents[row].key or f"{row:08d}"

    def read(self, part: int, row: int, *, images: bool = True) -> RawSample:
        """Return a document as a sample. Raises ContentError for text that is not Unicode."""
        return raw_sample(self.documents[row], self.key(part, row)[1])

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of documents and a digest of their nodes and images."""
        return {"samples": len(self.documents), "documents_sha256": self._digest}
