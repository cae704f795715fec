"""What the engine and the sources share: a unit of the input, and the counts of what was kept and dropped, and why."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.shards.document import Document, to_utf8
from data.shards.places import Place, put
from data.shards.writer import MANIFEST_VERSION
from flamingo.errors import UserError

# Options for where things are or how fast to work. They change no document, so the manifest leaves them out.
NOT_RECORDED = {
    "command",
    "source",
    "out",
    "part",
    "workers",
    "inputs",
    "images",
    "restart",
    "work",
    "skip_bad_files",
    "counts",
    "engine",
    "engine_options",
    "scratch",
    "state",
    "digest",
    "module",
}


@dataclass(frozen=True, slots=True)
class InputUnit:
    """A part of the input that one process turns into shards of its own.

    `label` names it without the folder it lies in. `begin` and `end` count whatever the source reads by (bytes, rows,
    row groups); `names` are the files of a unit that is a list of files. `size` tells versions of the same file apart.
    """

    label: str
    path: str
    begin: int = 0
    end: int = 0
    size: int = 0
    names: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the unit without its folder, so that a moved input is still the same."""
        body = json.dumps([self.label, self.begin, self.end, self.size, self.names])
        return hashlib.sha256(body.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Dropped(Exception):  # noqa: N818 (not an error)
    """A document or image that is left out. `reason` is a short phrase to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Tally:
    """Counts of the documents and images that were kept and dropped, by reason, with the first case of each reason."""

    documents: int = 0
    images: int = 0
    dropped_documents: Counter[str] = field(default_factory=Counter)
    dropped_images: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop_document(self, reason: str, where: str) -> None:
        """Count a document that is left out."""
        self.dropped_documents[reason] += 1
        self._remember(f"document: {reason}", where)

    def drop_image(self, reason: str, where: str) -> None:
        """Count an image that is left out of its document."""
        self.dropped_images[reason] += 1
        self._remember(f"image: {reason}", where)

    def _remember(self, name: str, where: str) -> None:
        if name not in self.first:  # printable, whatever the name of a file or an address
            self.first[name] = where[:200].encode("utf-8", "replace").decode()

    def add(self, other: Tally) -> None:
        """Add the counts of a later unit."""
        self.documents += other.documents
        self.images += other.images
        self.dropped_documents.update(other.dropped_documents)
        self.dropped_images.update(other.dropped_images)
        self.first = other.first | self.first

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a manifest has them, reasons in alphabetical order."""
        return {
            "documents": {"kept": self.documents, "dropped": dict(sorted(self.dropped_documents.items()))},
            "images": {"kept": self.images, "dropped": dict(sorted(self.dropped_images.items()))},
            "first": dict(sorted(self.first.items())),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Tally:
        """Return the inverse of `to_json`."""
        documents, images = body["documents"], body["images"]
        dropped = Counter(documents["dropped"]), Counter(images["dropped"])
        return cls(documents["kept"], images["kept"], *dropped, dict(body["first"]))

    def report(self) -> list[str]:
        """Return the counts as lines of text, the commonest reason first."""
        lines = []
        for what, counts in (("document", self.dropped_documents), ("image", self.dropped_images)):
            if counts:
                lines.append(f"  dropped {what}s: {counts.total():,}")
            for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                lines.append(f"    {number:>9,}  {reason}  (first: {self.first[f'{what}: {reason}']})")
        return lines


class SourceModule(Protocol):
    """What the engine needs of a source's module (see `data.prepare`)."""

    LAYOUT: str

    def units(self, args: argparse.Namespace) -> list[InputUnit]:
        """Return independent parts of the input, always in the same order. Raises UserError when there are none."""

    def documents(self, unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
        """Yield the documents of a unit, in its order."""


def parse_part(text: str) -> tuple[int, int]:
    """Return (i, n) of "i/n", counted from 1. Raises UserError."""
    left, _, right = text.partition("/")
    if not (left.isdecimal() and right.isdecimal() and 1 <= int(left) <= int(right)):
        raise UserError(f"--part {text!r} must be i/n with 1 <= i <= n, for example 3/100")
    return int(left), int(right)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what the shards hold, in alphabetical order."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in NOT_RECORDED and value is not None}


def fingerprint(source: str, options: dict[str, Any], units: list[InputUnit]) -> str:
    """Return a digest of a preparation: equal for equal inputs and options."""
    body = json.dumps([MANIFEST_VERSION, source, options, [unit.digest for unit in units]], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def write_json(path: Place, body: Any) -> None:
    """Write JSON under its name only when it is whole."""
    put(path, to_utf8(json.dumps(body, indent=1, ensure_ascii=False) + "\n"))
