"""A document in memory and as JSON: text and images in reading order.

    {"v":1,"nodes":[{"t":"text"},{"t":"question","loss":false},{"i":0},{"c":[1,2],"fps":1.0}],"meta":{}}
    {"v":1.1,"nodes":[{"i":0,"r":"user"},{"t":"What?","r":"user"},{"t":"A cat.","r":"assistant"}],"meta":{}}

`t` is text, `i` an image, `c` a clip (several frames), both as indices into the document's images. In a conversation
(version 1.1) every node has a role `r`: neighbours of one role are a message. A sample without such a JSON is a pair as
img2dataset writes it: its image, then its text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from data.errors import ContentError
from flamingo.errors import UserError
from flamingo.processing.conversation import ROLES, Conversation, Medium, Message, check_turns

VERSION, WITH_ROLES = 1, 1.1
"""Documents without roles are written as version 1, byte for byte as ever; older programs refuse those with roles."""


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. `loss=False` marks text that is read but not in the loss (a question).

    `role`: who says it in a conversation, of which what the assistant says is in the loss.
    """

    text: str
    loss: bool = True
    role: str | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An image (one frame) or a clip (several): indices into the document's `images`; `fps` is a clip's frame rate."""

    frames: tuple[int, ...]
    fps: float | None = None
    role: str | None = None


Node = Text | Image


@dataclass(slots=True)
class Document:
    """Text and images in reading order; `images` holds encoded bytes. The writer replaces an empty `key`."""

    key: str
    nodes: list[Node]
    images: list[bytes]
    meta: dict[str, Any] = field(default_factory=dict)


def nodes_to_json(nodes: Iterable[Node], meta: Mapping[str, Any]) -> bytes:
    """Return the JSON member of a document."""
    out: list[dict[str, Any]] = []
    for node in nodes:
        if isinstance(node, Text):
            out.append({"t": node.text} if node.loss == _learnt(node.role) else {"t": node.text, "loss": node.loss})
        elif len(node.frames) == 1:
            out.append({"i": node.frames[0]})
        else:
            out.append({"c": list(node.frames)} | ({} if node.fps is None else {"fps": node.fps}))
        if node.role is not None:
            out[-1]["r"] = node.role
    body = {"v": WITH_ROLES if any("r" in item for item in out) else VERSION, "nodes": out, "meta": dict(meta)}
    return to_utf8(json.dumps(body, ensure_ascii=False, separators=(",", ":")))


def _learnt(role: str | None) -> bool:
    return role in (None, "assistant")


def to_utf8(text: str) -> bytes:
    """Encode a text as UTF-8; half a surrogate pair, which web text sometimes has, becomes a question mark."""
    return text.encode("utf-8", "replace")


def parse_nodes(body: Mapping[str, Any]) -> list[Node]:
    """Return the nodes of a document's decoded JSON. Raises ValueError, naming the node, for a wrong format."""
    version = body.get("v")
    if (type(version), version) not in ((int, VERSION), (float, WITH_ROLES)):
        raise ValueError(f"format version {version!r}, this program reads versions {VERSION} and {WITH_ROLES}")
    if not isinstance(body["nodes"], list):
        raise ValueError("'nodes' is not a list")
    nodes: list[Node] = []
    for number, item in enumerate(body["nodes"]):
        if not isinstance(item, dict):
            raise ValueError(f"node {number} is not an object")
        role = item.get("r")
        if (role is not None and role not in ROLES) or (nodes and (role is None) != (nodes[0].role is None)):
            raise ValueError(f"node {number} has the role {role!r}: a conversation's nodes all have one of {ROLES}")
        if isinstance(text := item.get("t"), str):
            nodes.append(Text(text, bool(item.get("loss", _learnt(role))), role))
            continue
        frames = item.get("c", [item.get("i")])
        if not isinstance(frames, list) or not frames or not all(type(f) is int and f >= 0 for f in frames):
            raise ValueError(f"node {number} is neither text ('t'), an image ('i') nor a clip ('c')")
        nodes.append(Image(tuple(frames), item.get("fps"), role))
    return nodes


def is_conversation(nodes: Sequence[Node]) -> bool:
    """Say whether a document's nodes have roles."""
    return bool(nodes) and nodes[0].role is not None


def conversation_nodes(conversation: Conversation, media: Sequence[Image]) -> list[Node]:
    """Return the nodes of a conversation whose images and clips are `media`, in their order.

    Raises:
        ValueError: they differ in number.
    """
    left = list(media)
    if (count := sum(1 for _ in conversation.media)) != len(left):
        raise ValueError(f"the conversation shows {count} images and clips, but {len(left)} are given")
    nodes: list[Node] = []
    for message in conversation.messages:
        loss = message.loss and _learnt(message.role)
        for part in message.content:
            if isinstance(part, Medium):
                nodes.append(replace(left.pop(0), role=message.role))
            elif part:
                nodes.append(Text(part, loss, message.role))
    return nodes


def conversation_of(nodes: Sequence[Node]) -> Conversation:
    """Return the conversation of a document's nodes; what its media hold are the nodes themselves.

    Raises:
        UserError: roles out of order, or an empty turn; names the message.
    """
    messages = []
    for role, group in groupby(nodes, key=lambda node: node.role):
        inside = list(group)
        content = tuple(
            node.text if isinstance(node, Text) else Medium("image" if len(node.frames) == 1 else "video", node)
            for node in inside
        )
        loss = all(node.loss for node in inside if isinstance(node, Text)) if role == "assistant" else True
        messages.append(Message(str(role), content, loss))
    conversation = Conversation(tuple(messages))
    check_turns(conversation.to_messages(), "the document")
    return conversation


def facts_of(raw: bytes | None) -> dict[str, Any]:
    """Return a sample's JSON object, empty where it has none. Raises ValueError when it is not one."""
    if raw is None:
        return {}
    try:
        body = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"JSON cannot be read ({error})") from None
    if not isinstance(body, dict):
        raise ValueError("JSON is not an object")
    return body


def document_of(body: Mapping[str, Any]) -> tuple[list[Node], dict[str, Any]]:
    """Return (nodes, meta) of a document's decoded JSON. Raises ValueError for a wrong format."""
    meta = body.get("meta", {})
    return parse_nodes(body), meta if isinstance(meta, dict) else {}


def pair_of(text: bytes | None, facts: Mapping[str, Any], images: int) -> list[Node]:
    """Return the nodes of a sample that is no document: its images, then its caption. Raises as `caption_of`."""
    return [*(Image((number,)) for number in range(images)), Text(caption_of(text, facts))]


def caption_of(text: bytes | None, facts: Mapping[str, Any], key: str = "caption") -> str:
    """Return the caption of a pair: its text file, or where that is missing or blank `key` of its JSON's facts.

    Byte-order marks and blanks around it are left out. `prepare` and training in place both ask here. Raises
    ContentError when there is no caption, ValueError for bytes that are not text and values of other types.
    """
    caption = "" if text is None else _visible(decode_text(text))
    if not caption:
        value = facts.get(key)
        if not isinstance(value, str | None):
            raise ValueError("caption is not text")
        caption = _visible(value or "")
    if not caption:
        has = f"the JSON has {', '.join(map(str, list(facts)[:12]))}" if facts else "there is no JSON"
        raise ContentError("no caption", f"{'blank' if text is not None else 'no'} .txt, and {has}")
    if not caption.isascii():
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise ValueError("caption is not Unicode") from None
    return caption


def _visible(text: str) -> str:
    """Return a text without the blanks around it; nothing where no character of it is seen (zero width, control)."""
    text = text.strip()
    return text if text.isprintable() or any(c.isprintable() and c != " " for c in text) else ""


def decode_text(raw: bytes) -> str:
    """Decode UTF-8, or UTF-16 with its byte-order mark as Windows' editors write it. Raises ValueError."""
    try:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff") and len(raw) > 2:
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None


def check_images(nodes: Iterable[Node], present: Collection[int], where: str) -> None:
    """Raise UserError when the nodes name an image that the sample does not have."""
    used = {frame for node in nodes if isinstance(node, Image) for frame in node.frames}
    if missing := used - set(present):
        raise UserError(
            f"{where}: its nodes name image {min(missing)} but it has {len(present)} images, counted from 0; add the "
            "missing images or remove the nodes"
        )
