"""Images with captions: img2dataset's tars (LAION, DataComp, COYO), folders of image + text, CSV and TSV.

    00000.tar           {key}.jpg + {key}.txt and/or {key}.json with "caption", as img2dataset leaves it
    folder              cat.jpg + cat.txt (or cat.json with "caption"), searched whole
    table.csv|.tsv      a header, then an image's path below --images and its caption in two of the columns

Tars can be trained on as they are (`python -m data index`); preparing them filters them. `--where` takes conditions on
the facts beside an image, for instance `--where 'similarity>=0.28' 'punsafe<0.5' 'NSFW=UNLIKELY'`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.prepare.conditions import add_where, conditions_of, hold
from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import csv_rows, csv_units, file_units, folder_units, input_files
from data.prepare.tars import json_of, tar_samples
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Text
from data.shards.index import IMAGE_SUFFIX
from flamingo.errors import UserError

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
        path = Path(item)
        if path.suffix in TABLES and path.is_file():
            ((label, table),) = input_files([item], (path.suffix,))
            result += csv_units(table, label, IN_A_UNIT, TABLES[path.suffix])
        elif path.is_dir() and not next(path.rglob("*.tar"), None):
            names = sorted(_image_names(path))
            if not names:
                raise UserError(f"folder {item} holds neither tars nor images; correct the path")
            result += folder_units(path, names, IN_A_UNIT)
        else:
            result += file_units([item], (".tar",))
    return result


def _image_names(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        for name in files:
            if IMAGE_SUFFIX.match(name.rpartition(".")[2].lower()):
                yield (Path(folder) / name).relative_to(root).as_posix()


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
            caption, facts, read_image = read()
            if len(caption.split()) < args.min_words:
                raise Dropped("no caption" if not caption.strip() else f"caption of fewer than {args.min_words} words")
            hold(facts, conditions)
            image = rule.check(read_image())
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        meta = {name: value for name, value in facts.items() if name not in (args.caption_key, "exif", "nodes")}
        yield Document("", [Image((0,)), Text(caption)], [image], meta)


def _from_tar(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[tuple[str, Any]]:
    for sample in tar_samples(unit.path, unit.label, tally):

        def read(sample: Any = sample) -> tuple[str, dict[str, Any], Any]:
            facts = {"key": sample.key} | json_of(sample, json.loads)
            suffix = sample.first_image()
            if suffix is None:
                raise Dropped("no image")
            caption = _text(sample.read("txt")) if "txt" in sample.members else facts.get(args.caption_key)
            if caption is not None and not isinstance(caption, str):
                raise Dropped("caption is not text")
            return caption or "", facts, lambda: sample.read(suffix)

        yield sample.where, read


def _from_folder(unit: InputUnit, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    folder = _folder(unit.path)
    for name in unit.names:

        def read(name: str = name) -> tuple[str, dict[str, Any], Any]:
            stem, facts, caption = name.rpartition(".")[0], {}, None
            try:
                facts = json.loads(folder.read(f"{stem}.json"))
            except Dropped:
                pass
            except ValueError:
                raise Dropped("JSON cannot be read") from None
            if not isinstance(facts, dict):
                raise Dropped("JSON is not an object")
            try:
                caption = _text(folder.read(f"{stem}.txt"))
            except Dropped as dropped:
                if "missing" not in dropped.reason:
                    raise
                caption = facts.get(args.caption_key)
            if caption is not None and not isinstance(caption, str):
                raise Dropped("caption is not text")
            return (caption or "").strip(), {"file": name} | facts, lambda: folder.read(name)

        yield name, read


def _from_table(unit: InputUnit, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    delimiter = TABLES[Path(unit.path).suffix]
    header = next(csv_rows(unit.path, 0, None, delimiter))[1]
    image = _column(header, args.image_column, ("image", "filepath", "path"), unit.path, "--image-column")
    caption = _column(header, args.caption_column, ("caption", "title", "text"), unit.path, "--caption-column")
    folder = _folder(args.images or str(Path(unit.path).parent))
    label, _, first = unit.label.rpartition(" from row ")
    for number, (_, row) in enumerate(csv_rows(unit.path, unit.begin, unit.end, delimiter), int(first)):
        if not row:
            continue  # an empty line

        def read(row: list[str] = row) -> tuple[str, dict[str, Any], Any]:
            if len(row) != len(header):
                raise Dropped("row with another number of columns than the header")
            facts = dict(zip(header, row, strict=True))
            name = facts[image]
            del facts[caption]
            return row[header.index(caption)], facts, lambda: folder.read(name)

        yield f"{label} row {number}", read


def _column(header: list[str], wanted: str | None, usual: tuple[str, ...], path: str, option: str) -> str:
    for name in (wanted,) if wanted else usual:
        if name in header:
            return name
    raise UserError(f"{path} has the columns {', '.join(header)}; say with {option} which one is meant")


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Dropped("caption is not UTF-8") from None
