"""What one call remembers about its images.

The cache holds every block's keys and values of the media, computed once per call whatever the number of new
tokens and beams. It rides on `past_key_values`, so that a hand-written decoding loop keeps seeing the images too, and
it belongs to the call, so two calls in two threads do not meet. Beams need no copies: they share their prompt's
images in the flat stack.

Which images a row has, and how many it has seen, decide shapes and are therefore on the host (`transfer.py`), until
somebody re-indexes the rows by indices on a device: then they follow there.

Whatever re-indexes the rows of such a cache re-indexes what it remembers (`RemembersImages`), and a cache that was cut
to less text has seen only the images of that text (`recall`). Nothing in here is changed in place, so copies may share.

Letters: B batch, T text tokens, P tokens in the cache, R rows of the prompt, I images, M most images of a row,
L latents, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import Cache

from flamingo.errors import UserError
from flamingo.layers.cross_attention import KeysValues
from flamingo.layers.media_mask import Segments, image_table, images_so_far, segments_from_slots, segments_of_step
from flamingo.transfer import on_host, sent


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
    history: Int[Tensor, "B P"] | None = None
    """How many `<image>` tokens each row has had up to each token of the cache: the next call sees only what follows.

    Negative where a reset token hides them (`media_mask.images_so_far`)."""
    mask: Shaped[Tensor, "B Q"] | None = None
    """The attention mask of the tokens of the cache, if there was one, for a next call without."""
    maps: list[tuple[Tensor, ...]] | None = None
    """Where each forward pass of `generate` leaves its attention maps, if they are asked for."""
    steps: dict[Any, Any] = field(default_factory=dict)
    """What steps of one token need, by the images they see: the next step sees them too."""

    @property
    def seen(self) -> Int[Tensor, "B"] | None:
        """`history` at its last token."""
        return None if self.history is None else self.history[:, -1]

    def __deepcopy__(self, memo: dict[int, Any]) -> MediaCache:
        """Share the tensors, which nobody changes."""
        return self.branch()

    @classmethod
    def of(cls, features: Float[Tensor, "I L E"], image_counts: Int[Tensor, "R"]) -> MediaCache:
        """Make the cache of a call from all rows' latents and the number of images of each row.

        Raises:
            UserError: the counts do not sum to the number of images.
        """
        image_counts = on_host(image_counts)
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
        more = image_table(on_host(image_counts), start=len(self.features))
        images = torch.cat([on_host(self.images), more], dim=1)
        images = images.gather(1, (images < 0).long().argsort(dim=1, stable=True))
        if len(features) and len(self.features) and features.shape[1] != self.features.shape[1]:
            raise UserError(
                f"the new images have {features.shape[1]} latents each, those before them {self.features.shape[1]}; "
                "this connector needs clips of one length"
            )
        stacks = [stack for stack in (self.features, features) if len(stack)] or [features]
        more_features = torch.cat(stacks)
        return replace(self, features=more_features, images=images, keys_values=dict(self.keys_values))

    def branch(self, rows: Int[Tensor, "B"] | None = None) -> MediaCache:
        """Return a cache of some `rows` that shares the tensors; what is added to it, this one does not see."""
        images = on_host(self.images)
        images = images if rows is None else images[rows]
        return replace(self, images=images, keys_values=dict(self.keys_values), steps={}, maps=None)

    def segments(self, slots: Int[Tensor, "B T"]) -> Segments:
        """Return the tokens grouped by image, on the device of the latents; `slots` are on the host."""
        if slots.shape[1] != 1:
            return segments_from_slots(slots, len(self.features)).on(self.features.device)
        key = (len(self.features), *slots[:, 0].tolist())
        if key not in self.steps:
            self.steps[key] = segments_from_slots(slots, len(self.features)).on(self.features.device)
        return self.steps[key]

    def step(self, slots: Int[Tensor, "B 1"]) -> Step | None:
        """Return a step of one token a row in the shapes of a compiled one; None where a block has not run yet."""
        key = ("compiled", len(self.features), *slots[:, 0].tolist())
        if key not in self.steps:
            if not self.keys_values or not len(self.features):
                return None
            seen = sent(slots[:, 0].clamp(min=0), self.features.device)
            rows = {name: (k[seen], v[seen]) for name, (k, v) in self.keys_values.items()}
            segments = segments_of_step(slots >= 0).on(self.features.device)
            self.steps.clear()  # these are copies; those of rows that have been re-ordered are not needed again
            self.steps[key] = Step(self.features[seen], segments, rows)
        return self.steps[key]

    def hosted(self) -> MediaCache:
        """Return the cache with its integers on the host; waits for those that are not."""
        history, mask = (None if x is None else on_host(x) for x in (self.history, self.mask))
        return replace(self, images=on_host(self.images), history=history, mask=mask)

    def moved(self, move: Callable[[Tensor], Tensor]) -> MediaCache:
        """Return the cache with its rows as `move` puts them; rows of beams are made rows of their own first."""
        if self.history is None:
            return replace(self, images=move(self.images))
        images = self.images.repeat_interleave(len(self.history) // max(len(self.images), 1), dim=0)
        mask = None if self.mask is None else move(self.mask)
        return replace(self, images=move(images), history=move(self.history), mask=mask)


class Step(NamedTuple):
    """A step of one token a row, with an image for each row: nothing in it has a shape that depends on the images."""

    features: Float[Tensor, "B L E"]
    segments: Segments
    keys_values: dict[str, KeysValues]


class RemembersImages(Cache):
    """What a cache becomes when this model has used it: its images follow its rows.

    A class of its own for each class of caches (`_remembering`), so that it stays whatever it was.
    """

    media: MediaCache
    kind: type[Cache]
    """What the cache was."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows, and their images, in another order."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.media = self.media.moved(lambda rows: _rows(rows, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, and its images."""
        super().batch_repeat_interleave(repeats)
        self.media = self.media.moved(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and their images."""
        super().batch_select_indices(indices)
        self.media = self.media.moved(lambda rows: _rows(rows, indices))

    def reset(self) -> None:
        """Forget the text, and what its rows have seen."""
        super().reset()
        self.media = replace(self.media, history=None, mask=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles find the class, which no module holds."""
        return _blank, (self.kind,), dict(vars(self))


def _rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Return some rows. What is on the host goes to the indices; to bring those there would be waited for."""
    where = indices.device if rows.device.type == "cpu" else rows.device
    return sent(rows, where)[sent(indices, where)]


@lru_cache
def _remembering(kind: Any) -> Any:
    return type(kind.__name__, (RemembersImages, kind), {"kind": kind, "__doc__": kind.__doc__})


def _blank(kind: Any) -> Any:
    made = _remembering(kind)
    return made.__new__(made)


def attach_media(cache: Any, media: MediaCache) -> None:
    """Have a cache remember `media`, of whose `history` the last P entries belong to its P tokens.

    Raises:
        UserError: it is of a class that cannot.
    """
    if not isinstance(cache, RemembersImages):
        kind: Any = type(cache)
        try:
            cache.__class__ = _remembering(kind)
        except TypeError as error:
            raise UserError(
                f"a {type(cache).__name__} cannot remember the images of its rows ({error}); use a DynamicCache"
            ) from None
    cache.media = media


def remember(
    cache: Any,
    media: MediaCache,
    phi: Int[Tensor, "B T"],
    input_ids: Int[Tensor, "B T"],
    mask: Any,
    reset_token_id: int | None = None,
) -> None:
    """Have a cache remember the images of a call, before the language model puts the call's T tokens into it."""
    past = cached_length(cache)
    # On the host, unless the ids, with which a reset comes, or what came before are not.
    where = phi.device if media.history is None or not past else media.history.device
    where = where if reset_token_id is None or where.type != "cpu" else input_ids.device
    seen = sent(media.seen, where) if past and media.seen is not None else None
    input_ids = input_ids if reset_token_id is None else sent(input_ids, where)
    now = images_so_far(sent(phi, where), input_ids, reset_token_id, seen)
    before = now.new_zeros(len(now), past)
    if past and media.history is not None:
        before = sent(media.history[:, :past], where)
    if len(before) != len(now):
        before = before.repeat_interleave(len(now) // max(len(before), 1), dim=0)
    total = past + now.shape[1]
    flat = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total
    known = mask[:, :total] if flat else None
    attach_media(cache, replace(media, history=torch.cat([before, now], 1), mask=known, maps=None))


def cached_length(cache: Any) -> int:
    """Return the number of tokens in a cache, 0 for None.

    Raises:
        UserError: it is not a `Cache` of transformers.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise UserError(
            f"past_key_values is a {type(cache).__name__}; give a Cache, as DynamicCache(keys_and_values_of_each_layer)"
        )
    length = cache.get_seq_length()
    history = getattr(getattr(cache, "media", None), "history", None)
    if isinstance(length, Tensor) and length.device.type != "cpu" and history is not None:
        return int(history.shape[1])  # a static cache counts on its device
    return int(length)


def recall(cache: Any) -> MediaCache | None:
    """Return what a cache remembers of its images, as far as its text still goes; None where it remembers nothing.

    Raises:
        UserError: its rows or its tokens are not those that this model has put there.
    """
    media: MediaCache | None = getattr(cache, "media", None)
    length = cached_length(cache)
    if media is None or media.history is None or not length:
        return None if not length else media
    rows, known = media.history.shape
    keys: list[Any] = [getattr(layer, "keys", None) for layer in cache.layers]
    held = next((len(own) for own in keys if _filled(own)), rows)
    if held != rows:
        raise UserError(
            f"the cache has {held} rows, but remembers the images of {rows}; change its rows by reorder_cache, "
            "batch_repeat_interleave or batch_select_indices of the cache, and not of its layers"
        )
    if length > known:
        raise UserError(
            f"the cache holds {length} tokens, of which this model has run {known}; run all of them through the model"
        )
    if len(media.images) != rows:
        media = media.moved(lambda rows: rows)
    if length == known:
        return media
    history, images = on_host(media.history[:, :length]), on_host(media.images)  # type: ignore[index]
    position = torch.arange(images.shape[1])
    images = images.masked_fill(position >= history[:, -1:].abs(), -1)
    return replace(media, images=images, history=history, mask=None if media.mask is None else media.mask[:, :length])


def _filled(keys: Any) -> bool:
    return isinstance(keys, Tensor) and keys.ndim == 4 and keys.numel() > 0


def check_counts(phi: Int[Tensor, "B T"], media: MediaCache, seen: Int[Tensor, "B"] | None = None) -> None:
    """Compare the `<image>` tags that were counted in each row, in these tokens and before, with its images.

    Raises:
        UserError: they differ; names the row and both numbers.
    """
    tags, images = on_host(phi).amax(1), (on_host(media.images) >= 0).sum(1)
    tags = tags if seen is None else torch.maximum(tags, on_host(seen).abs())
    tags = tags[:: max(len(tags) // max(len(images), 1), 1)]
    if len(wrong := (tags != images).nonzero()[:, 0]):
        row = int(wrong[0])
        raise UserError(f"row {row} has {int(tags[row])} <image> tags but {int(images[row])} images")
