"""What a dataset of a mixture is, which shards it has, and which of their samples count."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.index import JSON, TEXT, TarIndex, open_index
from data.page import Text
from data.plan import default_lanes
from data.reader import ShardReader
from data.schema import MANIFEST, read_manifest
from data.windows import LABEL_POLICIES, WINDOWS
from flamingo.errors import UserError

KINDS = ("interleaved", "pairs", "text")


@dataclass(kw_only=True, slots=True)
class DatasetSpec:
    """One dataset of a mixture, and how a training row is cut out of its samples.

    Raises UserError, naming the dataset and the field, for a value that cannot be.
    """

    name: str
    shards: list[str]
    """Tars, folders of tars, or glob patterns, used in this order (a folder's or a pattern's by name)."""
    batch_size: int
    """Samples of a global batch: of all processes and micro-batches together."""
    weight: float = 1.0
    """What the trainer multiplies this dataset's loss by. The loader only carries it."""
    kind: str = "interleaved"
    """"interleaved" (any sample), "pairs" (samples with a picture and text), "text" (the pictures are left out)."""
    max_tokens: int = 256
    """Longest row, in tokens."""
    max_images: int = 5
    """Most pictures of a row; the row ends before the first one more."""
    max_frames: int = 1
    """Frames of every picture of this dataset: 1 for pictures."""
    next_image_probability: float = 0.0
    """Share of the rows whose tokens see the next picture and not the one before them (the paper: 0.5 on M3W)."""
    labels: str = "text"
    """"text" (every text token, EOC and EOS) or "openflamingo" (only from an <image> to its EOC)."""
    window: str = "random"
    """Where a row begins in a page that is too long: at a "random" token or at the "start"."""
    flip: bool = False
    """Mirror each picture with probability 1/2. Wrong where the text says left or right, or has letters."""
    lanes: int = 0
    """Lanes of the order (see data.plan); 0: the greatest common divisor of the batch size and 64."""
    block: int = 16
    """Shards whose samples are shuffled together."""

    def __post_init__(self) -> None:
        self.lanes = self.lanes or default_lanes(self.batch_size)
        wrong = [
            (not self.shards, "shards is empty; give at least one tar, folder or pattern"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1"),
            (self.kind not in KINDS, f"kind={self.kind!r} must be one of {', '.join(KINDS)}"),
            (self.labels not in LABEL_POLICIES, f"labels={self.labels!r} must be one of {', '.join(LABEL_POLICIES)}"),
            (self.window not in WINDOWS, f"window={self.window!r} must be one of {', '.join(WINDOWS)}"),
            (self.max_tokens < 2, f"max_tokens={self.max_tokens} must be at least 2"),
            (self.max_images < 0, f"max_images={self.max_images} must not be negative"),
            (self.max_frames < 1, f"max_frames={self.max_frames} must be at least 1"),
            (self.block < 1, f"block={self.block} must be at least 1"),
            (
                not 0 <= self.next_image_probability <= 1,
                f"next_image_probability={self.next_image_probability} must be between 0 and 1",
            ),
            (
                self.lanes < 0 or (self.lanes > 0 and self.batch_size % self.lanes != 0),
                f"lanes={self.lanes} must divide batch_size={self.batch_size}",
            ),
        ]
        for bad, message in wrong:
            if bad:
                raise UserError(f"dataset {self.name!r}: {message}")


@dataclass(slots=True)
class Corpus:
    """The opened shards of a dataset: their indexes, and for each the rows that count (None: all)."""

    indexes: list[TarIndex]
    valid: list[NDArray[np.int64] | None] = field(repr=False)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(S,) samples that count, for each shard."""
        return np.array(
            [len(index) if rows is None else len(rows) for index, rows in zip(self.indexes, self.valid, strict=True)],
            dtype=np.int64,
        )

    def row(self, shard: int, number: int) -> int:
        """The row in the shard of its sample `number` among those that count."""
        rows = self.valid[shard]
        return number if rows is None else int(rows[number])


def resolve_shards(patterns: list[str], *, owner: str = "") -> list[str]:
    """Tars, folders and patterns to a list of tars. Raises UserError for one that leads to no shard."""
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            if (path / MANIFEST).exists():
                parts = read_manifest(path)["parts"].values()
                more = sorted(str(path / entry["name"]) for part in parts for entry in part["shards"])
            else:
                more = sorted(str(tar) for tar in path.glob("*.tar"))
        elif any(c in pattern for c in "*?["):
            more = sorted(glob.glob(pattern))  # noqa: PTH207 (the pattern may be absolute)
        else:
            more = [pattern]
        if not more:
            raise UserError(f"{owner}no shards in {pattern}: prepare the data first, or correct the path")
        for shard in more:
            if not Path(shard).exists():
                raise UserError(f"{owner}shard {shard} does not exist; prepare the data first, or correct the path")
        found += more
    return found


def valid_rows(index: TarIndex, kind: str) -> NDArray[np.int64] | None:
    """Rows that a dataset of this kind can use, None when it is all of them."""
    texts = index.rows_with(JSON) | index.rows_with(TEXT)
    pictures = index.pictures_per_row > 0
    usable = {"interleaved": texts | pictures, "pairs": texts & pictures, "text": texts}[kind]
    return None if usable.all() else np.flatnonzero(usable)


def open_corpus(spec: DatasetSpec) -> Corpus:
    """Open and check every shard of a dataset before anything trains. Raises UserError, naming the shard."""
    indexes = [open_index(shard) for shard in resolve_shards(spec.shards, owner=f"dataset {spec.name!r}: ")]
    corpus = Corpus(indexes, [valid_rows(index, spec.kind) for index in indexes])
    if corpus.counts.sum() == 0:
        raise UserError(f"dataset {spec.name!r} has no sample of kind {spec.kind!r} in its {len(indexes)} shards")
    return corpus


def page_texts(specs: Sequence[DatasetSpec]) -> Iterator[str]:
    """The text of every page of a mixture, once, in the order of the shards (for training a tokenizer)."""
    for spec in specs:
        corpus = open_corpus(spec)
        reader = ShardReader(corpus.indexes)
        for shard, rows in enumerate(corpus.counts):
            for number in range(rows):
                nodes = reader.sample(shard, corpus.row(shard, number)).nodes
                yield "".join(node.text for node in nodes if isinstance(node, Text))
        reader.close()
