"""Conversations of other people's data, whatever their files call a speaker and wherever they have their images.

    {"role": "user", "content": "<image>What is it?"}      TRL, LLaMA-Factory, ms-swift, OpenAI
    {"from": "human", "value": "<image>\\nWhat is it?"}     LLaVA, ShareGPT
    {"user": "What is it?", "assistant": "A cat."}         The Cauldron: a question with its answer

An image stands where its `<image>` (or its part of the content) is; where no text has one, all images come before the
first question. What says that it shows something that is not there is dropped, never learnt as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.prepare.media_fields import refuse_other_media
from data.prepare.units import Dropped
from data.shards.document import Image
from flamingo.processing.conversation import Medium, Message

SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TAG = re.compile(r"<(image|video)>")
OTHER_TAGS = ("<audio>", "<speech>", "<bbox>", "<ref-object>")
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
SOURCES = ("image", "video", "path", "url", "base64", "bytes")
ORDER = "the turns are not in order: user and assistant in turn, a system message only before them"

Content = str | Medium


@dataclass(slots=True)
class Media:
    """The images and clips that a row lists, taken one after another, and the bytes of those that are shown.

    `read` returns the frames of what a row names, for a kind ("image" or "video"), and a clip's rate. Raises Dropped.
    """

    listed: dict[str, list[Any]]
    read: Callable[[str, Any], tuple[list[bytes], float | None]]
    images: list[bytes] = field(default_factory=list)
    taken: dict[str, set[int]] = field(default_factory=lambda: {"image": set(), "video": set()})

    def show(self, kind: str, value: Any) -> Medium:
        """Return an image or a clip, as the node of a document. Raises Dropped."""
        frames, fps = self.read(kind, value)
        first = len(self.images)
        self.images += frames
        return Medium(kind, Image(tuple(range(first, first + len(frames))), fps if len(frames) > 1 else None))

    def take(self, kind: str, index: int | None = None) -> Medium:
        """Return the next one that is listed, or the one at an index. Raises Dropped."""
        listed, taken = self.listed[kind], self.taken[kind]
        index = len(taken) if index is None else index
        if not 0 <= index < len(listed):
            raise Dropped(f"the numbers of <{kind}> tags and {kind}s differ")
        taken.add(index)
        return self.show(kind, listed[index])

    def rest(self) -> list[Medium]:
        """Return all that no text has named; of a kind all are named, or none. Raises Dropped."""
        left: list[Medium] = []
        for kind, listed in self.listed.items():
            if self.taken[kind] and len(self.taken[kind]) < len(listed):
                raise Dropped(f"the numbers of <{kind}> tags and {kind}s differ")
            if not self.taken[kind]:
                left += [self.show(kind, value) for value in listed]
        return left


def conversation(turns: Any, media: Media, system: Any = None) -> list[Message]:
    """Return the messages of a row's turns in any of the forms above, with their media in their places.

    Raises:
        Dropped: not a list of turns, a speaker of another kind, turns out of order, media that are not there.
    """
    if not isinstance(turns, list) or not turns:
        raise Dropped("not a list of turns")
    if isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    said = [message for turn in turns for message in _of_turn(turn, media)]
    if rest := media.rest():
        first = next((index for index, message in enumerate(said) if message.role == "user"), None)
        if first is None:
            raise Dropped("images without a question")
        said[first] = replace(said[first], content=(*rest, *said[first].content))
    _check(said)
    return said


def _check(said: Sequence[Message]) -> None:
    """Raise Dropped for turns that no template can write, and where there is nothing to learn."""
    if not any(message.role == "assistant" and message.loss for message in said):
        raise Dropped("no answer")
    before = ""
    for message in said:
        if message.is_empty:
            raise Dropped("no answer" if message.role == "assistant" else "an empty turn")
        if (
            message.role == before
            or (message.role == "system" and before)
            or (message.role == "assistant" and before != "user")
        ):
            raise Dropped(ORDER)
        before = message.role


def _of_turn(turn: Any, media: Media) -> Iterator[Message]:
    if not isinstance(turn, Mapping):
        raise Dropped("a turn is not an object with 'role' and 'content'")
    if "user" in turn and "assistant" in turn:
        for role in ("user", "assistant"):
            yield Message(role, tuple(_parts(turn[role], media)))
        return
    refuse_other_media(turn, ())
    if unread := next((key for key in UNREAD if turn.get(key)), None):
        raise Dropped(f"{unread!r} of a turn is not read")
    named = turn.get("role", turn.get("from"))
    if not isinstance(named, str) or named not in SPEAKERS:
        raise Dropped("a turn is neither the user's, the assistant's nor the system's")
    parts = tuple(_parts(turn.get("content", turn.get("value")), media))
    learnt = turn.get("loss") not in (False, 0) and turn.get("weight") != 0
    yield Message(SPEAKERS[named], parts if "role" in turn else in_front(parts), learnt)


def _parts(content: Any, media: Media) -> Iterator[Content]:
    """Yield the texts and media of a message's content: a text with tags, or a list of parts."""
    if isinstance(content, str):
        if other := next((tag for tag in OTHER_TAGS if tag in content), None):
            raise Dropped(f"{other} without its media")
        for index, piece in enumerate(TAG.split(content)):
            if index % 2:
                yield media.take(piece)
            elif piece:
                yield piece
        return
    if not isinstance(content, list):
        raise Dropped("a turn's content is neither text nor a list of parts")
    for part in content:
        yield from _part(part, media)


def _part(part: Any, media: Media) -> Iterator[Content]:
    if isinstance(part, str):
        yield from _parts(part, media)
        return
    if not isinstance(part, Mapping):
        raise Dropped("a part is not an object with 'type'")
    kind = str(part.get("type")).removesuffix("_url")
    if kind == "text":
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise Dropped("a part of text without text")
        yield from _parts(text, media)
    elif kind not in ("image", "video"):
        raise Dropped("a part that is neither text, an image nor a video")
    else:
        given: Any = part.get(f"{kind}_url")
        given = given.get("url") if isinstance(given, Mapping) else given
        key = next((key for key in SOURCES if part.get(key) is not None), "")
        # Base64 keeps its name: a short one could be a path.
        given = given or (part if key in ("base64", "bytes") else part.get(key))
        index = part.get("index")
        # What the row lists comes first: parts may name the files that its images were read from.
        from_list = media.listed[kind] or not given
        yield media.take(kind, index if type(index) is int else None) if from_list else media.show(kind, given)


def in_front(parts: tuple[Content, ...]) -> tuple[Content, ...]:
    """Return the parts of a message of LLaVA's form: an only image comes first, wherever its tag is, as in its code.

    A question must see what it asks about. The line break that divided them is left out.
    """
    shown = [part for part in parts if isinstance(part, Medium)]
    texts = [part.strip() for part in parts if isinstance(part, str)]
    return parts if len(shown) > 1 else (*shown, *filter(None, [" ".join(filter(None, texts))]))
