"""Next-token loss over the labelled positions, a few hundred at a time.

Notable: a vocabulary of 50,000 makes the logits the largest tensor of a training step, so there is never one of all
positions, nor of all labelled ones: each chunk's logits are made, reduced to one number a position and dropped, and
made again in the backward pass. The last chunk is not: it is the first that the backward pass needs.

Letters: B batch, T text tokens, N labelled positions, D width, V vocabulary of the LM, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK = 256
"""Positions at a time; at V = 50,000 their logits are 51 MB in float32."""

Head = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (m, D), logits of the new tokens (m, n)) to all logits (m, V + n)."""


def next_labels(labels: Int[Tensor, "B T"]) -> Int[Tensor, "Z"]:
    """Return for each place in the flattened (B*T) text the label of the token after it, -100 for none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def changes_logits(text_config: Any) -> bool:
    """Say whether an LM of this config is known to change the logits behind its head (soft caps, scales)."""
    scales = [getattr(text_config, name, None) for name in ("logit_scale", "logits_scaling")]
    return bool(getattr(text_config, "final_logit_softcapping", None)) or any(x not in (None, 1) for x in scales)


def nll_in_chunks(
    head: Head,
    hidden: Float[Tensor, "N D"],
    new_logits: Float[Tensor, "N n"],
    targets: Int[Tensor, "N"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, "N"]:
    """Return the negative log-likelihood of each target, in float32; `chunk` is `CHUNK` by default."""
    chunk = CHUNK if chunk is None else chunk

    def piece(hidden: Tensor, new_logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden, new_logits).float(), targets, reduction="none")

    # Splits and not slices: the backward pass of a slice makes a gradient of the whole tensor's size.
    parts = list(zip(hidden.split(chunk), new_logits.split(chunk), targets.split(chunk), strict=True))
    again = torch.is_grad_enabled() and (hidden.requires_grad or new_logits.requires_grad)
    out = []
    for place, part in enumerate(parts):
        if again and place + 1 < len(parts):
            out.append(checkpoint(piece, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(piece(*part))
    return torch.cat(out)


def mean_nll(nll: Float[Tensor, "N"], number: Tensor | int | None) -> Float[Tensor, ""]:
    """Return the sum of the token losses over `number`, by default over their number."""
    return nll.sum() / (max(len(nll), 1) if number is None else number)
