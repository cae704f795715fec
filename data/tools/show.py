"""A document as a person would look at it: as text for the terminal, or as HTML with its images in position."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image as PILImage

from data.shards.document import Document, Image, Text, sniff

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 48em; margin: 2em auto; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: .4em .6em .4em 0; vertical-align: middle; }
img { image-rendering: pixelated; min-width: 96px; max-width: 100%; border: 1px solid #ccc; }
figcaption, .facts { color: #777; font-size: 12px; }
.masked { color: #a60; }
"""


def describe_image(data: bytes) -> str:
    """Describe an encoded image: its format, size in pixels (or that it cannot be decoded) and bytes."""
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            size = f"{image.width} x {image.height}"
    except (OSError, ValueError, SyntaxError):
        size = "undecodable"
    return f"{sniff(data) or 'unknown'}, {size}, {len(data)} bytes"


def document_as_text(document: Document, where: str) -> str:
    """Return a document in reading order, one node a line; `?` marks text that is not in the loss."""
    lines = [f"{where}, key {document.key}", *(f"  {name}: {value}" for name, value in document.meta.items()), ""]
    for node in document.nodes:
        if isinstance(node, Text):
            lines.append(f"  {' ' if node.loss else '?'} {node.text!r}")
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
    parts = []
    for node in document.nodes:
        if isinstance(node, Text):
            name = "in-loss" if node.loss else "masked"
            parts.append(f'<span class="{name}">{html.escape(node.text)}</span>')
        else:
            parts += [figure(document.images[frame], f"image {frame}") for frame in node.frames]
    facts = "<br>".join(f"{html.escape(str(name))}: {html.escape(str(value))}" for name, value in document.meta.items())
    title = html.escape(f"{where}, key {document.key}")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n'
        f'<h1 class="facts">{title}</h1>\n<p>{"".join(parts)}</p>\n'
        f'<p class="facts">{facts}<br><span class="masked">this colour</span>: not in the loss</p>\n</html>\n'
    )


def figure(data: bytes, caption: str) -> str:
    """Return an image with its format and size below it, as HTML that holds its bytes."""
    kind = {"jpg": "jpeg", None: "octet-stream"}.get(sniff(data), sniff(data))
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = html.escape(f"{caption}: {describe_image(data)}")
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'
