"""What the model does with images before its language model runs: encode them, each once, and know whose they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flamingo.errors import UserError
from flamingo.inference.media_cache import ImageInputs, MediaCache, cached_length, recall
from flamingo.pretrained import FlamingoPreTrainedModel
from flamingo.transfer import on_host, sent
from flamingo.vision.encoder import distinct, encode, flat_frames, frames_of, touched


class EncodesMedia(FlamingoPreTrainedModel):
    """What `FlamingoForConditionalGeneration` does with images before the language model runs."""

    def encode_media(
        self, pixel_values: Shaped[Tensor, "..."], frame_counts: Int[Tensor, "I"] | None = None
    ) -> Float[Tensor, "I L E"]:
        """Return the latents of each image or clip; uint8 pixels are normalised with the encoder's statistics.

        `pixel_values` is (I, F, C, S, S), or (frames of all images, C, S, S) with `frame_counts`. Without gradients
        equal images are encoded once, if they are on the host: on a device one would have to wait to see which.

        Raises:
            UserError: images of another size than the encoder's, or counts that do not fit the frames.
        """
        if pixel_values.shape[-1] != self.vision_encoder.image_size:
            raise UserError(
                f"the images are {pixel_values.shape[-1]} px wide, but the encoder takes "
                f"{self.vision_encoder.image_size} px; build the ImageTransform with that size"
            )
        frames, counts = flat_frames(pixel_values, None if frame_counts is None else on_host(frame_counts).tolist())
        positions: list[int] = []
        known = frames.device.type == "cpu" and type(frames) is Tensor  # a plan's have no values to compare
        if known and counts and not torch.is_grad_enabled():
            kept, positions = distinct(frames, counts)
            positions = positions if len(kept) < len(positions) else []
            frames, counts = frames_of(frames, counts, kept)
        latents = encode(self.vision_encoder, self.resampler, sent(frames, self._runs_on(frames)), counts)
        return latents[sent(torch.tensor(positions), latents.device)] if positions else latents

    def _runs_on(self, *inputs: Tensor | None) -> torch.device:
        """Return the device that the model runs on: its own, or where its weights, or an input, only visit (FSDP2)."""
        own = self.device
        if own.type not in ("cpu", "meta"):
            return own
        mesh = getattr(next(self.parameters()), "device_mesh", None)
        if mesh is not None and mesh.device_type != "cpu":
            return torch.device(mesh.device_type, torch.accelerator.current_device_index())
        return next((x.device for x in inputs if x is not None and x.device.type != "cpu"), torch.device("cpu"))

    def media_cache(
        self,
        rows: int,
        *,
        pixel_values: Shaped[Tensor, "..."] | None = None,
        media_features: Float[Tensor, "I L E"] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
        frame_counts: Int[Tensor, "I"] | None = None,
    ) -> MediaCache:
        """Encode the images of `rows` rows; pixels and features may be None or empty.

        Raises:
            UserError: counts are missing or do not fit the rows or the images.
        """
        number = len(next((x for x in (media_features, frame_counts, pixel_values) if x is not None), ()))
        if image_counts is None:
            if rows > 1 and number:
                raise UserError(f"{number} images for {rows} rows need image_counts, the number of images of each row")
            image_counts = torch.tensor([number] + [0] * (rows - 1))
        if len(image_counts) != rows:
            raise UserError(f"image_counts has {len(image_counts)} entries for {rows} rows")
        if media_features is None:
            media_features = self._encode_some(pixel_values, frame_counts)
        elif self.training and torch.is_grad_enabled():
            # Encoder and resampler do not run; see `_encode_some`.
            skipped: Iterable[nn.Parameter] = (*self.vision_encoder.parameters(), *self.resampler.parameters())
            media_features = touched(media_features, (p for p in skipped if p.requires_grad))
        return MediaCache.of(media_features, image_counts)

    def _encode_some(self, pixel_values: Tensor | None, frame_counts: Tensor | None) -> Tensor:
        if pixel_values is not None and len(pixel_values):
            return self.encode_media(pixel_values, frame_counts)
        size, dtype = self.vision_encoder.image_size, torch.uint8
        sharded = hasattr(self, "set_requires_gradient_sync")  # a method that FSDP2 gives
        if sharded or (self.training and torch.is_grad_enabled()):
            # One black image that nobody sees: in a run of several processes each must call the same modules (where
            # they are sharded in validation too) and give gradients (of zeros) for the same parameters, whether its
            # batch has images or not.
            return self.encode_media(torch.zeros(1, 1, 3, size, size, dtype=dtype, device=self.device))[:0].clone()
        return self.resampler.empty()

    def media_of(self, rows: int, given: MediaCache | None, past: Cache | None, inputs: ImageInputs) -> MediaCache:
        """Return the images of this call: given, encoded now, remembered by the cache, or the last two together.

        Raises:
            UserError: the cache holds tokens of which nobody knows what they have seen, or another number of rows.
        """
        remembered = recall(past)
        if given is not None:
            return given if remembered is None else replace(given, history=remembered.history, mask=remembered.mask)
        if remembered is None:
            if cached_length(past) and all(value is None for value in inputs):
                raise UserError(
                    "past_key_values holds tokens, but not which images they saw; go on with a cache that this model "
                    "returned, or give image_counts (zeros for rows without images)"
                )
            return self.media_cache(rows, **inputs._asdict())
        if len(remembered.images) != rows:
            raise UserError(f"{rows} rows continue a cache of {len(remembered.images)} rows")
        if inputs.pixel_values is None and inputs.media_features is None:
            return remembered
        new = self.media_cache(rows, **inputs._asdict())
        return remembered.extended(new.features, (new.images >= 0).sum(1))
