"""Images with captions: img2dataset's tars (LAION, DataComp, COYO), folders of image + text, CSV and TSV.

    00000.tar           {key}.jpg + {key}.txt and/or {key}.json with "caption", as img2dataset leaves it
    folder              cat.jpg + cat.txt (or cat.json with "caption"), searched whole
    table.csv|.tsv      a header, then an image's path below --images and its caption in two of the columns

Tars can be trained on as they are (`python -m data index`); preparing them filters them. `--where` takes conditions on
the facts beside an image, for instance `--where 'similarity>=0.28' 'punsafe<0.5' 'NSFW=UNLIKELY'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.errors import ContentError
from data.prepare.conditions import add_where, conditions_of, hold
from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import csv_rows, csv_units, folder_files, folder_units, input_files
from data.prepare.tars import tar_samples
from data.prepare.units import Dropped, InputUnit, Tally
from data.records import header_of
from data.shards.document import Document, Image, Text, caption_of, facts_of
from data.shards.places import place
from flamingo.errors import UserError
from flamingo.vision.image_files import SUFFIXES

LAYOUT = "pairs"
TABLES = {".csv": ",", ".tsv": "\t"}
IN_A_UNIT = 10_000  # images of a folder, rows of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare pairs`."""
    parser.add_argument("--images", metavar="DIR", help="where a table's paths begin (default: the table's folder)")
    parser.add_argument("--image-column", metavar="NAME", help="of a table (default: image, filepath or path)")
    parser.add_argument("--caption-column", metavar="NAME", help="of a table (default: caption, title or text)")
    parser.add_argument("--caption-key", default="caption", metavar="NAME", help="in a JSON (default caption)")
    add_where(parser, "what is known of an image")
    parser.add_argument("--min-words", type=int, default=1, help="of a caption (default 1)")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units: whole tars, rows of tables, files of folders."""
    conditions_of(tuple(args.where))
    result: list[InputUnit] = []
    for item in args.inputs:
        inside = folder_files(item)
        if inside is not None and not any(name.lower().endswith(".tar") for name in inside):
            images = {name: size for name, size in inside.items() if _is_image(name.rpartition("/")[2])}
            if not images:
                raise UserError(f"folder {item} holds neither tars nor images; correct the path")
            result += folder_units(item, images, IN_A_UNIT)
            continue
        for label, path in input_files([item], (".tar",)):
            if path.suffix in TABLES:
                result += csv_units(path, label, IN_A_UNIT, TABLES[path.suffix])
            else:
                result.append(InputUnit(label, str(path), size=path.stat().st_size))
    return result


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith(".")


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each image with its caption."""
    rule, conditions = ImageRule.of(args), conditions_of(tuple(args.where))
    if unit.names:
        samples = _from_folder(unit, args)
    elif Path(unit.path).suffix in TABLES:
        samples = _from_table(unit, args)
    else:
        samples = _from_tar(unit, args, tally)
    for where, read in samples:
        try:
            text, facts, read_images = read()
            caption = _caption(text, facts, args)
            hold(facts, conditions)
            images = [rule.check(data) for data in read_images()]
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        meta = {name: value for name, value in facts.items() if name not in (args.caption_key, "exif", "nodes")}
        yield Document("", [*(Image((n,)) for n in range(len(images))), Text(caption)], images, meta)


def _caption(text: bytes | None, facts: dict[str, Any], args: argparse.Namespace) -> str:
    try:
        caption = caption_of(text, facts, args.caption_key)
    except ContentError as error:
        raise Dropped(error.reason) from None
    except ValueError as error:
        raise Dropped(str(error)) from None
    if len(caption.split()) < args.min_words:
        raise Dropped(f"caption of fewer than {args.min_words} words")
    return caption


def _from_tar(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[tuple[str, Any]]:
    for sample in tar_samples(unit.path, unit.label, tally):

        def read(sample: Any = sample) -> tuple[bytes | None, dict[str, Any], Any]:
            suffixes = sample.images()
            if not suffixes:
                raise Dropped("no image")
            facts = _facts(sample.read("json") if "json" in sample.members else None)
            text = sample.read("txt") if "txt" in sample.members else None
            return text, {"key": sample.key} | facts, lambda: map(sample.read, suffixes)

        yield sample.where, read


def _facts(raw: bytes | None) -> dict[str, Any]:
    try:
        return facts_of(raw)
    except (ValueError, RecursionError) as error:
        raise Dropped("JSON is not an object" if "object" in str(error) else "JSON cannot be read") from None


def _from_folder(unit: InputUnit, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    folder = _folder(unit.path)
    for name in unit.names:

        def read(name: str = name) -> tuple[bytes | None, dict[str, Any], Any]:
            text, facts = (beside(folder, name, suffix) for suffix in ("txt", "json"))
            return text, {"file": name} | _facts(facts), lambda: [folder.read(name)]

        yield name, read


def beside(folder: ImageFolder, name: str, suffix: str) -> bytes | None:
    """Return the bytes of the file of this name with another suffix, in whatever letters; None where there is none."""
    stem = name.rpartition(".")[0]
    try:
        return folder.read(*(f"{stem}.{form}" for form in (suffix, suffix.upper(), suffix.capitalize())))
    except Dropped as dropped:
        if "missing" not in dropped.reason:
            raise
        return None


def _from_table(unit: InputUnit, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    delimiter = TABLES[Path(unit.path).suffix]
    header = header_of(unit.path, next(csv_rows(unit.path, 0, None, delimiter))[1])
    image = _column(header, args.image_column, ("image", "filepath", "path"), unit.path, "--image-column")
    caption = _column(header, args.caption_column, ("caption", "title", "text"), unit.path, "--caption-column")
    folder = _folder(args.images or str(place(unit.path).parent))
    label, _, first = unit.label.rpartition(" from row ")
    for row_number, (_, row) in enumerate(csv_rows(unit.path, unit.begin, unit.end, delimiter), int(first)):
        if not row:
            continue  # an empty line

        def read(row: list[str] = row) -> tuple[bytes | None, dict[str, Any], Any]:
            if len(row) != len(header):
                raise Dropped("row with another number of columns than the header")
            facts = dict(zip(header, row, strict=True))
            name = facts[image]
            text = facts.pop(caption)
            return text.encode("utf-8", "surrogatepass"), facts, lambda: [folder.read(name)]

        yield f"{label} row {row_number}", read


def _column(header: list[str], wanted: str | None, usual: tuple[str, ...], path: str, option: str) -> str:
    for name in (wanted,) if wanted else usual:
        if name in header:
            return name
    raise UserError(f"{path} has the columns {', '.join(header)}; say with {option} which one is meant")


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)
