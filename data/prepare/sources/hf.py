"""Data sets of the Hugging Face hub, or in its forms: any with a column of images.

    python -m data prepare hf flaviagiammarino/vqa-rad --question-column question --text-column answer --out DIR
    python -m data prepare hf FOLDER ...      what `save_to_disk` wrote, or a folder of parquet or of images

Read through `datasets`, in its order: a row becomes a document of its image (or images) and its text. Where there is a
question only the answer, the text, is in the loss. Of a list of texts each becomes a document. Nothing that a data set
brings along is run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.prepare.conditions import add_where, conditions_of, hold
from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import one_line, required
from data.prepare.turns import add_turn_arguments, question_and_answer, turn_nodes
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Text
from flamingo.errors import UserError

LAYOUT = "interleaved"
IN_A_UNIT = 10_000  # rows of a data set on disk
MOST_UNITS = 256  # of a data set whose files are read one after another
TEXTS = ("caption", "captions", "text", "sentence", "sentences", "title", "description", "answer", "label")
FIELD = re.compile(r"\{(\w+)\}")
PLAIN = (str, int, float, bool)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare hf`."""
    add_split_arguments(parser)
    parser.add_argument("--image-column", nargs="+", metavar="NAME", help="(default: the only column of images)")
    parser.add_argument("--text-column", metavar="NAME", help=f"(default: the first of {', '.join(TEXTS)})")
    parser.add_argument("--question-column", metavar="NAME", help="what is asked; the text is its answer")
    parser.add_argument("--template", metavar="TEXT", help="instead of a column: a text such as 'a photo of {label}'")
    add_where(parser, "a row's columns")
    add_turn_arguments(parser)
    add_image_arguments(parser)


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for which part of a data set is read."""
    parser.add_argument("--split", default="train", metavar="NAME", help="(default train)")
    parser.add_argument("--config", metavar="NAME", help="the subset, where a data set has several")
    parser.add_argument("--revision", metavar="COMMIT", help="of the hub: fix it, so that the result stays the same")


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units: rows of what `save_to_disk` wrote, else files."""
    conditions_of(tuple(args.where))
    if args.template is not None and (args.text_column or args.question_column):
        raise UserError("--template stands for all of the text; give it without --text-column and --question-column")
    result: list[InputUnit] = []
    for item in args.inputs:
        rows = open_split(item, args)
        _columns(rows, item, args)
        result += split_units(rows, item, args)
    return result


def split_units(rows: Any, item: str, args: argparse.Namespace) -> list[InputUnit]:
    """Return the units of an opened split."""
    name, size = Path(item).name, _size(item)
    if on_disk(item):
        return [
            InputUnit(f"{name} {args.split} from row {n}", item, n, min(n + IN_A_UNIT, len(rows)), size)
            for n in range(0, len(rows), IN_A_UNIT)
        ]
    count = min(rows.num_shards, MOST_UNITS)
    return [InputUnit(f"{name} {args.split} part {n}", item, n, count, size) for n in range(count)]


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield the documents of the rows of a unit."""
    rule, conditions = ImageRule.of(args), conditions_of(tuple(args.where))
    rows = open_split(unit.path, args)
    images, names = _columns(rows, unit.path, args)
    features = rows.features
    folder = ImageFolder(unit.path) if Path(unit.path).is_dir() else None
    for where, row in split_rows(rows, unit):
        facts = {name: _plain(value, features[name]) for name, value in row.items() if name not in images}
        try:
            hold(facts, conditions)
            kept = [rule.check(_bytes(value, folder)) for name in images for value in _several(row[name])]
            if not kept:
                raise Dropped("image is missing")
            texts = _texts(facts, names, args)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        meta = {name: value for name, value in facts.items() if name not in names and isinstance(value, PLAIN)}
        shown = [Image((index,)) for index in range(len(kept))]
        for text in texts:
            if not text.strip():
                tally.drop_document("no text", where)
            elif args.question_column:
                asked = str(facts[args.question_column]).strip()
                nodes = turn_nodes(question_and_answer(shown, asked, text.strip()), args)
                yield Document("", nodes, list(kept), meta)
            else:
                yield Document("", [*shown, Text(text.strip())], list(kept), meta)


def _texts(facts: dict[str, Any], names: list[str], args: argparse.Namespace) -> list[str]:
    """Return the texts of a row. Raises Dropped where it has none."""
    for name in names:
        if facts[name] in (None, "", []):
            raise Dropped("no text" if name != args.question_column else "no question")
        if not isinstance(facts[name], (*PLAIN, list)) or (isinstance(facts[name], list) and len(names) > 1):
            raise Dropped(f"{name!r} is not text")
    if args.template is not None:
        return [FIELD.sub(lambda field: str(facts[field[1]]), args.template)]
    value = facts[names[0]]
    if not isinstance(value, list):
        return [str(value)]
    if not all(isinstance(text, str) for text in value):
        raise Dropped(f"{names[0]!r} is not text")
    return value


def open_split(item: str, args: argparse.Namespace) -> Any:
    """Return a split of a data set, without reading its rows. Raises UserError."""
    datasets, known = _library(), ""
    try:
        if on_disk(item):
            opened = datasets.load_from_disk(item)
            if not isinstance(opened, datasets.DatasetDict):
                return opened
            known = f" (its splits are {', '.join(opened)})"
            return opened[args.split]
        if not Path(item).is_dir() and (Path(item).exists() or item.count("/") > 1 or item.startswith((".", "/"))):
            raise UserError(f"input {item} is not a folder; give the folder of the data set, or its name on the hub")
        more = {} if Path(item).is_dir() else {"revision": args.revision}
        return datasets.load_dataset(item, args.config, split=args.split, streaming=True, **more)
    except UserError:
        raise
    except Exception as error:  # of every kind: files, formats, names, the network
        raise UserError(
            f"data set {item}, split {args.split}{known} cannot be opened: {type(error).__name__}: {one_line(error)}; "
            "correct --split or --config, or download it where there is a network and give its folder"
        ) from None


def _library() -> Any:
    datasets = required("datasets", "reading data sets of the hub", "hf")
    datasets.disable_progress_bars()
    return datasets


def on_disk(item: str) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((Path(item) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _size(item: str) -> int:
    """Return the bytes of a folder's files, which tell versions of it apart."""
    return sum(path.stat().st_size for path in Path(item).rglob("*") if path.is_file()) if Path(item).is_dir() else 0


def split_rows(rows: Any, unit: InputUnit) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a unit; images as they are stored, not decoded. Raises UserError when it is damaged."""
    for name, feature in list(rows.features.items()):  # sounds, films and images that are not shown, too
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "decode_example"):
            bare = type(inner)(decode=False)
            rows = rows.cast_column(name, bare if inner is feature else type(feature)(bare))
    first = 0
    if on_disk(unit.path):
        rows, first = rows.select(range(unit.begin, unit.end)), unit.begin
    else:
        rows = rows.shard(num_shards=unit.end, index=unit.begin, contiguous=True)
    try:
        for index, row in enumerate(rows, first):
            yield f"{unit.label.partition(' from ')[0]} row {index}", row
    except Exception as error:  # readers of every format raise their own
        raise UserError(f"{unit.label} cannot be read: {type(error).__name__}: {one_line(error)}") from None


def _columns(rows: Any, item: str, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the columns of images and those of the text, the answer first. Raises UserError."""
    datasets = _library()
    if rows.features is None:
        raise UserError(f"data set {item} does not say which columns it has; save it with save_to_disk first")
    names = list(rows.features)
    inner = {name: getattr(feature, "feature", feature) for name, feature in rows.features.items()}
    of_images = [name for name, feature in inner.items() if isinstance(feature, datasets.Image)]
    images = args.image_column or of_images
    if args.template is not None:
        texts = list(dict.fromkeys(FIELD.findall(args.template)))
    else:
        texts = [args.text_column] if args.text_column else [name for name in TEXTS if name in names][:1]
        texts += [args.question_column] if args.question_column else []
    for name in [*images, *texts]:
        if name not in names:
            raise UserError(f"data set {item} has no column {name!r}; its columns are {', '.join(names)}")
    if wrong := [name for name in texts if hasattr(inner[name], "decode_example")]:
        raise UserError(f"column {wrong[0]!r} of data set {item} holds no text but {inner[wrong[0]]}")
    if wrong := [name for name in images if name not in of_images]:
        raise UserError(f"column {wrong[0]!r} of data set {item} holds no images but {inner[wrong[0]]}")
    if len(images) != 1 and not args.image_column:
        has = f"several columns of images ({', '.join(images)})" if images else f"no images (it has {', '.join(names)})"
        raise UserError(f"data set {item} has {has}; say with --image-column what is shown")
    if not texts or (args.template is None and not args.text_column and len(texts) == bool(args.question_column)):
        raise UserError(f"data set {item} has the columns {', '.join(names)}; say with --text-column which is the text")
    return list(images), texts


def _plain(value: Any, feature: Any) -> Any:
    """Return a value as text has it: the name of a class, not its number."""
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None  # -1 where a test split hides it
    return value


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bytes(value: Any, folder: ImageFolder | None) -> bytes:
    """Return an image as it is stored. A name in a data set leads to no file outside of its folder. Raises Dropped."""
    value = value or {}
    if isinstance(data := value.get("bytes"), bytes):
        return data
    path = value.get("path")
    if not isinstance(path, str) or not path:
        raise Dropped("image is missing")
    if folder is not None:
        return folder.read(path)
    if not path.startswith("hf://"):
        raise Dropped("image is neither in the data set nor on the hub")
    from huggingface_hub import HfFileSystem

    try:
        return bytes(HfFileSystem().cat_file(path))
    except FileNotFoundError:
        raise Dropped("image is missing") from None
