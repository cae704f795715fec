"""M3IT: rows of `instruction`, `inputs`, `image_base64_str` and `outputs`, as JSONL or converted to parquet.

The raw files name their fields differently in each sub-task; `--field image_base64_str=img_str` says what a field is
called in this file. A row with media in any other field is dropped and counted. Several images of a row stand one after
another, or with --clips form one clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from data.prepare.images import ImageRule, add_image_arguments, from_base64
from data.prepare.inputs import input_files, record_units, records
from data.prepare.media_fields import refuse_other_media
from data.prepare.sources.obelics import parquet_rows, parquet_units
from data.prepare.turns import add_turn_arguments, question_and_answer, turn_nodes
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image
from flamingo.errors import UserError

LAYOUT = "interleaved"
IN_A_UNIT = 10_000
FIELDS = ("instruction", "inputs", "image_base64_str", "outputs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare m3it`."""
    parser.add_argument("--field", nargs="+", default=[], metavar="NAME=HERE", help="what a field is called here")
    parser.add_argument("--clips", action="store_true", help="several images of a row are the frames of a clip")
    add_turn_arguments(parser)
    add_image_arguments(parser)


def fields(args: argparse.Namespace) -> dict[str, str]:
    """Return what each field is called in these files. Raises UserError."""
    names = {name: name for name in FIELDS}
    for item in args.field:
        name, _, here = item.partition("=")
        if name not in FIELDS or not here:
            raise UserError(f"--field {item!r} must be NAME=HERE with NAME one of {', '.join(FIELDS)}")
        names[name] = here
    return names


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of lines of JSONL or row groups of parquet."""
    names, result = fields(args), []
    for label, path in input_files(args.inputs, (".jsonl", ".jsonl.gz", ".parquet")):
        result += (
            parquet_units([str(path)], (names["instruction"], names["outputs"]))
            if path.suffix.lower() == ".parquet"
            else record_units(path, label, IN_A_UNIT)
        )
    return result


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each row."""
    rule, names = ImageRule.of(args), fields(args)
    for where, row in parquet_rows(unit) if unit.path.lower().endswith(".parquet") else records(unit):
        try:
            if not isinstance(row, dict):
                raise Dropped("line is not a JSON object")
            yield _document(row, names, args, rule)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)


def _document(row: dict[str, Any], names: dict[str, str], args: argparse.Namespace, rule: ImageRule) -> Document:
    refuse_other_media(row, (names["image_base64_str"],))
    encoded = row.get(names["image_base64_str"])
    encoded = [encoded] if isinstance(encoded, str | bytes) else encoded or []
    if not isinstance(encoded, list):
        raise Dropped(f"{names['image_base64_str']!r} is neither a string nor a list")
    kept = [rule.check(from_base64(text)) for text in encoded if text is not None]
    texts = {name: row.get(names[name]) for name in ("instruction", "inputs", "outputs")}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise Dropped(f"{names[name]!r} is not text")
    answer_text = (texts["outputs"] or "").strip()
    if not answer_text:
        raise Dropped("no answer")
    question_text = "\n".join(text.strip() for text in (texts["instruction"], texts["inputs"]) if text and text.strip())
    numbers = tuple(range(len(kept)))
    images = [Image(numbers)] if args.clips and kept else [Image((index,)) for index in numbers]
    return Document("", turn_nodes(question_and_answer(images, question_text, answer_text), args), kept)
