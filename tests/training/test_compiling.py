"""torch.compile layer by layer changes no value, alone, recomputing and sharded."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flamingo.conformance.checks import gradients
from flamingo.conformance.tiny_models import subject, tiny_lm
from flamingo.training.distributed.fsdp import Processes, ShardingStrategy, compile_layers, full_tensor, shard, spawn
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.objectives.flamingo import FlamingoObjective

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = [[0, 1], [2]]


def compiled(backend: str, rows: list[int], recompute: bool, processes: Processes | None = None) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = subject(partial(tiny_lm, "llama"))
    compile_layers(FlamingoObjective().compiled_layers(model), backend=backend)
    if processes is not None:
        shard(model, flamingo_units(model), processes, ShardingStrategy())
    return {name: full_tensor(value) for name, value in gradients(model, rows, recompute=recompute)[1].items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_decoder_layers_and_feed_forwards_are_compiled_and_keep_their_names() -> None:
    model = subject(partial(tiny_lm, "llama"))
    before = list(model.state_dict())
    parts = list(FlamingoObjective().compiled_layers(model))
    assert len(parts) == 4 + 1 + 2  # decoder layers, the resampler's feed-forward, two blocks'
    compile_layers(parts, backend="aot_eager")
    assert list(model.state_dict()) == before


def _work(processes: Processes, file: str, backend: str, recompute: bool) -> None:
    found = compiled(backend, ROWS[processes.rank], recompute, processes)
    if processes.is_main:
        torch.save(found, file)


# In processes of their own, which do not have the tests' run-time checks of shapes: torch.compile does not take those.
@pytest.mark.parametrize(("backend", "recompute"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_and_sharded_over_two_processes(tmp_path: Path, backend: str, recompute: bool) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    spawn(_work, 2, str(tmp_path / "found.pt"), backend, recompute)
    parts = [gradients(subject(partial(tiny_lm, "llama")), rows)[1] for rows in ROWS]
    same(
        torch.load(tmp_path / "found.pt"),
        {name: (value + parts[1][name]) / 2 for name, value in parts[0].items()},
    )
