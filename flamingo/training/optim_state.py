"""AdamW that keeps its two moments of matrices in 2 bytes or 1 instead of 4 (`optim.state`).

The update is torch's fused kernel in float32, some rows at a time; only what is kept between updates is smaller:

- `bf16` is rounded at random, up or down in proportion: to the nearest, a second moment would stop to move once an
  update changes it by less than half a step (1/256 of it). The random bits are a hash of parameter, update and element,
  so a resumed run, other processes and other shards round alike.
- `8bit` is bitsandbytes' dynamic code with a scale for every 256 values of a row. It keeps the root of the second
  moment: of that itself, what is 1/2500 of a block's largest gradient would become zero, and its next step huge.

Vectors, and for `8bit` matrices whose rows are not a multiple of 256, stay float32. Everything is stored in the shape
of the parameter's rows, so it is sharded, saved and resumed as the parameter is, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.adamw import adamw as adamw_update

from flamingo.training.distributed.fsdp import local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""Values that share a scale."""
CHUNK = 1 << 20
"""Values that are float32 at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


def stored_as(parameter: Tensor, state: str) -> str:
    """Return how the moments of a parameter are kept where `state` is asked for."""
    width = parameter.shape[1:].numel()
    if parameter.ndim < 2 or (state == "8bit" and (width == 0 or width % BLOCK)):
        return "fp32"
    return state


def moments(parameter: Tensor, state: str) -> dict[str, Tensor]:
    """Return the moments of a parameter, all zero, and the scales of those in 8 bits."""
    kind = stored_as(parameter, state)
    out = {name: torch.zeros_like(parameter, dtype=DTYPES[kind], requires_grad=False) for name in MOMENTS}
    if kind == "8bit":
        out |= {f"{name}_scale": _scales(parameter) for name in MOMENTS}
    return out


def _scales(parameter: Tensor) -> Tensor:
    """Return zeros (rows, blocks of a row), sharded as the parameter's rows are."""
    mine = local_tensor(parameter)
    blocks = mine.shape[1:].numel() // BLOCK
    own = torch.zeros(mine.shape[0], blocks, dtype=torch.float32, device=mine.device)
    if not isinstance(parameter, DTensor):
        return own
    shape = torch.Size((parameter.shape[0], blocks))
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(blocks, 1)
    )


class SmallStateAdamW(torch.optim.Optimizer):
    """AdamW with moments kept as `state` says; its groups and options are those of torch's."""

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, state: str, lr: float = 1e-3
    ) -> None:
        """Every parameter has its state from the start, as in `optim.adamw`."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._kind = state
        for _, parameter in self._parameters():
            # On the CPU: the hash needs the number, and reading it from a GPU would wait for all work before it.
            step = torch.zeros((), dtype=torch.float32)
            self.state[parameter] = {"step": step, **moments(parameter, state)}

    def _parameters(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; torch turns a state into its parameter's type, which loses nothing, and here it is turned back."""
        super().load_state_dict(state_dict)
        for _, parameter in self._parameters():
            state, kind = self.state[parameter], stored_as(parameter, self._kind)
            for name in MOMENTS:
                state[name] = state[name].to(DTYPES[kind])
            state["step"] = state["step"].cpu()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update of every parameter that has a gradient."""
        assert closure is None
        for index, (group, parameter) in enumerate(self._parameters()):
            if parameter.grad is None or not (mine := local_tensor(parameter)).numel():
                continue
            state = self.state[parameter]
            kind = stored_as(parameter, self._kind)
            if kind == "fp32":
                mean, square = (local_tensor(state[name]) for name in MOMENTS)
                _update(group, mine, local_tensor(parameter.grad), mean, square, state["step"])
            else:
                self._update_rows(group, parameter, kind, seed=_hash_number(index, int(state["step"])))
            state["step"] += 1

    def _update_rows(self, group: dict[str, Any], parameter: nn.Parameter, kind: str, seed: int) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        rows = len(local_tensor(parameter))
        # Views, but of a gradient that lies transposed.
        weight, gradient = (local_tensor(x).reshape(rows, -1) for x in (parameter, parameter.grad))
        width = weight.shape[1]
        first = _first_row(parameter)
        for start in range(0, rows, max(1, CHUNK // width)):
            part = slice(start, start + max(1, CHUNK // width))
            own = {key: local_tensor(value).view(rows, -1)[part] for key, value in state.items() if key != "step"}
            mean, square = _read(own, kind)
            _update(group, weight[part], gradient[part], mean, square, state["step"])
            _write(own, kind, mean, square, seed, (first + start) * width)


def _first_row(parameter: Tensor) -> int:
    """Return which row of the whole parameter the first of this process's is."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0])


def _update(
    group: dict[str, Any], weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor
) -> None:
    """Make the update in place; `step` is how many there were before."""
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
    options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
    steps = [step.to(weight.device, copy=True)]  # the kernel counts
    adamw_update(
        [weight], [gradient], [mean], [square], [], steps, fused=True, amsgrad=False, maximize=False, **options
    )


def _read(state: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Return both moments of some rows in float32."""
    if kind == "bf16":
        return state["exp_avg"].float(), state["exp_avg_sq"].float()
    from bitsandbytes.functional import dequantize_blockwise

    mean, root = (
        dequantize_blockwise(
            state[name], absmax=state[f"{name}_scale"].flatten(), code=_code(name, state[name].device), blocksize=BLOCK
        )
        for name in MOMENTS
    )
    return mean, root.square_()


def _write(state: dict[str, Tensor], kind: str, mean: Tensor, square: Tensor, seed: int, first: int) -> None:
    """Keep both moments of some rows, the first of whose values is number `first` of the parameter."""
    if kind == "bf16":
        bits = _hash(mean, seed, first)
        state["exp_avg"].copy_(_round_at_random(mean, bits & 0xFFFF))
        state["exp_avg_sq"].copy_(_round_at_random(square, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)))
        return
    from bitsandbytes.functional import quantize_blockwise

    for name, value in zip(MOMENTS, (mean, square.sqrt_()), strict=True):
        packed, scale = quantize_blockwise(value, code=_code(name, value.device), blocksize=BLOCK)
        state[name].copy_(packed)
        state[f"{name}_scale"].copy_(scale.absmax.view(len(value), -1))


@cache
def _code(name: str, device: torch.device) -> Tensor:
    """Return the 256 values of bitsandbytes' dynamic code, signed for the first moment."""
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map(signed=name == "exp_avg").to(device)
    return code


def _round_at_random(value: Tensor, bits: Tensor) -> Tensor:
    """Return float32 values that bf16 holds exactly: `bits` (16 random ones) are added below and the rest cut off.

    What is not finite stays so: it has no bits to carry from.
    """
    exact = value.view(torch.int32)
    return exact.add(bits).bitwise_and_(-0x10000).view(torch.float32)


def _hash_number(index: int, step: int) -> int:
    """Return 32 mixed bits of a parameter's index and an update."""
    mixed = (index * 0x9E3779B1 + step * 0x85EBCA77 + 1) & 0xFFFFFFFF
    mixed = ((mixed ^ mixed >> 16) * 0x45D9F3B) & 0xFFFFFFFF
    return mixed ^ mixed >> 16


def _hash(like: Tensor, seed: int, first: int) -> Tensor:
    """Return 32 mixed bits for each value of a tensor, by its number from `first` on (Wellons' low-bias hash)."""
    x = torch.arange(first, first + like.numel(), device=like.device, dtype=torch.int64)
    # Folded to 32 bits, so that numbers beyond them do not repeat; int32 products wrap around.
    x = (((x >> 32) * 0x27D4EB2F) ^ x ^ seed).bitwise_and_(0xFFFFFFFF)
    x = x.sub_((x >> 31) << 32).to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return x.view(like.shape)
