"""Conversations as trainers have them: JSON, JSONL or parquet of TRL, LLaMA-Factory, ms-swift and OpenAI; The Cauldron.

    {"messages": [{"role": "user", "content": "<image>What is it?"},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

`conversations` (ShareGPT), `texts` (The Cauldron) and `prompt` with `completion` are read as `messages`; contents may
be lists of parts. Images are paths below --images, base64, or in the rows; videos are files, or lists of frames. Also a
folder that `save_to_disk` wrote, or a name on the hub. Pairs of preference, tools and sounds are dropped and counted.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data.prepare.clips import add_clip_arguments, check_clip_arguments, frames_of
from data.prepare.conversation import Media, conversation
from data.prepare.images import ImageFolder, ImageRule, add_image_arguments, from_base64
from data.prepare.inputs import input_files, record_units, records
from data.prepare.media_fields import refuse_other_media
from data.prepare.sources.hf import add_split_arguments, on_disk, open_split, split_rows, split_units
from data.prepare.sources.obelics import parquet_rows, parquet_units
from data.prepare.turns import add_turn_arguments, turn_nodes
from data.prepare.units import Dropped, InputUnit, Tally
from data.records import parse_json
from data.shards.document import Document
from data.shards.places import place

LAYOUT = "interleaved"
IN_A_UNIT = 10_000
FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
HUB = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN = {"image": ("images", "image"), "video": ("videos", "video")}
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare messages`."""
    parser.add_argument("--images", metavar="DIR", help="where paths begin (default: the folder of the file)")
    parser.add_argument("--drop-text-only", action="store_true", help="drop conversations without an image")
    add_split_arguments(parser)
    add_clip_arguments(parser)
    add_turn_arguments(parser)
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of lines, items, row groups or rows."""
    check_clip_arguments(args)
    result: list[InputUnit] = []
    for item in args.inputs:
        if _is_data_set(item):
            result += split_units(open_split(item, args), item, args)
            continue
        for label, path in input_files([item], FILES):
            result += (
                parquet_units([str(path)])
                if path.suffix.lower() == ".parquet"
                else record_units(path, label, IN_A_UNIT)
            )
    if args.images:
        _folder(args.images)
    return result


def _is_data_set(item: str) -> bool:
    """Return whether an input is read through `datasets`: what `save_to_disk` wrote, or a name on the hub."""
    return on_disk(item) or (not Path(item).exists() and bool(HUB.fullmatch(item)) and not item.endswith(FILES))


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each row."""
    rule, here = ImageRule.of(args), place(unit.path)
    root = args.images or (unit.path if here.is_dir() else str(here.parent) if here.exists() else None)
    folder = None if root is None else _folder(root)
    for where, row in _rows(unit, args):
        try:
            if not isinstance(row, dict):
                raise Dropped("line is not a JSON object")
            yield _document(row, args, partial(_frames, rule, folder, args))
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)


def _rows(unit: InputUnit, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    if _is_data_set(unit.path):
        return split_rows(open_split(unit.path, args), unit)
    return parquet_rows(unit) if unit.path.lower().endswith(".parquet") else records(unit)


def _document(row: dict[str, Any], args: argparse.Namespace, read: Any) -> Document:
    """Return the document of a row. Raises Dropped."""
    if any(row.get(name) for name in PREFERENCE):
        raise Dropped("a pair of preference, not a conversation")
    if row.get("tools"):
        raise Dropped("tools are not read")
    refuse_other_media(row, (name for names in KNOWN.values() for name in names))
    media = Media({kind: _listed(row, names) for kind, names in KNOWN.items()}, read)
    said = conversation(_turns(row), media, row.get("system"))
    if args.drop_text_only and not media.images:
        raise Dropped("no image")
    meta = {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
    return Document("", turn_nodes(said, args), media.images, meta)


def _turns(row: dict[str, Any]) -> Any:
    """Return the turns of a row, under whichever name it has them. Raises Dropped."""
    for name in ("messages", "conversations", "conversatons", "conversation", "texts"):  # LLaVA-Med has the third
        if row.get(name):
            return _parsed(row[name])
    if row.get("prompt") and row.get("completion"):
        prompt, completion = _parsed(row["prompt"]), _parsed(row["completion"])
        if isinstance(prompt, str) and isinstance(completion, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if isinstance(prompt, list) and isinstance(completion, list):
            return [*prompt, *completion]
    raise Dropped("no messages")


def _parsed(value: Any) -> Any:
    """Return turns that a table holds as JSON; other text as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        return parse_json(value.encode("utf-8", "replace"))
    except ValueError:
        return value


def _listed(row: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    found = [row[name] if isinstance(row[name], list) else [row[name]] for name in names if row.get(name)]
    if len(found) > 1 and found[0] != found[1]:
        raise Dropped(f"{names[0]!r} and {names[1]!r} differ")
    return found[0] if found else []


def _frames(
    rule: ImageRule, folder: ImageFolder | None, args: argparse.Namespace, kind: str, value: Any
) -> tuple[list[bytes], float | None]:
    """Return an image, or the frames of a clip and their rate where it is known. Raises Dropped."""
    if kind == "video" and not isinstance(value, list):
        frames = frames_of(_bytes(value, folder), args.fps, args.max_frames, args.side, args.max_pixels)
        return [rule.check(frame) for frame in frames], args.fps
    listed = value[: args.max_frames] if kind == "video" else [value]
    return [rule.check(_bytes(frame, folder)) for frame in listed], None


def _bytes(value: Any, folder: ImageFolder | None) -> bytes:
    """Return what a row names: bytes, base64, or a path below the folder. Raises Dropped."""
    if isinstance(value, dict):
        key = next((key for key in ("bytes", "base64", "path", "url", "image") if value.get(key)), "")
        value = value.get(key)
        if key in ("bytes", "base64") and isinstance(value, str):
            return from_base64(value)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Dropped("image is missing" if value in (None, "") else "image of a type that is not read")
    if value.startswith("data:") or (len(value) > 255 and "." not in value):
        return from_base64(value)
    if folder is None:
        raise Dropped("image is not in the data set")
    if value.startswith(("http://", "https://")):
        raise Dropped("image is a URL: download it, and give its path")
    return folder.read(value.removeprefix("file://"))
