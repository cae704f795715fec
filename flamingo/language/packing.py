"""Several sequences in one row of a batch, each of which sees itself alone.

    tokens      a  b  c  d  e  f  -
    sequence    1  1  1  2  2  3  0        0 is padding
    position    0  1  2  0  1  0  0

What is notable: the mask is given whole, (B, 1, T, T), which transformers' language models pass through to their
attention as it is. A language model that makes its mask in another way is refused, and so are rows longer than its
sliding window: in both a sequence would silently see what it should not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from flamingo.errors import UserError
from flamingo.inference.protocol import MediaModel

ATTENTIONS = ("sdpa", "eager")  # the others take no mask of ones own


def packed_positions(sequence_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each token's position in its own sequence; padding (0) is one more sequence."""
    position = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return position - (position * first).cummax(dim=1).values


def packed_mask(model: MediaModel, sequence_ids: Int[Tensor, "B T"]) -> Shaped[Tensor, "B 1 T T"]:
    """Return who may see whom, as the LM's attention takes it: earlier tokens of the own sequence, and oneself.

    Raises UserError when the rows are longer than the LM's window.
    """
    config = model.language_model.config.get_text_config(decoder=True)
    length, window = sequence_ids.shape[1], getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and length > window:
        raise UserError(
            f"rows of {length} tokens cannot be packed for {type(model.language_model).__name__}, whose sliding window "
            f"has {window}; use pack={window}"
        )
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    seen = same.tril()[:, None]
    if config._attn_implementation == "sdpa":
        return seen
    dtype = model.language_model.dtype  # eager attention adds the mask to its scores
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def packed_inputs(
    model: MediaModel,
    sequence_ids: Int[Tensor, "B T"],
    phi: Tensor | None,
    past_key_values: Any,
    use_cache: bool | None,
) -> tuple[Shaped[Tensor, "B 1 T T"], Int[Tensor, "B T"], bool]:
    """Return (attention_mask, position_ids, use_cache) for packed rows. Raises UserError as `check_packs`."""
    check_packs(model, phi, past_key_values, use_cache)
    return packed_mask(model, sequence_ids), packed_positions(sequence_ids), False


def check_packs(model: MediaModel, phi: Tensor | None, past_key_values: Any, use_cache: bool | None) -> None:
    """Raise UserError unless packed sequences stay apart in this model and call."""
    lm = model.language_model
    config = lm.config.get_text_config(decoder=True)
    name = type(lm).__name__
    if phi is None:
        raise UserError("packed rows (sequence_ids) need phi: counted from the row's tags it would cross sequences")
    if past_key_values is not None or use_cache:
        raise UserError("packed rows (sequence_ids) have no cache; leave out past_key_values and use_cache")
    if model.config.attend_all_previous:
        raise UserError("rows cannot be packed with attend_all_previous: a token would see other sequences' images")
    if config._attn_implementation not in ATTENTIONS:
        raise UserError(
            f"rows cannot be packed with attn_implementation={config._attn_implementation!r}; use one of "
            f"{', '.join(ATTENTIONS)}, or pack=0"
        )
    if (
        not model.lm_takes_positions
        or getattr(config, "alibi", False)
        or not hasattr(sys.modules[type(lm).__module__], "create_causal_mask")
    ):
        raise UserError(f"rows cannot be packed for {name}: it does not keep packed sequences apart; use pack=0")
