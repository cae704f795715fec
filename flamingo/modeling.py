"""`FlamingoForConditionalGeneration`: frozen encoder, resampler, gated blocks inside a frozen causal LM.

Alayrac et al. 2022. Notable: the pictures of a batch are one flat stack with a count per row, never padded; the LM is
an untouched transformers model that is driven through hooks (`language.py`); the loss is computed over the labelled
positions only, so that training builds no (B, T, V) tensor.

Letters: B batch, T text tokens, I pictures of all rows, F frames, C channels, S side in pixels, L latents, E media
width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo import generation
from flamingo.base import FlamingoPreTrainedModel
from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock
from flamingo.errors import UserError
from flamingo.generation import MediaCache
from flamingo.language import Call, CallState, attach, new_tokens_for
from flamingo.media import seen_after, segments_from_slots, slots_from_phi
from flamingo.resampler import PerceiverResampler
from flamingo.vision import VisionEncoder, build_tower


@dataclass
class FlamingoOutput(CausalLMOutputWithPast):
    """What a forward pass returns; `media_features` (I, L, E) can be given again instead of the pictures."""

    media_features: Tensor | None = None


class FlamingoForConditionalGeneration(FlamingoPreTrainedModel, GenerationMixin):
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

    def encode_media(self, pixel_values: Shaped[Tensor, "I F C S S"]) -> Float[Tensor, "I L E"]:
        """Return the latents of each picture or clip; uint8 pixels are normalised with the encoder's statistics."""
        if pixel_values.shape[-1] != self.vision_encoder.image_size:
            raise UserError(
                f"the pictures are {pixel_values.shape[-1]} px wide, but the encoder takes "
                f"{self.vision_encoder.image_size} px; build the ImageTransform with that size"
            )
        return self.resampler(self.vision_encoder(pixel_values))

    def media_cache(
        self,
        rows: int,
        *,
        pixel_values: Shaped[Tensor, "I F C S S"] | None = None,
        media_features: Float[Tensor, "I L E"] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
    ) -> MediaCache:
        """Encode the pictures of `rows` rows; pixels and features may be None or empty."""
        number = len(next((x for x in (media_features, pixel_values) if x is not None), ()))
        if image_counts is None:
            if rows > 1 and number:
                raise UserError(
                    f"{number} pictures for {rows} rows need image_counts, the number of pictures of each row"
                )
            image_counts = torch.tensor([number] + [0] * (rows - 1), device=self.device)
        if len(image_counts) != rows:
            raise UserError(f"image_counts has {len(image_counts)} entries for {rows} rows")
        if media_features is None:
            media_features = self._encode_some(pixel_values)
        return MediaCache.of(media_features, image_counts.to(media_features.device))

    def _encode_some(self, pixel_values: Tensor | None) -> Tensor:
        if pixel_values is not None and len(pixel_values):
            return self.encode_media(pixel_values)
        size, dtype = self.vision_encoder.image_size, torch.uint8
        if self.training and torch.is_grad_enabled():
            # One black picture that nobody sees: in a sharded run every process must call the same modules and give
            # gradients (of zeros) for the same parameters, whether its batch has pictures or not.
            return self.encode_media(torch.zeros(1, 1, 3, size, size, dtype=dtype, device=self.device))[:0].clone()
        latents = self.resampler.latents
        return latents.new_zeros(0, *latents.shape)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "..."] | dict[str, Any] | None = None,
        pixel_values: Shaped[Tensor, "I F C S S"] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
        phi: Int[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        media_features: Float[Tensor, "J L E"] | None = None,
        media_cache: MediaCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> FlamingoOutput:
        """Run the model.

        Args:
            input_ids: tokens; each `<image>` stands for one picture or clip.
            attention_mask: (B, past + T), 0 for padding.
            pixel_values: all rows' pictures in order; None or empty for none. Instead: `media_features` from
                `encode_media`, or `media_cache`, what `media_cache()` returned.
            image_counts: pictures of each row; may be left out for one row.
            phi: the picture each token sees, 1-based within its row, 0 none; by default `<image>` tokens are counted.
            labels: like `input_ids`, -100 where there is no loss; shifted here.
            past_key_values: the cache of earlier calls; it remembers their pictures too.
            use_cache: make and return such a cache; off by default in training and with labels.
            position_ids: by default counted from `attention_mask`, so that left padding changes nothing.
            num_items_in_batch: what the sum of the token losses is divided by; by default the number of labels.
            logits_to_keep: only the last so many positions' logits; 0 all.
            skip_logits: with labels, no logits, and the head over labelled positions only; the default in training.
            kwargs: go to the language model.

        Raises:
            UserError: the pictures do not match the counts or the `<image>` tags (names the row).
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        pictures = {"pixel_values": pixel_values, "media_features": media_features, "image_counts": image_counts}
        media = self._media_of(len(input_ids), media_cache, past_key_values, pictures)
        if phi is None:
            seen = media.seen if past else None
            phi = generation.count_phi(self.config, input_ids, seen=seen)
            generation.check_counts(phi, media, seen)
        lean = (self.training and labels is not None) if skip_logits is None else skip_logits
        keep = _labelled(labels) if lean else None
        if self._lm_takes_positions:
            kwargs["position_ids"] = _positions(position_ids, attention_mask, input_ids.shape[1])
        if self._lm_takes_logits_to_keep and keep is None:
            kwargs["logits_to_keep"] = logits_to_keep
        cached = (not self.training and labels is None) if use_cache is None else use_cache
        kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": cached}
        out = self._run_language_model(input_ids, phi, media, keep, kwargs)
        loss = None if labels is None else _loss(out.logits, labels, keep, num_items_in_batch)
        return _output(out, loss, media, lean)

    def _run_language_model(
        self, input_ids: Tensor, phi: Tensor, media: MediaCache, keep: Tensor | None, options: dict[str, Any]
    ) -> Any:
        """Run the LM while the hooks know this call's pictures; makes the cache that is asked for and missing."""
        if options["use_cache"]:
            if options["past_key_values"] is None:
                options["past_key_values"] = DynamicCache(config=self.config.get_text_config(decoder=True))
            media.seen = seen_after(phi, input_ids, self.config.media_reset_token_id, media.seen)
            options["past_key_values"].media = media
        is_new = self.new_tokens.match(input_ids)
        segments = segments_from_slots(slots_from_phi(phi, media.pictures), len(media.features))
        keys_values = media.keys_values if options["use_cache"] else None
        with self._state.running(Call(media.features, segments, keys_values, is_new, keep)):
            return self.language_model(input_ids=input_ids.masked_fill(is_new.any(-1), 0), **options)

    def _media_of(
        self, rows: int, given: MediaCache | None, past: Cache | None, pictures: dict[str, Tensor | None]
    ) -> MediaCache:
        """Return the pictures of this call: given, encoded now, remembered by the cache, or the last two together."""
        if given is not None:
            return given
        remembered: MediaCache | None = getattr(past, "media", None)
        if remembered is not None and pictures["pixel_values"] is None and pictures["media_features"] is None:
            return remembered
        new = self.media_cache(rows, **pictures)
        if remembered is None:
            return new
        return remembered.extended(new.features, (new.pictures >= 0).sum(1))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Continue prompts; see `flamingo.generation.generate`."""
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
            inputs["phi"] = generation.count_phi(self.config, input_ids)[:, -new:]
        return inputs

    def score_candidates(
        self, prompt_inputs: Mapping[str, Any], candidates: generation.Candidates, *, batch_size: int = 32
    ) -> Float[Tensor, "B n"]:
        """Return log-probabilities (B, n) of the candidates; see `flamingo.generation.score_candidates`."""
        return generation.score_candidates(self, prompt_inputs, candidates, batch_size=batch_size)


def _labelled(labels: Tensor | None) -> Tensor:
    """Return the places in the flattened (B*T) text whose next token has a label."""
    if labels is None:
        raise ValueError("skip_logits needs labels")
    return (F.pad(labels[:, 1:], (0, 1), value=-100) != -100).flatten().nonzero()[:, 0]


def _positions(given: Tensor | None, attention_mask: Any, length: int) -> Tensor | None:
    """Return the positions of the last `length` tokens: as given, else counted over the tokens that are no padding."""
    if given is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return given


def _output(out: Any, loss: Tensor | None, media: MediaCache, lean: bool) -> FlamingoOutput:
    """Return what the LM gave, with the loss and the pictures of this call."""
    return FlamingoOutput(
        loss=loss,
        logits=None if lean else out.logits,
        past_key_values=out.past_key_values,
        hidden_states=out.hidden_states,
        attentions=out.attentions,
        media_features=media.features,
    )


def _loss(logits: Tensor, labels: Tensor, keep: Tensor | None, num_items: Tensor | int | None) -> Tensor:
    """Return the sum of the next-token losses over `num_items`, by default over the number of labels."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    flat = logits.flatten(0, -2)
    if keep is not None:
        targets = targets[keep]
    total = F.cross_entropy(flat.float(), targets, ignore_index=-100, reduction="sum")
    return total / (num_items if num_items is not None else (targets != -100).sum().clamp(min=1))
