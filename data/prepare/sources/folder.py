"""A folder of your own documents: Markdown or text files that show images, a document each.

    report.md     The first chart: ![](charts/1.png) shows the rise.

Which images a document shows is decided by `data.prepare.markdown`; the text stays as it is written, without them. An
image's path is relative to its file, or below the folder where it begins with a slash; `![[name]]` is looked for in the
whole folder too, as Obsidian does. A document with a missing image is dropped whole: your own documents are few, and
you can fix them.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import unquote

from data.prepare.images import ImageFolder, ImageRule, add_image_arguments, from_base64
from data.prepare.inputs import folder_files, folder_units, input_files
from data.prepare.markdown import parts_of
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Text
from data.shards.places import files_below, place
from flamingo.errors import UserError
from flamingo.vision.image_files import SUFFIXES as IMAGES

LAYOUT = "interleaved"
SUFFIXES = (".md", ".markdown", ".txt")
IN_A_UNIT = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare folder`."""
    parser.add_argument("--min-images", type=int, default=0, help="documents with fewer are dropped (default 0)")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of a thousand documents."""
    result: list[InputUnit] = []
    for item in args.inputs:
        if folder_files(item) is None:
            raise UserError(f"input {item} is not a folder; give the folder of the documents")
        result += folder_units(
            item, {name: path.stat().st_size for name, path in input_files([item], SUFFIXES)}, IN_A_UNIT
        )
    return result


@lru_cache(maxsize=4)
def _folder(root: str) -> ImageFolder:
    return ImageFolder(root)


@lru_cache(maxsize=4)
def _by_name(root: str) -> dict[str, list[str]]:
    """Return the images of a folder by their names in small letters, those with the shortest path first."""
    names: dict[str, list[str]] = {}
    for path in files_below(place(root)):
        name = path.rpartition("/")[2].lower()
        if name.rpartition(".")[2] in IMAGES:
            names.setdefault(name, []).append(path)
    return {name: sorted(paths, key=lambda path: (path.count("/"), path)) for name, paths in names.items()}


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each file."""
    rule, folder = ImageRule.of(args), _folder(unit.path)
    for name in unit.names:
        try:
            yield _document(name, folder, rule, args.min_images)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, name)


def _document(name: str, folder: ImageFolder, rule: ImageRule, min_images: int) -> Document:
    try:
        text = folder.read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Dropped("document is not UTF-8") from None
    document = Document("", [], [], {"file": name})
    numbers: dict[str, int] = {}
    for part in parts_of(text, plain=name.lower().endswith(".txt")):
        if isinstance(part, str):
            if part.strip():
                document.nodes.append(Text(part.strip()))
            continue
        address = part.address or ""
        inline = address[:5].lower() == "data:"
        places = (address,) if inline else _places(address, part.wiki, name, folder)
        if places[0] not in numbers:
            data = from_base64("data:" + unquote(address[5:])) if inline else folder.read(*places)
            document.images.append(rule.check(data))
            numbers[places[0]] = len(document.images) - 1
        document.nodes.append(Image((numbers[places[0]],)))
    if not document.nodes:
        raise Dropped("empty document")
    if len(document.images) < min_images:
        raise Dropped(f"fewer than {min_images} images")
    return document


def _places(address: str, wiki: bool, name: str, folder: ImageFolder) -> tuple[str, ...]:
    """Return where an image may be, below the folder: the first of these that exists is meant."""
    forms = [form for whole in (address, re.split(r"[?#]", address)[0]) for form in (unquote(whole), whole)]
    forms += [form.replace("\\", "/") for form in forms]
    places = []
    for form in filter(None, forms):
        if form.startswith("/") and not folder.is_inside(form):
            form = f"{'../' * name.count('/')}{form.lstrip('/')}"  # as GitHub and site generators have it
        places.append(posixpath.normpath(posixpath.join(posixpath.dirname(name), form)))
    if wiki:
        places += [posixpath.normpath(form) for form in filter(None, forms)]
        for form in forms:
            known = _by_name(str(folder.root)).get(form.rpartition("/")[2].lower(), [])
            places += [path for path in known if f"/{path}".lower().endswith(f"/{form}".lower())]
    return tuple(dict.fromkeys(places))
