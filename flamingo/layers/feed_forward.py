"""Feed-forward, nonlinearities and norms by their names in the config.

Letters: D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS = ("gelu", "relu", "silu", "squared_relu")
NORMS = ("layernorm", "rmsnorm")


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return a feed-forward's nonlinearity by its name in the config."""
    if name == "squared_relu":
        return _squared_relu
    functions: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    return functions[name]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def norm_layer(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    """Return a norm over the last axis by its name in the config."""
    return {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[kind](width, eps=eps)


class FeedForward(nn.Module):
    """Pre-norm feed-forward without biases: `down(act(up(norm(x))))`, or `down(act(gate(y)) * up(y))`, y = norm(x)."""

    def __init__(
        self, width: int, inner: int, *, act: str, norm: str = "layernorm", eps: float = 1e-5, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm_layer(norm, width, eps)
        self.gate_proj = nn.Linear(width, inner, bias=False) if gated else None
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act = activation_function(act)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the update, without the residual."""
        x = self.norm(x)
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)
