"""Real gloo processes: every strategy gives what one process gives, and keeps and sends what it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo.conformance.tiny_models import document, subject, tiny_lm
from flamingo.training.distributed.fsdp import (
    FsdpUnit,
    Processes,
    ShardingStrategy,
    full_tensor,
    prepare_backward,
    shard,
    spawn,
)
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.memory_plan.collectives import measure_all, table
from flamingo.training.objectives import lora
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.optim import adamw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = [0, 2, 1, 0]
"""Of `document`: two images, none, one, two. Where each process has one row, one of them has no image."""
LABELS = 40.0
UPDATES = 3


@dataclass(frozen=True)
class Case:
    family: str
    strategy: ShardingStrategy
    micro_batches: int = 1
    recompute: bool = False
    adapters: bool = False
    trains: bool = False
    """The language model too."""


def updates(case: Case, processes: Processes | None = None) -> dict[str, Any]:
    """Losses and trained weights after some updates on the four rows, of which each process has its share."""
    model = subject(partial(tiny_lm, case.family))
    if case.trains:
        model.freeze({"language": "train"})
    if case.adapters:
        torch.manual_seed(0)
        lora.add_adapters(model.language_model, rank=2, alpha=4.0)
        for module in model.language_model.modules():  # an LM that trains drops out, other numbers on each process
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]
    if case.recompute:
        model.activation_checkpointing_enable()
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    if processes is not None:
        shard(model, flamingo_units(model), processes, case.strategy)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A large eps: where a gradient is nearly zero, AdamW would turn its rounding into a whole step.
    optimizer = adamw([{"params": trained, "lr": 1e-3, "weight_decay": 0.1}], betas=(0.9, 0.95), eps=1e-3)
    mine = ROWS[rank * len(ROWS) // size : (rank + 1) * len(ROWS) // size]
    micro_batches = [mine[start :: case.micro_batches] for start in range(case.micro_batches)]
    losses = []
    for _ in range(UPDATES):
        total = 0.0
        for place, rows in enumerate(micro_batches):
            batch: Any = document(model, rows, side="right")
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            if processes is not None:
                prepare_backward(model, case.strategy, last=place + 1 == len(micro_batches))
            loss = FlamingoObjective().sums(model, batch)["text"] / LABELS
            (loss * size).backward()
            total += float(loss.detach())
        losses.append(sum(processes.sum([total])) if processes is not None else total)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: full_tensor(p.detach()).float() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "weights": weights}


def _work(processes: Processes, cases: list[Case], file: str) -> None:
    found = [updates(case, processes) for case in cases]
    if processes.is_main:
        torch.save(found, file)


def differences(cases: list[Case], size: int, folder: Path) -> list[tuple[float, float]]:
    """For each case how far losses and weights of several processes are from those of one."""
    file = folder / "found.pt"
    spawn(_work, size, cases, str(file))
    return [distance(sharded, updates(case)) for case, sharded in zip(cases, torch.load(file), strict=True)]


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    assert ours["weights"].keys() == theirs["weights"].keys()
    weights: list[tuple[Tensor, Tensor]] = [
        (ours["weights"][name], theirs["weights"][name]) for name in ours["weights"]
    ]
    losses = zip(ours["losses"], theirs["losses"], strict=True)
    return max(abs(a - b) for a, b in losses), max(float((a - b).abs().max()) for a, b in weights)


FAMILIES = ["gpt2", "opt", "llama", "gpt_neox", "mpt"]
HALF: dict[str, Any] = {"precision": "bf16", "frozen_dtype": torch.bfloat16}


def cases(size: int) -> list[Case]:
    """Every family under the main strategies, and one family under all of them."""
    micro_batches = len(ROWS) // size
    common = [Case(family, ShardingStrategy()) for family in FAMILIES]
    common += [Case(family, ShardingStrategy(frozen="replicate"), recompute=True) for family in FAMILIES]
    if size == 2:
        common += [
            Case(family, ShardingStrategy(keep_gathered=True), micro_batches=micro_batches) for family in FAMILIES
        ]
        common += [Case(family, ShardingStrategy(), recompute=True, adapters=True) for family in FAMILIES]
    for strategy in (
        ShardingStrategy(shard_size=2),
        ShardingStrategy(shard_size=1),
        ShardingStrategy(shard_size=2, frozen="replicate"),
        ShardingStrategy(offload=True),
        ShardingStrategy(keep_gathered=True, frozen="replicate"),
    ):
        if strategy.shard_size != size:
            common.append(Case("llama", strategy, micro_batches=micro_batches))
    common += [Case("llama", ShardingStrategy(sync_every_micro_batch=True), micro_batches=micro_batches)]
    common += [
        Case("gpt2", ShardingStrategy(), trains=True),
        Case("llama", ShardingStrategy(), trains=True, recompute=True),
    ]
    return common


@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one(size: int, tmp_path: Path) -> None:
    chosen = cases(size)
    for case, (losses, weights) in zip(chosen, differences(chosen, size, tmp_path), strict=True):
        assert losses < 2e-5, case
        assert weights < 5e-5, case


def test_bf16_computes_what_fp32_does(tmp_path: Path) -> None:
    chosen = [Case("llama", ShardingStrategy(**HALF, frozen=frozen)) for frozen in ("shard", "replicate")]
    file = tmp_path / "found.pt"
    spawn(_work, 2, chosen, str(file))
    exact = updates(chosen[0])
    for half in torch.load(file):
        losses, weights = distance(half, exact)
        assert 0 < losses < 0.05
        assert 0 < weights < 3 * UPDATES * 1e-3  # what AdamW may move at most, a few times over


def test_what_a_process_keeps_and_what_travels() -> None:
    found = measure_all("llama", 2, 3)
    plain, replicated = found["full shard"], found["frozen replicated"]
    for name, one in found.items():
        kept = one["kept"]
        assert kept["frozen gradients"] == 0, name
        assert kept["gradients"] == kept["trained"], name
        assert kept["optimizer"] == 2 * kept["trained"], name
        assert set(one["calls"]) <= {"all-gather", "reduce-scatter", "all-reduce"}
    # Gradients travel once an update, and only those of what trains.
    assert (
        found["full shard, every micro-batch reduced"]["calls"]["reduce-scatter"]
        == 3 * plain["calls"]["reduce-scatter"]
    )
    assert plain["bytes"]["reduce-scatter"] == pytest.approx(2 * plain["kept"]["trained"], rel=0.05)
    # Kept gathered, one all-gather a unit; replicated, none for what is frozen; bf16, half the bytes.
    kept_gathered = found["full shard, kept gathered"]["calls"]["all-gather"]
    assert kept_gathered < plain["calls"]["all-gather"] / 2
    assert replicated["calls"]["all-gather"] < plain["calls"]["all-gather"]
    assert replicated["kept"]["frozen"] == pytest.approx(2 * plain["kept"]["frozen"], rel=0.05)
    half = found["full shard, bf16"]
    assert half["bytes"]["all-gather"] == pytest.approx(plain["bytes"]["all-gather"] / 2, rel=0.01)
    assert half["kept"]["frozen"] == pytest.approx(plain["kept"]["frozen"] / 2, rel=0.01)
    assert half["bytes"]["reduce-scatter"] == plain["bytes"]["reduce-scatter"]  # summed in fp32
    assert len(table(found).splitlines()) == 2 + len(found)


def _normed(trains: bool, processes: Processes | None) -> tuple[Tensor, Tensor, list[torch.dtype]]:
    """Output, gradient of the last layer, and dtypes of a batch norm's weight and statistics."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    model[0].requires_grad_(False)
    norm.requires_grad_(trains).eval()
    if processes is not None:
        units = [FsdpUnit([model[0]]), FsdpUnit([model[3]])]
        shard(model, units, processes, ShardingStrategy(**HALF))
    out = model(torch.rand(2, 3, 8, 8).to(torch.bfloat16 if processes else torch.float32))
    out.float().square().sum().backward()
    gradient = model.get_parameter("3.weight").grad
    assert gradient is not None
    assert norm.running_mean is not None
    return out.detach().float(), full_tensor(gradient), [norm.weight.dtype, norm.running_mean.dtype]


def _work_normed(processes: Processes, file: str) -> None:
    found = [_normed(trains, processes) for trains in (False, True)]
    if processes.is_main:
        torch.save(found, file)


def test_batch_norms_keep_fp32_in_a_bf16_run(tmp_path: Path) -> None:
    file = tmp_path / "found.pt"
    spawn(_work_normed, 2, str(file))
    for trains, (out, gradient, dtypes) in zip((False, True), torch.load(file), strict=True):
        wanted, exact, _ = _normed(trains, None)
        assert dtypes == [torch.float32, torch.float32]
        assert torch.allclose(out, wanted, atol=0.03)
        assert torch.allclose(gradient, exact, atol=0.03 * exact.abs().max().item())
