"""A page as a person would look at it: as text for the terminal, or as HTML with the pictures in their places."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from data.shards.document import Page, Picture, Text, sniff

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 48em; margin: 2em auto; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: .4em .6em .4em 0; vertical-align: middle; }
img { image-rendering: pixelated; min-width: 96px; max-width: 100%; border: 1px solid #ccc; }
figcaption, .facts { color: #777; font-size: 12px; }
.unlearnt { color: #a60; }
"""


def describe_picture(data: bytes) -> str:
    """Format, size and bytes of an encoded picture, or why it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = f"{image.width} x {image.height}"
    except (OSError, ValueError, SyntaxError):
        size = "undecodable"
    return f"{sniff(data) or 'unknown'}, {size}, {len(data)} bytes"


def page_as_text(page: Page, where: str) -> str:
    """The page in reading order, one node a line; `?` marks text that is read and not learnt."""
    lines = [f"{where}, key {page.key}", *(f"  {name}: {value}" for name, value in page.meta.items()), ""]
    for node in page.nodes:
        if isinstance(node, Text):
            lines.append(f"  {' ' if node.loss else '?'} {node.text!r}")
            continue
        label = (
            f"[picture {node.frames[0]}: " if len(node.frames) == 1 else f"[clip of {len(node.frames)} frames, first: "
        )
        lines.append(f"  {label}{describe_picture(page.images[node.frames[0]])}]")
    pictures = sum(isinstance(node, Picture) for node in page.nodes)
    lines += ["", f"{pictures} pictures shown, {len(page.images)} stored; '?' marks text that is read and not learnt"]
    return "\n".join(lines)


def page_as_html(page: Page, where: str) -> str:
    """A page of HTML that needs nothing else: the pictures are in it."""
    parts = []
    for node in page.nodes:
        if isinstance(node, Text):
            name = "learnt" if node.loss else "unlearnt"
            parts.append(f'<span class="{name}">{html.escape(node.text)}</span>')
        else:
            parts += [figure(page.images[frame], f"picture {frame}") for frame in node.frames]
    facts = "<br>".join(f"{html.escape(str(name))}: {html.escape(str(value))}" for name, value in page.meta.items())
    title = html.escape(f"{where}, key {page.key}")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n'
        f'<h1 class="facts">{title}</h1>\n<p>{"".join(parts)}</p>\n'
        f'<p class="facts">{facts}<br><span class="unlearnt">this colour</span>: read and not learnt</p>\n</html>\n'
    )


def figure(data: bytes, caption: str) -> str:
    """A picture with its format and size below it, as HTML that holds its bytes."""
    kind = {"jpg": "jpeg", None: "octet-stream"}.get(sniff(data), sniff(data))
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = html.escape(f"{caption}: {describe_picture(data)}")
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'
