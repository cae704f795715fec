"""In bf16 nothing is cast to fp32 and back on its way into a sharded block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo.conformance.tiny_models import document, subject, tiny_lm
from flamingo.training.config import RunConfig, Sharding
from flamingo.training.distributed.fsdp import (
    Processes,
    ShardingStrategy,
    prepare_backward,
    shard,
    sharding_strategy,
)
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.objectives.flamingo import FlamingoObjective

HALF = ShardingStrategy(precision="bf16", frozen_dtype=torch.bfloat16)


@contextmanager
def alone() -> Iterator[Processes]:
    """A group of one process, as a run in bf16 on one process has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(0, 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are cast between two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if (
            func.overloadpacket is torch.ops.aten._to_copy
            and isinstance(args[0], Tensor)
            and out.dtype != args[0].dtype
        ):
            self.shapes.setdefault((args[0].dtype, out.dtype), []).append(tuple(out.shape))
        return out


@pytest.mark.parametrize("frozen", ["shard", "replicate"])
def test_hidden_states_and_media_reach_the_blocks_in_the_precision_they_have(frozen: str) -> None:
    model = subject(partial(tiny_lm, "gpt2"))  # whose own layers cast nothing
    batch: Any = document(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    text = (*batch["input_ids"].shape, model.config.text_config.hidden_size)
    media = (len(batch["pixel_values"]), model.config.resampler.latents, model.config.vision.width)
    with alone() as processes:
        shard(model, flamingo_units(model), processes, ShardingStrategy(**{**vars(HALF), "frozen": frozen}))
        model.train()
        seen: list[torch.dtype] = []
        for block in model.cross_attn_blocks.values():
            block.register_forward_pre_hook(
                lambda module, args: seen.extend(arg.dtype for arg in args[:2]), prepend=True
            )
        with Casts() as casts:
            prepare_backward(model, HALF, last=True)
            loss = FlamingoObjective().sums(model, batch)["text"]
    assert bool(loss.isfinite())
    assert seen == 2 * len(model.cross_attn_blocks) * [torch.bfloat16]
    widened = casts.shapes.get((torch.bfloat16, torch.float32), [])
    assert text not in widened
    assert media not in widened
    assert text not in casts.shapes.get((torch.float32, torch.bfloat16), [])


@pytest.mark.parametrize(
    ("processes", "precision", "sharding", "frozen"),
    [
        (1, "bf16", Sharding(), "replicate"),
        (2, "bf16", Sharding(), "shard"),
        (2, "bf16", Sharding(frozen="replicate"), "replicate"),
        (1, "bf16", Sharding(cpu_offload=True), "shard"),
        (1, "bf16", Sharding(frozen_precision="fp32"), "shard"),  # gathering casts them
        (1, "fp32", Sharding(), "replicate"),
    ],
)
def test_one_process_gathers_no_frozen_weights(processes: int, precision: Any, sharding: Sharding, frozen: str) -> None:
    strategy = sharding_strategy(RunConfig(parallel="fsdp", precision=precision, sharding=sharding), processes)
    assert strategy is not None
    assert strategy.frozen == frozen
