"""What a prompt must be before it runs: its padding, its length, the images that its tokens see.

Letters: B batch, T text tokens, P tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import StaticCache
from transformers.utils import logging

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.inference.media_cache import MediaCache, cached_length, check_counts
from flamingo.inference.protocol import MediaModel
from flamingo.layers.media_mask import phi_from_ids
from flamingo.transfer import on_host

logger = logging.get_logger(__name__)


def left_padded(
    input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], *others: Int[Tensor, "B T"]
) -> list[Tensor]:
    """Return ids, mask and further (B, T) tensors with every row's padding moved to its left."""
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return [tensor.gather(1, order) for tensor in (input_ids, attention_mask, *others)]


def count_phi(
    config: FlamingoConfig, input_ids: Int[Tensor, "B T"], *, seen: Int[Tensor, "B"] | None = None
) -> Int[Tensor, "B T"]:
    """Return the image each token sees at inference, by counting `<image>` as the config says."""
    return phi_from_ids(input_ids, config.image_token_id, seen=seen, reset_token_id=config.media_reset_token_id)


def checked_phi(
    config: FlamingoConfig, input_ids: Int[Tensor, "B T"], media: MediaCache, past_key_values: Any
) -> Int[Tensor, "B T"]:
    """Return `count_phi` behind what a cache has seen. Raises UserError where images and tags differ in number."""
    seen = on_host(media.seen) if cached_length(past_key_values) and media.seen is not None else None
    phi = count_phi(config, on_host(input_ids), seen=seen)
    check_counts(phi, media, seen)
    return phi


def token_phi(phi: Int[Tensor, "B P"], length: int) -> Int[Tensor, "B T"]:
    """Return a prompt's explicit phi continued to `length` tokens: new tokens see what the last one saw."""
    missing = length - phi.shape[1]
    return torch.cat([phi, phi[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else phi


def mask_from_padding(
    input_ids: Int[Tensor, "B T"], pad: int | None, others: Collection[int], *, trailing: bool = True
) -> Int[Tensor, "B T"] | None:
    """Return the attention mask of rows that came without one, None where nothing is padded.

    Padding is what stands at the ends of a row (at its beginning only, without `trailing`: behind a row it changes none
    of the row's own tokens). `others` are the ids of a beginning or an end: if `pad` is one of them, one in front of or
    behind every row is text, and any other number cannot be told from padding:

        pad 0         0 0 5 6   ->  0 0 1 1       pad 0, which is   0 5 6   ->  None      0 0 5   ->  UserError
                      5 6 7 8       1 1 1 1       bos too           0 7 8                 0 6 7

    Raises:
        UserError: the padding token is also one of `others`, and the rows may be padded.
    """
    if pad is None:
        return None
    is_pad = input_ids == pad
    front = is_pad.long().cumprod(1)
    back = is_pad.flip(1).long().cumprod(1).flip(1) if trailing else torch.zeros_like(front)
    counts = torch.stack([front.sum(1), back.sum(1)]).tolist()
    if not any(map(any, counts)):
        return None
    if pad not in others:
        return 1 - torch.maximum(front, back)
    if all(set(side) in ({0}, {1}) for side in counts):
        return None
    raise UserError(
        f"the rows begin or end with token {pad}, which is padding but also a token of the text; give attention_mask"
    )


def inferred_mask(model: MediaModel, input_ids: Int[Tensor, "B T"], *, trailing: bool = True) -> Tensor | None:
    """Return `mask_from_padding` with the model's own special tokens."""
    own = model.generation_config
    ends = own.eos_token_id
    others = {own.bos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return mask_from_padding(on_host(input_ids), own.pad_token_id, others, trailing=trailing)


def call_mask(
    model: MediaModel, input_ids: Tensor, mask: Any, media: MediaCache, past: Any, positions: Tensor | None = None
) -> Any:
    """Return the mask of a forward pass over the cache's tokens and these: as given, else inferred.

    A mask of these tokens only stands behind the one that the cache remembers.

    Raises:
        UserError: a mask (B, T) that fits neither; more tokens than the LM has positions.
    """
    mask = _call_mask(model, input_ids, mask, media, past)
    check_positions(model, input_ids, mask, past, positions)
    return mask


def _call_mask(model: MediaModel, input_ids: Tensor, mask: Any, media: MediaCache, past: Any) -> Any:
    before, new = cached_length(past), input_ids.shape[1]
    if mask is None and not before:
        return inferred_mask(model, input_ids, trailing=False)
    if mask is None:
        if media.mask is None:
            return None
        return torch.cat([media.mask, media.mask.new_ones(len(input_ids), new)], dim=1)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] == before + new:
        return mask
    if mask.shape[1] > before + new and isinstance(past, StaticCache):
        return mask  # some families give one of the cache's whole size
    if mask.shape[1] != new:
        raise UserError(
            f"attention_mask is {mask.shape[1]} wide, but there are {new} tokens"
            + f" and {before} in the cache" * (before > 0)
        )
    known = mask.new_ones(len(mask), before) if media.mask is None else media.mask.to(mask)
    return torch.cat([known, mask], dim=1)


def position_limit(lm: Any, beyond: int) -> int | None:
    """Return how many positions an LM has, where it has a table of them of fewer than `beyond`; else None.

    Rotary and ALiBi models compute theirs; transformers warns where they leave what they were trained on, and so does
    this.
    """
    config = lm.config.get_text_config(decoder=True)
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if limit is None or beyond <= limit:
        return None
    words = lm.get_input_embeddings()
    tables = [m.weight for m in lm.modules() if isinstance(m, nn.Embedding) and m is not words]
    tables += [b for b in lm.buffers() if b.ndim == 2 and b.is_floating_point()]
    # OPT's table has two rows more than positions. Transformers' MPT builds its biases for just so many.
    if config.model_type == "mpt" or any(limit <= len(table) <= limit + 2 for table in tables):
        return limit
    logger.warning_once(f"{beyond} tokens are more than the {limit} that the language model was trained on")
    return None


def check_positions(
    model: MediaModel, input_ids: Tensor, mask: Any, past: Any, positions: Tensor | None = None
) -> None:
    """Compare the tokens of a forward pass, and those in the cache, with the LM's positions.

    Raises:
        UserError: they are more; says both numbers.
    """
    total = cached_length(past) + input_ids.shape[1]
    if (limit := position_limit(model.language_model, total)) is None:
        return
    if positions is not None:
        total = int(positions.max()) + 1
    elif model.lm_takes_positions and isinstance(mask, Tensor) and mask.ndim == 2:
        total = int(mask.sum(1).max())
    if total > limit:
        raise UserError(
            f"the longest row has {total} tokens, but the language model has {limit} positions; give a shorter one"
        )


def check_length(model: MediaModel, width: int, mask: Tensor | None, new: int, what: str) -> None:
    """Compare a prompt of `width` tokens and the `new` ones behind it with the LM's positions; the last one needs none.

    Raises:
        UserError: they are more; says all numbers, and `what` asks for so many.
    """
    if (limit := position_limit(model.language_model, width + new - 1)) is None:
        return
    if mask is not None and model.lm_takes_positions:
        width = int(mask.sum(1).max())
    if width > limit:
        raise UserError(
            f"the prompt has {width} tokens, but the language model has {limit} positions; give a shorter one"
        )
    if width + new - 1 > limit:
        raise UserError(
            f"a prompt of {width} tokens and {what}={new} need {width + new - 1} positions, but the language model has "
            f"{limit}; ask for at most {limit + 1 - width} or give a shorter prompt"
        )


def check_rows(input_ids: Tensor, mask: Tensor | None) -> None:
    """See that every row has a token. Raises UserError, which names the row."""
    if input_ids.ndim != 2:
        raise UserError(f"input_ids must be (rows, tokens), not of shape {tuple(input_ids.shape)}")
    empty = [0] if not input_ids.numel() else [] if mask is None else (mask.sum(1) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(f"row {empty[0]} has no tokens; a prompt needs one at least, as the begin-of-sequence token")
