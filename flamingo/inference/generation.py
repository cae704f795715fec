"""`generate()` and what it needs around transformers' own.

Every image is encoded and the prompt is run once, whatever the number of beams or of sequences to return;
the copies begin with the prompt's last token.

Letters: B batch, T text tokens, P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.inference.media_cache import ImageInputs, check_counts
from flamingo.inference.media_cache import MediaCache as MediaCache
from flamingo.inference.protocol import MediaModel
from flamingo.layers.media_mask import phi_from_ids


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
    config: FlamingoConfig, input_ids: Int[Tensor, "B T"], media: MediaCache, past_key_values: Cache | None
) -> Int[Tensor, "B T"]:
    """Return `count_phi` behind what a cache has seen. Raises UserError where images and tags differ in number."""
    past = past_key_values is not None and past_key_values.get_seq_length()
    seen = media.seen if past else None
    phi = count_phi(config, input_ids, seen=seen)
    check_counts(phi, media, seen)
    return phi


def token_phi(phi: Int[Tensor, "B P"], length: int) -> Int[Tensor, "B T"]:
    """Return a prompt's explicit phi continued to `length` tokens: new tokens see what the last one saw."""
    missing = length - phi.shape[1]
    return torch.cat([phi, phi[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else phi


def default_generation_config(lm: PreTrainedModel, config: FlamingoConfig) -> GenerationConfig:
    """Return the LM's own settings, ending at `<|endofchunk|>` too, never giving `<image>`, and with a cache."""
    own = GenerationConfig(**lm.generation_config.to_dict())
    eos = own.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    own.eos_token_id = [config.eoc_token_id, *(i for i in eos if i != config.eoc_token_id)]
    if own.pad_token_id is None:
        own.pad_token_id = config.eoc_token_id
    unwanted = {config.image_token_id, *(config.new_token_ids or ())} - {config.eoc_token_id}
    own.suppress_tokens = sorted({*(own.suppress_tokens or ()), *unwanted})
    own.use_cache = True  # MPT's config has it off
    return own


@torch.no_grad()
def generate(
    model: MediaModel,
    base_generate: Callable[..., Any],
    inputs: Tensor | None,
    *,
    return_full_text: bool = False,
    output_cross_attentions: bool = False,
    **kwargs: Any,
) -> Any:
    """Encode every image once, pad the prompts on the left, generate, and return the new tokens only.

    Takes the processor's output and any argument of transformers' `generate`. With `return_full_text` the prompt is
    in front of what is returned, as transformers does it. Ends at `<|endofchunk|>` by default.

    With `output_cross_attentions` and `return_dict_in_generate` the result has `cross_attentions`: for the prompt and
    for each new token but the last, every block's weights (B, H, T, L) as `FlamingoOutput` has them. T is 1 behind the
    prompt, and B counts beams, in their order of that step.

    Raises:
        UserError: no `input_ids`; images and `<image>` tags that differ in number (names the row and both numbers).
    """
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    if ids is None:
        raise UserError("generate needs input_ids, as from the processor")
    images = ImageInputs(**{name: kwargs.pop(name, None) for name in ImageInputs._fields})
    mask, phi = kwargs.pop("attention_mask", None), kwargs.pop("phi", None)
    past = kwargs.get("past_key_values")
    media = model.media_of(len(ids), kwargs.pop("media_cache", None), past, images)
    media = media.branch() if past is None else media
    if phi is None and getattr(past, "media", None) is None:
        check_counts(count_phi(model.config, ids), media)
    if mask is not None and mask.shape == ids.shape and not bool(mask[:, -1].all()):
        ids, mask, *moved = left_padded(ids, mask, *(() if phi is None else (phi,)))
        phi = moved[0] if moved else None
    if phi is not None:
        kwargs["phi"] = phi
    if output_cross_attentions:
        media.maps = []
    elif (copies := _copies(model, kwargs)) > 1 and ids.shape[1] > 1:
        kwargs["past_key_values"] = _prompt_cache(model, ids, mask, phi, media, copies)
    out = base_generate(ids, attention_mask=mask, media_cache=media, **kwargs)
    if not isinstance(out, Tensor) and output_cross_attentions:
        out.cross_attentions = tuple(media.maps or ())
    if return_full_text:
        return out
    if isinstance(out, Tensor):
        return out[:, ids.shape[1] :]
    out.sequences = out.sequences[:, ids.shape[1] :]
    return out


def _copies(model: MediaModel, options: dict[str, Any]) -> int:
    """Return how many beams or sequences follow each prompt, 1 where they cannot start from one run of the prompt."""
    config = options.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        return options[name] if name in options else getattr(config, name, None)

    whole = ("past_key_values", "output_attentions", "output_hidden_states", "cache_implementation", "guidance_scale")
    if any(option(name) for name in whole) or option("use_cache") is False or option("prefill_chunk_size"):
        return 1
    return max(option("num_beams") or 1, option("num_return_sequences") or 1)


def _prompt_cache(
    model: MediaModel,
    ids: Tensor,
    mask: Tensor | None,
    phi: Tensor | None,
    media: MediaCache,
    copies: int,
) -> Cache | None:
    """Run the prompts up to their last token, and return their cache, `copies` times a row; None where it cannot be."""
    phi = count_phi(model.config, ids) if phi is None else phi
    before = {"input_ids": ids[:, :-1], "attention_mask": None if mask is None else mask[:, :-1], "phi": phi[:, :-1]}
    cache = model(**before, media_cache=media, use_cache=True, logits_to_keep=1).past_key_values
    if not isinstance(cache, Cache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def transition_scores(
    sequences: Int[Tensor, "B T"], scores: Sequence[Tensor], beam_indices: Tensor | None, normalize_logits: bool
) -> Float[Tensor, "B S"]:
    """Return the score with which each of the last S tokens was chosen, 0 behind the end of a beam.

    transformers' own counts the columns by the LM's vocabulary, which has no rows for the new tokens.
    """
    stacked = torch.stack(tuple(scores)).float()  # (S, beams, V)
    stacked = stacked.log_softmax(-1) if normalize_logits else stacked
    if beam_indices is None:
        beam_indices = torch.arange(stacked.shape[1], device=stacked.device)[:, None].expand(-1, len(stacked))
    steps = int((beam_indices >= 0).sum(-1).max())
    beams, tokens = beam_indices[:, :steps], sequences[:, sequences.shape[1] - steps :]
    chosen = stacked[torch.arange(steps, device=stacked.device), beams.clamp(min=0), tokens]
    return chosen.masked_fill(beams < 0, 0.0)
