"""Which images and clips belong to which row and to which tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flamingo.errors import UserError
from flamingo.processing.conversation import is_chat
from flamingo.processing.rows import VIDEO_TAG
from flamingo.processing.video_processor import is_frame

Medium = tuple[str, Any]
"""("image" or "video", what it holds)."""


def looks_like_text(value: Any, tag: str) -> bool:
    """Say whether an argument is the text of a call: prompts or chat-style lists, and not paths of images."""
    if isinstance(value, str):
        return tag in value or VIDEO_TAG in value
    if not isinstance(value, list | tuple) or not value:
        return False
    if is_chat(value):
        return True
    return all(isinstance(item, str) or is_chat(item) for item in value) and any(
        is_chat(item) or looks_like_text(item, tag) for item in value
    )


def by_row(media: Any, tags: Sequence[int], name: str) -> list[list[Any]]:
    """Return the images of each row; `tags` says how many each row has room for.

    Raises:
        UserError: lists for another number of rows.
    """
    rows = len(tags)
    if media is None:
        return [[] for _ in tags]
    if not isinstance(media, list | tuple):
        stack = getattr(media, "ndim", 0) > (3 if name == "images" else 4)
        media = list(media) if stack else [media]  # an array of several
    listed = list(media)
    if name == "videos" and rows == 1 and listed and all(map(is_frame, listed)):
        return [[listed]]  # one clip
    if rows == 1 and not (len(listed) == 1 and (listed[0] is None or isinstance(listed[0], list | tuple))):
        return [listed]
    if all(item is not None and not isinstance(item, list | tuple) for item in listed) and sum(tags) == len(listed):
        # A flat list, as other processors take it, is dealt out to the tags in order.
        ends = [sum(tags[: row + 1]) for row in range(rows)]
        return [listed[end - count : end] for end, count in zip(ends, tags, strict=True)]
    if len(listed) != rows:
        raise UserError(f"{name} has {len(listed)} lists for {rows} rows of text; give one list a row")
    return [[] if row is None else list(row) if isinstance(row, list | tuple) else [row] for row in listed]


def row_media(
    where: str, tags: Sequence[str], inline: list[Medium], images: list[Any], videos: list[Any]
) -> list[Medium]:
    """Return a row's images and clips in the order of its tags.

    Raises:
        UserError: they differ in number.
    """
    if inline and (images or videos):
        raise UserError(f"{where} has images both in its chat-style list and in images= or videos=")
    if not (images and videos):
        row = inline or [("image", item) for item in images] or [("video", item) for item in videos]
        if len(tags) != len(row):
            raise UserError(
                f"{where} has {len(tags)} <image> tags but {len(row)} images; the text of users in chat-style lists "
                "and with split_special_tokens=True has no tags"
            )
        return row
    counts = {"image": len(images), "video": len(videos)}
    written = {"image": sum(tag != VIDEO_TAG for tag in tags), "video": sum(tag == VIDEO_TAG for tag in tags)}
    if counts != written:
        raise UserError(
            f"{where} has {written['image']} <image> tags and {written['video']} {VIDEO_TAG} tags but "
            f"{counts['image']} images and {counts['video']} clips"
        )
    left = {"image": iter(images), "video": iter(videos)}
    kinds = ["video" if tag == VIDEO_TAG else "image" for tag in tags]
    return [(kind, next(left[kind])) for kind in kinds]
