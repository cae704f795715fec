"""The three objectives: one engine calls `loss_sum` and `count`, and knows nothing else about them.

`loss_sum` is a sum over what `count` counts on this process; the engine divides by the count over all processes, so a
loss means the same for any number of processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from flamingo.labels import IGNORED
from flamingo.language.loss import next_labels

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_counts", "frame_counts", "phi", "sequence_ids")


@runtime_checkable
class Objective(Protocol):
    """What the training engine needs to know about a loss."""

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Terms of the sum that this batch contributes."""

    def loss_sum(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Scalar: the sum of the loss's terms, differentiable."""


def labelled_positions(labels: Tensor) -> Tensor:
    """`(B, T)` labels to a `(B, T - 1)` mask of positions whose next token counts."""
    return labels[:, 1:] != IGNORED


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of next-token cross-entropies in fp32 over labelled positions: `(B, T, V)` and `(B, T)` to a scalar.

    The positions are found among integers alone, which a plan computes for real: their number is a shape.
    """
    targets = next_labels(labels)
    places = (targets != IGNORED).nonzero()[:, 0]
    return F.cross_entropy(logits.flatten(0, 1).index_select(0, places).float(), targets[places], reduction="sum")


class LanguageObjective:
    """Next-token prediction on text."""

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled tokens."""
        return int(labelled_positions(batch["labels"]).sum())

    def loss_sum(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of cross-entropies over the labelled tokens."""
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return token_loss_sum(out.logits, batch["labels"])


class FlamingoObjective(LanguageObjective):
    """Next-token prediction on text given the images before it (paper, equation 1)."""

    def loss_sum(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of cross-entropies over the labelled tokens; the model computes no other logits."""
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        loss: Tensor = model(**inputs, labels=batch["labels"], num_items_in_batch=1, use_cache=False).loss
        return loss


class ContrastiveObjective:
    """open_clip's contrastive loss over the pairs of all processes."""

    MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    """Normalisation of images that an encoder trained here expects; written beside its weights."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        """The loss compares every image with every text of the whole batch, gathered with gradients."""
        self._loss = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world_size)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Pairs."""
        return int(batch["text"].shape[0])

    def loss_sum(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean over the whole batch, times the pairs of this process.

        The mean is the same on all processes; weighting it by the own pairs makes the engine's division by all pairs
        give it back, and FSDP2's average over processes then matches the gathered gradients.
        """
        raw = batch["image"].float() / 255.0
        mean, std = (raw.new_tensor(value)[:, None, None] for value in (self.MEAN, self.STD))
        images, texts, scale = model((raw - mean) / std, batch["text"])[:3]
        # CLIP's own limit on the temperature (Radford et al. 2021, section 2.5) keeps training stable.
        loss: Tensor = self._loss(images, texts, scale.clamp(max=100.0))
        return loss * self.count(batch)
