"""An exponential moving average of the trained weights, sharded as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flamingo.training.distributed.fsdp import local_tensor

# Wrappers for recomputing and compiling appear in the names of parameters, not in those of a checkpoint.
WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")


class Ema:
    """Moving average: mean <- decay * mean + (1 - decay) * weight after every update; it starts as the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the weights as they are, after sharding: it holds what the optimizer holds."""
        self._decay = decay
        self._weights = {
            WRAPPERS.sub("", name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.means = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        """Name -> mean, as saved in a checkpoint and restored in place."""

    @torch.no_grad()
    def update(self) -> None:
        """Follow an update."""
        means = [local_tensor(mean) for mean in self.means.values()]
        weights = [local_tensor(parameter.detach()) for parameter in self._weights.values()]
        torch._foreach_lerp_(means, weights, 1.0 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the means into the model, and its own weights back afterwards."""
        kept = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        self._fill(self.means)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            local_tensor(parameter.detach()).copy_(local_tensor(values[name]))
