"""A document in memory and as JSON: text and images in reading order.

    {"v":1,"nodes":[{"t":"text"},{"t":"question","loss":false},{"i":0},{"c":[1,2],"fps":1.0}],"meta":{}}

`t` is text, `i` an image, `c` a clip (several frames), both as indices into the document's images. A sample without
such a JSON is a pair as img2dataset writes it: its image, then its text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.errors import ContentError
from flamingo.errors import UserError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. `loss=False` marks text that is read but not in the loss (a question)."""

    text: str
    loss: bool = True


@dataclass(frozen=True, slots=True)
class Image:
    """An image (one frame) or a clip (several): indices into the document's `images`; `fps` is a clip's frame rate."""

    frames: tuple[int, ...]
    fps: float | None = None


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
            out.append({"t": node.text} if node.loss else {"t": node.text, "loss": False})
        elif len(node.frames) == 1:
            out.append({"i": node.frames[0]})
        else:
            out.append({"c": list(node.frames)} | ({} if node.fps is None else {"fps": node.fps}))
    body = {"v": VERSION, "nodes": out, "meta": dict(meta)}
    return to_utf8(json.dumps(body, ensure_ascii=False, separators=(",", ":")))


def to_utf8(text: str) -> bytes:
    """Encode a text as UTF-8; half a surrogate pair, which web text sometimes has, becomes a question mark."""
    return text.encode("utf-8", "replace")


def parse_nodes(body: Mapping[str, Any]) -> list[Node]:
    """Return the nodes of a document's decoded JSON. Raises ValueError, naming the node, for a wrong format."""
    if type(body.get("v")) is not int or body["v"] != VERSION:
        raise ValueError(f"format version {body.get('v')!r}, this program reads version {VERSION}")
    if not isinstance(body["nodes"], list):
        raise ValueError("'nodes' is not a list")
    nodes: list[Node] = []
    for number, item in enumerate(body["nodes"]):
        if not isinstance(item, dict):
            raise ValueError(f"node {number} is not an object")
        if isinstance(text := item.get("t"), str):
            nodes.append(Text(text, bool(item.get("loss", True))))
            continue
        frames = item.get("c", [item.get("i")])
        if not isinstance(frames, list) or not frames or not all(type(f) is int and f >= 0 for f in frames):
            raise ValueError(f"node {number} is neither text ('t'), an image ('i') nor a clip ('c')")
        nodes.append(Image(tuple(frames), item.get("fps")))
    return nodes


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
    caption = "" if text is None else decode_text(text).strip()
    if not caption:
        value = facts.get(key)
        if not isinstance(value, str | None):
            raise ValueError("caption is not text")
        caption = (value or "").strip()
    if not caption:
        has = f"the JSON has {', '.join(map(str, list(facts)[:12]))}" if facts else "there is no JSON"
        raise ContentError("no caption", f"{'blank' if text is not None else 'no'} .txt, and {has}")
    if not caption.isascii():
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise ValueError("caption is not Unicode") from None
    return caption


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
