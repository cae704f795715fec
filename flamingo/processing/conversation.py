"""A conversation: messages with roles, made of text, images and clips; from and to the form that chat programs use.

    {"role": "user", "content": [{"type": "image", "image": cat}, {"type": "text", "text": "What is this?"}]}
    {"role": "assistant", "content": "A cat."}

Images are given as transformers' processors take them (`image`, `path`, `url`, `base64`) or as OpenAI's API does
(`image_url`), clips likewise (`video`, `video_url`). A system message may come first; then user and assistant take
turns. This module imports nothing heavy: the readers of `data/` use it too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo.errors import UserError

ROLES = ("system", "user", "assistant")
_SOURCES = {"image": ("image", "path", "url", "base64"), "video": ("video", "path", "url", "base64")}

Part = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a clip in a message. `kind`: "image" or "video"; `source`: a path, pixels, ..., None: not here."""

    kind: str
    source: Any = None


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says. `loss=False`: an answer of the assistant that is shown, but not trained on."""

    role: str
    content: tuple[str | Medium, ...]
    loss: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said or shown."""
        return not any(isinstance(part, Medium) or part.strip() for part in self.content)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in an order that a model can learn: a system message or none, then user and assistant in turn."""

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: Any, where: str = "the conversation") -> Conversation:
        """Read messages in the form of transformers or of OpenAI's API (whose `weight: 0` means `loss=False`).

        Raises:
            UserError: not messages, an unknown role or part, roles out of order, or an empty turn; names it.
        """
        given = getattr(messages, "messages", messages)
        if not isinstance(given, list | tuple) or not all(map(is_message, given)):
            raise UserError(f"{where} is not a list of messages, each a dict with 'role' and 'content'")
        check_turns(given, where)
        return cls(
            tuple(
                Message(str(message["role"]), tuple(_content(message, where)), message.get("weight") != 0)
                for message in given
            )
        )

    @property
    def media(self) -> Iterator[Medium]:
        """The images and clips, in order."""
        return (part for message in self.messages for part in message.content if isinstance(part, Medium))

    def to_messages(self, form: str = "transformers") -> list[dict[str, Any]]:
        """Return the messages in the form of "transformers" or of "openai", whose images are URLs.

        Raises:
            UserError: for "openai", an image that is neither a path, a URL nor an encoded file.
        """
        write = {"transformers": _transformers_part, "openai": _openai_part}[form]
        return [
            {"role": message.role, "content": [write(part) for part in message.content]}
            | ({} if message.loss else {"weight": 0})
            for message in self.messages
        ]


def check_turns(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse messages in an order that no template can write well, and turns in which nothing is said.

    Raises:
        UserError: names the message, counted from 0.
    """
    if not messages:
        raise UserError(f"{where} has no messages")
    before = ""
    for number, message in enumerate(messages):
        role, place = message.get("role"), f"{where}: message {number}"
        if role not in ROLES:
            raise UserError(f"{place} has the role {role!r}; known are {', '.join(ROLES)}")
        if role == "system" and number:
            raise UserError(f"{place} is the system's; it must be the first one")
        if role == "assistant" and before != "user":
            raise UserError(
                f"{place} is the assistant's, and {before or 'nothing'} comes before it instead of a user's"
            )
        if role == before == "user":
            raise UserError(f"{place} is the user's again; join it with the one before, or put an answer between them")
        if role != "system" and Message(str(role), tuple(_content(message, place))).is_empty:
            raise UserError(f"{place} is an empty turn of the {role}; leave it out or say something in it")
        before = str(role)


def _content(message: Mapping[str, Any], where: str) -> Iterator[str | Medium]:
    for part in parts_of(message.get("content"), where):
        yield part["text"] if part["type"] == "text" else Medium(part["type"], source_of(part))


def _transformers_part(part: str | Medium) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": part.kind} if part.source is None else {"type": part.kind, part.kind: part.source}


def _openai_part(part: str | Medium) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    source = part.source
    if isinstance(source, bytes):
        from flamingo.vision.image_files import sniff

        kind = "video/mp4" if part.kind == "video" else f"image/{(sniff(source) or '').replace('jpg', 'jpeg')}"
        source = f"data:{kind};base64,{base64.b64encode(source).decode()}"
    if not isinstance(source, str | Path):
        raise UserError(f"a {part.kind} of OpenAI's form is a URL; give a path, a URL or an encoded file, not pixels")
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": str(source)}}


def is_message(node: Any) -> bool:
    """Say whether a mapping is a message, which has a role."""
    return isinstance(node, Mapping) and "role" in node


def is_chat(item: Any) -> bool:
    """Say whether something is a list of messages or of parts."""
    return isinstance(item, list | tuple) and len(item) > 0 and isinstance(item[0], Mapping)


def parts_of(nodes: Any, where: str) -> list[Part]:
    """Return the parts of a list of parts or of contents, with OpenAI's `image_url` as an image.

    Raises:
        UserError: a part of an unknown type.
    """
    if isinstance(nodes, str):
        return [{"type": "text", "text": nodes}]
    if not isinstance(nodes, list | tuple | None):
        raise UserError(f"{where} has a content that is a {type(nodes).__name__}; give a text or a list of parts")
    parts: list[Part] = []
    for node in nodes or []:
        if not isinstance(node, Mapping):
            raise UserError(f"{where} has a part that is a {type(node).__name__}; a part is a dict with a 'type'")
        if "type" not in node and "content" in node:
            parts += parts_of(node["content"], where)
            continue
        kind = node.get("type")
        if kind in ("image_url", "video_url"):
            given = node.get(kind)
            kind = kind.removesuffix("_url")
            node = {"type": kind, "url": given.get("url") if isinstance(given, Mapping) else given}
        if kind not in ("text", "image", "video"):
            raise UserError(f"{where} has a part of type {kind!r}; known are text, image and video")
        if kind == "text" and not isinstance(node.get("text"), str):
            raise UserError(f"{where} has a text part without a 'text'")
        parts.append(node)
    return parts


def source_of(part: Part) -> Any:
    """Return what an image's or a video's part holds (a path, URL, PIL image, bytes, frames), None for nothing.

    Raises:
        UserError: its `base64` is not the base64 of anything.
    """
    for key in _SOURCES[part["type"]]:
        if (value := part.get(key)) is None:
            continue
        if key != "base64":
            return value
        try:
            return base64.b64decode(value.partition(",")[2] or value)
        except (AttributeError, TypeError, ValueError) as error:
            kind, shown = part["type"], repr(value)[:40]
            raise UserError(f"the 'base64' of a part of type {kind!r} cannot be decoded ({error}): {shown}") from None
    return None


def media_of(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[tuple[str, Any]], int]:
    """Return (kind, what it holds) of the images and clips that messages carry, and how many parts there are."""
    parts = [part for message in messages for part in parts_of(message.get("content"), where)]
    seen = [(part["type"], source_of(part)) for part in parts if part["type"] != "text"]
    return [(kind, source) for kind, source in seen if source is not None], len(seen)
