"""Lets TRL's trainers (SFT, DPO) compute their losses with this model's own head.

TRL multiplies hidden states with the weight of the LM's head, which has no rows for `<image>` and `<|endofchunk|>` and
knows of no images; here its question for the log-probabilities of tokens is answered by the model itself. The logits of
all positions are made at once, which `train.py` avoids.

Letters: B batch, T text tokens, V vocabulary with the new tokens.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor

from flamingo.errors import UserError
from flamingo.labels import IGNORED
from flamingo.language.hooks import unwrapped
from flamingo.language.loss import next_labels
from flamingo.modeling import FlamingoForConditionalGeneration


def use_own_head(trainer: Any) -> None:
    """Give one of TRL's trainers, built around a Flamingo with or without peft, the losses of that model.

    Raises:
        UserError: TRL is missing or older than 1.16; the trainer's model is another one.
    """
    try:
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise UserError("TRL's trainers need trl 1.16 or newer: pip install 'flamingo-vlm[trl]'") from error
    model = unwrapped(trainer.model)
    if not isinstance(model, FlamingoForConditionalGeneration):
        raise UserError(f"the trainer's model is a {type(model).__name__}, which TRL knows by itself")
    own = type(model).forward

    @functools.wraps(own)  # the trainer reads the names of its arguments
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(self, *args, **kwargs)
        labels, number = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        logits = own(self, *args, **{**kwargs, "use_cache": False}).logits
        targets = next_labels(labels).view_as(labels)[:, :-1]
        return FusedCausalLMOutput(**token_facts(logits[:, :-1], targets, number))

    model.forward = types.MethodType(forward, model)


def token_facts(logits: Tensor, targets: Tensor, number: Tensor | int | None) -> dict[str, Tensor]:
    """Return what TRL asks of each target (B, T), zero where it is -100, given logits (B, T, V), and their loss."""
    mask = targets != IGNORED
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    return {
        "loss": -chosen.sum() / (mask.sum().clamp(min=1) if number is None else number),
        "log_probs": chosen,
        "entropy": -(log_p.exp() * log_p).sum(-1).detach().masked_fill(~mask, 0),
        "mean_logits": logits.detach().float().mean(-1).masked_fill(~mask, 0),
        "is_top1": (logits.argmax(-1) == targets) & mask,
        "label_mask": mask,
    }
