"""Next-token loss over the labelled positions, some at a time.

A vocabulary of 50,000 makes the logits the largest tensor of a training step, so there is never one of all
positions, nor of all labelled ones. Where the LM's head is frozen, each chunk's logits are made once: the gradient of
its hidden states is computed at once, kept (it is D wide, not V) and only scaled in the backward pass. Where the head
trains, the logits are made again in the backward pass.

Letters: B batch, T text tokens, N labelled positions, D width, V vocabulary of the LM, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flamingo.errors import UserError
from flamingo.labels import IGNORED, SOFT_ID

CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}
"""Memory for the float32 logits of a chunk. glibc gives blocks of up to 32 MiB again without fetching new documents."""

Head = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (m, D), logits of the new tokens (m, n)) to all logits (m, V + n)."""


def next_labels(labels: Int[Tensor, "B T"]) -> Int[Tensor, "Z"]:
    """Return for each position in the flattened (B*T) text the label of the token after it, -100 for none.

    A vector of a soft prompt is no text to learn.
    """
    labels = labels.masked_fill(labels >= SOFT_ID, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def changes_logits(text_config: Any) -> bool:
    """Say whether an LM of this config is known to change the logits behind its head (soft caps, scales)."""
    scales = [getattr(text_config, name, None) for name in ("logit_scale", "logits_scaling")]
    return bool(getattr(text_config, "final_logit_softcapping", None)) or any(x not in (None, 1) for x in scales)


def chunk_of(vocabulary: int, device: torch.device) -> int:
    """Return how many positions are in a chunk."""
    return max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (4 * max(vocabulary, 1)))


def long_chunk_of(vocabulary: int, device: torch.device) -> int:
    """Return how many positions are in a chunk where all logits are wanted: larger products waste less."""
    return 4 * chunk_of(vocabulary, device)


def logits_in_chunks(
    head: Head, hidden: Float[Tensor, "B T D"], new_logits: Float[Tensor, "B T n"], *, chunk: int
) -> Float[Tensor, "B T V"]:
    """Return the logits of all positions, without gradients: a chunk of them exists twice, never all."""
    flat, new = hidden.flatten(0, 1), new_logits.flatten(0, 1)
    out: Tensor | None = None
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        logits = head(flat[part], new[part])
        out = logits.new_empty(len(flat), logits.shape[-1]) if out is None else out
        out[part] = logits
    assert out is not None
    return out.unflatten(0, hidden.shape[:-1])


def nll_in_chunks(
    head: Head,
    hidden: Float[Tensor, "N D"],
    new_logits: Float[Tensor, "N n"],
    targets: Int[Tensor, "N"],
    *,
    chunk: int,
    frozen_head: bool = False,
) -> Float[Tensor, "N"]:
    """Return the negative log-likelihood of each target, in float32.

    With `frozen_head` no gradient goes to what `head` has inside, only to `hidden` and `new_logits`.
    """
    learns = torch.is_grad_enabled() and (hidden.requires_grad or new_logits.requires_grad)
    if learns and frozen_head:
        out: Tensor = _OnePass.apply(head, chunk, targets, hidden, new_logits)
        return out

    def chunk_losses(hidden: Tensor, new_logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden, new_logits).float(), targets, reduction="none")

    # Splits and not slices: the backward pass of a slice makes a gradient of the whole tensor's size.
    parts = list(zip(hidden.split(chunk), new_logits.split(chunk), targets.split(chunk), strict=True))
    out_parts = []
    for index, part in enumerate(parts):
        # Not the last one: it is the first that the backward pass needs.
        if learns and index + 1 < len(parts):
            out_parts.append(checkpoint(chunk_losses, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            out_parts.append(chunk_losses(*part))
    return torch.cat(out_parts)


class _OnePass(torch.autograd.Function):
    """Losses and, with them, the gradients of the hidden states: each position's loss depends on its own alone."""

    @staticmethod
    def forward(ctx: Any, head: Head, chunk: int, targets: Tensor, hidden: Tensor, new_logits: Tensor) -> Tensor:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden), torch.empty_like(new_logits)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                inputs = [x[part].detach().requires_grad_() for x in (hidden, new_logits)]
                logits = head(*inputs)
            log_p = logits.detach().float().log_softmax(-1)
            nll[part] = -log_p.gather(1, targets[part, None])[:, 0]
            slope = log_p.exp_()
            slope.scatter_add_(1, targets[part, None], slope.new_full((len(slope), 1), -1.0))
            slopes = torch.autograd.grad(logits, inputs, slope.to(logits.dtype))
            for gradient, value in zip(gradients, slopes, strict=True):
                gradient[part] = value
        ctx.save_for_backward(*gradients)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_new = ((gradient * weight[:, None]).to(gradient.dtype) for gradient in ctx.saved_tensors)
        return None, None, None, d_hidden, d_new


def mean_nll(nll: Float[Tensor, "N"], number: Tensor | int | None) -> Float[Tensor, ""]:
    """Return the sum of the token losses over `number`, by default over their number."""
    return nll.sum() / (max(len(nll), 1) if number is None else number)


def reducer(reduction: str, number: Tensor | int | None) -> Callable[[Tensor], Tensor]:
    """Return what makes a loss of the token losses (N,): `mean_nll`, or with "none" nothing.

    Raises:
        UserError: another word.
    """
    if reduction not in ("mean", "none"):
        raise UserError(f"loss_reduction={reduction!r} must be 'mean' or 'none'")
    return partial(mean_nll, number=number) if reduction == "mean" else lambda nll: nll
