"""A document as a person would look at it: as text for the terminal, or as HTML with its images in position."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from data.shards.document import Document, Image, Text
from data.tools.templates import render
from flamingo.vision.image_files import read_image, sniff

TEMPLATES = Path(__file__).parent / "templates"


def describe_image(data: bytes) -> str:
    """Describe an encoded image: its format, size in pixels (or that it cannot be decoded) and bytes."""
    try:
        size = read_image(data, lambda image: f"{image.width} x {image.height}")
    except Exception:  # decoders raise exceptions of every kind
        size = "undecodable"
    return f"{sniff(data) or 'unknown'}, {size}, {len(data)} bytes"


def document_as_text(document: Document, where: str) -> str:
    """Return a document in reading order, one node a line; `?` marks text that is not in the loss."""
    lines = [f"{where}, key {document.key}", *(f"  {name}: {value}" for name, value in document.meta.items()), ""]
    for node in document.nodes:
        if isinstance(node, Text):
            lines.append(f"  {' ' if node.loss else '?'} {f'{node.role}: ' if node.role else ''}{node.text!r}")
            continue
        label = (
            f"[image {node.frames[0]}: " if len(node.frames) == 1 else f"[clip of {len(node.frames)} frames, first: "
        )
        lines.append(f"  {label}{describe_image(document.images[node.frames[0]])}]")
    images = sum(isinstance(node, Image) for node in document.nodes)
    lines += ["", f"{images} images shown, {len(document.images)} stored; '?' marks text that is not in the loss"]
    return "\n".join(lines)


def document_as_html(document: Document, where: str) -> str:
    """Return a document as a self-contained HTML page, images included."""
    nodes: list[dict[str, Any]] = []
    for node in document.nodes:
        if isinstance(node, Text):
            nodes.append({"text": f"\n{node.role}: {node.text}" if node.role else node.text, "loss": node.loss})
        else:
            nodes.append({"images": [figure(document.images[frame], f"image {frame}") for frame in node.frames]})
    title = f"{where}, key {document.key}"
    return render(TEMPLATES / "document.html.j2", title=title, nodes=nodes, meta=document.meta)


def figure(data: bytes, caption: str) -> dict[str, str]:
    """Return an image for a template: its bytes as a data URI, and a caption with its format and size."""
    kind = {"jpg": "jpeg", "tif": "tiff", None: "octet-stream"}.get(sniff(data), sniff(data))
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"source": source, "caption": f"{caption}: {describe_image(data)}"}
