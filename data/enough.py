"""Whether a mixture has the samples that its processes need, before anything else is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data.dataset import DatasetSpec, open_corpus
from flamingo.errors import UserError


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
