"""What is shown in place of an episode's images: the controls without which a score proves no use of images.

real: as they are. shuffled: all images of the prompt, the query's included, change places at random, so names and
images no longer belong together. blank: every image is an even grey of the same size. text_only: demonstrations
keep their text and lose their images, the query keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from eval.task import Episode, Turn, generator

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
    return _with(episode, [replace(turn, image=one) for turn, one in zip(turns, images, strict=True)])


def _permuted(images: list[T], episode: Episode, seed: int) -> list[T]:
    """The prompt's own permutation: `generator` is keyed by the query, so neither batch nor order has an influence."""
    order = generator("shuffled", seed, episode.query_id, len(images)).permutation(len(images))
    return [images[int(index)] for index in order]


def _blank(episode: Episode, seed: int) -> Episode:
    return _with(episode, [turn.blank() for turn in [*episode.demos, episode.query]])


def _text_only(episode: Episode, seed: int) -> Episode:
    return _with(episode, [*(turn.with_images(()) for turn in episode.demos), episode.query])


def _with(episode: Episode, turns: list[Turn]) -> Episode:
    return replace(episode, demos=tuple(turns[:-1]), query=turns[-1])


ABLATIONS: dict[str, Callable[[Episode, int], Episode]] = {
    "real": _real,
    "shuffled": _shuffled,
    "blank": _blank,
    "text_only": _text_only,
}
"""Name in `images=[...]` to what it does with an episode. All but real need no model to be tested."""

NEEDS_DEMOS = frozenset({"shuffled", "text_only"})
"""Without demonstrations these change nothing; they are not run at 0 shots."""
