"""`generate()` and what it needs around transformers' own.

Every image is encoded and the prompt is run once, whatever the number of beams or of sequences to return;
the copies begin with the prompt's last token.

Letters: B batch, T text tokens, P tokens of the prompt.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.inference.assistants import draft_of
from flamingo.inference.media_cache import ImageInputs, MediaCache, cached_length, check_counts, recall
from flamingo.inference.prompts import (
    check_length,
    check_rows,
    count_phi,
    inferred_mask,
    left_padded,
    token_phi,
)
from flamingo.inference.protocol import MediaModel
from flamingo.labels import SOFT_ID
from flamingo.transfer import on_host, sent


def default_generation_config(lm: PreTrainedModel, config: FlamingoConfig) -> GenerationConfig:
    """Return the LM's own settings, ending at `<|endofchunk|>` too, never giving `<image>`, and with a cache."""
    own = GenerationConfig(**lm.generation_config.to_dict())
    eos = own.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    own.eos_token_id = [config.eoc_token_id, *(i for i in eos if i != config.eoc_token_id)]
    if own.pad_token_id is None:
        own.pad_token_id = config.eoc_token_id
    own.suppress_tokens = sorted({*(own.suppress_tokens or ()), *unwanted_tokens(config)})
    own.use_cache = True  # MPT's config has it off
    return own


def unwanted_tokens(config: FlamingoConfig) -> set[int]:
    """Return the ids that are never generated: the new tokens but `<|endofchunk|>`."""
    return {config.image_token_id, *(config.new_token_ids or ())} - {config.eoc_token_id}


@torch.no_grad()
def generate(
    model: MediaModel,
    base_generate: Callable[..., Any],
    inputs: Tensor | None,
    *,
    output_cross_attentions: bool = False,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Encode every image once, pad the prompts on the left, generate, and return the prompts and what follows.

    Takes the processor's output and any argument of transformers' `generate`, and returns what that returns: what is
    new is `out[:, inputs["input_ids"].shape[1]:]`. The prompts are returned as given, wherever their padding is. Ends
    at `<|endofchunk|>` by default; `<image>` is never given. Without `attention_mask`, padding is found by its token.

    With `past_key_values` (of an earlier call) `input_ids` are the whole rows, or with an attention mask of the whole
    rows those that follow; images are the new ones, or, for whole rows, all of them. `return_dict` changes nothing.

    With `output_cross_attentions` and `return_dict_in_generate` the result has `cross_attentions`: for the prompt and
    for each new token but the last, every block's weights (B, H, T, L) as `FlamingoOutput` has them. T is 1 behind the
    prompt, and B counts beams, in their order of that step.

    Raises:
        UserError: a row without tokens; images and `<image>` tags that differ in number (names the row and both
            numbers); more tokens than the LM has positions; a way of decoding that cannot show images; logits that are
            not finite.
    """
    options = Options(model, kwargs)
    refuse_unsupported(options, output_cross_attentions)
    keep_unwanted(model, kwargs, options)
    prompt = _checked_prompt(model, inputs, kwargs, options)
    # Before the caller's own: they may set what they forbid to minus infinity, and choose by what NaN makes of a sum.
    finite = FiniteLogits()
    kwargs["logits_processor"] = LogitsProcessorList([finite, *(kwargs.get("logits_processor") or ())])
    others = kwargs.get("stopping_criteria") or ()
    kwargs["stopping_criteria"] = StoppingCriteriaList([StopNotFinite(finite), *others])
    media = prompt.media
    if prompt.phi is not None:
        kwargs["phi"] = prompt.phi
    if output_cross_attentions:
        media.maps = []
    elif (copies := options.copies()) > 1 and prompt.ids.shape[1] > 1 and options.can_share_prompt():
        kwargs["past_key_values"] = _prompt_cache(model, prompt, copies)
    # Without a mask transformers would infer one of its own; a mask of ones it leaves out.
    ones = prompt.ids.new_ones(len(prompt.ids), prompt.width)
    mask = ones if prompt.mask is None else prompt.mask
    ids, mask = (sent(x, prompt.device) for x in (prompt.ids, mask))
    out = base_generate(input_ids=ids, attention_mask=mask, media_cache=media, **kwargs)
    finite.check()
    if not isinstance(out, Tensor) and output_cross_attentions:
        out.cross_attentions = tuple(media.maps or ())
    return _with_prompts(out, prompt)


class FiniteLogits(LogitsProcessor):
    """Notes logits of which the largest is not finite, without waiting for them; `check` refuses them afterwards."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None
        """Whether any row's were, in any step."""
        self._steps: list[tuple[Tensor, int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores; rows of zeros for those that are refused, of which nothing can be drawn."""
        best = scores.amax(-1)  # NaN if one of them is
        bad = ~best.isfinite()
        self.bad = bad.any() if self.bad is None else self.bad | bad.any()
        self._steps.append((best, input_ids.shape[1]))
        return scores.masked_fill(bad[:, None], 0.0)

    def check(self) -> None:
        """Raise UserError, naming the row and the token, if a token was chosen from such logits."""
        if self.bad is None or not bool(self.bad):
            return
        for best, tokens in self._steps:
            for row, value in enumerate(best.tolist()):
                if not math.isfinite(value):
                    raise UserError(
                        f"the logits of row {row} are not finite ({value}) after {tokens} tokens: look at the pixel "
                        "values given, or compute in float32 or bfloat16 instead of float16"
                    )


class StopNotFinite(StoppingCriteria):
    """Ends all rows with the step whose logits are refused."""

    def __init__(self, finite: FiniteLogits) -> None:
        self._finite = finite

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows end, (B,), without waiting for the answer."""
        none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return none if self._finite.bad is None else none | self._finite.bad.to(none.device)


class WithoutSoftPrompts(LogitsProcessorList):
    """Processors that see another token in the places of a soft prompt's vectors: some look up logits by the ids."""

    def __init__(self, processors: LogitsProcessorList, stand_in: int) -> None:
        super().__init__(processors)
        self.stand_in = stand_in

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return (B, V) scores; `stand_in` is a token that is never generated."""
        seen: Any = input_ids.masked_fill(input_ids >= SOFT_ID, self.stand_in)
        out: Tensor = super().__call__(seen, scores, **kwargs)
        return out


@dataclass
class Prompt:
    """The prompts of a call as they are run."""

    ids: Tensor
    mask: Tensor | None
    phi: Tensor | None
    """As the caller gave it."""
    media: MediaCache
    images: ImageInputs
    width: int
    """Tokens of a row, those in the cache included."""
    given: Tensor | None = None
    """The ids as the caller padded them, where that was another way."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where they are run. Until then they are on the host."""


class Options:
    """What a call asks for: its arguments, else those of its `generation_config`, else the model's."""

    def __init__(self, model: MediaModel, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self._configs = (kwargs.get("generation_config"), model.generation_config)
        self.lm_config: Any = model.language_model.config.get_text_config(decoder=True)

    def __call__(self, name: str) -> Any:
        """Return the value of an option, None where nobody sets it."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    def copies(self) -> int:
        """Return how many beams or sequences follow each prompt."""
        return max(self("num_beams") or 1, self("num_return_sequences") or 1)

    def can_share_prompt(self) -> bool:
        """Say whether all copies of a prompt may start from one run of it."""
        whole = ("past_key_values", "output_attentions", "output_hidden_states", "cache_implementation")
        other = ("guidance_scale", "prefill_chunk_size", "inputs_embeds", "custom_generate")
        return not any(self(name) is not None and self(name) is not False for name in whole + other) and (
            self("use_cache") is not False
        )

    def new_tokens(self, width: int) -> tuple[int, str]:
        """Return the most new tokens behind a prompt of so many, and the option that says so."""
        if (new := self("max_new_tokens")) is not None:
            return new, "max_new_tokens"
        if (longest := self("max_length")) is not None:
            return max(longest - width, 1), "max_length"
        return 20, "max_new_tokens"  # transformers' default

    def assisted(self) -> bool:
        """Say whether tokens are drafted first."""
        return self("assistant_model") is not None or self("prompt_lookup_num_tokens") is not None


def refuse_unsupported(options: Options, maps: bool) -> None:
    """Refuse ways of decoding that would not see the images, or that lose them, and no tokens. Raises UserError."""
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        if options(name) is not None and options(name) < 1:
            raise UserError(f"{name}={options(name)} must be at least 1")
    modes = {
        "penalty_alpha": "contrastive search",
        "dola_layers": "DoLa",
        "constraints": "constrained beam search",
        "force_words_ids": "constrained beam search",
        "assistant_early_exit": "early exit",
        "use_mtp": "multi-token prediction",
        "token_healing": "token healing",
    }
    asked = next((name for name in modes if options(name)), None)
    if asked is None and (options("num_beam_groups") or 1) > 1:
        asked, modes["num_beam_groups"] = "num_beam_groups", "group beam search"
    if asked is not None and options("custom_generate") is None:
        raise UserError(f"{asked}: {modes[asked]} does not know of images; use greedy decoding, samples or beams")
    _refuse_caches(options)
    past = options("past_key_values")
    if options.assisted():
        if options("cache_implementation") not in (None, "dynamic"):
            raise UserError("assisted decoding takes words back from its cache; leave cache_implementation out")
        if cached_length(past) or not isinstance(past, DynamicCache | None):
            raise UserError("assisted decoding runs the whole prompt; leave past_key_values out")
        if options("assistant_tokenizer") is not None and options("do_sample"):
            raise UserError("an assistant with another tokenizer drafts for greedy decoding only; set do_sample=False")
    if maps and (options.assisted() or options("prefill_chunk_size")):
        raise UserError("output_cross_attentions has one entry a token; leave assistants and prefill_chunk_size out")
    if options("use_cache") is False and (cached_length(past) or options.assisted()):
        raise UserError("use_cache=False cannot go on from past_key_values and takes no assistant; leave it out")


def _refuse_caches(options: Options) -> None:
    kind, past = options("cache_implementation"), options("past_key_values")
    if kind == "paged":
        raise UserError("cache_implementation='paged' cannot show images; leave it out")
    config = options.lm_config
    fixed = isinstance(past, StaticCache) or (
        isinstance(kind, str) and kind not in ("dynamic", "offloaded", "quantized")
    )
    if fixed and "local" in getattr(config, "attention_layers", ()):
        raise UserError(f"transformers' {config.model_type} is wrong with a static cache; leave it out")


def keep_unwanted(model: MediaModel, kwargs: dict[str, Any], options: Options) -> None:
    """Add the tokens that are never given to a call's own `suppress_tokens`."""
    wanted = options("suppress_tokens") or []
    every = sorted({*wanted, *unwanted_tokens(model.config)})
    if sorted(wanted) == every:
        return
    if "suppress_tokens" in kwargs or kwargs.get("generation_config") is None:
        kwargs["suppress_tokens"] = every
    else:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].suppress_tokens = every


def _checked_prompt(model: MediaModel, inputs: Tensor | None, kwargs: dict[str, Any], options: Options) -> Prompt:
    """Read the prompts and see that there is room behind them; an assistant becomes what this call needs of it."""
    ids = kwargs.pop("input_ids", None)
    if inputs is not None and ids is not None:
        raise UserError("generate has the prompt twice, as its first argument and as input_ids; give one")
    ids, embeds = ids if inputs is None else inputs, kwargs.get("inputs_embeds")
    read = _prompt if embeds is None else _embedded
    for name in ("attention_mask", "phi"):
        if isinstance(kwargs.get(name), Tensor):
            kwargs[name] = on_host(kwargs[name])
    prompt = read(model, None if ids is None else on_host(ids), kwargs, options)
    where = [x.device for x in (embeds, ids) if x is not None and x.device.type != "cpu"]
    prompt.device, prompt.media = next(iter(where), model.language_model.device), prompt.media.hosted()
    new, what = options.new_tokens(prompt.ids.shape[1] or prompt.width)
    check_length(model, prompt.width, prompt.mask, new, what)
    rows, assistant = len(prompt.ids), options("assistant_model")
    if options.assisted() and rows > 1:
        raise UserError("assisted decoding takes one row at a time; call generate for each")
    if assistant is not None and bool((prompt.ids >= SOFT_ID).any()):
        raise UserError("an assistant does not know this model's soft prompts; leave assistant_model out")
    if assistant is not None:
        translated = options("assistant_tokenizer") is not None
        longest = prompt.width + new
        draft = draft_of(model, assistant, rows, prompt.images, longest, translated=translated)
        kwargs["assistant_model"] = draft
    return prompt


def _prompt(model: MediaModel, ids: Tensor | None, kwargs: dict[str, Any], options: Options) -> Prompt:
    """Read, check and left-pad the prompts; what is about images, and the mask, is taken out of `kwargs`."""
    images = ImageInputs(**{name: kwargs.pop(name, None) for name in ImageInputs._fields})
    mask, phi, given = (kwargs.pop(name, None) for name in ("attention_mask", "phi", "media_cache"))
    ids = _begun(model) if ids is None else ids
    check_rows(ids, None)
    if cached_length(past := kwargs.get("past_key_values")):
        return _continued(model, past, ids, mask, phi, given, images, options.copies())
    if mask is None:
        mask = inferred_mask(model, ids)
    elif mask.shape != ids.shape:
        raise UserError(f"attention_mask is of shape {tuple(mask.shape)}, but input_ids of {tuple(ids.shape)}")
    check_rows(ids, mask)
    media = model.media_of(len(ids), given, None, images).branch()
    model.check_ids(ids)
    if phi is None:
        check_counts(count_phi(model.config, ids), media)
    prompt = Prompt(ids, mask, phi, media, images, ids.shape[1])
    if mask is not None and not bool(mask[:, -1].all()):
        prompt.given = ids
        prompt.ids, prompt.mask, *moved = left_padded(ids, mask, *(() if phi is None else (phi,)))
        prompt.phi = moved[0] if moved else None
    if phi is None:
        prompt.phi = _known_phi(model, count_phi(model.config, prompt.ids))
    return prompt


def _known_phi(model: MediaModel, tags: Tensor) -> Tensor | None:
    """Return which image each token sees where that of the tokens to come is known too: the last one of the prompt.

    `<image>` is never given, so only a token that resets would have to be looked for in every step.
    """
    return None if model.config.media_reset_token_id is not None else tags


def _begun(model: MediaModel) -> Tensor:
    """Return the begin-of-sequence token, with which a call without a prompt starts, as in transformers."""
    bos = model.generation_config.bos_token_id
    if bos is None:
        raise UserError("generate needs input_ids, as from the processor")
    return torch.tensor([[bos]])


def _continued(
    model: MediaModel,
    past: Any,
    ids: Tensor,
    mask: Tensor | None,
    phi: Tensor | None,
    given: MediaCache | None,
    images: ImageInputs,
    copies: int,
) -> Prompt:
    """Read rows that go on behind a cache. The cache gets a row for each copy, if it has one for each prompt."""
    before, remembered = cached_length(past), recall(past)
    remembered = None if remembered is None else remembered.hosted()
    repeated = remembered is not None and copies > 1 and len(remembered.images) == copies * len(ids)
    if remembered is not None and repeated:
        remembered = remembered.moved(lambda rows: rows[::copies])
    if remembered is not None and len(remembered.images) != len(ids):
        raise UserError(f"{len(ids)} rows continue a cache of {len(remembered.images)} rows")
    whole = ids.shape[1] > before and (mask is None or mask.shape == ids.shape)
    seen = None if remembered is None or whole else remembered.seen
    tags = count_phi(model.config, ids, seen=seen)
    if whole and phi is None and remembered is not None and remembered.seen is not None:
        named = tags[:, :before].amax(1)
        if len(wrong := (named != remembered.seen.abs()).nonzero()[:, 0]):
            row = int(wrong[0])
            raise UserError(
                f"row {row} of the cache has seen {int(remembered.seen[row].abs())} images in its {before} tokens, but "
                f"so many of input_ids name {int(named[row])}; give whole rows, or the tokens that follow with an "
                "attention_mask of the whole rows"
            )
    mask = _whole_mask(model, ids, mask, before, whole, remembered)
    media = _media_behind(model, past, len(ids), given, images, remembered, tags if whole and phi is None else None)
    if phi is None:
        check_counts(tags, media, seen)
        phi = _known_phi(model, tags)
    if phi is not None and not whole and phi.shape == ids.shape:
        phi = torch.cat([phi.new_zeros(len(phi), before), phi], dim=1)
    if copies > 1 and not repeated:
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in past.layers):
            raise UserError(
                f"beams and several sequences cannot go on from a {type(past).__name__}; use a DynamicCache"
            )
        past.batch_repeat_interleave(copies)
    width = ids.shape[1] + (0 if whole else before)
    return Prompt(ids, mask, phi, media, images, width)


def _whole_mask(
    model: MediaModel, ids: Tensor, mask: Tensor | None, before: int, whole: bool, remembered: MediaCache | None
) -> Tensor | None:
    """Return the mask of the cache's tokens and the new ones, by whose width transformers knows what `ids` are."""
    known = None if remembered is None else remembered.mask
    width = ids.shape[1] + (0 if whole else before)
    if mask is None and known is None:
        return inferred_mask(model, ids) if whole else ids.new_ones(len(ids), width)
    if mask is None or mask.shape[1] == width - before:
        known = ids.new_ones(len(ids), before) if known is None else known
        new = known.new_ones(len(ids), width - before) if mask is None else mask.to(known)
        mask = torch.cat([known, new], dim=1)
    if mask.shape != (len(ids), width):
        raise UserError(
            f"attention_mask is of shape {tuple(mask.shape)}, but the rows have {width} tokens, {before} of them cached"
        )
    if not bool(mask[:, -1].all()):
        raise UserError("rows that are padded on the right cannot go on from a cache; pad them on the left")
    return mask


def _media_behind(
    model: MediaModel,
    past: Any,
    rows: int,
    given: MediaCache | None,
    images: ImageInputs,
    remembered: MediaCache | None,
    tags: Tensor | None,
) -> MediaCache:
    """Return the images of rows behind a cache: the new ones are added, unless they are all that whole rows name."""
    if given is not None or remembered is None:
        return model.media_of(rows, given, past, images)
    if images.pixel_values is None and images.media_features is None:
        return remembered
    new = model.media_of(rows, None, None, images)
    counts = (new.images >= 0).sum(1)
    if tags is not None and torch.equal(counts, tags.amax(1)):
        return replace(new, history=remembered.history, mask=remembered.mask)
    return remembered.extended(new.features, counts)


def _embedded(model: MediaModel, ids: Tensor | None, kwargs: dict[str, Any], options: Options) -> Prompt:
    """Read prompts that come as embeddings; where the images stand, ids of the same width or phi say."""
    if "inputs_embeds" not in inspect.signature(type(model).forward).parameters:  # type: ignore[attr-defined]
        raise UserError("generate takes input_ids, which say where the images are, and not inputs_embeds")
    rows, width = kwargs["inputs_embeds"].shape[:2]
    images = ImageInputs(**{name: kwargs.pop(name, None) for name in ImageInputs._fields})
    mask, phi, given = (kwargs.pop(name, None) for name in ("attention_mask", "phi", "media_cache"))
    media = model.media_of(rows, given, None, images).branch()
    if cached_length(kwargs.get("past_key_values")):
        raise UserError("inputs_embeds cannot go on from past_key_values; give input_ids")
    if mask is not None and not bool(mask[:, -1].all()):
        raise UserError("inputs_embeds must be padded on the left")
    if phi is None and ids is not None and ids.shape == (rows, width):
        check_counts(phi := count_phi(model.config, ids), media)
    elif phi is None and bool((media.images >= 0).any()):
        raise UserError("inputs_embeds do not say where the images are; give input_ids of the same width too, or phi")
    ids = torch.zeros(rows, 0, dtype=torch.long) if ids is None else ids
    phi = ids.new_zeros(rows, width) if phi is None else phi
    return Prompt(ids, mask, phi, media, images, width)


def _with_prompts(out: Any, prompt: Prompt) -> Any:
    """Put the prompts back as the caller padded them."""
    if prompt.given is not None:
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = prompt.given.repeat_interleave(len(sequences) // len(prompt.given), dim=0)
        sequences[:, : prompts.shape[1]] = sent(prompts, sequences.device)
    return out


def _prompt_cache(model: MediaModel, prompt: Prompt, copies: int) -> Cache | None:
    """Run the prompts up to their last token, and return their cache, `copies` times a row; None where it cannot be."""
    ids, mask = prompt.ids, prompt.mask
    phi = count_phi(model.config, ids) if prompt.phi is None else prompt.phi
    before = {"input_ids": ids[:, :-1], "attention_mask": None if mask is None else mask[:, :-1], "phi": phi[:, :-1]}
    cache = model(
        **before, media_cache=prompt.media, use_cache=True, logits_to_keep=1, return_dict=True
    ).past_key_values
    if not isinstance(cache, Cache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def phi_of_step(
    config: FlamingoConfig, input_ids: Int[Tensor, "B T"], new: int, past: Any, phi: Int[Tensor, "B P"] | None
) -> Int[Tensor, "B N"]:
    """Return which image the `new` tokens of a step see: as `phi` of the prompts says, else by counting.

    `input_ids` are whole rows, or what follows the cache.
    """
    before = cached_length(past)
    if phi is not None:
        return token_phi(phi, before + new)[:, before : before + new]
    if input_ids.shape[1] == before + new:
        return count_phi(config, input_ids)[:, before:]
    remembered = recall(past)
    seen = None if remembered is None or remembered.seen is None else on_host(remembered.seen)
    return count_phi(config, on_host(input_ids[:, -new:]), seen=seen)


def transition_scores(
    sequences: Int[Tensor, "B T"],
    scores: Sequence[Tensor],
    beam_indices: Tensor | None,
    normalize_logits: bool,
    own: GenerationConfig,
) -> Float[Tensor, "B S"]:
    """Return the score with which each of the last S tokens was chosen, 0 behind the end of a row or beam.

    transformers' own counts the columns by the LM's vocabulary, which has no rows for the new tokens. `own`: the
    model's generation config, whose padding stands behind the end of a row.
    """
    stacked = torch.stack(tuple(scores)).float()  # (S, beams, V)
    stacked = stacked.log_softmax(-1) if normalize_logits else stacked
    if beam_indices is None:
        beam_indices = torch.arange(stacked.shape[1], device=stacked.device)[:, None].expand(-1, len(stacked))
    steps = int((beam_indices >= 0).sum(-1).max())
    beams, tokens = beam_indices[:, :steps], sequences[:, sequences.shape[1] - steps :]
    chosen = stacked[torch.arange(steps, device=stacked.device), beams.clamp(min=0), tokens]
    return chosen.masked_fill((beams < 0) | _padding_behind(tokens, own), 0.0)


def _padding_behind(tokens: Int[Tensor, "B S"], own: GenerationConfig) -> Bool[Tensor, "B S"]:
    """Return which generated tokens are padding; where padding is an end itself, the first one was chosen."""
    if own.pad_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    padding = (tokens == own.pad_token_id).flip(-1).cumprod(-1).flip(-1).bool()
    ends = torch.as_tensor(own.eos_token_id if own.eos_token_id is not None else [], device=tokens.device).reshape(-1)
    if own.pad_token_id not in ends.tolist():
        return padding
    before = torch.isin(F.pad(tokens[:, :-1], (1, 0), value=-1), ends)
    return padding & before
