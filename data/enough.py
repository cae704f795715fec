"""Whether a mixture has the samples that its batches need, before anything else is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data.spec import DatasetSpec, open_corpus
from flamingo.errors import UserError


def too_small(specs: Iterable[DatasetSpec]) -> Iterator[str]:
    """One clause for each dataset whose shards are missing or broken, or have fewer samples than a batch."""
    for spec in specs:
        try:
            samples = int(open_corpus(spec).counts.sum())
        except UserError as error:
            yield str(error)
            continue
        if samples < spec.batch_size:
            yield (
                f"data.datasets.{spec.name}.batch_size={spec.batch_size}, but its shards have {samples} samples, so a "
                "batch would hold some of them twice: lower it or add shards"
            )
