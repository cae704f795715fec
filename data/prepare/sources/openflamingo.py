"""open_flamingo's own shards: tars whose one member a sample is MMC4's JSON with the images in it as base64.

Two kinds of samples: those of its `convert_mmc4_to_wds.py`, with `image_base64` in each `image_info`, and its
ChatGPT-made sequences, which have `is_gpt`, the text with markers `_!_IMAGE1_!_`, and an `image_map`. The images'
bytes are kept unchanged; without base64 they are a quarter smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from data.prepare.images import ImageRule, from_base64
from data.prepare.inputs import file_units
from data.prepare.sources.mmc4 import add_document_arguments, parsed_document
from data.prepare.tars import json_samples
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Text
from data.shards.mmc4 import Malformed, generated

LAYOUT = "interleaved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare openflamingo`."""
    add_document_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return a unit for each tar."""
    return file_units(args.inputs, (".tar",))


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each sample."""
    rule = ImageRule.of(args)
    for sample, body in json_samples(unit, tally):
        try:
            document = (
                _generated(body, sample.where, rule, tally)
                if "is_gpt" in body
                else parsed_document(
                    body, sample.where, args, rule, lambda info: from_base64(info.get("image_base64")), tally
                )
            )
        except (Dropped, Malformed) as dropped:
            tally.drop_document(dropped.reason, sample.where)
            continue
        if document is not None:
            yield document


def _generated(body: dict[str, Any], where: str, rule: ImageRule, tally: Tally) -> Document:
    """Return a ChatGPT-made sequence, its missing images counted and left out. Raises Dropped or Malformed."""

    def image(index: int, text: Any) -> bytes | None:
        try:
            return rule.check(from_base64(text))
        except Dropped as dropped:
            tally.drop_image(dropped.reason, f"{where} image {index}")
            return None

    nodes, images = generated(body, image)
    if not images:
        raise Dropped("fewer than 1 images left")
    if not any(isinstance(node, Text) for node in nodes):
        raise Dropped("no text")
    return Document("", nodes, images, {"generated": True})
