"""Who sees what: which image each text token attends to, as pure functions of tensors.

Nothing else in the library decides this. A batch's images are one flat stack of all rows' images, so
there are two ways to name one: phi is 1-based within the row and 0 means none (the paper's symbol, section 3.1.3); a
`slot` is 0-based in the flat stack and -1 means none.

Letters: B batch rows, T text tokens, I images of all rows together, N tokens that see an image, An images that are
seen, S the most tokens that one image has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flamingo.errors import UserError
from flamingo.transfer import sent


def phi_from_ids(
    input_ids: Int[Tensor, "B T"],
    image_token_id: int,
    *,
    attend: str = "previous",
    seen: Int[Tensor, "B"] | None = None,
    reset_token_id: int | None = None,
) -> Int[Tensor, "B T"]:
    """Return which image each token sees: 1-based within the row, 0 for none.

    An `<image>` token sees its own image. With `attend="previous"` (paper, section 3.1.3; the only way at
    inference) the tokens after it see it until the next one comes; with `attend="next"` (the paper's p_next placement,
    in which the text precedes its image) they see the image that follows, and none after the last one:

        ids        a  <i>  b  c  <i>  d  e
        previous   0   1   1  1   2   2  2
        next       1   1   2  2   2   0  0

    `seen` (B,) is the number of images in the part of the row that came before these ids (a continued cache).

    After a `reset_token_id` (IDEFICS: the end of a sequence) no image is seen until the next one comes. The part
    before may have ended so: `seen` is negative then (`images_so_far`).

        ids        a  <i>  b  </s>  c  <i>  d
        previous   0   1   1   1    0   2   2

    Raises:
        UserError: an `attend` that is neither "previous" nor "next".
    """
    is_image = input_ids == image_token_id
    count = is_image.cumsum(dim=1)
    if seen is not None:
        count = count + seen.abs()[:, None]
    if attend == "previous":
        if reset_token_id is None:
            return count
        return count.masked_fill(_behind_reset(is_image, input_ids == reset_token_id, seen), 0)
    if attend != "next":
        raise UserError(f"attend={attend!r} must be 'previous' or 'next'")
    following = count + (~is_image).long()
    return following.masked_fill(following > count[:, -1:], 0)


def images_so_far(
    phi: Int[Tensor, "B T"],
    input_ids: Int[Tensor, "B T"],
    reset_token_id: int | None = None,
    before: Int[Tensor, "R"] | None = None,
) -> Int[Tensor, "B T"]:
    """Return how many images each row has had up to each token, negative where a reset token hides them from the next.

    `before` is the same for the token in front of these; with beams each of its R rows stands for B / R.

        phi        0  1  1     1     0   2   2         before 3   phi      4  4
        ids        a <i> b    </s>   c  <i>  d                    ids     <i> a
        so far     0  1  1    -1    -1   2   2                    so far   4  4
    """
    count = phi.cummax(dim=1).values
    if before is not None:
        before = before.repeat_interleave(len(count) // max(len(before), 1))
        count = torch.maximum(count, before.abs()[:, None])  # all of these tokens may stand behind a reset
    if reset_token_id is None:
        return count
    return torch.where((phi == 0) | (input_ids == reset_token_id), -count, count)


def _behind_reset(
    is_image: Bool[Tensor, "B T"], is_reset: Bool[Tensor, "B T"], seen: Int[Tensor, "B"] | None
) -> Bool[Tensor, "B T"]:
    """Return which tokens have a reset token between them and the last image; the reset token itself does not."""
    position = torch.arange(1, is_image.shape[1] + 1, device=is_image.device)
    image, reset = ((mask * position).cummax(dim=1).values for mask in (is_image, is_reset))
    behind = torch.nn.functional.pad(reset, (1, -1)) > image
    return behind if seen is None else behind | ((seen < 0)[:, None] & (image == 0))


def slots_from_phi(phi: Int[Tensor, "B T"], images: Int[Tensor, "R M"]) -> Int[Tensor, "B T"]:
    """Return the index in the flat stack of the image each token sees, -1 for none.

    `images` (R, M) lists every row's images as indices into the stack, padded with -1. B is a multiple of R: with
    beams each prompt's row is repeated, and its images are not.

        phi [0 1 1 2], images [3 4 -1]   ->   [-1 3 3 4]

    A phi beyond the row's images sees none: -1 as well.
    """
    if images.shape[0] != phi.shape[0]:
        images = images.repeat_interleave(phi.shape[0] // max(images.shape[0], 1), dim=0)
    # Column 0 is "none", and so is the last one, where every phi that is too high ends up.
    padded = torch.nn.functional.pad(images, (1, 1), value=-1)
    return padded.gather(1, phi.clamp(max=padded.shape[1] - 1))


def image_table(image_counts: Int[Tensor, "B"], start: int = 0) -> Int[Tensor, "B M"]:
    """Return every row's images as indices into the flat stack, padded with -1; the first one has index `start`.

    counts [2 0 1]   ->   [[0 1] [-1 -1] [2 -1]]
    """
    width = int(image_counts.max()) if len(image_counts) else 0
    column = torch.arange(width, device=image_counts.device)
    first = image_counts.cumsum(0) - image_counts + start
    return torch.where(column < image_counts[:, None], first[:, None] + column, -1)


@dataclass(frozen=True)
class Segments:
    """The tokens of a batch grouped by the image they see, made once per forward and shared by all blocks.

    With slots [-1 0 0 2] over a stack of three images: tokens [1 2 3], images [0 2], lengths [2 1], and the padded
    table of tokens [[0 1] [2 2]] over the N=3 tokens, from which `unpad` [0 1 2] reads them back.

    Where one image has many more tokens than the mean, the groups are cut into chunks of about the mean, so that the
    padded table stays small: slots [0 0 0 0 0 0 0 0 0 1] give images [0 0 1] and lengths [5 4 1].
    """

    tokens: Int[Tensor, "N"]
    """Positions in the flattened (B*T) text of the tokens that see an image, grouped by image."""
    images: Int[Tensor, "A"]
    """For each group the index of its image in the flat stack."""
    lengths: list[int]
    """How many tokens are in each group, (A,)."""
    pad: Int[Tensor, "A S"]
    """Each group's tokens as indices into `tokens`; unused entries repeat the last token and are never read."""
    unpad: Int[Tensor, "N"]
    """Where each token is in the flattened `pad`."""
    sees: Bool[Tensor, "B T"]
    """Which tokens see an image at all."""
    is_whole_stack: bool
    """Whether `images` is just 0, 1, 2, ... to the end of the stack."""
    reach: Int[Tensor, "A M"] | None = None
    """Where tokens see several images: a group is a row of the batch, these are its images, -1 for none."""
    upto: Int[Tensor, "A S"] | None = None
    """And this is how many of them, from the first, each token of `pad` sees."""
    maps: list[Tensor] | None = None
    """Where each block leaves its attention weights (N, H, L or M * L), if they are asked for."""
    counts: Bool[Tensor, "N"] | None = None
    """Where tokens have a place whether they see an image or not, so that shapes stay the same: which of them do."""

    def on(self, device: torch.device) -> Segments:
        """Return the same on a device. They are made on the host, where their lengths are known without waiting."""
        moved: dict[str, Any] = {
            name: sent(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def segments_from_slots(slots: Int[Tensor, "B T"], num_images: int) -> Segments:
    """Group the tokens of a batch by the image they see; `slots` as of `slots_from_phi`."""
    flat = slots.flatten()
    sees = slots >= 0
    order = flat.argsort(stable=True)
    tokens = order[flat.numel() - int(sees.sum()) :]
    images, counts = flat[tokens].unique_consecutive(return_counts=True)
    longest = int(counts.max()) if len(counts) else 0
    whole = len(counts) == num_images
    if longest > 1.5 * len(tokens) / max(len(counts), 1):
        images, counts, longest = _in_chunks(images, counts, -(-len(tokens) // len(counts)))
        whole = False
    return Segments(tokens, images, counts.tolist(), *_padded(counts, longest), sees, whole)


def segments_of_step(sees: Bool[Tensor, "B 1"]) -> Segments:
    """Give each row's one token an image of its own, the row's in a stack of B; one that sees none does not count.

    Shapes depend on the number of rows alone, so that the steps of any prompts are one compiled graph.
    """
    rows = torch.arange(len(sees))
    return Segments(rows, rows, [1] * len(rows), rows[:, None], rows, sees, True, counts=sees[:, 0])


def segments_of_rows(phi: Int[Tensor, "B T"], images: Int[Tensor, "R M"]) -> Segments:
    """Group the tokens by row, each of which sees its row's images 1 to phi; `images` as of `slots_from_phi`.

    phi [0 1 1 2], images [3 4 -1]   ->   tokens [1 2 3], reach [[3 4 -1]], upto [[1 1 2]]
    """
    if images.shape[0] != phi.shape[0]:
        images = images.repeat_interleave(phi.shape[0] // max(images.shape[0], 1), dim=0)
    upto = torch.minimum(phi, (images >= 0).sum(1, keepdim=True))
    sees = upto > 0
    counts = sees.sum(1)
    rows = counts.nonzero()[:, 0]
    counts = counts[rows]
    tokens = sees.flatten().nonzero()[:, 0]
    pad, unpad = _padded(counts, int(counts.max()) if len(counts) else 0)
    reach, upto = images[rows], upto.flatten()[tokens][pad]
    return Segments(
        tokens, reach[:, 0] if reach.numel() else rows, counts.tolist(), pad, unpad, sees, False, reach, upto
    )


def _padded(counts: Int[Tensor, "A"], longest: int) -> tuple[Int[Tensor, "A S"], Int[Tensor, "N"]]:
    """Return `pad` and `unpad` of consecutive groups of `counts` tokens."""
    first = counts.cumsum(0) - counts
    column = torch.arange(longest, device=counts.device)
    pad = first[:, None] + torch.minimum(column, (counts - 1)[:, None])
    rank = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    unpad = torch.arange(len(rank), device=counts.device) - first[rank] + rank * longest
    return pad, unpad


def _in_chunks(
    images: Int[Tensor, "A"], counts: Int[Tensor, "A"], size: int
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], int]:
    """Cut groups of `counts` tokens into chunks of at most `size`."""
    chunks = (counts + size - 1) // size
    group = torch.arange(len(counts), device=counts.device).repeat_interleave(chunks)
    nth = torch.arange(len(group), device=counts.device) - (chunks.cumsum(0) - chunks)[group]
    return images[group], (counts[group] - nth * size).clamp(max=size), size
