"""What one call to `generate()` remembers about its pictures, and the ranking of given answers.

Notable: the cache holds every block's keys and values of the media, computed once per call whatever the number of new
tokens and beams. It rides on `past_key_values`, so that a hand-written decoding loop keeps seeing the pictures too, and
it belongs to the call, so two calls in two threads do not meet. Beams need no copies: they share their prompt's
pictures in the flat stack.

Letters: R rows of the prompt, I pictures, M most pictures of a row, L latents, E width, n candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flamingo.config import FlamingoConfig
from flamingo.cross_attention import KeysValues
from flamingo.errors import UserError
from flamingo.media import phi_from_ids, picture_table

if TYPE_CHECKING:
    from flamingo.modeling import FlamingoForConditionalGeneration


@dataclass
class MediaCache:
    """The pictures of a call: their latents, whose they are, and what the blocks made of them."""

    features: Float[Tensor, "I L E"]
    """Latents of all pictures, one flat stack."""
    pictures: Int[Tensor, "R M"]
    """Places in the stack of each row's pictures, -1 for none."""
    keys_values: dict[str, KeysValues] = field(default_factory=dict)
    """Of each block, by its key."""
    seen: Int[Tensor, "B"] | None = None
    """How many `<image>` tokens each row has had so far; for the next call, which sees only the ids that follow."""

    @classmethod
    def of(cls, features: Float[Tensor, "I L E"], image_counts: Int[Tensor, "R"]) -> MediaCache:
        """Make the cache of a call from all rows' latents and the number of pictures of each row."""
        total = int(image_counts.sum())
        if total != len(features):
            raise UserError(f"image_counts sum to {total}, but {len(features)} pictures are given")
        return cls(features, picture_table(image_counts))

    def extended(self, features: Float[Tensor, "I L E"], image_counts: Int[Tensor, "R"]) -> MediaCache:
        """Return the cache with more pictures behind those of each row (a later turn of a conversation)."""
        if len(image_counts) != len(self.pictures):
            raise UserError(f"{len(image_counts)} rows continue a cache of {len(self.pictures)} rows")
        more = picture_table(image_counts, start=len(self.features))
        pictures = torch.cat([self.pictures, more], dim=1)
        pictures = pictures.gather(1, (pictures < 0).long().argsort(dim=1, stable=True))
        return MediaCache(torch.cat([self.features, features]), pictures, self.keys_values, self.seen)


def left_padded(
    input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], *others: Int[Tensor, "B T"]
) -> list[Tensor]:
    """Return ids, mask and further (B, T) tensors with every row's padding moved to its left."""
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return [tensor.gather(1, order) for tensor in (input_ids, attention_mask, *others)]


def count_phi(
    config: FlamingoConfig, input_ids: Int[Tensor, "B T"], *, seen: Int[Tensor, "B"] | None = None
) -> Int[Tensor, "B T"]:
    """Return the picture each token sees at inference, by counting `<image>` as the config says."""
    return phi_from_ids(input_ids, config.image_token_id, seen=seen, reset_token_id=config.media_reset_token_id)


def token_phi(phi: Int[Tensor, "B P"], length: int) -> Int[Tensor, "B T"]:
    """Return a prompt's explicit phi continued to `length` tokens: new tokens see what the last one saw."""
    missing = length - phi.shape[1]
    return torch.cat([phi, phi[:, -1:].expand(-1, missing)], dim=1) if missing > 0 else phi


def check_counts(phi: Int[Tensor, "B T"], media: MediaCache, seen: Int[Tensor, "B"] | None = None) -> None:
    """Compare the `<image>` tags that were counted in each row, in these tokens and before, with its pictures.

    Raises:
        UserError: they differ; names the row and both numbers.
    """
    tags, pictures = phi.amax(1), (media.pictures >= 0).sum(1)
    tags = tags if seen is None else torch.maximum(tags, seen.abs())
    tags = tags[:: max(len(tags) // max(len(pictures), 1), 1)]
    if len(wrong := (tags != pictures).nonzero()[:, 0]):
        row = int(wrong[0])
        raise UserError(f"row {row} has {int(tags[row])} <image> tags but {int(pictures[row])} pictures")


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
    model: FlamingoForConditionalGeneration,
    base_generate: Callable[..., Any],
    inputs: Tensor | None,
    *,
    return_full_text: bool = False,
    **kwargs: Any,
) -> Any:
    """Encode every picture once, pad the prompts on the left, generate, and return the new tokens only.

    Takes the processor's output and any argument of transformers' `generate`. With `return_full_text` the prompt is
    in front of what is returned, as transformers does it. Ends at `<|endofchunk|>` by default.
    """
    ids = kwargs.pop("input_ids", None) if inputs is None else inputs
    if ids is None:
        raise UserError("generate needs input_ids, as from the processor")
    pictures = {name: kwargs.pop(name, None) for name in ("pixel_values", "media_features", "image_counts")}
    mask, phi = kwargs.pop("attention_mask", None), kwargs.pop("phi", None)
    past = kwargs.get("past_key_values")
    media = model._media_of(len(ids), kwargs.pop("media_cache", None), past, pictures)
    if phi is None and getattr(past, "media", None) is None:
        check_counts(count_phi(model.config, ids), media)
    if mask is not None and mask.shape == ids.shape and not bool(mask[:, -1].all()):
        ids, mask, *moved = left_padded(ids, mask, *(() if phi is None else (phi,)))
        phi = moved[0] if moved else None
    if phi is not None:
        kwargs["phi"] = phi
    out = base_generate(ids, attention_mask=mask, media_cache=media, **kwargs)
    if return_full_text:
        return out
    if isinstance(out, Tensor):
        return out[:, ids.shape[1] :]
    out.sequences = out.sequences[:, ids.shape[1] :]
    return out


Candidates = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]


def per_row_candidates(candidates: Candidates, rows: int) -> list[list[list[int]]]:
    """Return candidates as one list per row; n lists of ids are shared by all rows.

    Raises:
        UserError: no candidates, an empty one, rows of different numbers, or not as many lists as rows.
    """
    if not len(candidates):
        raise UserError("score_candidates needs at least one candidate")
    shared = not len(candidates[0]) or isinstance(candidates[0][0], int)
    listed: Any = [candidates] * rows if shared else candidates
    if len(listed) != rows or len({len(row) for row in listed}) != 1:
        raise UserError(f"candidates must be one list, or {rows} lists (one a row) of one length each")
    for row, options in enumerate(listed):
        for index, option in enumerate(options):
            if not len(option):
                raise UserError(f"candidate {index} of row {row} has no tokens")
    return [[list(option) for option in row] for row in listed]


@torch.no_grad()
def score_candidates(
    model: FlamingoForConditionalGeneration,
    prompt_inputs: Mapping[str, Any],
    candidates: Candidates,
    *,
    batch_size: int = 32,
) -> Float[Tensor, "B n"]:
    """Return the log-probability of each candidate after its row's prompt, summed over the candidate's tokens.

    Plain and exact: each prompt is run with each candidate, `batch_size` rows at a time; every picture is encoded once.
    `prompt_inputs` as from the processor (or `media_features` instead of `pixel_values`); `candidates` n lists of token
    ids shared by all rows, or one list of n lists a row.
    """
    inputs = dict(prompt_inputs)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    phi = inputs.get("phi")
    phi = count_phi(model.config, ids) if phi is None else phi
    media = model.media_cache(
        len(ids), **{k: inputs.get(k) for k in ("pixel_values", "media_features", "image_counts")}
    )
    ids, mask, phi = left_padded(ids, mask, phi)
    options = per_row_candidates(candidates, len(ids))
    jobs = [(row, option) for row, row_options in enumerate(options) for option in row_options]
    scores = [_score(model, ids, mask, phi, media, jobs[i : i + batch_size]) for i in range(0, len(jobs), batch_size)]
    return torch.cat(scores).view(len(ids), -1)


def _score(
    model: FlamingoForConditionalGeneration,
    ids: Tensor,
    mask: Tensor,
    phi: Tensor,
    media: MediaCache,
    jobs: list[tuple[int, list[int]]],
) -> Tensor:
    """Score some (row, candidate) pairs in one forward pass: prompts padded left, candidates right."""
    rows = torch.tensor([row for row, _ in jobs], device=ids.device)
    longest = max(len(option) for _, option in jobs)
    tail = torch.tensor([option + [option[-1]] * (longest - len(option)) for _, option in jobs], device=ids.device)
    real = torch.tensor([[i < len(option) for i in range(longest)] for _, option in jobs], device=ids.device)
    out = model(
        input_ids=torch.cat([ids[rows], tail], dim=1),
        attention_mask=torch.cat([mask[rows], real.to(mask.dtype)], dim=1),
        phi=token_phi(phi[rows], ids.shape[1] + longest),
        media_cache=MediaCache(media.features, media.pictures[rows]),
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    log_probs = out.logits[:, -longest - 1 : -1].float().log_softmax(-1)
    return (log_probs.gather(2, tail[..., None])[..., 0] * real).sum(1)
