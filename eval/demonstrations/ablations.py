"""What is shown in place of an episode's pictures: the controls without which a score proves no use of pictures.

real: as they are. shuffled: all pictures of the prompt, the query's included, change places at random, so names and
pictures no longer belong together. blank: every picture is an even grey of the same size. text_only: demonstrations
keep their text and lose their pictures, the query keeps its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from PIL import Image

from eval.demonstrations.samplers import generator
from eval.task import Episode, Picture, Turn

GREY = (128, 128, 128)
T = TypeVar("T")


def _real(episode: Episode, seed: int) -> Episode:
    return episode


def _shuffled(episode: Episode, seed: int) -> Episode:
    turns = [*episode.demos, episode.query]
    if any(turn.more for turn in turns):  # each turn keeps its number of pictures
        every = _permuted([picture for turn in turns for picture in turn.pictures], episode, seed)
        left = iter(every)
        return _with(episode, [turn.with_pictures([next(left) for _ in turn.pictures]) for turn in turns])
    pictures = _permuted([turn.picture for turn in turns], episode, seed)  # a turn without one may get one
    return _with(episode, [replace(turn, picture=one) for turn, one in zip(turns, pictures, strict=True)])


def _permuted(pictures: list[T], episode: Episode, seed: int) -> list[T]:
    """The prompt's own permutation: `generator` is keyed by the query, so neither batch nor order has an influence."""
    order = generator("shuffled", seed, episode.query_id, len(pictures)).permutation(len(pictures))
    return [pictures[int(index)] for index in order]


def _blank(episode: Episode, seed: int) -> Episode:
    return _with(episode, [blanked(turn) for turn in [*episode.demos, episode.query]])


def _text_only(episode: Episode, seed: int) -> Episode:
    return _with(episode, [*(turn.with_pictures(()) for turn in episode.demos), episode.query])


def _with(episode: Episode, turns: list[Turn]) -> Episode:
    return replace(episode, demos=tuple(turns[:-1]), query=turns[-1])


def blanked(turn: Turn) -> Turn:
    """The turn with grey pictures."""
    return turn.with_pictures([blank(picture) for picture in turn.pictures]) if turn.pictures else turn


def blank(picture: Picture) -> Picture:
    """A grey picture (or clip) of the same size and number of frames."""
    return Picture(tuple(_grey(Image.open(io.BytesIO(frame)).size) for frame in picture.frames))


@lru_cache(maxsize=64)
def _grey(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, GREY).save(buffer, format="PNG")
    return buffer.getvalue()


ABLATIONS: dict[str, Callable[[Episode, int], Episode]] = {
    "real": _real,
    "shuffled": _shuffled,
    "blank": _blank,
    "text_only": _text_only,
}
"""Name in `pictures=[...]` to what it does with an episode. All but real need no model to be tested."""

NEEDS_DEMOS = frozenset({"shuffled", "text_only"})
"""Without demonstrations these change nothing; they are not run at 0 shots."""
