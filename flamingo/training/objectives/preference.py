"""Objective `preference`: of two answers the model comes to prefer the chosen one (DPO, Rafailov et al. 2023).

    loss = -log sigmoid(beta * ((chosen - chosen_ref) - (rejected - rejected_ref)))

Each of the four is the log-probability of all tokens of an answer, given the images and the text before it; `_ref` is
by the reference, which is the same model without its adapters, so no second model is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flamingo.labels import IGNORED
from flamingo.language.loss import next_labels
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.model_config import ModelConfig
from flamingo.training.objectives import flamingo, lora
from flamingo.training.objectives.protocol import BatchShape, Setup
from flamingo.transfer import on_host, sent


class PreferenceObjective(flamingo.FlamingoObjective):
    """Direct preference optimization on the batches of `data.batches.collate.PreferenceCollate`."""

    # Both rows of a pair show the same images, which are encoded once; that they are the same is seen on the host.
    host_inputs: ClassVar[frozenset[str]] = flamingo.FlamingoObjective.host_inputs | {"pixel_values"}

    def __init__(self, beta: float) -> None:
        """`beta` holds the model to the reference."""
        self._beta = beta

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of pairs."""
        return {"preference": len(batch["labels"]) // 2}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the pairs' losses."""
        inputs = {name: batch[name] for name in flamingo.MODEL_INPUTS if name in batch}
        with torch.no_grad(), lora.without_adapters(model):
            pixels = inputs.pop("pixel_values")
            reference, features = log_probs(model, batch["labels"], {**inputs, "pixel_values": torch.cat([pixels] * 2)})
        # The adapters are in the language model, so both see the same latents.
        log_ratios = log_probs(model, batch["labels"], {**inputs, "media_features": features})[0] - reference
        chosen, rejected = log_ratios.chunk(2)
        return {"preference": -F.logsigmoid(self._beta * (chosen - rejected)).sum()}

    def largest_batch(self, model: Any, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return both rows of `rows` samples, with the images of one."""
        batch = super().largest_batch(model, 2 * rows, shape)
        return {**batch, "pixel_values": batch["pixel_values"].chunk(2)[0]}


def log_probs(
    model: nn.Module, labels: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "I L E"]]:
    """Return the log-probability of all labelled tokens of each row, and the latents of the images."""
    out = model(**inputs, labels=labels, loss_reduction="none", skip_logits=True, use_cache=False)
    rows = sent((next_labels(on_host(labels)) != IGNORED).nonzero()[:, 0] // labels.shape[1], out.loss.device)
    return out.loss.new_zeros(len(labels)).index_add(0, rows, -out.loss), out.media_features


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Load a Flamingo with adapters in its LM, without dropout: both passes are of the same network."""
    setup = flamingo.build(model, run_dir, processes, texts)
    cast("FlamingoForConditionalGeneration", setup.model).lm_drops_out = False
    return replace(
        setup,
        objective=PreferenceObjective(model.preference.beta),
        collate=lambda classes: classes.PreferenceCollate(setup.processor),
    )


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, PreferenceObjective]:
    """Build the same without memory."""
    built, _ = flamingo.build_on_meta(model, processes)
    cast("FlamingoForConditionalGeneration", built).lm_drops_out = False
    return built, PreferenceObjective(model.preference.beta)
