"""The model under FSDP2: every part its own unit, parameters used inside the units' own forward only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flamingo.language import find_decoder_layers
from tests.model import tiny


def step(shard: bool, rows: list[int], recompute: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch; two processes average theirs."""
    model, processor = tiny.flamingo("llama")
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


def worker(rank: int, port: str, file: str, recompute: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    try:
        # One process has pictures, the other has a page of text alone.
        _, gradients = step(True, [[0, 1], [2]][rank], recompute)
        if rank == 0:
            torch.save(gradients, file)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_two_processes_are_one(recompute: bool, tmp_path: Path, unused_port: str) -> None:
    file = tmp_path / "gradients.pt"
    mp.spawn(worker, args=(unused_port, str(file), recompute), nprocs=2)
    sharded = torch.load(file)
    parts = [step(False, rows, recompute)[1] for rows in ([0, 1], [2])]
    for name, gradient in sharded.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-5)


@pytest.fixture
def unused_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
