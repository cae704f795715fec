"""Prompts and answers to look at: a self-contained HTML page, and one image of a few prompts.

Images are in the prompt where the model saw them, enlarged without smoothing. Right and wrong answers are shown half
and half if there are both, the first of each in the task's order, so that nobody chooses them.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data.tools.templates import render
from eval.reports.results import interval_text, percent, setting
from eval.samples import Sample
from eval.task import EncodedImage
from flamingo.processor import IMAGE_TOKEN
from flamingo.vision.image_files import read_image, sniff
from flamingo.vision.transform import as_seen

TEMPLATE = Path(__file__).parent / "templates" / "gallery.html.j2"
MOST_SIDE = 256  # in pixels; larger images are shown as thumbnails
SHOWN_BY_BROWSERS = ("png", "jpg", "webp", "gif", "bmp", "avif")
UNSURE = 0.5  # the filter "unsure" shows confidences below it
FILTERS = {"all": "all", "wrong": "wrong", "unsure": f"confidence below {UNSURE:g}", "failed": "not parsed"}


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return at most `count` samples in the task's order, half of them wrong if there are enough of both."""
    right = [sample for sample in samples if sample.score >= 0.5]
    wrong = [sample for sample in samples if sample.score < 0.5]
    take_wrong = min(len(wrong), max(count // 2, count - len(right)))
    chosen = {id(sample) for sample in right[: count - take_wrong] + wrong[:take_wrong]}
    return [sample for sample in samples if id(sample) in chosen]


def cells_to_show(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples with the first seed and the real images, a list for each task, strategy and shots."""
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        if sample.cell.images == "real" and sample.cell.seed == samples[0].cell.seed:
            groups.setdefault((sample.cell.task, sample.cell.strategy, sample.cell.shots), []).append(sample)
    return list(groups.values())


def gallery_html(
    results: Mapping[str, Any], samples: Sequence[Sample], images: Mapping[str, EncodedImage], count: int = 8
) -> str:
    """Return the whole page, with `count` samples for each task, strategy and number of shots. `images` by SHA-256."""
    groups = []
    for group in cells_to_show(samples):
        cell = group[0].cell
        strategy = "" if cell.strategy == "plain" else f", {cell.strategy}"
        groups.append(
            {
                "title": f"{cell.task}, {cell.shots} shots{strategy}",
                "right": f"{sum(sample.score for sample in group):g}",
                "n": len(group),
                "samples": [_sample(sample, images) for sample in choose(group, count)],
            }
        )
    rows = [_row(row) for row in results["rows"]]
    values = {"rows": rows, "filters": FILTERS, "groups": groups}
    return render(TEMPLATE, model=results["model"]["name"], date=results["date"], **values)


def _row(row: Mapping[str, Any]) -> list[object]:
    shares = percent(row["score"]), f"{interval_text(row['interval'])} %", percent(row["chance"])
    return [row["task"], setting(row), row["shots"], *shares, percent(row["constant"]), row["n"]]


def figures_of(sample: Sample) -> list[tuple[str | None, str, bool]]:
    """Return (image, the text after it, whether it is the query's) in prompt order; a turn may have several images."""
    figures = []
    left = iter(sample.images_sha256)
    tags = sum(text.count(IMAGE_TOKEN) + (sha256 is not None) for sha256, text in sample.turns)
    split = tags == len(sample.images_sha256)  # otherwise some text contains the tag as an ordinary word
    for index, (sha256, text) in enumerate(sample.turns):
        is_query = index == len(sample.turns) - 1
        first, *more = text.split(IMAGE_TOKEN) if split else [text]
        if sha256 is not None:
            next(left, None)
        figures.append((sha256, first, is_query))
        figures += [(next(left), after, is_query) for after in more]
    return figures


def _sample(sample: Sample, images: Mapping[str, EncodedImage]) -> dict[str, Any]:
    """Return what the template shows of a sample."""
    figures = []
    for sha256, text, is_query in figures_of(sample):
        frames = () if sha256 is None else images[sha256].frames
        figures.append({"sources": [data_uri(frame) for frame in frames], "text": text, "is_query": is_query})
    notes = []
    if sample.log_probs:
        ranked = sorted(zip(sample.log_probs, sample.candidates, strict=True), reverse=True)[:4]
        notes.append(", ".join(f"{candidate} {log_prob:.2f}" for log_prob, candidate in ranked))
    if sample.confidence is not None:
        notes.append(f"confidence {sample.confidence:.2f}")
    if sample.votes:
        notes.append("votes " + ", ".join(f"{answer} {100 * share:.0f} %" for answer, share in sample.votes[:4]))
    return {
        "figures": figures,
        "answer": sample.raw.strip(),
        "expected": " | ".join(sample.golds) if sample.score < 1 else "",
        "notes": [*notes, f"{sample.query_id} {sample.kind}"],
        "right": sample.score >= 0.5,
        "unsure": sample.confidence is not None and sample.confidence < UNSURE,
        "failed": sample.parse_failed,
    }


def data_uri(data: bytes, most_side: int = MOST_SIDE) -> str:
    """Return the image's own bytes, or a JPEG thumbnail of one beyond `most_side` pixels, as a data URI."""
    kind = sniff(data)
    if kind not in SHOWN_BY_BROWSERS or max(read_image(data, lambda image: image.size)) > most_side:
        image = as_seen(data)
        image.thumbnail((most_side, most_side))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        data, kind = buffer.getvalue(), "jpg"
    return f"data:image/{'jpeg' if kind == 'jpg' else kind};base64,{base64.b64encode(data).decode()}"


def choose_for_strip(samples: Sequence[Sample], each: int = 3, widest: int = 9) -> list[Sample]:
    """Return `each` samples of every task, with the most shots whose prompts have at most `widest` figures."""
    best: dict[str, list[Sample]] = {}
    for group in cells_to_show(samples):
        if max(len(figures_of(sample)) for sample in group) <= widest or group[0].cell.task not in best:
            best[group[0].cell.task] = max(best.get(group[0].cell.task, []), group, key=_shots)
    return [sample for group in best.values() for sample in choose(group, each)]


def _shots(group: Sequence[Sample]) -> int:
    return group[0].cell.shots if group else -1


def _lines(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 22, max_lines=3, placeholder=" …") or ["(nothing)"]


def strip_png(samples: Sequence[Sample], images: Mapping[str, EncodedImage], side: int = 112) -> bytes:
    """Return a PNG with one prompt per line, from left to right: each image with its text, then the model's answer."""
    font = ImageFont.load_default(size=13)
    widest = max(len(figures_of(sample)) for sample in samples)
    step, line = side + 14, side + 66
    sheet = Image.new("RGB", (step * widest + 190, line * len(samples) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for row, sample in enumerate(samples):
        x, y = 8, 8 + row * line
        for sha256, text, is_query in figures_of(sample):
            if sha256 is not None:
                frame = as_seen(images[sha256].frames[0])
                sheet.paste(frame.resize((side, side), Image.Resampling.NEAREST), (x, y))
            if is_query:
                draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="#0072B2", width=3)
            draw.multiline_text((x, y + side + 4), textwrap.fill(text, 18), fill="#222222", font=font, spacing=2)
            x += step
        right = sample.score >= 0.5
        lines = [*_lines(sample.raw), *([] if right else ["", "expected:", *_lines(sample.golds[0])])]
        draw.multiline_text((x + 4, y), "\n".join(lines), fill="#27864a" if right else "#c0392b", font=font, spacing=2)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
