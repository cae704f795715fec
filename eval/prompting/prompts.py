"""From an episode to token ids and images, exactly as a training page would have them.

A prompt is a list of text and image chunks; ids and images come from the same list and are counted against each
other. Text is tokenised node by node, as the loader does, and special ids are put between: strings are never joined and
then tokenised, so a demonstration that contains "<image>" stays text.

The query's turn ends where the answer begins. What "begins" means in tokens depends on the tokenizer (" dax" may be one
token or two, and a lead " " may melt into it), so a ranked prompt takes the tokens that all candidates share into the
prompt and keeps the rest, ended by the end-of-chunk token: without that end "tiger" would beat "tiger shark".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eval.task import EncodedImage, Episode, Frame, Turn
from flamingo.errors import UserError


class TextEncoder(Protocol):
    """What prompts need of a processor."""

    image_token_id: int
    eoc_token_id: int

    def encode_text(self, text: str) -> list[int]:
        """Token ids without any special token."""
        ...


SHORTEST = 16
"""Tokens from which on a beginning that prompts share is worth a pass of its own."""


@dataclass(frozen=True)
class Prompt:
    """Token ids with their images in order.

    `turns` tell the same for people: each turn's image and text, the query's last. `shots_kept` of the episode's
    demonstrations fitted the context. The first `shared` (tokens, images) do not depend on the query.
    """

    ids: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    candidates: tuple[tuple[int, ...], ...]
    turns: tuple[tuple[EncodedImage | None, str], ...]
    shots_kept: int
    shared: tuple[int, int] = (0, 0)

    @property
    def beginning(self) -> tuple[object, ...] | None:
        """What does not depend on the query, ids and images; None where that is too short to be run apart."""
        tokens, images = self.shared
        if tokens < SHORTEST or tokens >= len(self.ids):
            return None
        return self.ids[:tokens], tuple(image.sha256 for image in self.images[:images])

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest candidate."""
        return len(self.ids) + max((len(candidate) for candidate in self.candidates), default=0)


class PromptBuilder:
    """Builds prompts for one model. `start` are the ids that every row begins with; `context` its longest row."""

    def __init__(self, encoder: TextEncoder, *, start: Sequence[int] = (), context: int | None = None) -> None:
        self._encoder = encoder
        self._start = tuple(start)
        self._context = context
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of one text node, remembered: the same few nodes occur in thousands of prompts."""
        if text not in self._known:
            self._known[text] = tuple(self._encoder.encode_text(text)) if text else ()
        return self._known[text]

    def build(
        self, episode: Episode, max_new_tokens: int, *, whole_candidates: bool = False, end_candidates: bool = True
    ) -> Prompt:
        """The prompt of an episode.

        Where it would not fit the context together with the answer, whole demonstrations are dropped from the far end;
        the query is never touched. `whole_candidates` leaves candidates the tokens that all of them begin with, for
        means over tokens; without `end_candidates` they have no end.

        Raises:
            UserError: the query alone does not fit.
        """
        lead, candidates = self._answer(episode, whole_candidates, end_candidates)
        room = max((len(candidate) for candidate in candidates), default=max_new_tokens)
        before, head = self.encode(episode.frame.before), [*self._start, *self.encode(episode.frame.prefix)]
        query = [*before, *self._opening(episode.query), *lead]
        end = [*self._end(episode.frame), *self.encode(episode.frame.separator)]
        demos = [[*before, *self._opening(turn), *self.encode(turn.text), *end] for turn in episode.demos]
        kept = len(demos)
        while self._context is not None and _length(head, demos[len(demos) - kept :], query) + room > self._context:
            if kept == 0:
                raise UserError(
                    f"query {episode.query_id} needs {_length(head, [], query) + room} tokens without any "
                    f"demonstration and the model's context is {self._context}; shorten the question or max_new_tokens"
                )
            kept -= 1
        shown = episode.demos[len(episode.demos) - kept :]
        ids = [*head, *(i for demo in demos[len(demos) - kept :] for i in demo), *query]
        images = tuple(image for turn in [*shown, episode.query] for image in turn.images)
        tags = ids.count(self._encoder.image_token_id)
        assert tags == len(images), f"{tags} image tokens and {len(images)} images, query {episode.query_id}"
        turns = [(turn.image, f"{turn.asked}{turn.text}") for turn in shown]
        turns.append((episode.query.image, f"{episode.query.asked}{episode.query.lead.rstrip()}"))
        shared = len(ids) - len(query) + len(before), len(images) - len(episode.query.images)
        return Prompt(tuple(ids), images, candidates, tuple(_framed(turns, episode.frame)), kept, shared)

    def _end(self, frame: Frame) -> list[int]:
        return [self._encoder.eoc_token_id] if frame.end_of_chunk else []

    def _opening(self, turn: Turn) -> list[int]:
        ids: list[int] = []
        for image, text in turn.pieces:
            ids += [] if image is None else [self._encoder.image_token_id]
            ids += self.encode(text)
        return ids

    def _answer(
        self, episode: Episode, whole_candidates: bool, end_candidates: bool
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """(ids of the answer node that belong to the prompt, the candidates' ids after them)."""
        if not episode.candidates:
            # A lead's last space belongs to the token that follows it, for tokenizers that mark the beginning of words.
            return self.encode(episode.query.lead.rstrip()), ()
        turn = episode.query
        whole = [self.encode(f"{turn.lead}{candidate}{turn.tail}") for candidate in episode.candidates]
        shared = _shared_start(whole) if len(whole) > 1 else 0
        if whole_candidates:
            shared = min(shared, len(self.encode(turn.lead.rstrip())))
        end = (self._end(episode.frame) or self.encode(episode.frame.separator)) if end_candidates else ()
        return whole[0][:shared], tuple((*ids[shared:], *end) for ids in whole)


def _length(head: Sequence[int], demos: Sequence[Sequence[int]], query: Sequence[int]) -> int:
    return len(head) + sum(len(demo) for demo in demos) + len(query)


def _framed(turns: list[tuple[EncodedImage | None, str]], frame: Frame) -> list[tuple[EncodedImage | None, str]]:
    """The turns for reading: what stands ahead of an image is shown at the end of the turn before it."""
    between = f"{frame.separator}{frame.before}"
    shown = [(image, f"{text}{between}") for image, text in turns[:-1]]
    head = f"{frame.prefix}{frame.before}"
    return [*([(None, head)] if head else []), *shown, turns[-1]]


def _shared_start(rows: Sequence[Sequence[int]]) -> int:
    """How many first elements all rows have in common; (1, 2, 3) and (1, 2) share 2."""
    columns = zip(*rows, strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))
