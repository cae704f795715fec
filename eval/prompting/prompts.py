"""From an episode to token ids and images, exactly as a training document has them; what is asked, what is answered.

A prompt is a list of text and image chunks; ids and images come from the same list and their counts have to agree. Text
is tokenised node by node, as in the loader, with special ids in between: strings are never joined and then tokenised,
so a demonstration that contains "<image>" stays text.

The query's turn ends where the answer begins. Where that is in tokens depends on the tokenizer (" dax" may be one token
or two, and a lead " " may be merged into it). So a ranked prompt takes in the tokens that all candidates share, and the
candidates keep the rest, ended by the end-of-chunk token: without that end "tiger" would beat "tiger shark".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from eval.task import EncodedImage, Episode, Frame, Turn
from flamingo.errors import UserError
from flamingo.processing.conversation import Conversation, Medium, Message
from flamingo.processing.turns import TurnTokenizer


class TextEncoder(Protocol):
    """What prompts need from a processor."""

    image_token_id: int
    eoc_token_id: int

    def encode_text(self, text: str) -> list[int]:
        """Return token ids without any special token."""
        ...


SHORTEST_START = 16
"""Tokens from which a start that prompts share is worth a forward pass of its own."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids with their images in order.

    `turns` are the same for readers: each turn's image and text, the query's last. `shots_kept` of the episode's
    demonstrations fitted into the context. The first `shared` (tokens, images) do not depend on the query.
    """

    ids: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    candidates: tuple[tuple[int, ...], ...]
    turns: tuple[tuple[EncodedImage | None, str], ...]
    shots_kept: int
    shared: tuple[int, int] = (0, 0)
    chat: bool = False  # the answer ends as the chat template ends one

    @property
    def beginning(self) -> tuple[object, ...] | None:
        """The ids and images that do not depend on the query; None if they are too few to be run separately."""
        tokens, images = self.shared
        if tokens < SHORTEST_START or tokens >= len(self.ids):
            return None
        return self.ids[:tokens], tuple(image.sha256 for image in self.images[:images])

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with its longest candidate."""
        return len(self.ids) + max((len(candidate) for candidate in self.candidates), default=0)


@dataclass(frozen=True)
class Decoding:
    """How text is generated. Temperature 0 is greedy (or beam) search; above it `draw` numbers the samples.

    A sample is a pure function of the request and its `draw`: two draws are independent, and the same draw gives the
    same text whatever shares its batch.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    draw: int = 0

    @property
    def greedy(self) -> bool:
        """Whether only the number of tokens is set."""
        return self.num_beams == 1 and self.temperature == 0.0

    @property
    def kind(self) -> Decoding:
        """The settings that all requests of a batch share."""
        return replace(self, draw=0)


@dataclass(frozen=True)
class Completion:
    """Generated text, and whether the model ended it (False: it reached the limit of new tokens).

    `log_prob` is the mean log-probability of its tokens, including the one that ended it; None where unknown.
    """

    text: str
    ended: bool
    log_prob: float | None = None


Response = Completion | list[float]
"""A completion, or the log-probability of each candidate."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue, or, without a decoding, one whose candidates are ranked."""

    prompt: EncodedPrompt
    decoding: Decoding | None = None

    def key(self, model: str) -> str:
        """Return the hash of all that the response depends on; `model` is that of weights, code, precision, device."""
        material = [
            model,
            self.prompt.ids,
            self.prompt.candidates if self.decoding is None else None,
            [image.sha256 for image in self.prompt.images],
            None if self.decoding is None else asdict(self.decoding),
            *(["chat"] if self.prompt.chat else []),
        ]
        return hashlib.sha256(json.dumps(material).encode()).hexdigest()


class PromptBuilder:
    """Prompts for one model. Every row begins with the ids of `start`; `context` is the longest row, in tokens.

    `turns` gives what writes conversations, for tasks with `chat: true`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        start: Sequence[int] = (),
        context: int | None = None,
        turns: Callable[[], TurnTokenizer] | None = None,
    ) -> None:
        self._encoder, self._turns = encoder, turns
        self._start = tuple(start)
        self._context = context
        self._known: dict[str, tuple[int, ...]] = {}
        self._replies: dict[tuple[TurnTokenizer, str, bool], list[int]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of one text node. They are cached: the same few nodes occur in thousands of prompts."""
        if text not in self._known:
            self._known[text] = tuple(self._encoder.encode_text(text)) if text else ()
        return self._known[text]

    def _reply(self, turns: TurnTokenizer, text: str, *, closed: bool) -> list[int]:
        """Return the ids of an answer, cached as well: a template is slow, and every query has the same classes."""
        if (key := (turns, text, closed)) not in self._replies:
            self._replies[key] = turns.answer(text, closed=closed)
        return self._replies[key]

    def build(
        self, episode: Episode, max_new_tokens: int, *, whole_candidates: bool = False, end_candidates: bool = True
    ) -> EncodedPrompt:
        """Return the prompt of an episode.

        If it does not fit into the context together with the answer, whole demonstrations are dropped from the far
        end; the query is never changed. With `whole_candidates` the candidates keep the tokens that they share, for
        means over tokens; without `end_candidates` they have no end.

        Raises:
            UserError: the query alone does not fit.
        """
        if episode.frame.chat:
            return self._conversation(episode, max_new_tokens, whole_candidates, end_candidates)
        lead, candidates = self._answer(episode, whole_candidates, end_candidates)
        room = max((len(candidate) for candidate in candidates), default=max_new_tokens)
        before, head = self.encode(episode.frame.before), [*self._start, *self.encode(episode.frame.prefix)]
        query = [*before, *self._opening(episode.query), *lead]
        end = [*self._end(episode.frame), *self.encode(episode.frame.separator)]
        demos = [[*before, *self._opening(turn), *self.encode(turn.text), *end] for turn in episode.demos]
        # Text is never cut: it would no longer be what training showed. So whole demonstrations go, the farthest first.
        kept = len(demos)
        while self._context is not None and _length(head, demos[len(demos) - kept :], query) + room > self._context:
            if kept == 0:
                raise self._too_long(episode, _length(head, [], query) + room)
            kept -= 1
        shown = episode.demos[len(episode.demos) - kept :]
        ids = [*head, *(i for demo in demos[len(demos) - kept :] for i in demo), *query]
        images = tuple(image for turn in [*shown, episode.query] for image in turn.images)
        shared = len(ids) - len(query) + len(before), len(images) - len(episode.query.images)
        return self._encoded(episode, ids, images, candidates, kept, shared)

    def _encoded(
        self,
        episode: Episode,
        ids: Sequence[int],
        images: tuple[EncodedImage, ...],
        candidates: tuple[tuple[int, ...], ...],
        kept: int,
        shared: tuple[int, int],
    ) -> EncodedPrompt:
        image_tokens = ids.count(self._encoder.image_token_id)
        assert image_tokens == len(images), f"{image_tokens} image tokens, {len(images)} images: {episode.query_id}"
        shown = episode.demos[len(episode.demos) - kept :]
        turns = [(turn.image, f"{turn.question_text}{turn.text}") for turn in shown]
        turns.append((episode.query.image, f"{episode.query.question_text}{episode.query.lead.rstrip()}"))
        framed = tuple(_framed(turns, episode.frame))
        return EncodedPrompt(tuple(ids), images, candidates, framed, kept, shared, episode.frame.chat)

    def _too_long(self, episode: Episode, needed: int) -> UserError:
        return UserError(
            f"query {episode.query_id} needs {needed} tokens without any demonstration; the model's context is "
            f"{self._context}: shorten the question or max_new_tokens"
        )

    def _conversation(self, episode: Episode, max_new_tokens: int, whole: bool, ended: bool) -> EncodedPrompt:
        """Return the prompt of an episode whose turns are messages, as training rows of conversations have them."""
        if self._turns is None:
            raise UserError("chat=true needs a model with a chat template; use another protocol")
        turns, query = self._turns(), episode.query
        lead = self._reply(turns, query.lead.strip(), closed=False) if query.lead.strip() else []
        answers = [self._reply(turns, f"{query.lead}{c}{query.tail}".strip(), closed=ended) for c in episode.candidates]
        shared = shared_start(answers) if len(answers) > 1 else 0
        shared = min(shared, len(lead)) if whole else shared
        opened = answers[0][:shared] if answers else lead
        candidates = tuple(tuple(answer[shared:]) for answer in answers)
        room = max(map(len, candidates), default=max_new_tokens)
        for kept in range(len(episode.demos), -1, -1):
            shown = [*episode.demos[len(episode.demos) - kept :], query]
            tokens = turns(asked(episode.frame.prefix, shown), f"query {episode.query_id}", prompt=True)
            ids = [*self._start, *tokens.ids, *opened]
            if self._context is None or len(ids) + room <= self._context:
                break
        else:
            raise self._too_long(episode, len(ids) + room)
        images = tuple(image for turn in shown for image in turn.images)
        before = len(self._start) + tokens.stops[-1] if tokens.stops else 0
        return self._encoded(episode, ids, images, candidates, kept, (before, len(images) - len(query.images)))

    def _end(self, frame: Frame) -> list[int]:
        return [self._encoder.eoc_token_id] if frame.end_of_chunk else []

    def _opening(self, turn: Turn) -> list[int]:
        ids: list[int] = []
        for image, text in turn.segments:
            ids += [] if image is None else [self._encoder.image_token_id]
            ids += self.encode(text)
        return ids

    def _answer(
        self, episode: Episode, whole_candidates: bool, end_candidates: bool
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Return the ids of the answer node that belong to the prompt, and the candidates' ids after them."""
        if not episode.candidates:
            # A lead's last space belongs to the token after it, for tokenizers that mark the beginning of words.
            return self.encode(episode.query.lead.rstrip()), ()
        turn = episode.query
        whole = [self.encode(f"{turn.lead}{candidate}{turn.tail}") for candidate in episode.candidates]
        shared = shared_start(whole) if len(whole) > 1 else 0
        if whole_candidates:
            shared = min(shared, len(self.encode(turn.lead.rstrip())))
        end = (self._end(episode.frame) or self.encode(episode.frame.separator)) if end_candidates else ()
        return whole[0][:shared], tuple((*ids[shared:], *end) for ids in whole)


def asked(system: str, turns: Sequence[Turn]) -> Conversation:
    """Return turns, the last one without its answer, as a conversation; what its media hold are the turns' images."""
    messages = [Message("system", (system,))] if system else []
    for turn in turns:
        parts: list[str | Medium] = []
        for image, text in turn.segments:
            parts += [] if image is None else [Medium("video" if len(image.frames) > 1 else "image", image)]
            parts += [text] if text else []
        messages += [Message("user", tuple(parts)), Message("assistant", (turn.text.strip(),))]
    return Conversation(tuple(messages[:-1]))


def _length(head: Sequence[int], demos: Sequence[Sequence[int]], query: Sequence[int]) -> int:
    return len(head) + sum(len(demo) for demo in demos) + len(query)


def _framed(turns: list[tuple[EncodedImage | None, str]], frame: Frame) -> list[tuple[EncodedImage | None, str]]:
    """Return the turns for readers: text before an image is shown at the end of the previous turn."""
    between = f"{frame.separator}{frame.before}"
    shown = [(image, f"{text}{between}") for image, text in turns[:-1]]
    head = f"{frame.prefix}{frame.before}"
    return [*([(None, head)] if head else []), *shown, turns[-1]]


def shared_start(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first elements all rows share; (1, 2, 3) and (1, 2) share 2."""
    columns = zip(*rows, strict=False)
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))
