"""`FlamingoForConditionalGeneration`: frozen encoder, resampler, gated blocks inside a frozen causal LM.

Alayrac et al. 2022. Notable: the pictures of a batch are one flat stack with a count per row, never padded; the LM is
an untouched transformers model that is driven through hooks (`language.py`); the loss is computed over the labelled
positions only and in chunks, so that training builds no (B, T, V) tensor (`loss.py`).

Letters: B batch, T text tokens, I pictures of all rows, F frames, C channels, S side in pixels, L latents, E media
width, H heads, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo.inference import generation
from flamingo.inference import scoring
from flamingo.layers.attention import laid_out
from flamingo.config import FlamingoConfig
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.encoding import EncodesMedia
from flamingo.errors import UserError
from flamingo.inference.generation import checked_phi, count_phi
from flamingo.language.hooks import Call, CallState, attach, new_tokens_for
from flamingo.language.loss import IGNORED, changes_logits, mean_nll, next_labels
from flamingo.layers.media_mask import Segments, seen_after, segments_from_slots, segments_of_rows, slots_from_phi
from flamingo.inference.media_cache import MediaCache, PictureInputs
from flamingo.language.packing import counted_positions, packed_inputs
from flamingo.layers.resampler import PerceiverResampler
from flamingo.vision.encoder import VisionEncoder, build_tower


@dataclass
class FlamingoOutput(CausalLMOutputWithPast):
    """What a forward pass returns; `media_features` (I, L, E) can be given again instead of the pictures.

    `cross_attentions`, if asked for, is for each block how the attention of every token is spread over the latents of
    the picture it sees, (B, H, T, L), zero where it sees none; `phi` (B, T) says which picture that is. (With
    `attend_all_previous` the last axis holds the latents of all pictures of the row, one after the other.)
    """

    loss: Tensor | None = None  # transformers before 5.23 declares these two as float32
    logits: Tensor | None = None
    media_features: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    phi: Tensor | None = None


class FlamingoForConditionalGeneration(EncodesMedia, GenerationMixin):
    """Text and pictures in, next tokens out.

    Built from a config with random weights, or by `from_backbones` / `from_pretrained`. `vision_tower` and `causal_lm`
    are built modules to use instead of what the config describes.
    """

    def __init__(
        self, config: FlamingoConfig, vision_tower: nn.Module | None = None, causal_lm: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        for built in (vision_tower, causal_lm):
            for module in built.modules() if built is not None else ():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.vision_encoder = VisionEncoder(vision_tower or build_tower(config.vision), config.vision)
        if causal_lm is None:
            if config.language_kind == "module":
                raise UserError("the language model was built by the caller and cannot be rebuilt; pass language=...")
            causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = causal_lm
        self.resampler = PerceiverResampler(config.vision.width, **asdict(config.resampler))
        width = config.text_config.get_text_config(decoder=True).hidden_size
        self.cross_attn_blocks = nn.ModuleDict(
            {
                str(i): GatedCrossAttentionBlock(
                    width, config.resampler.width or config.vision.width, **asdict(config.cross_attention)
                )
                for i in config.cross_attn_layers or ()
            }
        )
        self.new_tokens = new_tokens_for(causal_lm, list(config.new_token_ids or ()))
        self._state = CallState()
        lm_parameters = inspect.signature(causal_lm.forward).parameters
        self._lm_takes_positions = "position_ids" in lm_parameters
        self._lm_takes_logits_to_keep = "logits_to_keep" in lm_parameters
        # Whether the LM's logits are what its head gives; None: not known yet.
        self._head_is_last = False if changes_logits(config.text_config.get_text_config(decoder=True)) else None
        attach(
            causal_lm,
            self.cross_attn_blocks,
            self.new_tokens,
            self._state,
            decoder_layers_path=config.decoder_layers_path,
        )
        self.post_init()
        self.generation_config = generation.default_generation_config(causal_lm, config)
        self.freeze()

    @classmethod
    def from_backbones(cls, vision: Any, language: Any, **options: Any) -> tuple[Any, Any]:
        """Return (model, processor) from an encoder and a causal LM; see `flamingo.backbones.from_backbones`."""
        from flamingo.backbones import from_backbones

        return from_backbones(cls, vision, language, **options)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "..."] | dict[str, Any] | None = None,
        pixel_values: Shaped[Tensor, "..."] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
        frame_counts: Int[Tensor, "I"] | None = None,
        phi: Int[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        media_features: Float[Tensor, "J L E"] | None = None,
        media_cache: MediaCache | None = None,
        sequence_ids: Int[Tensor, "B T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        output_cross_attentions: bool = False,
        **kwargs: Any,
    ) -> FlamingoOutput:
        """Run the model.

        Args:
            input_ids: tokens; each `<image>` stands for one picture or clip.
            attention_mask: (B, past + T), 0 for padding.
            pixel_values: all rows' pictures in order, (I, F, C, S, S), or their frames (N, C, S, S); None or empty
                for none. Instead: `media_features` from `encode_media`, or `media_cache`, what `media_cache()` gave.
            image_counts: pictures of each row; may be left out for one row.
            frame_counts: frames of each picture, where they differ.
            phi: the picture each token sees, 1-based within its row, 0 none; by default `<image>` tokens are counted.
            labels: like `input_ids`, -100 where there is no loss; shifted here.
            past_key_values: the cache of earlier calls; it remembers their pictures too.
            use_cache: make and return such a cache; off by default in training and with labels.
            position_ids: by default counted from `attention_mask`, so that left padding changes nothing.
            sequence_ids: where rows are packed, which sequence each token is of, 0 padding (`packing.py`); needs `phi`.
            num_items_in_batch: what the sum of the token losses is divided by; by default the number of labels.
            logits_to_keep: only the last so many positions' logits; 0 all.
            skip_logits: with labels, no logits, and the head over labelled positions only; the default in training.
            output_cross_attentions: return every block's attention weights, computed the slow way.
            kwargs: go to the language model.

        Raises:
            UserError: the pictures do not match the counts or the `<image>` tags (names the row).
        """
        if sequence_ids is not None:
            attention_mask, position_ids, use_cache = packed_inputs(self, sequence_ids, phi, past_key_values, use_cache)
        pictures = PictureInputs(pixel_values, media_features, image_counts, frame_counts)
        media = self._media_of(len(input_ids), media_cache, past_key_values, pictures)
        if phi is None:
            phi = checked_phi(self.config, input_ids, media, past_key_values)
        lean = (self.training and labels is not None) if skip_logits is None else skip_logits
        if self._lm_takes_positions:
            kwargs["position_ids"] = counted_positions(position_ids, attention_mask, input_ids.shape[1])
        if self._lm_takes_logits_to_keep and not lean:
            kwargs["logits_to_keep"] = logits_to_keep
        cached = (not self.training and labels is None) if use_cache is None else use_cache
        kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": cached}
        call = self._call(input_ids, phi, media, kwargs, output_cross_attentions)
        loss, out = self._run_with_loss(input_ids, call, kwargs, labels, num_items_in_batch, lean)
        return self._output(out, loss, phi, media, call.segments, lean)

    def _call(self, input_ids: Tensor, phi: Tensor, media: MediaCache, options: dict[str, Any], maps: bool) -> Call:
        """Return what the hooks need to know; makes the LM's cache that is asked for and missing."""
        if options["use_cache"]:
            if options["past_key_values"] is None:
                options["past_key_values"] = DynamicCache(config=self.config.get_text_config(decoder=True))
            media.seen = seen_after(phi, input_ids, self.config.media_reset_token_id, media.seen)
            options["past_key_values"].media = media
        if self.config.attend_all_previous:
            segments = segments_of_rows(phi, media.pictures)
        else:
            segments = segments_from_slots(slots_from_phi(phi, media.pictures), len(media.features))
        if maps or media.maps is not None:
            segments = replace(segments, maps=[])
        keys_values = media.keys_values if options["use_cache"] else None
        return Call(media.features, segments, keys_values, self.new_tokens.match(input_ids))

    def _run_language_model(self, input_ids: Tensor, call: Call, options: dict[str, Any]) -> Any:
        """Run the LM while the hooks know this call."""
        assert call.is_new is not None
        with self._state.running(call):
            return self.language_model(input_ids=input_ids.masked_fill(call.is_new.any(-1), 0), **options)

    def _run_with_loss(
        self,
        input_ids: Tensor,
        call: Call,
        options: dict[str, Any],
        labels: Tensor | None,
        number: Tensor | int | None,
        lean: bool,
    ) -> tuple[Tensor | None, Any]:
        """Run the LM; return the loss, if there are labels, and what the LM gave, if `lean` without all its logits."""
        if labels is None:
            if lean:
                raise ValueError("skip_logits needs labels")
            return None, self._run_language_model(input_ids, call, options)
        targets = next_labels(labels)
        places = (targets != IGNORED).nonzero()[:, 0]
        targets = targets[places]
        if lean:
            call.keep = places
            call.targets = targets if self._head_is_last is not False else None
        out = self._run_language_model(input_ids, call, options)
        if call.nll is not None and self._head_is_last is None and len(places):
            # A few LMs change the logits behind their head (Gemma 2 caps them). What went through as losses was then
            # changed as well, and the labelled positions are taken in one piece, now and from now on.
            self._head_is_last = bool(torch.equal(out.logits.flatten(), call.nll))
            if not self._head_is_last:
                call.targets = None
                out = self._run_language_model(input_ids, call, options)
        if call.targets is not None:
            return mean_nll(out.logits.flatten(), number), out
        logits = out.logits.flatten(0, -2)
        logits = logits if lean else logits[places]
        return mean_nll(F.cross_entropy(logits.float(), targets, reduction="none"), number), out

    def _output(
        self, out: Any, loss: Tensor | None, phi: Tensor, media: MediaCache, segments: Segments, lean: bool
    ) -> FlamingoOutput:
        """Return what the LM gave, with the loss, the pictures of this call and the maps that were asked for."""
        maps = None
        if segments.maps is not None:
            latents = media.features.shape[1] * (media.pictures.shape[1] if self.config.attend_all_previous else 1)
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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Let the LM prepare its inputs its own way (many families do), then add which picture the tokens see."""
        language_model: Any = self.language_model
        inputs = language_model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
        inputs["media_cache"] = media_cache
        new = inputs["input_ids"].shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if phi is not None:
            inputs["phi"] = generation.token_phi(phi, input_ids.shape[1])[:, -new:]
        elif input_ids.shape[1] == past + new:
            inputs["phi"] = count_phi(self.config, input_ids)[:, -new:]
        return inputs

    def compute_transition_scores(
        self, sequences: Tensor, scores: Any, beam_indices: Tensor | None = None, normalize_logits: bool = False
    ) -> Tensor:
        """Return the scores of the chosen tokens; see `flamingo.inference.generation.transition_scores`."""
        return generation.transition_scores(sequences, scores, beam_indices, normalize_logits)

    def score_candidates(
        self, prompt_inputs: Mapping[str, Any], candidates: scoring.Candidates, *, batch_size: int = scoring.BATCH
    ) -> Float[Tensor, "B n"]:
        """Return log-probabilities (B, n) of the candidates; see `flamingo.inference.scoring.score_candidates`."""
        return scoring.score_candidates(self, prompt_inputs, candidates, batch_size=batch_size)


AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
