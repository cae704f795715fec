"""Reading annotation files: every fault is reported in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.records import json_objects
from eval.spec import SourceSpec
from eval.task import EncodedImage, StoredImage
from flamingo.errors import UserError

Item = dict[str, Any]
"""One question: id, image, question, answers (accepted ones), kind, label, text (the answer's node in the document, or
None); optionally choices, rationale, group (what ties scores together) and values (for the question's `{...}`)."""

VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def item(
    name: object, image: EncodedImage | None, question: str, answers: Sequence[object], kind: object = "", **more: Any
) -> Item:
    """Return an item of a data set. Answers may be numbers in some files; here they are text, stripped."""
    texts = [str(answer).strip() for answer in answers]
    facts: Item = {"id": str(name), "image": image, "question": " ".join(question.split()), "answers": texts}
    return facts | {"kind": str(kind or ""), "label": "", "text": None} | more


def below_root(source: SourceSpec, root: str) -> SourceSpec:
    """Return the source with its relative paths below `root`."""
    if not root:
        return source
    path, annotations, images = (
        value and str(Path(root) / value) for value in (source.path, source.annotations, source.images)
    )
    return replace(source, path=path, annotations=annotations, images=images)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object a line (or an array of them). Raises UserError."""
    return (row for _, row in json_objects(path))


def need(row: Mapping[str, Any], key: str, path: Path, what: object = "an entry") -> Any:
    """Return `row[key]`. Raises UserError when it is not there."""
    if not isinstance(row, Mapping) or key not in row:
        has = ", ".join(map(str, list(row)[:8])) if isinstance(row, Mapping) else type(row).__name__
        raise UserError(f"{path}: {what} has no {key!r} (it has {has}); is this the published file?")
    return row[key]


def rows(path: Path, content: Any, key: str | None = None) -> list[Any]:
    """Return the list in a file's content, under `key` if given."""
    listed = content if key is None else need(content, key, path, "the file")
    if not isinstance(listed, list):
        raise UserError(f"{path}: {key or 'the file'} is not a list; is this the published file?")
    return listed


def wanted(row: Mapping[str, Any], source: SourceSpec) -> bool:
    """Return whether a row has the values that `source.only` asks for."""
    return all(str(row.get(key)) == value for key, value in source.only.items())


def in_split(split: object, source: SourceSpec) -> bool:
    """Return whether a row's split is one of those asked for; all are if none is named."""
    return not source.split or str(split) in source.split.split("+")


def check_annotators(count: int, source: SourceSpec, path: Path, question: object) -> None:
    """Raise UserError for an answer list of the wrong length."""
    if source.annotators is not None and count != source.annotators:
        raise UserError(
            f"{path}: question {question} has {count} answers, but every question of this data set should have "
            f"{source.annotators}; use the published file, or set source.annotators"
        )


def read_files(*files: Path) -> tuple[bytes, ...]:
    """Return the content of the files: an image, or the frames of a clip."""
    return tuple(file.read_bytes() for file in files)


def stored(file: Path) -> StoredImage:
    """Return the image in a file, read when it is needed."""
    return StoredImage(partial(read_files, file), file)


def image_of(source: SourceSpec, beside: Path, name: str, row: Mapping[str, Any]) -> StoredImage:
    """Return the image of a row: `source.images` filled with the row's fields, or the folder it is with `name` in it.

    Without `source.images` the folder is that of `beside`, the annotation file.
    """
    return stored(Path(_location(source, beside, name, row)))


def _location(source: SourceSpec, beside: Path, name: str, row: Mapping[str, Any]) -> str:
    if "{" in source.images:
        try:
            return source.images.format(**row)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"images={source.images} cannot be filled from {beside} ({type(error).__name__}: {error})"
            ) from None
    return str(Path(source.images or beside.parent) / name)


def clip_of(
    source: SourceSpec, beside: Path, name: str, row: Mapping[str, Any], start: float = 0.0, end: float | None = None
) -> StoredImage:
    """Return `source.frames` frames of a row's video, a file or a folder of images, from `start` to `end` seconds."""
    from eval.tasks.formats.video import frames_of

    where = Path(_location(source, beside, name, row))
    options = [where, *(where.with_name(where.name + ending) for ending in VIDEO_ENDINGS)]
    file = next((option for option in options if option.exists()), options[0])
    segment = None if end is None and start == 0 else (start, end)
    return StoredImage(partial(frames_of, file, source.frames, start, end), file, segment)
