"""Models that draft tokens for `generate(assistant_model=...)`, made to understand a Flamingo's prompts.

A draft is a shallow copy of the assistant: its weights, another class. A text LM gets ids that it knows, and its logits
the Flamingo's width; a smaller Flamingo encodes the same images itself. What they draft is only proposed, so the tokens
stay those of decoding without an assistant.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flamingo.errors import UserError
from flamingo.inference.media_cache import ImageInputs, MediaCache
from flamingo.inference.prompts import position_limit
from flamingo.inference.protocol import MediaModel


def vocabulary(model: MediaModel) -> int:
    """Return the number of logits that a model gives, those of the new tokens included."""
    return max(
        _rows(model.language_model.get_output_embeddings()), *(i + 1 for i in model.config.new_token_ids or [-1])
    )


def _rows(table: Any) -> int:
    """Return the rows of an embedding or a head, also of a quantised one, whose weight is packed."""
    sizes = (getattr(table, name, None) for name in ("num_embeddings", "out_features"))
    return next((size for size in sizes if size is not None), len(table.weight))


def draft_of(
    model: MediaModel, assistant: Any, rows: int, images: ImageInputs, length: int, *, translated: bool
) -> Any:
    """Return the assistant as this call needs it; `length` is the most tokens it has to run.

    With `translated` transformers itself writes the prompt in the tokens of the assistant.

    Raises:
        UserError: it cannot see the images, has other new tokens, or fewer positions than `length`.
    """
    flamingo = isinstance(assistant, MediaModel)
    if (limit := position_limit(assistant.language_model if flamingo else assistant, length)) is not None:
        raise UserError(f"prompt and new tokens are {length}, but assistant_model has {limit} positions")
    draft = copy.copy(assistant)
    kind = type(assistant)
    if flamingo:
        if images.pixel_values is None and images.media_features is not None:
            raise UserError("a Flamingo as assistant_model encodes the images itself; give pixel_values, not features")
        ours, its = (
            (x.config.image_token_id, x.config.eoc_token_id, sorted(x.config.new_token_ids)) for x in (model, assistant)
        )
        if ours != its:
            raise UserError(
                f"assistant_model has the new tokens {its}, but this model {ours}; build both with one tokenizer"
            )
        draft.__class__ = type(kind.__name__, (_SeeingDraft, kind), {})
        draft.draft_media = assistant.media_of(rows, None, None, images)
    else:
        body: dict[str, Any] = {"forward": wraps(kind.forward)(_forward_known)}
        draft.__class__ = type(kind.__name__, (_TextDraft, kind), body)
        draft.draft_width = None if translated else vocabulary(model)
    return draft


class _SeeingDraft:
    """A Flamingo that drafts: what it is called with is the other model's media, what it sees its own."""

    draft_media: MediaCache

    def generate(self, *args: Any, media_cache: Any = None, **options: Any) -> Any:
        """Draft tokens."""
        media = self.draft_media.branch()
        return super().generate(*args, media_cache=media, **options)  # type: ignore[misc]


class _TextDraft:
    """A text LM that drafts."""

    draft_width: int | None

    def generate(self, *args: Any, media_cache: Any = None, phi: Any = None, **options: Any) -> Any:
        """Draft tokens, without the images."""
        return super().generate(*args, **options)  # type: ignore[misc]


def _forward_known(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
    """Run a text LM on ids of which it lacks some (`<image>`, ...), and give them logits of minus infinity."""
    rows = _rows(self.get_input_embeddings())
    known = input_ids.masked_fill(input_ids >= rows, _filler(self))
    out = super(_TextDraft, self).forward(known, *args, **options)
    if self.draft_width is not None:
        out.logits = pad(out.logits, (0, self.draft_width - out.logits.shape[-1]), value=-torch.inf)
    return out


def _filler(lm: Any) -> int:
    """Return a token that says nothing: the one that begins a text, else ends it."""
    config = lm.config.get_text_config(decoder=True)
    ids = (config.bos_token_id, config.eos_token_id)
    return next((i for i in ids if isinstance(i, int)), 0)
