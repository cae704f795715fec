"""The model's side that looks at pictures: pixels to latents, and to the `MediaCache` of a call.

Letters: B rows, I pictures of all rows, F frames, C channels, S side in pixels, L latents, E media width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import Cache

from flamingo.base import FlamingoPreTrainedModel
from flamingo.errors import UserError
from flamingo.inference.media_cache import MediaCache, PictureInputs
from flamingo.vision.frames import distinct, encode, flat_frames, frames_of


class EncodesMedia(FlamingoPreTrainedModel):
    """What `FlamingoForConditionalGeneration` does with pictures before the language model runs."""

    def encode_media(
        self, pixel_values: Shaped[Tensor, "..."], frame_counts: Int[Tensor, "I"] | None = None
    ) -> Float[Tensor, "I L E"]:
        """Return the latents of each picture or clip; uint8 pixels are normalised with the encoder's statistics.

        `pixel_values` is (I, F, C, S, S), or (frames of all pictures, C, S, S) with `frame_counts`. Without gradients
        equal pictures are encoded once.

        Raises:
            UserError: pictures of another size than the encoder's, or counts that do not fit the frames.
        """
        if pixel_values.shape[-1] != self.vision_encoder.image_size:
            raise UserError(
                f"the pictures are {pixel_values.shape[-1]} px wide, but the encoder takes "
                f"{self.vision_encoder.image_size} px; build the ImageTransform with that size"
            )
        frames, counts = flat_frames(pixel_values, None if frame_counts is None else frame_counts.tolist())
        if torch.is_grad_enabled() or not counts:
            return encode(self.vision_encoder, self.resampler, frames, counts)
        kept, places = distinct(frames, counts)
        frames, counts = frames_of(frames, counts, kept)
        latents = encode(self.vision_encoder, self.resampler, frames, counts)
        return latents if len(kept) == len(places) else latents[torch.tensor(places, device=latents.device)]

    def media_cache(
        self,
        rows: int,
        *,
        pixel_values: Shaped[Tensor, "..."] | None = None,
        media_features: Float[Tensor, "I L E"] | None = None,
        image_counts: Int[Tensor, "B"] | None = None,
        frame_counts: Int[Tensor, "I"] | None = None,
    ) -> MediaCache:
        """Encode the pictures of `rows` rows; pixels and features may be None or empty.

        Raises:
            UserError: counts are missing or do not fit the rows or the pictures.
        """
        number = len(next((x for x in (media_features, frame_counts, pixel_values) if x is not None), ()))
        if image_counts is None:
            if rows > 1 and number:
                raise UserError(
                    f"{number} pictures for {rows} rows need image_counts, the number of pictures of each row"
                )
            image_counts = torch.tensor([number] + [0] * (rows - 1), device=self.device)
        if len(image_counts) != rows:
            raise UserError(f"image_counts has {len(image_counts)} entries for {rows} rows")
        if media_features is None:
            media_features = self._encode_some(pixel_values, frame_counts)
        return MediaCache.of(media_features, image_counts.to(media_features.device))

    def _encode_some(self, pixel_values: Tensor | None, frame_counts: Tensor | None) -> Tensor:
        if pixel_values is not None and len(pixel_values):
            return self.encode_media(pixel_values, frame_counts)
        size, dtype = self.vision_encoder.image_size, torch.uint8
        sharded = hasattr(self, "set_requires_gradient_sync")  # a method that FSDP2 gives
        if sharded or (self.training and torch.is_grad_enabled()):
            # One black picture that nobody sees: in a sharded run every process must call the same modules, in
            # validation too, and give gradients (of zeros) for the same parameters, whether its batch has pictures or
            # not.
            return self.encode_media(torch.zeros(1, 1, 3, size, size, dtype=dtype, device=self.device))[:0].clone()
        latents = self.resampler.latents
        return latents.new_zeros(0, *latents.shape)

    def _media_of(self, rows: int, given: MediaCache | None, past: Cache | None, inputs: PictureInputs) -> MediaCache:
        """Return the pictures of this call: given, encoded now, remembered by the cache, or the last two together."""
        if given is not None:
            return given
        remembered: MediaCache | None = getattr(past, "media", None)
        if remembered is not None and inputs.pixel_values is None and inputs.media_features is None:
            return remembered
        new = self.media_cache(rows, **inputs._asdict())
        if remembered is None:
            return new
        return remembered.extended(new.features, (new.pictures >= 0).sum(1))
