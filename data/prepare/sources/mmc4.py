"""Multimodal C4 (allenai/mmc4): `docs_shard_N_v3.jsonl`, or `docs_no_face_shard_N_v2.jsonl.zip`, and its images.

A line lists sentences, images and which sentence each image belongs to; the images' bytes are what MMC4's
`download_images.py` left under --images: `{image_name}`, or `{N}/{image_name}` with the number of the shard.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import json_lines, line_units
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document
from data.shards.mmc4 import MATCHING, Malformed, interleave, read_document
from flamingo.errors import UserError

LAYOUT = "interleaved"
SUFFIXES = (".jsonl", ".jsonl.zip", ".jsonl.gz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare mmc4`."""
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the downloaded images")
    add_document_arguments(parser)


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of documents in MMC4's format, wherever their images are."""
    parser.add_argument(
        "--min-similarity", type=float, default=0.24, metavar="X", help="of an image to its sentence (default 0.24)"
    )
    parser.add_argument(
        "--matching",
        choices=MATCHING,
        default="assigned",
        help="images without a matched_text_index: each to its most similar sentence (listed), or one to one "
        "as MMC4 does (default: assigned)",
    )
    parser.add_argument("--min-images", type=int, default=1, help="documents with fewer are dropped (default 1)")
    parser.add_argument("--drop-url-duplicates", action="store_true", help="drop where could_have_url_duplicate is 1")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of files; plain ones are cut at lines."""
    if not -1 <= args.min_similarity < 1:
        raise UserError(
            f"--min-similarity {args.min_similarity:g} must be in [-1, 1): MMC4's similarities are cosines, about 0.15 "
            "to 0.35, not multiplied by 100"
        )
    _folder(args.images)
    return line_units(args.inputs, SUFFIXES)


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each line."""
    shard = re.search(r"shard_(\d+)", unit.label)
    folder = _folder(args.images)

    def bytes_of(info: dict[str, Any]) -> bytes:
        name = info.get("image_name")
        if not isinstance(name, str) or not name:
            raise Dropped("image has no 'image_name'")
        return folder.read(name, *([str(PurePosixPath(shard[1]) / name)] if shard else []))

    rule = ImageRule.of(args)
    for where, body in json_lines(unit):
        document = parsed_document(body, where, args, rule, bytes_of, tally)
        if document is not None:
            yield document


def parsed_document(
    body: Any,
    where: str,
    args: argparse.Namespace,
    rule: ImageRule,
    bytes_of: Callable[[dict[str, Any]], bytes],
    tally: Tally,
) -> Document | None:
    """Return the document of a line's JSON, or None when it is dropped; the tally counts both."""
    if isinstance(body, Exception):
        tally.drop_document("line is not JSON", where)
        return None
    try:
        if not isinstance(body, dict):
            raise Dropped("line is not a JSON object")
        sentences, listed = read_document(body, args.matching)
        if args.drop_url_duplicates and body.get("could_have_url_duplicate"):
            raise Dropped("url may be a duplicate")
        if not any(sentence.strip() for sentence in sentences):
            raise Dropped("no text")
    except (Dropped, Malformed) as dropped:
        tally.drop_document(dropped.reason, where)
        return None
    kept: list[tuple[int, bytes]] = []
    for index, image in enumerate(listed):
        try:
            if not image.similarity >= args.min_similarity:
                raise Dropped(f"similarity below {args.min_similarity:g}")
            kept.append((image.sentence, rule.check(bytes_of(image.info))))
        except Dropped as dropped:
            tally.drop_image(dropped.reason, f"{where} image {index}")
    if len(kept) < args.min_images:
        tally.drop_document(f"fewer than {args.min_images} images left", where)
        return None
    meta = {"url": body["url"]} if isinstance(body.get("url"), str) else {}
    nodes, images, matched = interleave(sentences, kept)
    return Document("", nodes, images, meta | {"sentences": matched})
