"""What is shown in place of an episode's images: the controls without which a score proves no use of images.

real: as they are. shuffled: all images of the prompt, including the query's, are permuted at random, so names and
images no longer belong together. blank: every image is uniform grey, of the same size. text_only: demonstrations keep
their text and lose their images, the query keeps its own. unordered: the frames of every clip, in a random order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from eval.task import EncodedImage, Episode, StoredImage, Turn, generator
from flamingo.errors import UserError

T = TypeVar("T")


def _real(episode: Episode, seed: int) -> Episode:
    return episode


def _shuffled(episode: Episode, seed: int) -> Episode:
    turns = [*episode.demos, episode.query]
    if any(turn.more for turn in turns):  # each turn keeps its number of images
        every = _permuted([image for turn in turns for image in turn.images], episode, seed)
        left = iter(every)
        return _with(episode, [turn.with_images([next(left) for _ in turn.images]) for turn in turns])
    images = _permuted([turn.image for turn in turns], episode, seed)  # a turn without one may get one
    return _with(episode, [replace(turn, image=image) for turn, image in zip(turns, images, strict=True)])


def _permuted(images: list[T], episode: Episode, seed: int) -> list[T]:
    """Permute by a generator keyed by the query, so that neither batch nor order matters."""
    order = generator("shuffled", seed, episode.query_id, len(images)).permutation(len(images))
    return [images[int(index)] for index in order]


def _blank(episode: Episode, seed: int) -> Episode:
    return _with(episode, [turn.blank() for turn in [*episode.demos, episode.query]])


def _text_only(episode: Episode, seed: int) -> Episode:
    return _with(episode, [*(turn.with_images(()) for turn in episode.demos), episode.query])


def _unordered(episode: Episode, seed: int) -> Episode:
    turns = [*episode.demos, episode.query]
    clips = [len(image.frames) > 1 for turn in turns for image in turn.images]
    if not any(clips):
        raise UserError(
            f"images=unordered: query {episode.query_id} shows no clip of two frames or more, so there is no order to "
            "lose; leave unordered out"
        )

    def mixed(image: EncodedImage) -> EncodedImage:
        order = generator("unordered", seed, image.sha256).permutation(len(image.frames)).tolist()
        return StoredImage(lambda: tuple(image.frames[index] for index in order), names=lambda: image.names)

    return _with(episode, [turn.with_images([mixed(image) for image in turn.images]) for turn in turns])


def _with(episode: Episode, turns: list[Turn]) -> Episode:
    return replace(episode, demos=tuple(turns[:-1]), query=turns[-1])


ABLATIONS: dict[str, Callable[[Episode, int], Episode]] = {
    "real": _real,
    "shuffled": _shuffled,
    "blank": _blank,
    "text_only": _text_only,
    "unordered": _unordered,
}
"""Names in `images=[...]`, and what each does with an episode."""

NEEDS_DEMOS = frozenset({"shuffled", "text_only"})
"""Ablations that change nothing without demonstrations; they are not run at 0 shots."""
