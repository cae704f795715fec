"""Not keeping for the backward pass what is cheap to make again: norms and nonlinearities in front of a matrix product.

Notable: the weight's gradient needs the product's input, and the norm or the nonlinearity that made it needs its own;
keeping both is keeping the same numbers twice. torch's checkpointing stops its second run at the last tensor that the
backward pass asks for. Where a product ends the function that is the product's input, so the product itself is not run
again, and what is left costs a few thousandths of the block's time. Values and gradients are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `function(*inputs)`, a chain of cheap steps that ends with a product, and keep only the inputs.

    Without gradients, and under torch.compile, which decides for itself what to make again, it is a plain call.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out
