"""MIMIC-IT (Otter): `T_instructions.json`, the images of `T.json` or `T.parquet` as base64, and `T_train.json`.

A document is a conversation, an instruction with its examples before it: the related instructions that `T_train.json`
(or, without it, the instruction's own `rel_ins_ids`) names, then the instruction itself. Otter keeps all images in
memory; here one pass notes where each lies. The frames of the video tasks (an id that begins with DC, TVC, E4D or
FunQA) are one clip.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.prepare.images import ImageRule, add_image_arguments, from_base64
from data.prepare.inputs import input_files, json_spans
from data.prepare.lookup import Entry, build_lookup, open_lookup
from data.prepare.media_fields import refuse_other_media
from data.prepare.sources.obelics import parquet_columns, parquet_rows, parquet_units
from data.prepare.turns import add_turn_arguments, question_and_answer, turn_nodes
from data.prepare.units import Dropped, InputUnit, Tally
from data.records import parse_json
from data.shards.document import Document, Image
from data.shards.places import Place
from flamingo.errors import UserError
from flamingo.processing.conversation import Message

LAYOUT = "interleaved"
ENDING = "_instructions.json"
VIDEO = ("DC", "TVC", "E4D", "FunQA")
IN_A_UNIT = 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare mimicit`."""
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="image files, JSON or parquet")
    parser.add_argument("--examples", type=int, default=4, help="most examples before an instruction (default 4)")
    parser.add_argument("--clips", choices=("auto", "always", "never"), default="auto", help="images as one clip")
    add_turn_arguments(parser)
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of thousands of instructions to train on, in the order of their file."""
    if args.examples < 0:
        raise UserError(f"--examples {args.examples} must not be negative")
    result = []
    for label, path in input_files(args.inputs, (ENDING,)):
        train = _train_file(path)
        spans = json_spans(train) if train else json_spans(path, "data")
        ids = [str(key) for key, _, _ in spans]
        for first in range(0, len(ids), IN_A_UNIT):
            some = tuple(ids[first : first + IN_A_UNIT])
            name = label if first == 0 else f"{label} from {some[0]}"
            result.append(InputUnit(name, str(path), first, first + len(some), path.stat().st_size, some))
    return result


def _train_file(path: Place) -> Place | None:
    train = path.with_name(path.name.removesuffix(ENDING) + "_train.json")
    return train if path.name.endswith(ENDING) and train.exists() else None


def begin(args: argparse.Namespace, work: Path) -> None:
    """Build the lookups of images, instructions and lists of related instructions."""
    files = [path for _, path in input_files(args.inputs, (ENDING,))]
    trains = [train for path in files if (train := _train_file(path))]
    build_lookup(work / "instructions.sqlite", _spans(files, "data"))
    build_lookup(work / "related.sqlite", _spans(trains, None))
    if not (work / "images.sqlite").exists():
        build_lookup(work / "images.sqlite", _images(args.images, work))


def _spans(files: Sequence[Place], inside: str | None) -> Iterator[Entry]:
    for path in files:
        for key, offset, size in json_spans(path, inside):
            yield str(key), str(path), offset, size


def _images(images: list[str], work: Path) -> Iterator[Entry]:
    """Yield where the base64 of each image lies; a parquet's is written out first, as its rows cannot be read alone."""
    for file_index, (_, path) in enumerate(input_files(images, (".json", ".parquet"))):
        if path.suffix.lower() == ".json":
            yield from _spans([path], None)
            continue
        index = _index_of(path)
        columns = (index, "base64")
        written = work / f"images-{file_index}.txt"
        with written.open("wb") as out:
            for unit in parquet_units([str(path)], columns):
                for _, row in parquet_rows(unit, list(columns)):
                    text = json.dumps(row["base64"]).encode()
                    yield str(row[index]), str(written), out.tell(), len(text)
                    out.write(text)


def _index_of(path: Place) -> str:
    """Return the column of a parquet file that holds the ids of its images. Raises UserError."""
    names = parquet_columns(str(path))[0]
    index = next((name for name in ("__index_level_0__", "id", "image_id") if name in names), None)
    if "base64" not in names or index is None:
        raise UserError(f"{path} has the columns {', '.join(names)}; 'base64' and an index of ids are needed")
    return index


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each instruction."""
    rule = ImageRule.of(args)
    for name in unit.names:
        try:
            yield _document(name, args, rule, tally)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, name)


def _document(name: str, args: argparse.Namespace, rule: ImageRule, tally: Tally) -> Document:
    wanted = _instruction(name, args)
    related = _value("related.sqlite", name, args)
    if related is None:
        related = wanted.get("rel_ins_ids") or []
    if not isinstance(related, list) or not all(isinstance(other, str) for other in related):
        raise Dropped("related instructions are not a list of ids")
    document = Document("", [], [], {"id": name, "examples": []})
    said: list[Message] = []
    for other in [other for other in related if other != name][: args.examples]:
        try:
            said += _turns(document.images, other, _instruction(other, args), args, rule)
            document.meta["examples"].append(other)
        except Dropped as dropped:
            tally.drop_image(f"example left out: {dropped.reason}", f"{name} example {other}")
    said += _turns(document.images, name, wanted, args, rule)
    document.nodes = turn_nodes(said, args)
    return document


def _turns(
    shown: list[bytes], name: str, body: dict[str, Any], args: argparse.Namespace, rule: ImageRule
) -> list[Message]:
    """Return an instruction and its answer, its images added to those shown; all of it, or Dropped is raised."""
    refuse_other_media(body, ("image_ids", "rel_ins_ids"))
    ids = body.get("image_ids") or []
    if not isinstance(ids, list) or not all(isinstance(image_id, str) for image_id in ids):
        raise Dropped("'image_ids' is not a list of ids")
    instruction, response = body.get("instruction"), body.get("answer")
    if not isinstance(instruction, str) or not isinstance(response, str) or not response.strip():
        raise Dropped("'instruction' or 'answer' is not text, or empty")
    images = []
    for image_id in ids:
        text = _value("images.sqlite", image_id, args)
        images.append(rule.check(from_base64(text)))
    numbers = range(len(shown), len(shown) + len(images))
    shown += images
    clip = len(ids) > 1 and (args.clips == "always" or (args.clips == "auto" and name.startswith(VIDEO)))
    nodes = [Image(tuple(numbers))] if clip else [Image((index,)) for index in numbers]
    return question_and_answer(nodes, instruction.strip(), response.strip())


def _instruction(name: str, args: argparse.Namespace) -> dict[str, Any]:
    body = _value("instructions.sqlite", name, args)
    if not isinstance(body, dict):
        raise Dropped("instruction is missing" if body is None else "instruction is not an object")
    return body


def _value(table: str, name: str, args: argparse.Namespace) -> Any:
    """Return the JSON value under a name, None when there is none."""
    lookup = open_lookup(os.path.join(args.work, table))  # noqa: PTH118 (a key of a cache, made for every image)
    try:
        return parse_json(lookup.read(name)) if name in lookup else None
    except ValueError:  # the scanner that found it allows more, such as bare tabs in strings
        raise Dropped("JSON cannot be read") from None
