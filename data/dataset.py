"""A dataset of a mixture: where its samples are, and how a training row is cut out of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from data.order import default_lanes
from data.remote.shard_cache import ShardCache
from data.shard_store import ShardStore, open_shards, resolve_shards
from data.shards.document import Text
from data.shards.index import KINDS
from data.shards.mmc4 import Mmc4Rule
from flamingo.errors import UserError

REDUCTIONS = ("token_mean", "sequence_sum")
LABEL_POLICIES = ("text", "openflamingo")
CROPS = ("random", "start")
__all__ = [
    "KINDS",
    "REDUCTIONS",
    "DatasetSpec",
    "document_texts",
    "open_store",
    "resolve_shards",
]


@dataclass(kw_only=True, slots=True)
class DatasetSpec:
    """A dataset of a mixture, and how a training row is cut out of its samples.

    Raises UserError, naming the dataset and the field, for an invalid value.
    """

    name: str
    shards: list[str] = field(default_factory=list)
    """Tars, folders of tars, glob or brace patterns, URLs; read in this order (a folder or pattern: by name). Empty
    for a dataset whose samples the loader is given as a `data.store.DocumentStore`."""
    batch_size: int
    """Samples in a global batch: over all processes and micro-batches."""
    weight: float = 1.0
    """Factor of this dataset's loss. The trainer applies it; the loader only carries it."""
    kind: str = "interleaved"
    """"interleaved" (any sample), "pairs" (samples with an image and text), "text" (images are ignored)."""
    max_tokens: int = 256
    """Maximum length of a row, in tokens."""
    max_images: int = 5
    """Maximum number of images in a row; the row ends before the image that would exceed it."""
    max_frames: int = 1
    """Frames in every image of this dataset: 1 unless its images are clips."""
    next_image_probability: float = 0.0
    """Share of the rows whose tokens see the next image instead of the previous one (the paper: 0.5 on M3W)."""
    labels: str = "text"
    """Tokens in the loss: "text" (all of the text, EOC and EOS) or "openflamingo" (only from an <image> to its EOC)."""
    crop: str = "random"
    """Where the crop of a document longer than `max_tokens` begins, and of a clip longer than `max_frames`: "random" or
    "start". A pair is always cropped at its start."""
    flip: bool = False
    """Mirror each image with probability 1/2, except in documents whose text says left or right. Wrong for letters."""
    colour: float = 0.0
    """Multiply brightness, contrast and saturation of each image by factors from 1 - colour to 1 + colour."""
    single_image_share: float = 1.0
    """Share of the rows with a single image to keep; others are replaced (open_flamingo: 0.5 of MMC4's documents)."""
    space_probability: float = 0.0
    """Share of the rows whose first text is given a leading space (the paper: 0.5 on its pairs)."""
    frame_rate: float = 0.0
    """Frames per second to take of a clip with a known rate (the paper: 1); 0: every stored frame."""
    reduction: str = "token_mean"
    """Divisor of the loss: "token_mean", the labels of the batch; "sequence_sum", its samples (the paper)."""
    pack: int = 0
    """Pack the samples of a micro-batch in rows of at most this many tokens; 0: one row per sample."""
    similarity: float = 0.24
    """Minimum similarity of an image to its sentence, in open_flamingo's MMC4 shards (a cosine, not scaled by 100)."""
    cache: str = ""
    """Folder on this machine's disk for copies of remote shards; the datasets and ranks of a machine may share it."""
    cache_gb: float = 100.0
    """Capacity of that folder, in 1e9 bytes."""
    lanes: int = 0
    """Lanes of the order (see data.order); 0: the greatest common divisor of the batch size and 64."""
    block: int = 16
    """Number of shards whose samples are shuffled together."""

    def __post_init__(self) -> None:
        self.lanes = self.lanes or default_lanes(self.batch_size)
        wrong = [
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1"),
            (self.kind not in KINDS, f"kind={self.kind!r} must be one of {', '.join(KINDS)}"),
            (self.labels not in LABEL_POLICIES, f"labels={self.labels!r} must be one of {', '.join(LABEL_POLICIES)}"),
            (self.crop not in CROPS, f"crop={self.crop!r} must be one of {', '.join(CROPS)}"),
            (self.max_tokens < 2, f"max_tokens={self.max_tokens} must be at least 2"),
            (self.max_images < 0, f"max_images={self.max_images} must not be negative"),
            (self.max_frames < 1, f"max_frames={self.max_frames} must be at least 1"),
            (self.block < 1, f"block={self.block} must be at least 1"),
            (self.reduction not in REDUCTIONS, f"reduction={self.reduction!r} must be one of {', '.join(REDUCTIONS)}"),
            (0 < self.pack < self.max_tokens or self.pack < 0, f"pack={self.pack} must be 0 or at least max_tokens"),
            (self.frame_rate < 0, f"frame_rate={self.frame_rate} must not be negative"),
            (self.similarity > 1, f"similarity={self.similarity} must be at most 1 (0.24, not 24)"),
            (self.cache_gb <= 0, f"cache_gb={self.cache_gb} must be above 0"),
            (not 0 <= self.space_probability <= 1, f"space_probability={self.space_probability} must be from 0 to 1"),
            (not 0 <= self.colour < 1, f"colour={self.colour} must be at least 0 and below 1"),
            (
                not 0 <= self.single_image_share <= 1,
                f"single_image_share={self.single_image_share} must be from 0 to 1",
            ),
            (
                self.kind == "pairs" and self.single_image_share < 1,
                "single_image_share is for documents; a pair has a single image",
            ),
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

    def divisor(self, labels: float) -> float:
        """Return the divisor of the sum of the token losses of a global batch with this many labels."""
        return float(self.batch_size) if self.reduction == "sequence_sum" else max(1.0, labels)


def open_store(spec: DatasetSpec, rank: int = 0, world: int = 1) -> ShardStore:
    """Open a dataset's shards; each rank checks its share of them, so that together they check all before training.

    Raises UserError, naming the dataset and the shard.
    """
    owner = f"dataset {spec.name!r}: "
    paths = resolve_shards(spec.shards, owner=owner)
    cache = ShardCache(spec.cache, int(spec.cache_gb * 1e9)) if spec.cache else None
    rule = Mmc4Rule(similarity=spec.similarity)
    return open_shards(paths, spec.kind, owner=owner, share=(rank, world), cache=cache, mmc4=rule)


def document_texts(specs: Sequence[DatasetSpec]) -> Iterator[str]:
    """Yield the text of every document of a mixture once, in the order of the shards (to train a tokenizer)."""
    for spec in specs:
        store = open_store(spec)
        for part, length in enumerate(store.lengths()):
            for row in range(length):
                nodes = store.read(part, row, images=False).nodes
                yield "".join(node.text for node in nodes if isinstance(node, Text))
        store.reader.close()


def too_small(specs: Iterable[DatasetSpec], micro_batches: int) -> Iterator[str]:
    """Yield a clause for each dataset whose shards are missing or broken, or that has fewer samples than micro-batches.

    `micro_batches` counts those of all processes. Shards need not be as many as processes, since the order deals out
    samples (`data.order`); and a batch may be larger than a small dataset, which then repeats itself within it.
    """
    for spec in specs:
        try:
            samples = sum(open_store(spec).lengths())
        except UserError as error:
            yield str(error)
            continue
        if samples < micro_batches:
            yield (
                f"data.datasets.{spec.name}.shards hold {samples} samples, fewer than processes x run.micro_batches = "
                f"{micro_batches}, so several processes would train on the same samples: add shards or use fewer "
                "processes"
            )
