"""What one call remembers about its images.

The cache holds every block's keys and values of the media, computed once per call whatever the number of new
tokens and beams. It rides on `past_key_values`, so that a hand-written decoding loop keeps seeing the images too, and
it belongs to the call, so two calls in two threads do not meet. Beams need no copies: they share their prompt's
images in the flat stack.

Letters: B batch, T text tokens, R rows of the prompt, I images, M most images of a row, L latents, E width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flamingo.errors import UserError
from flamingo.layers.cross_attention import KeysValues
from flamingo.layers.media_mask import image_table


class ImageInputs(NamedTuple):
    """What a call says about its images, as `FlamingoForConditionalGeneration.forward` takes it."""

    pixel_values: Tensor | None = None
    media_features: Tensor | None = None
    image_counts: Tensor | None = None
    frame_counts: Tensor | None = None


@dataclass
class MediaCache:
    """The images of a call: their latents, whose they are, and what the blocks made of them."""

    features: Float[Tensor, "I L E"]
    """Latents of all images, one flat stack."""
    images: Int[Tensor, "R M"]
    """Places in the stack of each row's images, -1 for none."""
    keys_values: dict[str, KeysValues] = field(default_factory=dict)
    """Of each block, by its key."""
    seen: Int[Tensor, "B"] | None = None
    """How many `<image>` tokens each row has had so far; for the next call, which sees only the ids that follow.

    Negative where a reset token hides them (`media.seen_after`)."""
    maps: list[tuple[Tensor, ...]] | None = None
    """Where each forward pass of `generate` leaves its attention maps, if they are asked for."""

    @classmethod
    def of(cls, features: Float[Tensor, "I L E"], image_counts: Int[Tensor, "R"]) -> MediaCache:
        """Make the cache of a call from all rows' latents and the number of images of each row.

        Raises:
            UserError: the counts do not sum to the number of images.
        """
        total = int(image_counts.sum())
        if total != len(features):
            raise UserError(f"image_counts sum to {total}, but {len(features)} images are given")
        return cls(features, image_table(image_counts))

    def extended(self, features: Float[Tensor, "I L E"], image_counts: Int[Tensor, "R"]) -> MediaCache:
        """Return the cache with more images behind those of each row (a later turn of a conversation).

        Raises:
            UserError: another number of rows than this cache has, or of latents an image.
        """
        if len(image_counts) != len(self.images):
            raise UserError(f"{len(image_counts)} rows continue a cache of {len(self.images)} rows")
        more = image_table(image_counts, start=len(self.features))
        images = torch.cat([self.images, more], dim=1)
        images = images.gather(1, (images < 0).long().argsort(dim=1, stable=True))
        if len(features) and len(self.features) and features.shape[1] != self.features.shape[1]:
            raise UserError(
                f"the new images have {features.shape[1]} latents each, those before them {self.features.shape[1]}; "
                "this connector needs clips of one length"
            )
        stacks = [stack for stack in (self.features, features) if len(stack)] or [features]
        return MediaCache(torch.cat(stacks), images, self.keys_values, self.seen)

    def branch(self, rows: Int[Tensor, "B"] | None = None) -> MediaCache:
        """Return a cache of some `rows` that shares the tensors; what is added to it, this one does not see."""
        images = self.images if rows is None else self.images[rows]
        return replace(self, images=images, keys_values=dict(self.keys_values), maps=None)


def check_counts(phi: Int[Tensor, "B T"], media: MediaCache, seen: Int[Tensor, "B"] | None = None) -> None:
    """Compare the `<image>` tags that were counted in each row, in these tokens and before, with its images.

    Raises:
        UserError: they differ; names the row and both numbers.
    """
    tags, images = phi.amax(1), (media.images >= 0).sum(1)
    tags = tags if seen is None else torch.maximum(tags, seen.abs())
    tags = tags[:: max(len(tags) // max(len(images), 1), 1)]
    if len(wrong := (tags != images).nonzero()[:, 0]):
        row = int(wrong[0])
        raise UserError(f"row {row} has {int(tags[row])} <image> tags but {int(images[row])} images")
