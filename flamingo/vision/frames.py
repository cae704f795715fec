"""Images and clips of any number of frames, from pixels to latents.

A batch may mix images with clips of different lengths. Then the frames are one flat stack with a count for
each image; no frame is ever padded. The encoder runs over the flat frames, the connector once for each
number of frames that occurs. Outside of training an image that occurs several times (one demonstration in many rows)
is encoded once.

Letters: N frames of all images, I images, F frames of an image, C channels, S side, P patches, L latents, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from flamingo.errors import UserError


def flat_frames(
    pixel_values: Shaped[Tensor, "..."], frame_counts: Sequence[int] | None = None
) -> tuple[Shaped[Tensor, "N C S S"], list[int]]:
    """Return all frames in one stack and the number of frames of each image.

    `pixel_values` is (I, F, C, S, S), every image with F frames or, with `frame_counts`, with its first so many; or
    (N, C, S, S), the frames of all images with `frame_counts`, or one image each.

    Raises:
        UserError: the counts do not fit the frames, or an image has none.
    """
    if pixel_values.ndim not in (4, 5):
        raise UserError(
            f"pixel_values has {pixel_values.ndim} dimensions; it is (images, frames, channels, side, side), or "
            "(frames, channels, side, side) with frame_counts"
        )
    given = len(pixel_values)
    counts = None if frame_counts is None else list(frame_counts)
    if counts is not None and min(counts, default=1) < 1:
        raise UserError(f"frame_counts has an image of {min(counts)} frames; each has at least 1")
    if pixel_values.ndim == 4:
        counts = [1] * given if counts is None else counts
        if sum(counts) != given:
            raise UserError(f"frame_counts sum to {sum(counts)}, but pixel_values has {given} frames")
        return pixel_values, counts
    frames = pixel_values.shape[1]
    if counts is None:
        return pixel_values.flatten(0, 1), [frames] * given
    if len(counts) != given or max(counts, default=0) > frames:
        raise UserError(
            f"frame_counts has {len(counts)} entries up to {max(counts, default=0)}, but pixel_values has {given} "
            f"images of {frames} frames"
        )
    kept = torch.arange(frames, device=pixel_values.device) < torch.tensor(counts, device=pixel_values.device)[:, None]
    return pixel_values[kept], counts


def distinct(frames: Shaped[Tensor, "N C S S"], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the first image of each kind, and for each image its index among those.

    Images a b a of one frame each: [0 1] and [0 1 0].
    """
    host = frames.detach().cpu().contiguous()
    marks = [hashlib.blake2b(frame.view(torch.uint8).numpy().tobytes(), digest_size=16).digest() for frame in host]
    first: dict[tuple[bytes, ...], int] = {}
    kept: list[int] = []
    positions = []
    start = 0
    for image, count in enumerate(counts):
        key = tuple(marks[start : start + count])
        if key not in first:
            first[key] = len(kept)
            kept.append(image)
        positions.append(first[key])
        start += count
    return kept, positions


def encode(
    encoder: Callable[[Tensor], Tensor],
    resampler: Callable[..., Tensor],
    frames: Shaped[Tensor, "N C S S"],
    counts: Sequence[int],
) -> Float[Tensor, "I L D"]:
    """Return the latents of each image: `encoder` as (I, F, C, S, S) to (I, F, P, D), `resampler` from there.

    Each is called once, whatever the counts: sharded modules must be called as often on every process.
    """
    if len(set(counts)) <= 1:
        return resampler(encoder(frames.unflatten(0, (len(counts), -1))))
    return resampler(encoder(frames[:, None])[:, 0], counts)


def frames_of(
    frames: Shaped[Tensor, "N C S S"], counts: Sequence[int], images: Sequence[int]
) -> tuple[Shaped[Tensor, "M C S S"], list[int]]:
    """Return the frames and counts of some of the images."""
    if len(images) == len(counts):
        return frames, list(counts)
    parts = frames.split(list(counts))
    return torch.cat([parts[image] for image in images]), [counts[image] for image in images]
