"""What a call of the model says besides images: which keyword arguments there are, ids that exist, embeddings for ids.

Letters: B batch, T text tokens, D width, n new tokens.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

from flamingo.errors import UserError
from flamingo.labels import SOFT_ID
from flamingo.language.hooks import Wiring, embedding_scale, table_shape, unwrapped

UNKNOWN = -1
"""Stands for the id of a token of which only the embedding is given, and which is not a new token."""
# What transformers hands on to a model whose `forward` ends in **kwargs, beyond the names in the signature.
_HANDED_ON = {*TransformersKwargs.__annotations__, "cache_position"}
_FROM_GENERATE = {"cache_position", "tokenizer", "assistant_tokenizer"}
"""What `generate` passes to every model, whether it takes it or not."""


@functools.cache
def _parameters(model_class: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model_class.forward).parameters


def takes(lm: nn.Module, name: str) -> bool:
    """Say whether an LM's `forward` names this argument."""
    lm_class: Any = type(unwrapped(lm))
    return name in _parameters(lm_class)


def checked_arguments(lm: nn.Module, given: Mapping[str, Any], own: type) -> dict[str, Any]:
    """Return the keyword arguments for the LM among those that the model's `forward` (of class `own`) does not name.

    What `generate` passes to every model is left out for an LM that does not take it.

    Raises:
        UserError: neither of the two takes one of them.
    """
    lm_class: Any = type(unwrapped(lm))
    parameters = _parameters(lm_class)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {*parameters, *(_HANDED_ON if open_ended else ())}
    kept = {name: value for name, value in given.items() if name in taken}
    for name, value in given.items():
        # What is None asks for nothing.
        if name not in taken and name not in _FROM_GENERATE and value is not None:
            close = difflib.get_close_matches(name, [*_parameters(own), *taken], n=1)
            meant = f"did you mean {close[0]}?" if close else "leave it out"
            raise UserError(
                f"forward has no argument {name!r}, nor has that of {type(unwrapped(lm)).__name__}; {meant}"
            )
    return kept


def check_ids(input_ids: Int[Tensor, "B T"], wiring: Wiring) -> None:
    """Raise UserError where an id has no row, neither in the LM's table nor in that of the new tokens.

    Ids on a device are not looked at: the answer would have to be waited for.
    """
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    rows, own = table_shape(wiring.embedding)[0], wiring.new_tokens.ids
    soft = wiring.new_tokens.soft_ids
    new = (*own, *soft)
    low, high = (int(x) for x in input_ids.aminmax())
    if low >= 0 and high < rows:
        return
    bad = input_ids[_without_row(input_ids, rows, new)]
    if not len(bad):
        return
    if int(bad[0]) >= SOFT_ID:
        raise UserError(
            f"input_ids begin with vector {int(bad[0]) - SOFT_ID} of the soft prompts, and this model has {len(soft)}: "
            "the processor is of another model; load_soft_prompt(model, processor, file) makes one known to both"
        )
    raise UserError(
        f"input_ids has the id {int(bad[0])}, but the language model's table has rows 0 to {rows - 1} and the new "
        f"tokens are {', '.join(map(str, own)) or 'none'}; after adding tokens to the tokenizer call "
        "model.resize_token_embeddings(len(tokenizer))"
    )


def _without_row(input_ids: Tensor, rows: int, new: tuple[int, ...]) -> Tensor:
    return (input_ids < 0) | (
        (input_ids >= rows) & ~torch.isin(input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device))
    )


def ids_of_embeddings(
    embeddings: Float[Tensor, "B T D"], wiring: Wiring, reset_token_id: int | None
) -> Int[Tensor, "B T"]:
    """Return the ids of the new tokens (and of the reset token) among embeddings, -1 for all others.

    They are found as transformers' own vision-language models find theirs: by rows that are exactly equal.
    """
    new_tokens, ids = wiring.new_tokens, list(wiring.new_tokens.ids)
    with torch.no_grad():
        one_each = torch.eye(len(ids), dtype=torch.bool, device=embeddings.device)[None]
        empty = embeddings.new_zeros(1, len(ids), embeddings.shape[-1])
        rows = new_tokens(empty, one_each, scale=embedding_scale(wiring.embedding))[0]
        if reset_token_id is not None and reset_token_id not in ids:
            ids.append(reset_token_id)
            row = wiring.embedding(torch.tensor([[reset_token_id]], device=embeddings.device))[0]
            rows = torch.cat([rows, row.to(rows)])
        found = torch.full(embeddings.shape[:2], UNKNOWN, device=embeddings.device)
        for token, row in zip(ids, rows, strict=True):
            found = found.masked_fill((embeddings == row).all(-1), token)
    return found


def fitted_phi(phi: Shaped[Tensor, "B P"], shape: tuple[int, int], *, embedded: bool) -> Int[Tensor, "B T"]:
    """Return `phi` for B rows of T tokens; where embeddings are given, what stands in front of its text sees no image.

    peft's prompt tuning puts its virtual tokens there, and leaves `phi` as it was.

    Raises:
        UserError: another number of rows or tokens.
    """
    missing = shape[1] - phi.shape[1]
    if len(phi) != shape[0] or missing < 0 or (missing and not embedded):
        raise UserError(f"phi is {tuple(phi.shape)}, but the text has {shape[0]} rows of {shape[1]} tokens")
    return nn.functional.pad(phi, (missing, 0)) if missing else phi


def counted_positions(given: Tensor | None, attention_mask: Any, length: int) -> Tensor | None:
    """Return the positions of the last `length` tokens: as given, else counted over the tokens that are not padding."""
    if given is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return given
