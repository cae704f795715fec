"""Slow twins of `flamingo.layers.attention`, by the definition: all keys of all images, and a mask.

Letters: N queries, I images, L latents, H heads, K width of a head.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flamingo.layers.media_mask import Segments


def attend_segments_slow(
    q: Float[Tensor, "N H K"],
    k: Float[Tensor, "I L H K"],
    v: Float[Tensor, "I L H K"],
    segments: Segments,
) -> Float[Tensor, "N H K"]:
    """The twin of `attend_segments` for tests: all keys of all images, and a mask."""
    scores = torch.einsum("nhk,ilhk->nhil", q, k) * q.shape[-1] ** -0.5
    hidden = ~images_seen(segments, len(k))
    scores = scores.masked_fill(hidden[:, None, :, None], float("-inf"))
    weights = scores.flatten(2).softmax(-1).unflatten(2, scores.shape[2:])
    return torch.einsum("nhil,ilhk->nhk", weights, v)


def images_seen(segments: Segments, num_images: int) -> Bool[Tensor, "N I"]:
    """Return the mask of which query sees which image of the flat stack."""
    lengths = torch.tensor(segments.lengths, dtype=torch.long, device=segments.images.device)
    index = torch.arange(num_images, device=segments.images.device)
    if segments.reach is None or segments.upto is None:
        return segments.images.repeat_interleave(lengths)[:, None] == index
    upto = segments.upto.flatten()[segments.unpad]
    reach = segments.reach.repeat_interleave(lengths, dim=0)
    reach = reach.masked_fill(torch.arange(reach.shape[1], device=reach.device) >= upto[:, None], -1)
    return (reach[..., None] == index).any(1)
