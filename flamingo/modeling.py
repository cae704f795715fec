"""`FlamingoForConditionalGeneration`: frozen encoder, connector, gated blocks inside a frozen causal LM.

Alayrac et al. 2022. The images of a batch are one flat stack with a count per row, never padded; the LM is an untouched
transformers model that is driven through hooks (`language/hooks.py`); the loss is computed in chunks and only over
positions with a label, so that training builds no (B, T, V) tensor (`language/loss.py`).

Letters: B batch, T text tokens, I images of all rows, F frames, C channels, S side in pixels, L latents, E media
width, H heads, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CompileConfig,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from flamingo import storage
from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.inference import generation, scoring
from flamingo.inference.assistants import vocabulary
from flamingo.inference.media_cache import ImageInputs, MediaCache, remember
from flamingo.inference.prompts import call_mask, checked_phi
from flamingo.labels import IGNORED
from flamingo.language.hooks import (
    Call,
    Wiring,
    check_new_ids,
    check_ran,
    new_tokens_for,
    output_head,
    running,
    table_shape,
    unwrapped,
    wire,
)
from flamingo.language.inputs import (
    check_ids,
    checked_arguments,
    counted_positions,
    fitted_phi,
    ids_of_embeddings,
    takes,
)
from flamingo.language.loss import changes_logits, next_labels, reducer
from flamingo.language.packing import packed_inputs
from flamingo.layers.attention import laid_out
from flamingo.layers.connector import connector_class
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.layers.media_mask import Segments, segments_of_rows, slots_from_phi
from flamingo.media_encoding import EncodesMedia
from flamingo.transfer import on_host, sent
from flamingo.vision.encoder import VisionEncoder, build_encoder


@dataclass
class FlamingoOutput(CausalLMOutputWithPast):
    """What a forward pass returns; `media_features` (I, L, E) can be given again instead of the images.

    `cross_attentions`, if asked for, is for each block how the attention of every token is spread over the latents of
    the image it sees, (B, H, T, L), zero where it sees none; `phi` (B, T) says which image that is. (With
    `attend_all_previous` the last axis holds the latents of all images of the row, one after the other.)
    """

    loss: Tensor | None = None  # transformers before 5.23 declares these two as float32
    logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None  # type: ignore[assignment]  # None at layers that were not asked for
    media_features: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    phi: Tensor | None = None


class FlamingoForConditionalGeneration(EncodesMedia, GenerationMixin):
    """Text and images in, next tokens out.

    Built from a config with random weights, or by `from_backbones` / `from_pretrained`. `vision_module` and `causal_lm`
    are built modules to use instead of what the config describes.
    """

    def __init__(
        self, config: FlamingoConfig, vision_module: nn.Module | None = None, causal_lm: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        for built in (vision_module, causal_lm):
            for module in built.modules() if built is not None else ():
                module._is_hf_initialized = True  # type: ignore[assignment]
        if vision_module is None:
            vision_module = build_encoder(config.vision, config.vision_config.encoder_config)
        elif isinstance(vision_module, PreTrainedModel):
            config.vision_config.encoder_config = vision_module.config  # one object, whoever built it
        self.vision_encoder = VisionEncoder(vision_module, config.vision)
        if causal_lm is None:
            if config.language_kind == "module":
                raise UserError("the language model was built by the caller and cannot be rebuilt; pass language=...")
            causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = causal_lm
        self.resampler = connector_class(config.connector)(config.vision.width, **config.resampler_config)
        width = config.text_config.get_text_config(decoder=True).hidden_size
        self.cross_attn_blocks = nn.ModuleDict(
            {
                str(i): GatedCrossAttentionBlock(width, self.resampler.width, **config.cross_attention_config)
                for i in config.cross_attn_layers or ()
            }
        )
        soft = sum(getattr(config, "soft_prompts", {}).values())
        self.new_tokens = new_tokens_for(causal_lm, list(config.new_token_ids or ()), soft)
        # Whether the LM's logits are what its head gives; None: not known yet.
        self._head_is_last: bool | None = None
        self._adopt(causal_lm)
        self._wiring()
        for module in self.modules():  # what constructors drew stays as it is; on the meta device they drew nothing
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm) and not getattr(
                module.weight, "is_meta", True
            ):
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()
        self.generation_config = generation.default_generation_config(causal_lm, config)
        storage.hand_down(self)
        self.freeze(config.freezing_policy)

    def __setstate__(self, state: Any) -> None:
        """Restore a copy, whose tables then know their model."""
        super().__setstate__(state)
        self._wiring()

    def _wiring(self) -> Wiring:
        """Return the modules that hang in the tree now, after a look at whether they fit together.

        Raises:
            UserError: a module that was replaced does not fit; says what was found and what is needed.
        """
        lm = self.language_model
        wiring = wire(
            self, lm, self.cross_attn_blocks, self.new_tokens, decoder_layers_path=self.config.decoder_layers_path
        )
        if lm.config is not self.config.text_config:
            self._check_vocabulary(lm)
            self._adopt(lm)
        for key, block in self.cross_attn_blocks.items():
            media_width = getattr(getattr(getattr(block, "attn", None), "k_proj", None), "in_features", None)
            if media_width not in (None, self.resampler.width):
                raise UserError(
                    f"the resampler gives latents {self.resampler.width} wide, but the gated block of layer {key} "
                    f"takes {media_width}; give a module of that width"
                )
        return wiring

    def _check_vocabulary(self, lm: Any) -> None:
        """Raise UserError where rows of another LM would be taken for those of the new tokens."""
        before = self.config.text_config.get_text_config(decoder=True).vocab_size
        after = table_shape(output_head(lm))[0]
        if taken := [token for token in self.new_tokens.ids if before <= token < after]:
            raise UserError(
                f"the language model put in has a vocabulary of {after} rows, the one before had {before}, so the new "
                f"tokens' ids {taken} would hide words of it; build a model around it with from_backbones, or, if it "
                "is the same one with rows added, put it in first and then call model.resize_token_embeddings"
            )

    def _adopt(self, lm: Any) -> None:
        """Let the config follow the LM that hangs in the tree, which may not be the one that was built in."""
        self.config.text_config = lm.config
        self.config.tie_word_embeddings = bool(getattr(lm.config, "tie_word_embeddings", False))
        self._head_is_last = False if changes_logits(lm.config.get_text_config(decoder=True)) else None

    def check_ids(self, input_ids: Int[Tensor, "B T"]) -> None:
        """Raise UserError where an id has no row in the tables; only ids on the host are looked at."""
        check_ids(input_ids, self._wiring())

    @property
    def lm_takes_positions(self) -> bool:
        """Whether the language model's `forward` has `position_ids`."""
        return takes(self.language_model, "position_ids")

    def get_input_embeddings(self) -> nn.Module:
        """Return the LM's input embedding; called with ids it gives the new tokens' rows for theirs."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LM's input embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM's head, which has no rows for new tokens behind its own."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LM's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: Any = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the LM's table and head, as for any causal LM; give `len(tokenizer)`.

        The new tokens keep their own (trained) rows: an id of theirs that then lies inside the table is still theirs.

        Raises:
            UserError: the table would end in front of a new token's id.
        """
        rows = table_shape(output_head(self.language_model))[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if isinstance(pad_to_multiple_of, int):  # anything else the LM refuses itself
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        last = max(self.new_tokens.ids, default=-1)
        if wanted < rows and wanted <= last:
            raise UserError(
                f"resize_token_embeddings({new_num_tokens}) would end the table of {rows} rows in front of the new "
                f"token {last}; {last + 1} is the least, unless the model is built again from its backbones"
            )
        check_new_ids(list(self.new_tokens.ids), wanted, type(self.language_model).__name__)
        table: nn.Embedding = self.language_model.resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.vocab_size = self.config.text_config.get_text_config(decoder=True).vocab_size
        return table

    @classmethod
    def from_backbones(cls, vision: Any, language: Any, **options: Any) -> tuple[Any, Any]:
        """Return (model, processor) from an encoder and a causal LM; see `flamingo.backbones.from_backbones`."""
        from flamingo.backbones import from_backbones

        return from_backbones(cls, vision, language, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | dict[str, Any] | None = None,
        pixel_values: Shaped[Tensor, "..."] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
        frame_counts: Int[Tensor, "I"] | None = None,
        phi: Int[Tensor, "B P"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        media_features: Float[Tensor, "J L E"] | None = None,
        media_cache: MediaCache | None = None,
        sequence_ids: Int[Tensor, "B T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_reduction: str = "mean",
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        output_cross_attentions: bool = False,
        inputs_embeds: Float[Tensor, "B Z D"] | None = None,
        **kwargs: Any,
    ) -> FlamingoOutput:
        """Run the model.

        Args:
            input_ids: tokens, `<image>` for each image or clip; `attention_mask`: (B, past + T), 0 for padding.
            pixel_values: all images, (I, F, C, S, S), or frames (N, C, S, S); or `media_features`, or a `media_cache`.
            image_counts: images of each row, may be left out for one; `frame_counts`: frames of each, if they differ.
            phi: the image each token sees, 1-based within its row, 0 none; by default `<image>` tokens are counted.
            labels: like `input_ids`, -100 where there is no loss; shifted here.
            past_key_values: the cache of earlier calls, with their images; `use_cache`: by default off with labels.
            position_ids: by default counted from `attention_mask`, so that left padding changes nothing.
            sequence_ids: where rows are packed, which sequence each token is of, 0 padding (`packing.py`); needs `phi`.
            num_items_in_batch: divisor of the token losses' sum, else their number; or `loss_reduction="none"`: (N,).
            logits_to_keep: the last so many, 0 all, or positions; `skip_logits`: with labels none (so in training).
            output_cross_attentions: return every block's attention weights, computed the slow way.
            inputs_embeds: see `_ids`; what `phi` is too short for stands in front, no image (peft's prompt tuning).
            kwargs: go to the language model; `return_dict=False` gives a tuple.

        Raises:
            UserError: images that do not match the counts or tags, ids without a row, unknown arguments, misfits.
        """
        compiled, kwargs = kwargs.pop("compiled_lm", None), checked_arguments(self.language_model, kwargs, type(self))
        ids = self._ids(input_ids, inputs_embeds, wiring := self._wiring())
        where = self._runs_on(pixel_values, media_features, inputs_embeds, ids)
        if (sequence_ids := _sent(sequence_ids, where)) is not None:
            attention_mask, position_ids, use_cache = packed_inputs(self, sequence_ids, phi, past_key_values, use_cache)
        images = ImageInputs(pixel_values, media_features, image_counts, frame_counts)
        media = self.media_of(len(ids), media_cache, past_key_values, images)
        phi = self._phi(phi, ids, media, past_key_values, embedded=inputs_embeds is not None)
        attention_mask = call_mask(self, ids, attention_mask, media, past_key_values, position_ids)
        lean = (self.training and labels is not None) if skip_logits is None else skip_logits
        cached = (not self.training and labels is None) if use_cache is None else use_cache
        attention_mask, position_ids = (_sent(x, where) for x in (attention_mask, position_ids))
        kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": cached}
        early = self._add_options(kwargs, ids.shape[1], position_ids, inputs_embeds, logits_to_keep, labels)
        call = self._call(ids := sent(ids, where), phi, media, kwargs, output_cross_attentions, wiring, compiled)
        loss, out = self._run_with_loss(ids, call, kwargs, labels, reducer(loss_reduction, num_items_in_batch), lean)
        out.logits = out.logits if early or lean else last_of(out.logits, logits_to_keep)
        return self._output(out, loss, phi, media, call.segments, lean)

    def _phi(
        self, phi: Tensor | None, ids: Tensor, media: MediaCache, past: Cache | None, *, embedded: bool
    ) -> Int[Tensor, "B T"]:
        """Return which image each token sees, on the host: as given, else counted."""
        phi = checked_phi(self.config, ids, media, past) if phi is None else phi
        return fitted_phi(on_host(phi), (ids.shape[0], ids.shape[1]), embedded=embedded)

    def _add_options(
        self,
        options: dict[str, Any],
        length: int,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        logits_to_keep: int | Tensor,
        labels: Tensor | None,
    ) -> bool:
        """Add what this LM takes to its arguments; return whether it keeps only the wanted logits itself."""
        if self.lm_takes_positions:
            options["position_ids"] = counted_positions(position_ids, options["attention_mask"], length)
        if inputs_embeds is not None:
            options["inputs_embeds"] = inputs_embeds
        # With labels the logits of all positions are needed, and those that are not kept fall away at the end.
        early = labels is None and takes(self.language_model, "logits_to_keep")
        if early:
            options["logits_to_keep"] = logits_to_keep
        return early

    def _ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, wiring: Wiring) -> Int[Tensor, "B T"]:
        """Return the ids of the text, -1 where only an embedding is given.

        Beside embeddings, ids only say where the images are. Without ids the new tokens are found by their rows, as
        `get_input_embeddings()` gives them.

        Raises:
            UserError: neither is given, they differ in shape, an id has no row, or the LM takes no embeddings.
        """
        if input_ids is not None:
            check_ids(input_ids, wiring)
        if inputs_embeds is None:
            if input_ids is None:
                raise UserError("forward needs input_ids, as from the processor, or inputs_embeds")
            return input_ids
        if not takes(self.language_model, "inputs_embeds"):
            raise UserError(f"{type(unwrapped(self.language_model)).__name__} takes no inputs_embeds; give input_ids")
        if input_ids is None:
            return ids_of_embeddings(inputs_embeds, wiring, self.config.media_reset_token_id)
        if input_ids.shape != inputs_embeds.shape[:2]:
            raise UserError(
                f"input_ids are {tuple(input_ids.shape)}, but inputs_embeds {tuple(inputs_embeds.shape)}; both are of "
                "the same tokens, or input_ids are left out"
            )
        return input_ids

    def _call(
        self,
        input_ids: Tensor,
        phi: Tensor,
        media: MediaCache,
        options: dict[str, Any],
        maps: bool,
        wiring: Wiring,
        compiled: Any,
    ) -> Call:
        """Return what the hooks need to know; makes the LM's cache that is asked for and missing."""
        if options["use_cache"]:
            if options["past_key_values"] is None:
                options["past_key_values"] = DynamicCache(config=self.config.get_text_config(decoder=True))
            reset, mask = self.config.media_reset_token_id, options["attention_mask"]
            remember(options["past_key_values"], media, phi, input_ids, mask, reset)
        features, keys_values = media.features, media.keys_values if options["use_cache"] else None
        images, maps = on_host(media.images), maps or media.maps is not None
        if self.config.attend_all_previous:
            segments = segments_of_rows(phi, images).on(features.device)
        else:
            slots = slots_from_phi(phi, images)
            fixed = phi.shape[1] == 1 and bool(options["use_cache"]) and compiled is not None and not maps
            if fixed and (step := media.step(slots)) is not None:
                features, segments, keys_values = step
            else:
                segments = media.segments(slots)
        segments = replace(segments, maps=[]) if maps else segments
        is_new = self.new_tokens.match(input_ids)
        return Call(wiring, features, segments, keys_values, is_new, run=compiled)

    def _run_language_model(self, input_ids: Tensor, call: Call, options: dict[str, Any]) -> Any:
        """Run the LM while the hooks know this call."""
        embedded = "inputs_embeds" not in options
        if embedded:
            options = {**options, "input_ids": input_ids.masked_fill(call.is_new.any(-1), 0)}
        # The LM looks in its own config only.
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):
                options.setdefault(name, True)
        with running(call):
            out = (self.language_model if call.run is None else call.run)(**options, return_dict=True)
        check_ran(call, self.language_model, embedded=embedded)
        return out

    def _run_with_loss(
        self,
        input_ids: Tensor,
        call: Call,
        options: dict[str, Any],
        labels: Tensor | None,
        reduce: Callable[[Tensor], Tensor],
        lean: bool,
    ) -> tuple[Tensor | None, Any]:
        """Run the LM; return the loss, if there are labels, and what the LM gave, if `lean` without all its logits."""
        if labels is None:
            if lean:
                raise ValueError("skip_logits needs labels")
            return None, self._run_language_model(input_ids, call, options)
        targets = next_labels(on_host(labels))
        positions = (targets != IGNORED).nonzero()[:, 0]
        targets, positions = (sent(x, call.media.device) for x in (targets[positions], positions))
        if lean:
            call.keep = positions
            call.targets = targets if self._head_is_last is not False else None
        out = self._run_language_model(input_ids, call, options)
        if call.nll is not None and self._head_is_last is None and len(positions):
            # A few LMs change the logits behind their head (Gemma 2 caps them). What went through as losses was then
            # changed as well, and the labelled positions are computed at once, from now on. (The values are compared,
            # which has to be waited for, only where the tensor is another one.)
            self._head_is_last = out.logits is call.left_head or bool(torch.equal(out.logits.flatten(), call.nll))
            if not self._head_is_last:
                call.targets = None
                out = self._run_language_model(input_ids, call, options)
        if call.targets is not None:
            return reduce(out.logits.flatten()), out
        logits = out.logits.flatten(0, -2)
        logits = logits if lean else logits[positions]
        return reduce(F.cross_entropy(logits.float(), targets, reduction="none")), out

    def _output(
        self, out: Any, loss: Tensor | None, phi: Tensor, media: MediaCache, segments: Segments, lean: bool
    ) -> FlamingoOutput:
        """Return what the LM gave, with the loss, the images of this call and the maps that were asked for."""
        maps = None
        if segments.maps is not None:
            latents = media.features.shape[1] * (media.images.shape[1] if self.config.attend_all_previous else 1)
            maps = laid_out(segments.maps, segments, len(self.cross_attn_blocks), latents)
            if media.maps is not None:
                media.maps.append(maps)
        return FlamingoOutput(
            loss=loss,
            logits=None if lean else out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            media_features=media.features,
            cross_attentions=maps,
            phi=None if maps is None else phi,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Continue prompts; see `flamingo.inference.generation.generate`."""
        return generation.generate(self, super().generate, inputs, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        media_cache: MediaCache | None = None,
        phi: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Let the LM prepare its inputs its own way (many families do), then add which image the tokens see."""
        language_model: Any = self.language_model
        inputs = language_model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        inputs["media_cache"] = media_cache
        new = next(x for x in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if x is not None).shape[1]
        inputs["phi"] = generation.phi_of_step(self.config, input_ids, new, past_key_values, phi)
        return inputs

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Return a call whose language model, gated blocks and all, is a compiled graph; `generate` decodes with it.

        That is with a static cache, on a GPU by itself, elsewhere if `compile_config` says so for all devices. What is
        around it decides shapes, on the host, and is not compiled.
        """
        options = (compile_config or self._default_compile_config()).to_dict()
        known = getattr(self, "_compiled_lm", None)
        if known is None or known[:2] != (options, self.language_model):
            known = self._compiled_lm = (options, self.language_model, torch.compile(self.language_model, **options))
        return functools.partial(self.__call__, compiled_lm=known[2])

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Let a search for candidates in the prompt know the new tokens too."""
        candidates: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if hasattr(candidates, "vocab_size"):
            candidates.vocab_size = vocabulary(self)
        return candidates

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Show transformers' processors of logits no ids that have none."""
        processors: Any = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        soft = self.new_tokens.soft is not None
        return generation.WithoutSoftPrompts(processors, self.config.image_token_id) if soft else processors

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what transformers' `generate_batch` needs: its paged cache knows no images."""
        raise UserError("continuous batching (generate_batch) cannot show images; use generate with a batch")

    def compute_transition_scores(
        self, sequences: Tensor, scores: Any, beam_indices: Tensor | None = None, normalize_logits: bool = False
    ) -> Tensor:
        """Return the scores of the chosen tokens; see `flamingo.inference.generation.transition_scores`."""
        own: Any = self.generation_config
        return generation.transition_scores(sequences, scores, beam_indices, normalize_logits, own)

    def score_candidates(
        self, prompt_inputs: Mapping[str, Any], candidates: scoring.Candidates, *, batch_size: int = scoring.BATCH
    ) -> Float[Tensor, "B n"]:
        """Return log-probabilities (B, n) of the candidates; see `flamingo.inference.scoring.score_candidates`."""
        return scoring.score_candidates(self, prompt_inputs, candidates, batch_size=batch_size)


def _sent(x: Any, where: torch.device) -> Any:
    """Return an argument on its way to the device if it is a tensor; what shapes depend on was looked at before."""
    return sent(x, where) if isinstance(x, Tensor) else x


def last_of(logits: Float[Tensor, "B T V"], keep: int | Tensor) -> Float[Tensor, "B K V"]:
    """Return the logits of the last `keep` positions, 0 all, or of those that a tensor names."""
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


# AutoModel too: there is no model without a head.
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
