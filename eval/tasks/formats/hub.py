"""Data sets as the Hugging Face hub has them: parquet files whose images are structs of bytes and path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from eval.spec import SourceSpec
from eval.task import EncodedImage, StoredImage
from eval.tasks.formats.files import Item, image_of, item
from eval.tasks.formats.rows import Row, parquet_rows
from flamingo.errors import UserError


def is_hub(path: Path) -> bool:
    """Return whether a path is a parquet file or a folder, as the hub's copies of a data set are."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def hub_questions(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Yield the rows of image, question and answer of a parquet file, or of a split (default test) of a folder.

    The hub's copies do not say which answers are closed: here yes and no are.
    """
    seen: dict[str, EncodedImage] = {}  # most images have several questions
    for name, row in hub_rows(path, source):
        image, group = hub_image(row, source, seen)
        answer = row.text("answer").strip()
        kind = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
        yield item(row, name, image, row.text("question"), [answer], kind, group=group)


def hub_rows(path: Path, source: SourceSpec) -> Iterator[tuple[str, Row]]:
    """Yield (name, row) of a parquet file or of a folder's split. Raises UserError when there is none, or a bad one."""
    split, files = source.split or "test", [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*.parquet")
            if file.name.startswith((f"{split}-", f"{split}.")) or file.parent.name == split
        )
        if not files:
            raise UserError(f"{path} holds no {split}-*.parquet; correct source.path, or set source.split")
    stem = split if path.is_dir() else path.stem
    for count, row in enumerate(row for file in files for row in parquet_rows(file)):
        yield f"{stem}.{count}", row


def hub_image(row: Row, source: SourceSpec, seen: dict[str, EncodedImage]) -> tuple[EncodedImage, str]:
    """Return a row's image and what is the same for all rows that show it; `seen` are the images of rows before it."""
    stored = row.get("image")
    data, file = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
    if isinstance(data, bytes):
        digest = hashlib.sha256(data).hexdigest()[:16]
        names = partial(_name_of, f"{row.path}, {row.where}")
        return seen.setdefault(digest, StoredImage(partial(_bytes_of, data), names=names)), digest
    if not isinstance(file, str) or not file:
        raise row.wrong("image", None, "an image")
    return image_of(source, file, row), file


def _name_of(name: str) -> tuple[str]:
    return (name,)


def _bytes_of(data: bytes) -> tuple[bytes, ...]:
    return (data,)
