"""What a dataset of a mixture is, which shards it has, and which of their samples count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from data.corpus import Corpus, open_shards, resolve_shards
from data.order import default_lanes
from data.remote.shard_cache import ShardCache
from data.shards.document import Text
from data.shards.mmc4 import Mmc4Rule
from data.shards.reader import ShardReader
from flamingo.configs.validate import (
    STRICT,
    AboveZero,
    AtLeast0,
    AtLeast1,
    NotNegative,
    Share,
    examine,
    self_checking,
)
from flamingo.errors import UserError

Labels = Literal["text", "openflamingo"]
Window = Literal["random", "start"]
LABEL_POLICIES, WINDOWS = get_args(Labels), get_args(Window)
__all__ = ["Corpus", "DatasetSpec", "dataset_specs", "document_texts", "open_corpus", "reader_of", "resolve_shards"]


@self_checking(lambda values: f"dataset {values.get('name')!r}")
@dataclass(kw_only=True, slots=True, config=STRICT)
class DatasetSpec:
    """One dataset of a mixture, and how a training row is cut out of its samples.

    Raises:
        UserError: values that are not allowed, all of them, with the dataset's name.
    """

    name: str
    shards: Annotated[list[str], Field(min_length=1)]
    """Tars, folders of tars, glob or brace patterns, URLs; used in this order (a folder's or a pattern's by name)."""
    batch_size: AtLeast1
    """Samples of a global batch: of all processes and micro-batches together."""
    weight: float = 1.0
    """What the trainer multiplies this dataset's loss by. The loader only carries it."""
    kind: Literal["interleaved", "pairs", "text"] = "interleaved"
    """"interleaved" (any sample), "pairs" (samples with an image and text), "text" (the images are left out)."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Longest row, in tokens."""
    max_images: AtLeast0 = 5
    """Most images of a row; the row ends before the first one more."""
    max_frames: AtLeast1 = 1
    """Frames of every image of this dataset: 1 for images."""
    next_image_probability: Share = 0.0
    """Share of the rows whose tokens see the next image and not the one before them (the paper: 0.5 on M3W)."""
    labels: Labels = "text"
    """"text" (every text token, EOC and EOS) or "openflamingo" (only from an <image> to its EOC)."""
    window: Window = "random"
    """Where a row begins in a document (not a pair) that is too long, and a clip in its frames: "random" or "start"."""
    flip: bool = False
    """Mirror each image with probability 1/2, but none of a document whose text says left or right. Wrong for letters.
    """
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation of each image are multiplied by a number from 1 - colour to 1 + colour."""
    single_image_share: Share = 1.0
    """Share of the rows with a single image that is kept; others stand in (open_flamingo: 0.5 of MMC4's documents)."""
    space_probability: Share = 0.0
    """Share of the rows whose first text gets one space in front (the paper: 0.5 on its pairs)."""
    frame_rate: NotNegative = 0.0
    """Frames a second taken of a clip that says its own rate (the paper: 1); 0: every stored frame."""
    reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """What a loss is divided by: "token_mean", the labels of the batch; "sequence_sum", its samples (the paper)."""
    pack: AtLeast0 = 0
    """Put the samples of a micro-batch together in rows of at most this many tokens; 0: a row a sample."""
    similarity: Annotated[float, Field(le=1)] = 0.24
    """Least similarity of an image to its sentence, in open_flamingo's MMC4 shards (not scaled by 100)."""
    cache: str = ""
    """Folder on this machine's disk for copies of remote shards; the datasets and ranks of a machine may share it."""
    cache_gb: AboveZero = 100.0
    """Most bytes in that folder, in units of 1e9."""
    lanes: AtLeast0 = 0
    """Lanes of the order (see data.order); 0: the greatest common divisor of the batch size and 64."""
    block: AtLeast1 = 16
    """Shards whose samples are shuffled together."""

    def __post_init__(self) -> None:
        self.lanes = self.lanes or default_lanes(self.batch_size)

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each combination of values that cannot be."""
        if 0 < self.pack < self.max_tokens:
            yield f"pack={self.pack} must be 0 or at least max_tokens={self.max_tokens}"
        if self.kind == "pairs" and self.single_image_share < 1:
            yield f"single_image_share={self.single_image_share} is for documents; a pair has a single image"
        if self.batch_size % self.lanes:
            yield f"lanes={self.lanes} must divide batch_size={self.batch_size}"

    def divisor(self, labels: float) -> float:
        """What the sum of the token losses of a global batch with so many labels is divided by."""
        return float(self.batch_size) if self.reduction == "sequence_sum" else max(1.0, labels)


def dataset_specs(group: str, datasets: Mapping[str, Mapping[str, Any]], problems: list[str]) -> list[DatasetSpec]:
    """Return the typed datasets of the config table `<group>.datasets`; what is wrong is added to `problems`."""
    specs = []
    for name, values in datasets.items():
        spec, clauses = examine(DatasetSpec, {"name": name, **values}, f"{group}.datasets.{name}")
        problems += clauses
        if spec is not None:
            specs.append(spec)
    return specs


def open_corpus(spec: DatasetSpec, rank: int = 0, world: int = 1) -> Corpus:
    """Open a dataset's shards; each rank checks its share of them, so together all, before anything trains.

    Raises UserError, naming the dataset and the shard.
    """
    owner = f"dataset {spec.name!r}: "
    paths = resolve_shards(spec.shards, owner=owner)
    cache = ShardCache(spec.cache, int(spec.cache_gb * 1e9)) if spec.cache else None
    return open_shards(paths, spec.kind, owner=owner, share=(rank, world), cache=cache)


def reader_of(spec: DatasetSpec, corpus: Corpus) -> ShardReader:
    """A reader for a dataset's shards."""
    return ShardReader(corpus.indexes, local=corpus.local, mmc4=Mmc4Rule(similarity=spec.similarity))


def document_texts(specs: Sequence[DatasetSpec]) -> Iterator[str]:
    """The text of every document of a mixture, once, in the order of the shards (for training a tokenizer)."""
    for spec in specs:
        corpus = open_corpus(spec)
        reader = reader_of(spec, corpus)
        for shard, rows in enumerate(corpus.counts):
            for number in range(rows):
                nodes = reader.sample(shard, corpus.row(shard, number), images=False).nodes
                yield "".join(node.text for node in nodes if isinstance(node, Text))
        reader.close()


def too_small(specs: Iterable[DatasetSpec], pieces: int) -> Iterator[str]:
    """One clause for each dataset whose shards are missing or broken, or that has less than a sample for each piece.

    Shards need not be as many as processes, since the order deals out samples (`data.order`); and a batch may be larger
    than a small dataset, which then repeats itself within it. `pieces` are processes x micro-batches.
    """
    for spec in specs:
        try:
            samples = int(open_corpus(spec).counts.sum())
        except UserError as error:
            yield str(error)
            continue
        if samples < pieces:
            yield (
                f"data.datasets.{spec.name}.shards hold {samples} samples, fewer than processes x run.micro_batches = "
                f"{pieces}, so processes would learn the same ones: add shards or use fewer processes"
            )
