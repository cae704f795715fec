"""A dataset of a mixture: where its samples are, and how a training row is cut out of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from data.errors import ContentError, warn
from data.order import default_lanes
from data.remote.download import Trust
from data.remote.shard_cache import ShardCache
from data.shard_store import ShardStore, open_shards, resolve_shards
from data.shards.document import Text
from data.shards.mmc4 import Mmc4Rule
from data.shards.retry import PATIENCE, Retry
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
Crop = Literal["random", "start"]
LABEL_POLICIES, CROPS = get_args(Labels), get_args(Crop)
__all__ = [
    "DatasetSpec",
    "dataset_specs",
    "document_texts",
    "open_store",
    "resolve_shards",
]


@self_checking(lambda values: f"dataset {values.get('name')!r}")
@dataclass(kw_only=True, slots=True, config=STRICT)
class DatasetSpec:
    """One dataset of a mixture, and how a training row is cut out of its samples.

    Raises:
        UserError: values that are not allowed, all of them, with the dataset's name.
    """

    name: str
    shards: list[str] = field(default_factory=list)
    """Tars, folders of tars, glob or brace patterns, URLs; read in this order (a folder or pattern: by name). Empty
    for a dataset whose samples the loader is given as a `data.store.DocumentStore`."""
    batch_size: AtLeast1
    """Samples in a global batch: over all processes and micro-batches."""
    weight: float = 1.0
    """Factor of this dataset's loss. The trainer applies it; the loader only carries it."""
    kind: Literal["interleaved", "pairs", "text"] = "interleaved"
    """"interleaved" (any sample), "pairs" (samples with an image and text), "text" (images are ignored)."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Maximum length of a row, in tokens."""
    max_images: AtLeast0 = 5
    """Maximum number of images in a row; the row ends before the image that would exceed it."""
    max_frames: AtLeast1 = 1
    """Frames in every image of this dataset: 1 unless its images are clips."""
    next_image_probability: Share = 0.0
    """Share of the rows whose tokens see the next image instead of the previous one (the paper: 0.5 on M3W)."""
    labels: Labels = "text"
    """Tokens in the loss: "text" (all of the text, EOC and EOS) or "openflamingo" (only from an <image> to its EOC)."""
    crop: Crop = "random"
    """Where the crop of a document longer than `max_tokens` begins, and of a clip longer than `max_frames`: "random" or
    "start". A pair is always cropped at its start."""
    flip: bool = False
    """Mirror each image with probability 1/2, except in documents whose text says left or right. Wrong for letters."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multiply brightness, contrast and saturation of each image by factors from 1 - colour to 1 + colour."""
    single_image_share: Share = 1.0
    """Share of the rows with a single image to keep; others are replaced (open_flamingo: 0.5 of MMC4's documents)."""
    space_probability: Share = 0.0
    """Share of the rows whose first text is given a leading space (the paper: 0.5 on its pairs)."""
    frame_rate: NotNegative = 0.0
    """Frames per second to take of a clip with a known rate (the paper: 1); 0: every stored frame."""
    reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Divisor of the loss: "token_mean", the labels of the batch; "sequence_sum", its samples (the paper)."""
    pack: AtLeast0 = 0
    """Pack the samples of a micro-batch in rows of at most this many tokens; 0: one row per sample."""
    similarity: Annotated[float, Field(le=1)] = 0.24
    """Minimum similarity of an image to its sentence, in open_flamingo's MMC4 shards (a cosine, not scaled by 100)."""
    cache: str = ""
    """Folder on this machine's disk for copies of remote shards; the datasets and ranks of a machine may share it."""
    cache_gb: AboveZero = 100.0
    """Capacity of that folder, in 1e9 bytes."""
    allow_pipe: bool = False
    """Whether shards may be shell commands, `pipe:COMMAND`; see docs/scale.md. `data.allow_pipe` says it for all."""
    redirect_hosts: list[str] = field(default_factory=list)
    """Hosts beside their own that servers of shards may redirect to."""
    lanes: AtLeast0 = 0
    """Lanes of the order (see data.order); 0: the greatest common divisor of the batch size and 64."""
    block: AtLeast1 = 16
    """Number of shards whose samples are shuffled together."""

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
        """Return the divisor of the sum of the token losses of a global batch with this many labels."""
        return float(self.batch_size) if self.reduction == "sequence_sum" else max(1.0, labels)


def dataset_specs(
    group: str, datasets: Mapping[str, Mapping[str, Any]], problems: list[str], *, allow_pipe: bool = False
) -> list[DatasetSpec]:
    """Return the typed datasets of the config table `<group>.datasets`; what is wrong is added to `problems`.

    `allow_pipe` holds for those that do not say it themselves.
    """
    specs = []
    for name, values in datasets.items():
        values = {"name": name, "allow_pipe": allow_pipe, **values}
        spec, clauses = examine(DatasetSpec, values, f"{group}.datasets.{name}")
        problems += clauses
        if not values.get("shards"):
            problems.append(f"{group}.datasets.{name}.shards is missing: name at least one tar, folder or pattern")
        if spec is not None:
            specs.append(spec)
    return specs


def open_store(spec: DatasetSpec, rank: int = 0, world: int = 1, storage_seconds: float = PATIENCE) -> ShardStore:
    """Open a dataset's shards; each rank checks its share of them, so that together they check all before training.

    Storage that is away is waited for `storage_seconds`. Raises UserError, naming the dataset and the shard.
    """
    owner = f"dataset {spec.name!r}: "
    paths = resolve_shards(spec.shards, owner=owner, allow_pipe=spec.allow_pipe)
    trust = Trust(spec.allow_pipe, tuple(spec.redirect_hosts))
    limit = int(spec.cache_gb * 1e9)
    cache = ShardCache(spec.cache, limit, patience=storage_seconds, trust=trust) if spec.cache else None
    rule = Mmc4Rule(similarity=spec.similarity)
    return open_shards(
        paths,
        spec.kind,
        owner=owner,
        share=(rank, world),
        cache=cache,
        mmc4=rule,
        retry=Retry(patience=storage_seconds),
    )


def document_texts(specs: Sequence[DatasetSpec], storage_seconds: float = PATIENCE) -> Iterator[str]:
    """Yield the text of every document of a mixture once, in the order of the shards (to train a tokenizer).

    Documents that cannot be used are left out, as in training, and counted by reason on stderr.
    """
    for spec in specs:
        store = open_store(spec, storage_seconds=storage_seconds)
        bad: Counter[str] = Counter()
        first = ""
        for part, length in enumerate(store.lengths()):
            for row in range(length):
                try:
                    nodes = store.read(part, row, images=False).nodes
                except ContentError as error:
                    first = first or "key {1!r} of {0}".format(*store.key(part, row))
                    bad[error.reason] += 1
                    continue
                yield "".join(node.text for node in nodes if isinstance(node, Text))
        store.reader.close()
        if bad:
            counts = ", ".join(f"{count} {reason}" for reason, count in bad.most_common())
            warn(f"dataset {spec.name!r}: {bad.total()} documents are left out ({counts}), the first one {first}")


def too_small(specs: Iterable[DatasetSpec], micro_batches: int, storage_seconds: float = PATIENCE) -> Iterator[str]:
    """Yield a clause for each dataset whose shards are missing or broken, or that has fewer samples than micro-batches.

    `micro_batches` counts those of all processes. Shards need not be as many as processes, since the order deals out
    samples (`data.order`); and a batch may be larger than a small dataset, which then repeats itself within it.
    """
    for spec in specs:
        try:
            samples = sum(open_store(spec, storage_seconds=storage_seconds).lengths())
        except UserError as error:
            yield str(error)
            continue
        if samples < micro_batches:
            yield (
                f"data.datasets.{spec.name}.shards hold {samples} samples, fewer than processes x run.micro_batches = "
                f"{micro_batches}, so several processes would train on the same samples: add shards or use fewer "
                "processes"
            )
