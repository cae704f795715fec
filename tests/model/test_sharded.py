"""The model under FSDP2: every part its own unit, parameters used inside the units' own forward only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flamingo.language.hooks import find_decoder_layers
from flamingo.training.distributed.fsdp import Processes, spawn
from tests.model import tiny


def step(shard: bool, rows: list[int], recompute: bool, connector: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch; two processes average theirs."""
    options: Any = {} if connector == "perceiver" else {"connector": connector, "resampler": {}}
    model, processor = tiny.flamingo("llama", **options)
    if recompute:
        model.activation_checkpointing_enable()
    model.train()
    if shard:
        units = [model.vision_encoder, model.resampler, model.new_tokens, *model.cross_attn_blocks.values()]
        lm = model.language_model
        units += [*find_decoder_layers(lm), lm.get_input_embeddings(), lm.get_output_embeddings(), lm]
        for unit in [*units, model]:
            fully_shard(unit)
    inputs = dict(tiny.batch(processor, rows, padding_side="right"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels, num_items_in_batch=10).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.trainable_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return float(loss.detach()), gradients


def worker(processes: Processes, file: str, recompute: bool, connector: str) -> None:
    # One process has images, the other has a document of text alone.
    _, gradients = step(True, [[0, 1], [2]][processes.rank], recompute, connector)
    if processes.is_main:
        torch.save(gradients, file)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "connector"), [(False, "perceiver"), (True, "perceiver"), (False, "mlp")])
def test_two_processes_are_one(recompute: bool, connector: str, tmp_path: Path) -> None:
    file = tmp_path / "gradients.pt"
    spawn(worker, 2, str(file), recompute, connector)
    sharded = torch.load(file)
    parts = [step(False, rows, recompute, connector)[1] for rows in ([0, 1], [2])]
    for name, gradient in sharded.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-5)
