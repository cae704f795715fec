"""Moments in bf16 and 8 bits: near the float32 ones, resumed and sharded bit for bit, and refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flamingo.training import optim_state
from flamingo.training.config import TrainConfig, differences, unavailable
from flamingo.training.distributed.fsdp import Processes, full_tensor, spawn
from flamingo.training.memory_plan.plan import memory_of, remedies
from flamingo.training.objectives.protocol import BatchShape
from flamingo.training.optim import adamw
from tests.training.test_plan import run_of

STATES = ("bf16", "8bit")
WIDTH = 256


def model() -> nn.Module:
    """Matrices of 7 and 5 rows, which two processes cannot halve, one of an odd width, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.Linear(7, WIDTH, bias=False), nn.Linear(WIDTH, 5))


def optimizer_of(module: nn.Module, state: str) -> torch.optim.Optimizer:
    groups = [{"params": list(module.parameters()), "lr": 1e-2, "weight_decay": 0.1}]
    return adamw(groups, betas=(0.9, 0.95), eps=1e-8, state=state)


def update(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make an update whose gradients depend on its number alone, sharded like the parameters."""
    for index, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(index % 4)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def weights(module: nn.Module) -> list[Tensor]:
    return [full_tensor(parameter.detach()).clone() for parameter in module.parameters()]


def run(state: str, steps: int) -> list[Tensor]:
    module = model()
    optimizer = optimizer_of(module, state)
    for step in range(steps):
        update(module, optimizer, step)
    return weights(module)


@pytest.mark.parametrize("state", STATES)
def test_losses_stay_those_of_float32(state: str) -> None:
    def losses(state: str) -> list[float]:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        optimizer = adamw(
            [{"params": list(module.parameters()), "lr": 1e-3, "weight_decay": 0.1}],
            betas=(0.9, 0.95),
            eps=1e-8,
            state=state,
        )
        out = []
        target = torch.randn(WIDTH, WIDTH) / 16
        for _ in range(50):
            x = torch.randn(64, WIDTH)
            loss = (module(x) - x @ target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(float(loss.detach()))
        return out

    exact, small = losses("fp32"), losses(state)
    assert exact[-1] < 0.8 * exact[0]
    assert abs(small[-1] - exact[-1]) < 2e-3 * exact[0]
    assert small != exact


@pytest.mark.parametrize("state", STATES)
def test_a_moment_that_falls_a_little_each_time_falls(state: str) -> None:
    """With beta2 = 0.999 each update takes a thousandth: the nearest bf16 would be the old one for ever."""
    weight = nn.Parameter(torch.zeros(4, WIDTH))
    optimizer = adamw([{"params": [weight], "lr": 0.0, "weight_decay": 0.0}], betas=(0.9, 0.999), eps=1e-8, state=state)
    for step in range(201):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    held = optimizer.state[weight]
    if state == "bf16":
        found = held["exp_avg_sq"].float()
        assert float(found.mean()) == pytest.approx(1e-3 * 0.999**200, rel=0.01)
    else:
        own = {key: value for key, value in held.items() if key != "step"}
        found = optim_state._read(own, "8bit")[1]
        assert float(found.mean()) == pytest.approx(1e-3 * 0.999**200, rel=0.01)


def test_random_bits_are_spread_and_belong_to_their_place() -> None:
    like = torch.zeros(64, 1024)
    bits = optim_state._hash(like, seed=7, first=0)
    torch.testing.assert_close(bits[32:], optim_state._hash(like[32:], seed=7, first=32 * 1024), rtol=0, atol=0)
    for shift in range(32):
        share = float((bits >> shift & 1).float().mean())
        assert 0.49 < share < 0.51, shift
    assert int((bits == optim_state._hash(like, seed=8, first=0)).sum()) < 5
    far = optim_state._hash(like, seed=7, first=1 << 32)
    assert int((bits == far).sum()) < 5
    value = torch.full((1000, 100), 1 + 2**-9)
    rounded = optim_state._round_at_random(value, optim_state._hash(value, 3, 0) & 0xFFFF)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1 + 2**-9, abs=1e-4)


@pytest.mark.parametrize("state", STATES)
def test_what_is_resumed_is_what_was_saved(state: str) -> None:
    module = model()
    optimizer = optimizer_of(module, state)
    for step in range(3):
        update(module, optimizer, step)
    other = model()
    other.load_state_dict(module.state_dict())
    continued = optimizer_of(other, state)
    continued.load_state_dict(optimizer.state_dict())
    kinds = {value.dtype for held in continued.state.values() for value in held.values()}
    assert optim_state.DTYPES[state] in kinds
    for step in range(3, 6):
        update(other, continued, step)
    for a, b in zip(run(state, 6), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_matrices_only_and_whole_blocks_only() -> None:
    shapes: list[tuple[tuple[int, ...], str, str]] = [
        ((WIDTH,), "bf16", "fp32"),
        ((3, 5), "bf16", "bf16"),
        ((3, 5), "8bit", "fp32"),
        ((3, WIDTH), "8bit", "8bit"),
        ((3, 2, 128), "8bit", "8bit"),
        ((3, 0), "8bit", "fp32"),
        ((0, WIDTH), "8bit", "8bit"),
    ]
    for shape, asked, wanted in shapes:
        assert optim_state.stored_as(torch.empty(shape), asked) == wanted, shape
    held = optim_state.moments(torch.empty(3, 512), "8bit")
    assert sum(value.nbytes for value in held.values()) == 2 * 3 * (512 + 2 * 4)
    empty = nn.Parameter(torch.empty(0, WIDTH))
    optimizer = adamw([{"params": [empty], "lr": 1.0, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8, state="8bit")
    empty.grad = torch.empty_like(empty)
    optimizer.step()


def _sharded(processes: Processes, state: str, folder: str, begin: int, end: int) -> None:
    """Go on from the checkpoint of update `begin`, if any, to update `end`; leave a checkpoint and the weights."""
    module = model()
    mesh = init_device_mesh("cpu", (processes.size,))
    fully_shard(module, mesh=mesh)
    optimizer = optimizer_of(module, state)

    def content() -> dict[str, Any]:
        return {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}

    if begin:
        found = content()
        dcp.load(found, checkpoint_id=f"{folder}/{begin}")
        module.load_state_dict(found["model"])
        set_optimizer_state_dict(module, optimizer, found["optimizer"])
    for step in range(begin, end):
        update(module, optimizer, step)
    dcp.save(content(), checkpoint_id=f"{folder}/{end}")
    whole = weights(module)
    if processes.is_main:
        torch.save(whole, f"{folder}/weights-{end}.pt")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("state", STATES)
def test_shards_on_any_number_of_processes_are_the_whole_bit_for_bit(state: str, tmp_path: Path) -> None:
    spawn(_sharded, 2, state, str(tmp_path), 0, 3)
    spawn(_sharded, 3, state, str(tmp_path), 3, 6)
    for end in (3, 6):
        found = torch.load(tmp_path / f"weights-{end}.pt", weights_only=True)
        for a, b in zip(run(state, end), found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_plan_counts_them_and_advises_them() -> None:
    shape, parts = [BatchShape(8, 64, 1)], {}
    for state in ("fp32", *STATES):
        config = run_of("llama")
        config.model.language.config |= {"hidden_size": WIDTH}  # type: ignore[operator]
        config.optim.state = state  # type: ignore[assignment]
        memory = memory_of(config, shape, 1)
        parts[state] = memory.parts["optimizer"]
        assert any("optim.state" in advice for advice in remedies(config, memory)) <= (state == "fp32")
    assert 0.5 < parts["bf16"] / parts["fp32"] < 0.52
    assert parts["8bit"] < 0.6 * parts["fp32"]  # the resampler, 96 wide, stays
    two = memory_of(config, shape, 2).parts["optimizer"]
    assert two == pytest.approx(parts["8bit"] / 2, rel=0.05)


def test_another_state_is_another_run_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = TrainConfig(), TrainConfig()
    now.optim.state = "8bit"
    assert differences(before.as_dict(), now.as_dict()) == ["optim.state (fp32 -> 8bit)"]
    find: Callable[[str], Any] = lambda name: None if name == "bitsandbytes" else object()  # noqa: E731
    monkeypatch.setattr("flamingo.training.config.importlib.util.find_spec", find)
    assert [clause for clause in unavailable(now) if "bitsandbytes" in clause] == [
        "optim.state=8bit needs bitsandbytes: pip install 'flamingo-vlm[quantization]', or optim.state=bf16"
    ]
    now.optim.state = "4bit"  # type: ignore[assignment]
    assert any("optim.state" in clause for clause in now.problems())
