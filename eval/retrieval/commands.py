"""`python -m eval index` and `python -m eval search`. Settings are key=value."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.reports.commands import told
from eval.retrieval.encoder import FlamingoEncoder, OpenClipEncoder, load_encoder
from eval.retrieval.index import VectorIndex, entries_of, json_bytes, write_index
from eval.task import EncodedImage
from eval.tasks.formats.files import stored
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.terminal import printable

INDEX = {"model": "", "to": "", "batch_size": "64", "device": "cpu", "limit": "", "faiss": "", "overwrite": "false"}
SEARCH = {"index": "", "text": "", "image": "", "k": "10", "model": "", "device": "cpu", "faiss": "false", "out": ""}
"""Settings and their defaults; empty: none."""


def settings_of(arguments: Sequence[str], known: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return (what is no setting, settings). Raises UserError for a setting that is not known."""
    settings, words = dict(known), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in known:
            settings[key] = value
        elif re.match(r"[A-Za-z_]+=", argument) and not Path(argument).exists():
            raise UserError(f"unknown key {key!r}; the keys are {', '.join(known)}")
        else:
            words.append(argument)
    return words, settings


def _count(settings: dict[str, str], key: str) -> int:
    value = settings[key]
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise UserError(f"{key}={value} is not a whole number of at least 1")
    return int(value)


def _flag(settings: dict[str, str], key: str) -> bool:
    if settings[key] not in ("true", "false"):
        raise UserError(f"{key}={settings[key]} is neither true nor false")
    return settings[key] == "true"


def index(arguments: Sequence[str]) -> int:
    """Run `index FOLDER|SHARD model=ENCODER to=FOLDER [batch_size= device= limit= faiss=FACTORY overwrite=]`."""
    words, settings = settings_of(arguments, INDEX)
    if len(words) != 1 or not settings["model"] or not settings["to"]:
        raise UserError("index needs a folder of images or of shards, model=ENCODER and to=FOLDER")
    source, batch_size = Path(words[0]), _count(settings, "batch_size")
    limit = _count(settings, "limit") if settings["limit"] else None
    overwrite = _flag(settings, "overwrite")
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder of image files, or of shards, or a shard")
    to, end = Path(settings["to"]).resolve(), source.resolve()
    if to == end or to in end.parents:
        raise UserError(f"to={settings['to']} would replace what is indexed: give another folder")
    encoder = load_encoder(settings["model"], settings["device"], batch_size, texts=False)
    kinds = {FlamingoEncoder: "flamingo", OpenClipEncoder: "open_clip"}
    kind = kinds.get(type(encoder), "transformers")
    entries, factory = entries_of(source), settings["faiss"]
    written = write_index(Path(settings["to"]), entries, encoder, kind, faiss=factory, overwrite=overwrite, limit=limit)
    print(printable(f"{len(written)} images in {settings['to']}, {written.vectors.shape[1]} numbers each"))
    for reason, count in written.facts["left_out"].items():
        print(printable(f"{count} left out: {reason}, the first is {written.facts['first_left_out'][reason]}"))
    return 0


def search(arguments: Sequence[str]) -> int:
    """Run `search TEXT|text=TEXT|image=FILE index=FOLDER [k= model= device= faiss=true out=FILE.json]`."""
    words, settings = settings_of(arguments, SEARCH)
    texts = [*words, *([settings["text"]] if settings["text"] else [])]
    if (
        len(texts) + bool(settings["image"]) != 1
        or not settings["index"]
        or not "".join([*texts, settings["image"]]).strip()
    ):
        raise UserError("search needs one text, or image=FILE, and index=FOLDER")
    k, approximate = _count(settings, "k"), _flag(settings, "faiss")
    opened = VectorIndex(Path(settings["index"]))
    image = _image(settings["image"]) if settings["image"] else None
    encoder = load_encoder(settings["model"] or opened.encoder["name"], settings["device"], texts=False)
    opened.check_encoder(encoder)
    query = encoder.encode_texts(texts) if image is None else encoder.encode_images([image])
    if encoder.texts_cut:
        print("the text is longer than the text encoder reads and was cut", file=sys.stderr)
    scores, rows = opened.search(query, k, approximate=approximate)
    hits = [
        {"rank": rank, "cosine": round(float(score), 6), **opened.row(int(row))}
        for rank, (score, row) in enumerate(zip(scores[0], rows[0], strict=True), 1)
    ]
    for hit in hits:
        print(printable(f"{hit['rank']:>3}  {hit['cosine']:.4f}  {hit['id']}  {hit['text']}".rstrip()))
    if settings["out"]:
        content = {"query": settings["image"] or texts[0], "index": settings["index"], "hits": hits}
        write_atomically(Path(settings["out"]), json_bytes(content, indent=1))
    return 0


def _image(name: str) -> EncodedImage:
    if not Path(name).is_file():
        raise UserError(f"image={name} is not a file")
    return stored(Path(name))


def main(arguments: Sequence[str]) -> int:
    """Run `index` or `search`."""
    return told({"index": index, "search": search}[arguments[0]], arguments[1:])
