"""What every reader makes of its rows: items, and images that lie where the source says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from eval.spec import SourceSpec
from eval.task import EncodedImage, StoredImage
from eval.tasks.formats.rows import Row

Item = dict[str, Any]
"""One question: id, image, question, answers (accepted ones), kind, label, text (the answer's node in the document, or
None); optionally choices, rationale, group (what ties scores together), values (for the question's `{...}`), support
(items, the only ones that may be shown as its demonstrations) and said (the turns before it)."""

VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def item(
    row: Row,
    name: str,
    image: EncodedImage | None,
    question: str,
    answers: Sequence[str],
    kind: str = "",
    **more: Any,
) -> Item:
    """Return an item of a data set. Raises UserError for a row without an answer."""
    if not answers:
        raise row.fault("has no answer; is this the published file?")
    texts = [answer.strip() for answer in answers]
    facts: Item = {"id": name, "image": image, "question": " ".join(question.split()), "answers": texts}
    return facts | {"kind": kind, "label": "", "text": None} | more


def below_root(source: SourceSpec, root: str) -> SourceSpec:
    """Return the source with its relative paths below `root`."""
    if not root:
        return source
    path, annotations, images = (
        value and str(Path(root) / value) for value in (source.path, source.annotations, source.images)
    )
    return replace(source, path=path, annotations=annotations, images=images)


def wanted(row: Mapping[str, Any], source: SourceSpec) -> bool:
    """Return whether a row has the values that `source.only` asks for."""
    return all(str(row.get(key)) == value for key, value in source.only.items())


def in_split(split: str, source: SourceSpec) -> bool:
    """Return whether a row's split is one of those asked for; all are if none is named."""
    return not source.split or split in source.split.split("+")


def check_annotators(row: Row, question: str, count: int, source: SourceSpec) -> None:
    """Raise UserError for an answer list of the wrong length."""
    if source.annotators is not None and count != source.annotators:
        raise row.fault(
            f"is not complete: question {question} has {count} answers, but every question of this data set should "
            f"have {source.annotators}; use the published file, or set source.annotators"
        )


def read_files(*files: Path) -> tuple[bytes, ...]:
    """Return the content of the files: an image, or the frames of a clip."""
    return tuple(file.read_bytes() for file in files)


def stored(*files: Path) -> StoredImage:
    """Return the image in a file (or the clip in several), read when it is needed."""
    return StoredImage(partial(read_files, *files), files[0], lambda: list(map(str, files)))


def image_of(source: SourceSpec, name: str, row: Row) -> StoredImage:
    """Return the image of a row: `source.images` filled with the row's fields, or the folder it is with `name` in it.

    Without `source.images` the folder is that of the annotation file.
    """
    return stored(location(source, name, row))


def location(source: SourceSpec, name: str, row: Row) -> Path:
    """Return the path of a row's image or video.

    Raises:
        UserError: it leads out of the folder, or `source.images` cannot be filled from the row.
    """
    if "{" not in source.images:
        return _inside(Path(source.images) if source.images else row.path.parent, name, row)
    try:
        for _, field, _, _ in Formatter().parse(source.images):
            if field:
                row.name(field)
        return _possible(source.images.format(**row.fields), row)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise row.fault(f"does not fill images={source.images} ({type(error).__name__}: {error})") from None


def _possible(name: str, row: Row) -> Path:
    """Return a name as a path, unless no file can have it: then asking whether it exists would be an error."""
    path = Path(name)
    if "\0" in name or len(name) > 2000 or any(len(part.encode("utf-8", "replace")) > 240 for part in path.parts):
        raise row.fault(f"names {name[:60]!r}, which no file can be called")
    return path


def _inside(folder: Path, name: str, row: Row) -> Path:
    path = folder / _possible(name, row)
    # As written or with all links followed: data sets are often reached through a link.
    for resolve in (os.path.abspath, os.path.realpath):
        if Path(resolve(path)).is_relative_to(resolve(folder)):
            return path
    raise row.fault(
        f"names {name}, which is outside the folder {folder}; set source.images to a folder that holds it, or to / to "
        "allow every absolute path"
    )


def clip_of(source: SourceSpec, name: str, row: Row, start: float = 0.0, end: float | None = None) -> StoredImage:
    """Return `source.frames` frames of a row's video, a file or a folder of images, from `start` to `end` seconds."""
    from eval.tasks.formats.video import frame_names, frames_of

    where = location(source, name, row)
    options = [where, *(Path(f"{where}{ending}") for ending in VIDEO_ENDINGS)]
    file = next((option for option in options if option.exists()), options[0])
    segment = None if end is None and start == 0 else (start, end)
    names = partial(frame_names, file, source.frames)
    return StoredImage(partial(frames_of, file, source.frames, start, end), file, names, segment)
