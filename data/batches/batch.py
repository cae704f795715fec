"""What the loader delivers: the batches of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches.tokenize import IGNORED
from data.errors import BadSample


@dataclass(slots=True)
class Batch:
    """A micro-batch of one dataset on one rank."""

    dataset: str
    tensors: dict[str, Tensor]
    keys: list[str]
    bad: list[BadSample] = field(default_factory=list)
    retries: int = 0
    """Number of reads that were repeated for this batch."""

    @property
    def stats(self) -> dict[str, int]:
        """Counts of samples, replaced samples, tokens (not padding), labels, and images (a clip counts once)."""
        tensors = self.tensors
        counts = {"rows": len(self.keys), "bad": len(self.bad)}
        if "attention_mask" in tensors:
            counts["tokens"] = int(tensors["attention_mask"].sum())
            counts["labels"] = int((tensors["labels"] != IGNORED).sum())
        images = tensors.get("pixel_values", tensors.get("image"))
        return counts | {"images": 0 if images is None else len(images)}

    @property
    def fill(self) -> float:
        """Share of the positions of its rows that are not padding."""
        mask = self.tensors["attention_mask"]
        return float(mask.sum()) / max(1, mask.numel())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Return the same batch with its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return Batch(self.dataset, moved, self.keys, self.bad, self.retries)

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory (called by the DataLoader)."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return Batch(self.dataset, pinned, self.keys, self.bad, self.retries)


@dataclass(slots=True)
class StepBatches:
    """What a rank needs for one step: the micro-batches of each dataset, in the order of the mixture."""

    step: int
    batches: dict[str, list[Batch]]
