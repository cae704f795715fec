"""Removes what repeats over a corpus: a second pass, over shards of any other source.

    python -m data prepare mmc4 ... --out shards/raw
    python -m data prepare deduplicate shards/raw --out shards/mmc4

With OBELICS' limits (Laurencon et al. 2023, section 3.2): an image in more than 10 documents is removed from all of
them; of documents with the same address the last is kept; a paragraph in more than 2 documents of a site is removed; of
documents with the same set of images the last is kept; an image repeated within a document is shown once. Images are
the same when their bytes are; "last" is by the names of the shards, so name dumps by their date; a document without an
address belongs to no site. Pairs come out as documents of one image and one text.

What is nearly the same is found when asked for (see `data.prepare.web.near_duplicates`): with `--near-images` images
of about the same look are one image in all of the rules above; with `--near-text` of documents with about the same text
the last is kept.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from data.errors import ContentError
from data.prepare.conditions import add_where, conditions_of, hold
from data.prepare.engine import on_engine
from data.prepare.inputs import file_units, required
from data.prepare.units import Dropped, InputUnit, Tally, parse_part
from data.prepare.web.duplicates import (
    Near,
    RepeatTable,
    count,
    document_hashes,
    hash_of,
    paragraph_hash,
    position_of,
    site_of,
    tabulate,
)
from data.remote.copies import shard_copy
from data.shards.document import Document, Image, Node, Text, is_conversation
from data.shards.index import build_index, index_path, load_index
from data.shards.places import is_store
from data.shards.reader import ShardReader
from data.shards.writer import make_folder
from flamingo.errors import UserError

LAYOUT = "interleaved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare deduplicate`."""
    parser.add_argument(
        "--max-image-documents", type=int, default=10, metavar="N", help="0: no limit (default 10, as OBELICS)"
    )
    parser.add_argument(
        "--max-paragraph-documents",
        type=int,
        default=2,
        metavar="N",
        help="of one site; 0: no limit (default 2, as OBELICS)",
    )
    parser.add_argument("--keep-same-url", action="store_true", help="keep all documents of an address")
    parser.add_argument("--keep-same-images", action="store_true", help="keep all documents with the same images")
    parser.add_argument(
        "--near-text", type=float, metavar="SHARE", help="of the five-word shingles that two texts have, such as 0.8"
    )
    parser.add_argument(
        "--near-images", type=int, metavar="BITS", help="of 64, in which the looks of images may differ, such as 4"
    )
    parser.add_argument("--min-images", type=int, default=1, help="documents with fewer are dropped (default 1)")
    parser.add_argument(
        "--counts", metavar="DIR", help="where the counts of each shard are kept; give all parts (--part) the same"
    )
    add_where(parser, "a document's meta", "perplexity<=1500")


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return a unit for each shard."""
    conditions_of(tuple(args.where))
    if min(args.max_image_documents, args.max_paragraph_documents, args.min_images) < 0:
        raise UserError("--max-image-documents, --max-paragraph-documents and --min-images must not be negative")
    if args.near_text is not None and not 0.3 <= args.near_text <= 1:
        raise UserError(f"--near-text {args.near_text} must be from 0.3 to 1: below, most texts would be compared")
    if args.near_images is not None and not 0 <= args.near_images <= 8:
        raise UserError(f"--near-images {args.near_images} must be from 0 to 8: beyond, different images look alike")
    if args.counts and is_store(args.counts):
        raise UserError(f"--counts {args.counts} must be a folder on a disk that all parts share, not a store")
    for option, package in ((args.near_text, "datasketch"), (args.near_images, "imagehash")):
        if option is not None:
            required(package, "finding near duplicates", extra="dedupe")
    return file_units(args.inputs, (".tar",))


def begin(args: argparse.Namespace, work: Path) -> None:
    """Count what repeats, unless an earlier run has."""
    if (work / "repeats.npz").exists():
        return
    folder = Path(args.counts) if args.counts else work / "counts"
    make_folder(folder)
    shards, near = units(args), Near(args.near_text, args.near_images)
    files = [folder / f"{number:06d}-{unit.digest}{near.suffix}.npz" for number, unit in enumerate(shards)]
    part, parts = parse_part(args.part) if args.part else (1, 1)
    first = (part - 1) * len(shards) // parts  # parts that count at the same time start at different shards
    order = [*range(first, len(shards)), *range(first)]
    jobs = {n: (shards[n], files[n], args.skip_bad_files, near) for n in order if not files[n].exists()}
    for _ in on_engine(_count, jobs, args):
        pass
    limits = args.max_image_documents, args.max_paragraph_documents
    tabulate(files, *limits, near, work).save(work / "repeats.npz")


def _count(unit: InputUnit, path: Path, skip: bool, near: Near) -> None:
    if path.exists():
        return  # another part has counted it
    try:
        count(((row, document) for row, _, document in _documents(unit) if isinstance(document, Document)), path, near)
    except UserError:
        if not skip:
            raise
        count((), path)  # counted as damaged when its documents are read


def _documents(unit: InputUnit) -> Iterator[tuple[int, str, Document | ContentError]]:
    """Yield (row, where, document or what is wrong with it) for each sample of a shard."""
    with contextlib.ExitStack() as held:
        copy = held.enter_context(shard_copy(unit.path))
        index = load_index(copy) if index_path(copy).exists() else build_index(copy)
        reader = ShardReader([index])
        held.callback(reader.close)
        for row in range(len(index)):
            where = f"{unit.label} row {row} (key {index.key(row)})"
            try:
                sample = reader.sample(0, row)
                sample.fetch(list(sample.numbers))
                images = [sample.image(number) for number in sample.numbers]
            except ContentError as error:
                yield row, where, error
                continue
            position = {number: index for index, number in enumerate(sample.numbers)}
            nodes = [
                replace(node, frames=tuple(position[frame] for frame in node.frames))
                if isinstance(node, Image)
                else node
                for node in sample.nodes
            ]
            yield row, where, Document("", nodes, images, sample.meta)


@lru_cache(maxsize=2)
def _table(path: str) -> RepeatTable:
    return RepeatTable.load(path)


@lru_cache(maxsize=2)
def _numbers(inputs: tuple[str, ...]) -> dict[str, int]:
    return {unit.path: number for number, unit in enumerate(file_units(inputs, (".tar",)))}


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a shard that are kept, without what repeats."""
    table = _table(str(Path(args.work) / "repeats.npz"))
    number = _numbers(tuple(args.inputs))[unit.path]
    for row, where, document in _documents(unit):
        try:
            if isinstance(document, ContentError):
                raise Dropped(document.reason)
            hold(document.meta, conditions_of(tuple(args.where)))
            _is_the_one(document, position_of(number, row), table, args)
            kept = without(document, table, where, tally)
            if len(kept.images) < args.min_images:
                raise Dropped(f"fewer than {args.min_images} images left")
            if not any(isinstance(node, Text) for node in kept.nodes):
                raise Dropped("no text")
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        yield kept


def _is_the_one(document: Document, position: int, table: RepeatTable, args: argparse.Namespace) -> None:
    """Raise Dropped for a document whose address, images or text a later document has."""
    hashes = document_hashes(document, table.same)
    for kind, all_kept, reason in (
        ("urls", args.keep_same_url, "address of a later document"),
        ("sets", args.keep_same_images, "images of a later document"),
    ):
        if not all_kept and any(not table.keeps(kind, value, position) for value in hashes[kind]):
            raise Dropped(reason)
    if table.has("texts", position):
        raise Dropped("text nearly that of a later document")


def without(document: Document, table: RepeatTable, where: str, tally: Tally) -> Document:
    """Return a document without repeated images and paragraphs; texts around a removed image stay two paragraphs.

    A conversation stays whole: its answers are about what was said and shown before.
    """
    if is_conversation(document.nodes):
        return document
    site = site_of(document)
    nodes: list[Node] = []
    images: list[bytes] = []
    stored: dict[int, int] = {}  # hash of an image to its number in the new document
    shown: set[int] = set()
    gone = False  # whether an image was removed since the last node
    for node in document.nodes:
        if isinstance(node, Text):
            if text := _text_without(node, site, table):
                before = nodes[-1] if nodes else None
                if gone and isinstance(before, Text) and before.loss == node.loss:
                    nodes[-1] = Text(f"{before.text}\n\n{text}", node.loss)
                else:
                    nodes.append(Text(text, node.loss))
                gone = False
            continue
        exact = [hash_of(document.images[frame]) for frame in node.frames]
        hashes = [table.same(value) for value in exact]
        reason = ""
        if any(table.has("images", value) for value in hashes):
            reason = "image of too many documents"
        elif len(hashes) == 1 and hashes[0] in shown:
            reason = "image of the same document again"
        if gone := bool(reason):
            tally.drop_image(reason, f"{where} image {node.frames[0]}")
            continue
        shown.add(hashes[0])
        for value, frame in zip(exact, node.frames, strict=True):
            if value not in stored:
                stored[value] = len(images)
                images.append(document.images[frame])
        nodes.append(Image(tuple(stored[value] for value in exact), node.fps))
    return Document("", nodes, images, document.meta)


def _text_without(node: Text, site: str, table: RepeatTable) -> str:
    """Return a text without its repeated paragraphs; unchanged when it has none."""
    if not site:
        return node.text
    parts = [part for part in node.text.split("\n\n") if part.strip()]
    kept = [part for part in parts if not table.has("paragraphs", paragraph_hash(site, part))]
    return node.text if len(kept) == len(parts) else "\n\n".join(kept)
