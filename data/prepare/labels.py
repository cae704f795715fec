"""A collection of images with their names: read, checked, and divided into what is trained on and what is held out.

    table.csv|.tsv|.jsonl|.json   columns image and name, and where there are any keywords and source (or vendor)
    folder                        NAME/file.png or SOURCE/NAME/file.png; an underscore in a name is a space

Images are one thing if their names differ in nothing but case and blanks. Which names are held out depends on the names
alone: neither on a seed, nor on the order of the rows, nor on how many images a name has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.prepare.images import ImageFolder, ImageRule
from data.prepare.units import Dropped, Tally
from data.records import json_objects, table_rows
from flamingo.errors import UserError
from flamingo.vision.image_files import SUFFIXES

TABLES = {".csv": ",", ".tsv": "\t"}
COLUMNS = {"image": ("image",), "name": ("name",), "keywords": ("keywords", "tags"), "source": ("source", "vendor")}
"""What is known of an image -> the columns that may say it, the first one found."""


@dataclass(frozen=True, slots=True, order=True)
class Labelled:
    """An image of a collection: the thing it shows, its name, where it lies and who drew it."""

    thing: str
    """The name without its case, by which images belong together."""
    file: str
    name: str
    keywords: tuple[str, ...] = ()
    source: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Collection:
    """The images of each thing, in an order that does not depend on the input's."""

    folder: ImageFolder
    things: Mapping[str, Sequence[Labelled]]

    @property
    def images(self) -> Iterator[Labelled]:
        """All images, thing after thing."""
        return (image for images in self.things.values() for image in images)

    def read(self, image: Labelled) -> bytes:
        """Return an image's bytes. Raises UserError where it has changed since it was checked."""
        try:
            data = self.folder.read(image.file)
        except Dropped as dropped:
            raise UserError(f"{image.file}: {dropped.reason}; it was there a moment ago") from None
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise UserError(f"{image.file} has changed while it was read; start again when nothing writes to it")
        return data

    def only(self, things: Iterable[str], sources: Iterable[str] | None = None) -> Collection:
        """Return the part of the collection with these things, drawn by these sources (default: by all)."""
        wanted = None if sources is None else set(sources)
        kept = {
            thing: [image for image in self.things[thing] if wanted is None or image.source in wanted]
            for thing in sorted(things)
        }
        return Collection(self.folder, {thing: images for thing, images in kept.items() if images})


def read_collection(labels: Path, images: Path | None, columns: Mapping[str, str], tally: Tally) -> Collection:
    """Return all usable images; the tally counts the others by reason.

    Args:
        labels: a table, or a folder.
        images: folder that a table's images lie below; None: the table's own.
        columns: of a table, where they have other names than in `COLUMNS`.
        tally: counts what is left out.

    Raises:
        UserError: there is no such table, it cannot be read, or not one image can be used.
    """
    if labels.is_dir():
        root, rows = labels, _folder_rows(labels, tally)
    elif labels.is_file():
        root, rows = images or labels.parent, _table_rows(labels, columns, tally)
    else:
        raise UserError(f"{labels} does not exist; give a table (csv, tsv, jsonl) or a folder of images by name")
    folder, rule = ImageFolder(root), ImageRule()
    names: dict[str, str] = {}
    by_bytes: dict[str, list[tuple[Labelled, str]]] = {}
    for where, row in rows:
        try:
            sha256 = hashlib.sha256(rule.check(folder.read(row.file))).hexdigest()
        except Dropped as dropped:
            tally.drop_image(dropped.reason, where)
            continue
        name = names.setdefault(row.thing, row.name)
        by_bytes.setdefault(sha256, []).append((replace(row, name=name, sha256=sha256), where))
    things: dict[str, list[Labelled]] = {}
    for rows_of_one in by_bytes.values():
        several = len({row.thing for row, _ in rows_of_one}) > 1  # which would be in training and held out as well
        for number, (row, where) in enumerate(rows_of_one):
            if several or number:
                tally.drop_image("the same image under several names" if several else "image listed before", where)
            else:
                things.setdefault(row.thing, []).append(row)
    if not things:
        reasons = "; ".join(" ".join(line.split()) for line in tally.report()) or "it is empty"
        raise UserError(f"{labels} has no image that can be used ({reasons})")
    tally.images = sum(map(len, things.values()))
    return Collection(folder, {thing: sorted(things[thing]) for thing in sorted(things)})


def _table_rows(path: Path, columns: Mapping[str, str], tally: Tally) -> Iterator[tuple[str, Labelled]]:
    if path.suffix in TABLES:
        rows: Iterable[tuple[int, Mapping[str, Any]]] = enumerate(table_rows(path, delimiter=TABLES[path.suffix]), 2)
    elif path.suffix in (".jsonl", ".json"):
        rows = json_objects(path)
    else:
        raise UserError(f"{path} is not a table; its name ends with none of .csv, .tsv, .jsonl, .json")
    for number, row in rows:
        where = f"{path.name} row {number}"
        found = {what: _column(path, row, what, columns.get(what)) for what in COLUMNS}
        file, name, source = (_text(found[what]) for what in ("image", "name", "source"))
        if not file or not name:
            tally.drop_image("the image has no name" if file else "the row has no image", where)
            continue
        words = found["keywords"]
        keywords = words if isinstance(words, list) else str(words or "").replace("|", ";").split(";")
        cleaned = tuple(dict.fromkeys(word for word in map(_text, keywords) if word))
        yield where, Labelled(name.casefold(), file, name, cleaned, source)


def _column(path: Path, row: Mapping[str, Any], what: str, chosen: str | None) -> Any:
    """Return the value of a column. A JSON object may leave out a key, and a table an optional column."""
    if chosen is None:
        chosen = next((name for name in COLUMNS[what] if name in row), None)
    if chosen is not None and chosen in row:
        return row[chosen]
    if path.suffix in TABLES and (what in ("image", "name") or chosen is not None):
        raise UserError(f"{path} has no column {chosen or what!r}; its columns are {', '.join(row)}")
    return None


def _text(value: Any) -> str:
    """Return a value as one line of text, empty for anything else than text or a number."""
    return " ".join(str(value).split()) if isinstance(value, str | int | float) else ""


def _folder_rows(root: Path, tally: Tally) -> Iterator[tuple[str, Labelled]]:
    for path in sorted(root.rglob("*")):
        if path.suffix.lower()[1:] not in SUFFIXES or not path.is_file():
            continue
        file = path.relative_to(root).as_posix()
        *parents, _ = file.split("/")
        name = _text(parents[-1].replace("_", " ")) if parents else ""
        if len(parents) not in (1, 2) or not name:
            tally.drop_image("image outside NAME/ and SOURCE/NAME/", file)
            continue
        yield file, Labelled(name.casefold(), file, name, source=parents[0] if len(parents) == 2 else "")


def held_out(things: Iterable[str], share: float) -> list[str]:
    """Return `share` of the things, chosen by their names alone, sorted."""
    order = sorted(things, key=lambda thing: hashlib.sha256(f"held out {thing}".encode()).digest())
    return sorted(order[: round(share * len(order))])
