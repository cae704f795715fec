"""Prompts and answers to look at: an HTML page that needs nothing but itself, and one image of a few prompts.

Images stand in the prompt where the model saw them, enlarged without smoothing. Right and wrong answers are shown
half and half where there are both, the first of each in the task's order: chosen by no one.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data.shards.writer import sniff
from eval.reports.results import setting
from eval.samples import Sample
from eval.task import EncodedImage
from flamingo.processor import IMAGE_TOKEN

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.sample { border: 1px solid #ccc; border-left: .5rem solid #c0392b; margin: .8rem 0; padding: .6rem; }
.sample.right { border-left-color: #27864a; }
.prompt { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-end; }
figure { margin: 0; max-width: 11rem; } figure.query { outline: 2px solid #0072B2; outline-offset: 3px; }
figcaption { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
img { height: 80px; image-rendering: pixelated; display: block; }
.answer { margin: .5rem 0 0; } code { background: #f2f2f2; padding: 0 .2rem; white-space: pre-wrap; }
#wrong:checked ~ .sample.right, #unsure:checked ~ .sample:not(.unsure) { display: none; }
#failed:checked ~ .sample:not(.failed) { display: none; } label { margin-right: 1rem; }
small { color: #666; } table { border-collapse: collapse; } td, th { padding: .1rem .7rem; text-align: right; }
"""
MOST_SIDE = 256  # larger images are shown as thumbnails
UNSURE = 0.5  # confidences below it are shown by that filter
FILTERS = {"all": "all", "wrong": "wrong", "unsure": f"confidence below {UNSURE:g}", "failed": "not parsed"}


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, half of them wrong where there are enough of both, in the task's order."""
    right = [sample for sample in samples if sample.score >= 0.5]
    wrong = [sample for sample in samples if sample.score < 0.5]
    take_wrong = min(len(wrong), max(count // 2, count - len(right)))
    chosen = {id(sample) for sample in right[: count - take_wrong] + wrong[:take_wrong]}
    return [sample for sample in samples if id(sample) in chosen]


def cells_to_show(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of the first seed and the real images, a list for each task, strategy and number of shots."""
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        if sample.cell.images == "real" and sample.cell.seed == samples[0].cell.seed:
            groups.setdefault((sample.cell.task, sample.cell.strategy, sample.cell.shots), []).append(sample)
    return list(groups.values())


def gallery_html(
    results: Mapping[str, Any], samples: Sequence[Sample], images: Mapping[str, EncodedImage], count: int = 8
) -> str:
    """The whole page as a string. `images` by SHA-256."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Prompts and answers</title><style>{STYLE}</style>"
    ]
    parts.append("<h1>Prompts and answers</h1><p>Framed in blue: the query. Green: right, red: wrong. ")
    parts.append(
        f"Model <code>{_text(results['model']['name'])}</code>, {_text(results['date'])}.</p>{_table(results)}"
    )
    for name, label in FILTERS.items():  # siblings of the samples, so that the style alone can hide them
        checked = " checked" if name == "all" else ""
        parts.append(f"<input type=radio name=show id={name}{checked}><label for={name}>{label}</label>")
    for group in cells_to_show(samples):
        cell = group[0].cell
        how = "" if cell.strategy == "plain" else f", {cell.strategy}"
        right = sum(sample.score for sample in group)
        parts.append(f"<h2>{_text(cell.task)}, {cell.shots} shots{how}</h2><p>{right:g} of {len(group)} right; below, ")
        parts.append("right and wrong ones half and half.</p>")
        parts += [_sample(sample, images) for sample in choose(group, count)]
    return "".join(parts) + "</html>\n"


def _table(results: Mapping[str, Any]) -> str:
    lines = ["<table><tr><th>task<th>setting<th>shots<th>score<th>95 % interval<th>chance<th>constant<th>n"]
    for row in results["rows"]:
        low, high = row["interval"]
        cells = [row["task"], setting(row), str(row["shots"]), _percent(row["score"])]
        cells += [
            f"{_percent(low)} to {_percent(high)}",
            _percent(row["chance"]),
            _percent(row["constant"]),
            str(row["n"]),
        ]
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}" for cell in cells))
    return "".join(lines) + "</table>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def figures_of(sample: Sample) -> list[tuple[str | None, str, bool]]:
    """(image, the text behind it, is it the query's) in the order of the prompt; a turn may have several images."""
    found = []
    left = iter(sample.images_sha256)
    tagged = sum(text.count(IMAGE_TOKEN) + (sha256 is not None) for sha256, text in sample.turns)
    split = tagged == len(sample.images_sha256)  # else a text has that word of its own
    for number, (sha256, text) in enumerate(sample.turns):
        is_query = number == len(sample.turns) - 1
        first, *more = text.split(IMAGE_TOKEN) if split else [text]
        if sha256 is not None:
            next(left, None)
        found.append((sha256, first, is_query))
        found += [(next(left), behind, is_query) for behind in more]
    return found


def _sample(sample: Sample, images: Mapping[str, EncodedImage]) -> str:
    figures = []
    for sha256, text, is_query in figures_of(sample):
        frames = () if sha256 is None else images[sha256].frames
        role = " class=query" if is_query else ""
        shown = "".join(f'<img alt="" src="{data_uri(frame)}">' for frame in frames)
        figures.append(f"<figure{role}>{shown}<figcaption>{_text(text)}</figcaption></figure>")
    said = f"said <code>{_text(sample.raw.strip())}</code>"
    if sample.score < 1:
        said += f", expected <code>{_text(' | '.join(sample.golds))}</code>"
    if sample.log_probs:
        ranked = sorted(zip(sample.log_probs, sample.candidates, strict=True), reverse=True)[:4]
        said += " <small>" + _text(", ".join(f"{name} {value:.2f}" for value, name in ranked)) + "</small>"
    if sample.confidence is not None:
        said += f" <small>confidence {sample.confidence:.2f}</small>"
    if sample.votes:
        shares = ", ".join(f"{answer} {100 * share:.0f} %" for answer, share in sample.votes[:4])
        said += f" <small>votes {_text(shares)}</small>"
    state = " right" if sample.score >= 0.5 else ""
    state += " unsure" if sample.confidence is not None and sample.confidence < UNSURE else ""
    state += " failed" if sample.parse_failed else ""
    head = f"<div class='sample{state}'><div class=prompt>{''.join(figures)}</div>"
    return f"{head}<p class=answer>{said} <small>{_text(sample.query_id)} {_text(sample.kind)}</small></p></div>"


def data_uri(data: bytes) -> str:
    """The image's own bytes, or a JPEG thumbnail of a large one, as a data URI."""
    kind = sniff(data)
    image: Image.Image = Image.open(io.BytesIO(data))
    if kind is None or max(image.size) > MOST_SIDE:
        image = image.convert("RGB")
        image.thumbnail((MOST_SIDE, MOST_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpg"
    return f"data:image/{'jpeg' if kind == 'jpg' else kind};base64,{base64.b64encode(data).decode()}"


def choose_for_strip(samples: Sequence[Sample], each: int = 3, widest: int = 9) -> list[Sample]:
    """`each` samples of every task, with the most shots whose prompts have at most `widest` images or texts."""
    best: dict[str, list[Sample]] = {}
    for group in cells_to_show(samples):
        if max(len(figures_of(sample)) for sample in group) <= widest or group[0].cell.task not in best:
            best[group[0].cell.task] = max(best.get(group[0].cell.task, []), group, key=_shots)
    return [sample for group in best.values() for sample in choose(group, each)]


def _shots(group: Sequence[Sample]) -> int:
    return group[0].cell.shots if group else -1


def _lines(text: str, most: int = 3) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 22, max_lines=most, placeholder=" …") or ["(nothing)"]


def strip_png(samples: Sequence[Sample], images: Mapping[str, EncodedImage], side: int = 112) -> bytes:
    """A PNG with one prompt a line, read from left to right: each image with its text, then what the model said."""
    font = ImageFont.load_default(size=13)
    widest = max(len(figures_of(sample)) for sample in samples)
    step, line = side + 14, side + 66
    sheet = Image.new("RGB", (step * widest + 190, line * len(samples) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for row, sample in enumerate(samples):
        x, y = 8, 8 + row * line
        for sha256, text, is_query in figures_of(sample):
            if sha256 is not None:
                frame = Image.open(io.BytesIO(images[sha256].frames[0])).convert("RGB")
                sheet.paste(frame.resize((side, side), Image.Resampling.NEAREST), (x, y))
            if is_query:
                draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="#0072B2", width=3)
            draw.multiline_text((x, y + side + 4), textwrap.fill(text, 18), fill="#222222", font=font, spacing=2)
            x += step
        right = sample.score >= 0.5
        said = [*_lines(sample.raw), *([] if right else ["", "expected:", *_lines(sample.golds[0])])]
        draw.multiline_text((x + 4, y), "\n".join(said), fill="#27864a" if right else "#c0392b", font=font, spacing=2)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
