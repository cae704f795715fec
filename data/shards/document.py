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
    if body.get("v") != VERSION:
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


def nodes_of(json_bytes: bytes | None, text: bytes | None, images: int) -> tuple[list[Node], dict[str, Any]]:
    """Return nodes and meta of a sample from its members: a document if the JSON has nodes, otherwise a pair.

    Raises ValueError, with a readable message, for broken JSON. The caller checks with `check_images` that all images
    are there: only it knows the shard and the row.
    """
    body: Any = {}
    if json_bytes is not None:
        try:
            body = json.loads(json_bytes)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"JSON cannot be read ({error})") from None
        if not isinstance(body, dict):
            raise ValueError("JSON is not an object")
        if "nodes" in body:
            meta = body.get("meta", {})
            return parse_nodes(body), meta if isinstance(meta, dict) else {}
    nodes: list[Node] = [Image((number,)) for number in range(images)]
    if text is not None:
        try:
            nodes.append(Text(text.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"text is not UTF-8 ({error})") from None
    return nodes, body


def check_images(nodes: Iterable[Node], present: Collection[int], where: str) -> None:
    """Raise UserError when the nodes name an image that the sample does not have."""
    used = {frame for node in nodes if isinstance(node, Image) for frame in node.frames}
    if missing := used - set(present):
        raise UserError(
            f"{where}: its nodes name image {min(missing)} but it has {len(present)} images, counted from 0; add the "
            "missing images or remove the nodes"
        )
