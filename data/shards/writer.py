"""The shard format: interleaved documents and pairs in plain POSIX tars that any webdataset user can read.

A document is text and images in reading order. On disk it is a JSON member and a member for each image, side by side:

    {key}.json       {"v":1,"nodes":[{"t":"text"},{"t":"question","loss":false},{"i":0},...],"meta":{}}
    {key}.000.png    the image's own bytes, never re-encoded; the extension is what the bytes are

and a pair, as img2dataset writes it, is `{key}.jpg` + `{key}.txt` (+ `{key}.json` with facts about it). The same
documents give the same bytes (no times, no owners), and a shard, its index and the manifest appear under their names
only when they are complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from data.errors import ContentError
from data.shards.document import Document, Image, Node, Text, check_images, nodes_to_json, to_utf8
from data.shards.index import build_index, open_index
from data.shards.places import Place, RemotePath, is_store, move, place, put
from data.shards.reader import ShardReader
from flamingo.errors import UserError
from flamingo.vision.image_files import NAMES, sniff

MANIFEST = "_dataset.json"
MANIFEST_VERSION = 2  # also of what `prepare --part i/n` leaves for `merge`
__all__ = [
    "MANIFEST",
    "Document",
    "Image",
    "Node",
    "ShardWriter",
    "Text",
    "read_document",
    "read_documents",
    "read_manifest",
]
MAX_KEY_BYTES = 80  # with ".00000.jpeg" this still fits the 100 bytes of a plain tar header


def read_documents(shard: str | Path, rows: Iterable[int] | None = None) -> Iterator[Document]:
    """Yield all or some samples of a shard as Documents. Raises UserError for one that cannot be read."""
    index = open_index(shard)
    reader = ShardReader([index])
    try:
        for row in range(len(index)) if rows is None else rows:
            if not 0 <= row < len(index):
                raise UserError(f"shard {shard} has {len(index)} rows, counted from 0; row {row} does not exist")
            try:
                sample = reader.sample(0, row)
            except ContentError as error:
                raise UserError(f"shard {shard}, row {row} (key {index.key(row)!r}): {error}") from None
            images = [sample.image(number) for number in sample.numbers]
            yield Document(sample.key, sample.nodes, images, sample.meta)
    finally:
        reader.close()


def read_document(shard: str | Path, row: int) -> Document:
    """Return one sample of a shard as a Document."""
    return next(read_documents(shard, [row]))


def _members(document: Document, layout: str) -> list[tuple[str, bytes]]:
    """Return (suffix, bytes) of a document's members. JSON comes first, so that a reader may stop after it."""
    check_images(document.nodes, range(len(document.images)), f"document {document.key!r}")
    kinds = [sniff(image) for image in document.images]
    if None in kinds:
        raise UserError(f"document {document.key!r}: image {kinds.index(None)} is not a {NAMES}")
    if layout == "interleaved":
        images = [
            (f"{n:03d}.{kind}", image) for n, (kind, image) in enumerate(zip(kinds, document.images, strict=True))
        ]
        return [("json", nodes_to_json(document.nodes, document.meta)), *images]
    texts = [node.text for node in document.nodes if isinstance(node, Text)]
    count = len(document.images)
    shown = [Image((number,)) for number in range(count)]
    if not count or len(texts) != 1 or document.nodes != [*shown, document.nodes[-1]]:
        raise UserError(f"document {document.key!r} is not a pair: a pair is an image (or several) and then one text")
    names = [str(kinds[0])] if count == 1 else [f"{n:03d}.{kind}" for n, kind in enumerate(kinds)]
    members = [*zip(names, document.images, strict=True), ("txt", to_utf8(texts[0]))]
    if document.meta:
        members.append(("json", to_utf8(json.dumps(document.meta, ensure_ascii=False, separators=(",", ":")))))
    return members


def check_key(key: str) -> None:
    """Raise UserError unless webdataset will read the key back unchanged (it splits names at the first dot)."""
    if not key or len(key.encode()) > MAX_KEY_BYTES or key.startswith("__") or not key.isprintable():
        raise UserError(f"key {key!r}: give 1 to {MAX_KEY_BYTES} printable bytes that do not begin with '__'")
    if any(c in key for c in "./\\ "):
        raise UserError(f"key {key!r}: '.', '/', '\\' and spaces are not allowed in keys")


def output_place(name: str | Path | RemotePath) -> Place:
    """Return the folder that a name stands for, of this machine or of a store. Raises UserError for other URLs."""
    if is_store(str(name)):
        return place(name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(name)):  # a Path of s3://bucket is s3:/bucket
        raise UserError(
            f"cannot write into {name}: shards are written to a folder or to a store as s3://bucket/folder; write to "
            "a folder and copy it to that URL"
        )
    return Path(str(name))


def make_folder(name: str | Path | RemotePath) -> Place:
    """Create a folder to write into, if needed, and return it. Raises UserError for other URLs or when that fails."""
    folder = output_place(name)
    if not isinstance(folder, Path):
        folder.exists()  # a store that refuses, or is away, says so before anything is done
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
        why = f"{file} is a file" if file else error.strerror
        raise UserError(f"cannot write into {folder}: {why}; give another folder") from None
    return folder


class ShardWriter:
    """Writes documents as `{prefix}-000000.tar`, ... with their indexes, and at the end the folder's manifest.

    Use it as a context manager. `layout` is "interleaved" or "pairs". Several prefixes may share a folder: each writer
    replaces its own prefix's shards and its own part of the manifest. When the block raises, the unfinished shard is
    removed and the manifest does not list this prefix. A shard ends after `documents_per_shard` documents, or with the
    document that takes it to `bytes_per_shard`. With `listed=False` the caller writes the manifest (several processes
    write into one folder) from the entries in `shards`.
    """

    def __init__(
        self,
        folder: str | Path | RemotePath,
        prefix: str,
        documents_per_shard: int = 1000,
        *,
        layout: str = "interleaved",
        meta: Mapping[str, Any] | None = None,
        bytes_per_shard: int | None = None,
        listed: bool = True,
        scratch: Path | None = None,
    ) -> None:
        if documents_per_shard < 1 or layout not in ("interleaved", "pairs"):
            raise ValueError(f"documents_per_shard={documents_per_shard}, layout={layout!r}")
        check_key(prefix)
        self.folder, self.prefix, self.layout, self.meta = make_folder(folder), prefix, layout, dict(meta or {})
        self.documents_per_shard, self.bytes_per_shard, self.listed = documents_per_shard, bytes_per_shard, listed
        self.shards: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()
        self._images = 0
        self._scratch = self.folder if isinstance(self.folder, Path) else scratch or Path(tempfile.gettempdir())
        # Random: where a machine is lost, another one may begin the same shard before the first has noticed.
        self._token = secrets.randbelow(10**12)
        if listed:
            replace_part(self.folder, self.prefix, None)

    @property
    def _final(self) -> Place:
        return self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"

    @property
    def _partial(self) -> Path:
        return self._scratch / f".{self._final.name}.{self._token}.partial"

    def write(self, document: Document) -> str:
        """Append a document and return its key. Raises UserError for an invalid key, image or reference."""
        if self._tar is None:
            self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key = document.key or f"{self.prefix}-{len(self.shards):06d}-{len(self._keys):08d}"
        check_key(key)
        if key in self._keys:
            raise UserError(f"key {key!r} is already in {self._final.name}; keys are unique within a shard")
        for suffix, body in _members(document, self.layout):
            info = tarfile.TarInfo(f"{key}.{suffix}")  # owner, group and time stay 0
            info.size = len(body)
            self._tar.addfile(info, io.BytesIO(body))
        self._keys.add(key)
        self._images += len(document.images)
        too_big = self.bytes_per_shard is not None and self._tar.offset >= self.bytes_per_shard
        if len(self._keys) == self.documents_per_shard or too_big:
            self._finish_shard()
        return key

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        index = build_index(self._partial)
        with self._partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        final, size = self._final, self._partial.stat().st_size
        sidecar = self._partial.with_name(f".{final.name}.idx.{self._token}.partial")
        index.save(sidecar)
        move(sidecar, _index_of(final))
        move(self._partial, final)
        entry = {"name": final.name, "documents": len(self._keys), "images": self._images, "bytes": size}
        self.shards.append(entry | {"sha256": digest})
        self._tar, self._keys, self._images = None, set(), 0

    def close(self) -> None:
        """Finish the last shard, remove older shards of this prefix beyond it, and write the manifest."""
        if self._tar is not None:
            self._finish_shard()
        number = len(self.shards)
        while (old := self.folder / f"{self.prefix}-{number:06d}.tar").exists():
            old.unlink()
            _index_of(old).unlink(missing_ok=True)
            number += 1
        if self.listed:
            write_part(self.folder, self.prefix, self.meta | {"layout": self.layout}, self.shards)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)
            self._tar, self._keys, self._images = None, set(), 0


def _index_of(tar: Place) -> Place:
    return tar.with_name(f"{tar.name}.idx")


def read_manifest(folder: str | Path | RemotePath) -> dict[str, Any]:
    """Return a folder's manifest: {"v", "parts": {prefix: {"documents", "images", "meta", "shards": [...]}}}.

    Raises UserError when there is none, when it cannot be read, and for one of another version.
    """
    path = place(folder) / MANIFEST
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is {folder} a folder that `python -m data prepare` wrote?") from None
    except ValueError as error:
        raise UserError(f"manifest {path} cannot be read ({error}); prepare the data again") from None
    if not isinstance(body, dict) or "v" not in body:
        raise UserError(f"{path} is not a manifest of this format; prepare the data again")
    check_version(body, f"manifest {path}")
    try:
        names = [entry["name"] for part in body["parts"].values() for entry in part["shards"]]
        outside = [name for name in names if name != Path(name).name or name in ("", "..")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest of this format ({type(error).__name__}: {error}); prepare the data again"
        ) from None
    if outside:
        raise UserError(f"manifest {path} names the shard {outside[0]!r}, which is not a file beside it; correct it")
    return body


def check_version(body: dict[str, Any], what: str) -> None:
    """Raise UserError when a manifest, or the manifest of a part, has another version than this program writes."""
    if type(body["v"]) is not int or body["v"] != MANIFEST_VERSION:
        raise UserError(
            f"{what} has version {body['v']}, this program reads version {MANIFEST_VERSION}; prepare the data again, "
            "into an empty folder"
        )


def write_part(folder: Place, prefix: str, meta: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """List the shards of a prefix in the folder's manifest, in place of what it listed before."""
    totals = {name: sum(entry[name] for entry in shards) for name in ("documents", "images")}
    replace_part(folder, prefix, totals | {"meta": meta, "shards": shards})


def replace_part(folder: Place, prefix: str, part: dict[str, Any] | None) -> None:
    """Put a part into the manifest, or take it out. The file is not touched when that changes nothing."""
    path = folder / MANIFEST
    before = read_manifest(folder)["parts"] if path.exists() else None
    parts = {name: old for name, old in (before or {}).items() if name != prefix}
    if part is not None:
        parts[prefix] = part
    if parts == before:
        return
    body = {"v": MANIFEST_VERSION, "parts": dict(sorted(parts.items()))}
    put(path, to_utf8(json.dumps(body, indent=1, ensure_ascii=False) + "\n"))
