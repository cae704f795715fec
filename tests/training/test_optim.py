"""Groups of the optimizer and the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from flamingo.training.config import OptimConfig
from flamingo.training.optim import adamw, lr_scale, parameter_groups, set_learning_rate


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.latents = nn.Parameter(torch.zeros(4, 3))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)


def test_decay_only_on_matrices_and_factor_by_part() -> None:
    model = Toy()
    groups = parameter_groups(
        model.named_parameters(),
        lr=0.1,
        weight_decay=0.5,
        lr_factors={"gates": 10.0, "resampler": 0.5},
        part_of=lambda name: "resampler" if name == "latents" else "cross_attention",
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert found == {
        "proj.weight": (0.1, 0.5),
        "proj.bias": (0.1, 0.0),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "attn_gate": (1.0, 0.0),
        "latents": (0.05, 0.0),
    }
    optimizer = torch.optim.AdamW(groups)
    options = OptimConfig(warmup_steps=2)
    assert set_learning_rate(optimizer, 0, 10, options) == pytest.approx(0.5)
    assert set_learning_rate(optimizer, 5, 10, options) == pytest.approx(1.0)  # never compounding


def test_decay_by_part() -> None:
    groups = parameter_groups(
        Toy().named_parameters(),
        lr=0.1,
        weight_decay=0.5,
        lr_factors={},
        part_of=lambda name: "language" if name == "proj.weight" else "cross_attention",
        decay_factors={"language": 0.0, "cross_attention": 2.0},
    )
    assert [group["weight_decay"] for group in groups] == [0.0]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_one_kernel_is_the_plain_optimizer(device: str) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(33, 65, device=device), torch.randn(7, device=device)]
    theirs = [value.clone() for value in ours]
    options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
    one = adamw([{"params": [value], "lr": 1e-2, "weight_decay": 0.1} for value in ours], **options)
    plain = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False, fused=False, **options)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_schedule() -> None:
    def at(step: int, schedule: str) -> float:
        return lr_scale(step, steps=100, warmup_steps=10, schedule=schedule, final_ratio=0.1)

    assert [at(step, "constant") for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert at(10, "cosine") == 1.0
    assert at(55, "cosine") == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert at(100, "cosine") == pytest.approx(0.1)
