"""OBELICS: parquet files of `images` and `texts`, where entry i is one or the other, in the order of the web page.

`images` holds URLs, whose images come from --images (see `data.prepare.lookup`), or the images themselves as `{"bytes",
"path"}`. A missing image is left out, and the texts around it joined by an empty line, as OBELICS' own builder does.
The marker that OBELICS left where several documents shared a page ends one document and begins the next; it is never
text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.prepare.conditions import add_where, conditions_of, hold
from data.prepare.images import ImageRule, add_image_arguments
from data.prepare.inputs import file_units, one_line, required
from data.prepare.lookup import build_url_lookup, open_lookup
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Node, Text
from data.shards.mmc4 import add_text
from data.shards.places import place
from flamingo.errors import UserError

LAYOUT = "interleaved"
END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
GENERAL = "general_metadata."
ROWS = 4000  # at least so many in a unit, unless the file ends
Part = str | bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare obelics`."""
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="tars of img2dataset, or a map")
    parser.add_argument("--min-images", type=int, default=1, help="documents with fewer are dropped (default 1)")
    add_where(parser, "a row's columns (or general_metadata.NAME)", "perplexity<=1500")
    parser.add_argument(
        "--where-image",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="the same of an image's entry in metadata, such as 'porn<=0.85' (an image is left out, not its document)",
    )
    add_image_arguments(parser)


def parquet_units(inputs: Sequence[str], columns: Sequence[str] = (), rows: int = ROWS) -> list[InputUnit]:
    """Return row groups of parquet files, several together where they are small; `begin` and `end` count row groups.

    Raises UserError for a file that is not parquet or lacks one of the columns.
    """
    units = []
    for unit in file_units(inputs, (".parquet",)):
        names, sizes = parquet_columns(unit.path)
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{unit.path} has no column {missing[0]!r}; it has {', '.join(names)}")
        begin, count = 0, 0
        for group, size in enumerate(sizes, 1):
            count += size
            if count >= rows or group == len(sizes):
                label = unit.label if begin == 0 else f"{unit.label} from row group {begin}"
                units.append(InputUnit(label, unit.path, begin, group, unit.size))
                begin, count = group, 0
    return units


def parquet_columns(path: str) -> tuple[list[str], list[int]]:
    """Return the columns of a parquet file and the rows of each of its row groups. Raises UserError."""
    parquet = required("pyarrow.parquet", "reading parquet")
    try:
        with place(path).open("rb") as opened, parquet.ParquetFile(opened) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            return list(file.schema_arrow.names), sizes
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a parquet file, or truncated ({one_line(error)}); download it again") from None


def parquet_rows(unit: InputUnit, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of the row groups of a unit. Raises UserError when the file is damaged."""
    arrow = required("pyarrow", "reading parquet")
    parquet = required("pyarrow.parquet", "reading parquet")
    try:
        with place(unit.path).open("rb") as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            first = sum(file.metadata.row_group(group).num_rows for group in range(unit.begin))
            wanted = None if columns is None else [name for name in columns if name in names]
            groups = list(range(unit.begin, unit.end))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=wanted):
                for row in batch.to_pylist():
                    yield f"{Path(unit.path).name} row {first}", row
                    first += 1
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{unit.path} is damaged ({one_line(error)}); download it again") from None


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of row groups."""
    conditions_of(tuple(args.where_image))
    return parquet_units(args.inputs, ("images", "texts", *_columns(args)))


def _columns(args: argparse.Namespace) -> list[str]:
    """Return the columns that conditions name; `general_metadata.NAME` is not a column."""
    names = [name for name, *_ in conditions_of(tuple(args.where))]
    return [name for name in dict.fromkeys(names) if not name.startswith(GENERAL)]


def begin(args: argparse.Namespace, work: Path) -> None:
    """Build the lookup of images by URL."""
    if args.images:
        build_url_lookup(work / "images.sqlite", args.images)


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each page, or several where a page holds several."""
    rule = ImageRule.of(args)
    columns = ["images", "texts", "metadata", "general_metadata", *_columns(args)]
    for where, row in parquet_rows(unit, columns):
        try:
            hold(_facts(row), conditions_of(tuple(args.where)))
            known = _of_images(row) if args.where_image else []
            parts = parts_of(row, partial(_read, args, rule, known), where, tally)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        yield from documents_of(parts, _url(row), args.min_images, where, tally)


def _read(args: argparse.Namespace, rule: ImageRule, known: list[dict[str, Any]], index: int, image: Any) -> bytes:
    if args.where_image:
        hold(known[index], conditions_of(tuple(args.where_image)))
    return rule.check(_bytes(image, args))


def parts_of(row: dict[str, Any], read: Callable[[int, Any], bytes], where: str, tally: Tally) -> list[Part]:
    """Return the texts and the bytes of the kept images, in order: at each position is one of `texts` or of `images`.

    `read` returns the bytes of an image from its position and what `images` says of it. Raises Dropped for a wrong
    type.
    """
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise Dropped("'images' and 'texts' are not lists of the same length")
    parts: list[Part] = []
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image == "" or text == "":  # where other copies have None
            image, text = image or None, text or None
        if image is None and text is None:
            tally.drop_image("entry with neither image nor text", f"{where} entry {index}")
            continue
        if (image is not None and text is not None) or not isinstance(text, str | None):
            raise Dropped("an entry is neither an image nor a text, or both")
        if text is not None:
            parts.append(text)
            continue
        try:
            parts.append(read(index, image))
        except Dropped as dropped:
            tally.drop_image(dropped.reason, f"{where} image {index}")
    return parts


def documents_of(
    parts: list[Part], meta: dict[str, Any], min_images: int, where: str, tally: Tally
) -> Iterator[Document]:
    """Yield the document of a row's parts, or several where it holds several."""
    for inside in _documents(parts):
        document = _document(inside, dict(meta))
        if len(document.images) < min_images:
            tally.drop_document(f"fewer than {min_images} images left", where)
        elif not any(isinstance(node, Text) for node in document.nodes):
            tally.drop_document("no text", where)
        else:
            yield document


def _bytes(image: Any, args: argparse.Namespace) -> bytes:
    if isinstance(image, dict):
        data = image.get("bytes")
        if not isinstance(data, bytes):
            raise Dropped("image is missing")
        return data
    if not isinstance(image, str):
        raise Dropped("image is neither a URL nor bytes")
    if not args.images:
        raise UserError("the parquet holds URLs, not images; give the downloaded images with --images")
    return open_lookup(str(Path(args.work) / "images.sqlite")).read_address(image)


def _json(value: Any) -> Any:
    """Return a column's value: some copies hold structs, or maps (lists of pairs), where OBELICS has JSON as text."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        return dict(value)
    return json.loads(value) if isinstance(value, str | bytes) else value


def _general(row: dict[str, Any]) -> dict[str, Any]:
    try:
        value = _json(row.get("general_metadata") or {})
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """Return what conditions may refer to: a row's columns, and `general_metadata.NAME`."""
    return row | {f"{GENERAL}{name}": value for name, value in _general(row).items()}


def _of_images(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of `metadata`, one for each position; empty ones when they are missing."""
    count = len(row["images"]) if isinstance(row["images"], list) else 0
    try:
        value = _json(row.get("metadata") or [])
    except (ValueError, RecursionError):
        value = []
    if not isinstance(value, list) or len(value) != count:
        return [{}] * count
    return [entry if isinstance(entry, dict) else {} for entry in value]


def _url(row: dict[str, Any]) -> dict[str, Any]:
    url = _general(row).get("url")
    return {"url": url} if isinstance(url, str) else {}


def _documents(parts: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts of each document, divided at the marker."""
    inside: list[Part] = []
    for part in parts:
        if isinstance(part, bytes):
            inside.append(part)
            continue
        for index, text in enumerate(part.split(END)):
            if index:
                yield inside
                inside = []
            if text.strip():
                inside.append(text.strip())
    yield inside


def _document(parts: list[Part], meta: dict[str, Any]) -> Document:
    """Return a document; adjacent texts are joined by an empty line."""
    nodes: list[Node] = []
    images: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            nodes.append(Image((len(images),)))
            images.append(part)
        else:
            add_text(nodes, part, "\n\n")
    return Document("", nodes, images, meta)
