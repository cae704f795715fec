"""LLaVA and LLaVA-Med: a JSON array (or JSONL) of conversations, each about an image below --images.

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` (or `images`) may be absent (text only) or a list; an item with media under another name, such as `video`, is
dropped and counted, never learnt as text. A question with one image shows it first, wherever its `<image>` stands, as
LLaVA's own code does: a question must see what it asks about. LLaVA-Med's misspelt "conversatons" is read too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import input_files, record_units, records
from data.prepare.media_fields import refuse_other_media
from data.prepare.turns import add_turn_arguments, answer, has_text, question
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Node

LAYOUT = "interleaved"
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
IMAGE_TAG = "<image>"
IMAGE_KEYS = ("image", "images")
OTHER_TAGS = ("<video>", "<audio>", "<speech>")
IN_A_UNIT = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare llava`."""
    parser.add_argument("--images", required=True, metavar="DIR", help="folder in which the images' paths begin")
    parser.add_argument("--drop-text-only", action="store_true", help="drop conversations without an image")
    add_turn_arguments(parser)
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of items of an array or lines of JSONL."""
    _folder(args.images)
    result: list[InputUnit] = []
    for label, path in input_files(args.inputs, (".json", ".jsonl")):
        result += record_units(path, label, IN_A_UNIT)
    return result


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each conversation."""
    rule, folder = ImageRule.of(args), _folder(args.images)
    for where, item in records(unit):
        try:
            yield conversation(item, args, folder, rule)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)


def conversation(item: Any, args: argparse.Namespace, folder: ImageFolder, rule: ImageRule) -> Document:
    """Return the document of one item. Raises Dropped."""
    if not isinstance(item, dict):
        raise Dropped("item is not a JSON object")
    turns = _turns(item.get("conversations", item.get("conversatons")))
    names = item.get("image") or item.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Dropped("'image' is neither a path nor a list of paths")
    refuse_other_media(item, IMAGE_KEYS)
    if tag := next((tag for tag in OTHER_TAGS if any(tag in text for _, text in turns)), None):
        raise Dropped(f"{tag} without its media")
    if args.drop_text_only and not names:
        raise Dropped("no image")
    images = [rule.check(folder.read(name)) for name in names]
    nodes = _nodes(turns, len(images), args)
    if not has_text(nodes):
        raise Dropped("no answer")
    return Document("", nodes, images, {"id": item["id"]} if isinstance(item.get("id"), str | int) else {})


def _turns(value: Any) -> list[tuple[str, str]]:
    """Return (human or gpt, text) of each turn."""
    if not isinstance(value, list) or not value:
        raise Dropped("'conversations' is not a list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Dropped("a turn is not an object with 'from' and 'value'")
        speaker = turn.get("from")
        if speaker == "system":
            continue
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise Dropped("a turn is neither from 'human' nor from 'gpt'")
        turns.append((SPEAKERS[speaker], turn["value"]))
    return turns


def _nodes(turns: list[tuple[str, str]], images: int, args: argparse.Namespace) -> list[Node]:
    """Return the nodes of a conversation. Raises Dropped when it has more or fewer `<image>` marks than images."""
    tags = sum(text.count(IMAGE_TAG) for speaker, text in turns if speaker == "human")
    nodes: list[Node] = []
    if tags == 0:
        nodes += [Image((index,)) for index in range(images)]
    elif tags != images:
        raise Dropped("the numbers of <image> tags and images differ")
    shown = 0
    for index, (speaker, text) in enumerate(turns):
        if speaker == "gpt":
            nodes.append(answer(text))
            continue
        parts = [part.strip() for part in text.split(IMAGE_TAG)]
        first = index == 0
        if len(parts) == 1:
            nodes.append(question(parts[0], args, first=first))
        elif len(parts) == 2:
            nodes += [Image((shown,)), question(" ".join(filter(None, parts)), args, first=first)]
            shown += 1
        else:
            for k, part in enumerate(parts):
                last = k == len(parts) - 1
                if part or last:
                    begins = not any(parts[:k])
                    nodes.append(question(part, args, first=first, begins=begins, ends=last))
                if not last:
                    nodes.append(Image((shown,)))
                    shown += 1
    return nodes
