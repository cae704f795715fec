"""An index: the vectors of many images in a folder, and which image each row is.

    index.json    format, encoder (name, key, kind), rows, width, what was left out and why
    vectors.f32   (rows, width) float32, little-endian, of length 1; mapped, never read whole
    rows.jsonl    a line a row: id, source, sha256 of the image, text
    offsets.i64   where each line begins
    faiss.index   only with faiss=FACTORY: an approximate index of the same rows

Search is exact by default: a matrix product over blocks of rows. The folder appears when it is complete.

Letters: N rows, E width of a vector, Q queries, K results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.writer import MANIFEST, read_documents
from eval.retrieval.encoder import DIGITS, DualEncoder, decoded
from eval.task import EncodedImage
from eval.tasks.formats.files import stored
from eval.tasks.sources import document_turns, shards_of
from flamingo.errors import UserError, first_line
from flamingo.files import write_folder
from flamingo.vision.image_files import SUFFIXES

FORMAT = 1
BLOCK = 1 << 16
"""Rows compared at once: bounds the memory of a search to 256 KiB a query."""


@dataclass(frozen=True)
class Entry:
    """One image to index: a name for it, where it lies, and its text where it has one."""

    id: str
    source: str
    image: EncodedImage
    text: str = ""


class VectorIndex:
    """An index that was written."""

    def __init__(self, folder: Path) -> None:
        """Open an index. Raises UserError for a folder that is none, of another format, or damaged."""
        self.folder = folder
        if not (folder / "index.json").is_file():
            raise UserError(
                f"index={folder} is not an index: index.json is missing; make one with python -m eval index"
            )
        try:
            self.facts: dict[str, Any] = json.loads((folder / "index.json").read_bytes())
            if self.facts["format"] != FORMAT:
                raise UserError(f"index={folder} has format {self.facts['format']}, not {FORMAT}: make it again")
            shape = (int(self.facts["rows"]), int(self.facts["width"]))
            self.encoder: dict[str, str] = {key: str(self.facts["encoder"][key]) for key in ("name", "key", "kind")}
            self.vectors = np.memmap(folder / "vectors.f32", dtype="<f4", mode="r", shape=shape)
            self._offsets = np.fromfile(folder / "offsets.i64", dtype="<i8")
            sizes = (
                (folder / "vectors.f32").stat().st_size,
                len(self._offsets),
                (folder / "rows.jsonl").stat().st_size,
            )
            if sizes != (shape[0] * shape[1] * 4, shape[0] + 1, int(self._offsets[-1])):
                raise ValueError("the files have other lengths than index.json says")
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"index={folder} is damaged ({first_line(error)}): make it again") from None

    def __len__(self) -> int:
        return len(self.vectors)

    def row(self, number: int) -> dict[str, str]:
        """Return what is known of a row: id, source, sha256 and text."""
        start, end = self._offsets[number : number + 2]
        with (self.folder / "rows.jsonl").open("rb") as file:
            file.seek(int(start))
            line: dict[str, str] = json.loads(file.read(int(end - start)))
            return line

    def rows_by_sha256(self) -> dict[str, int]:
        """Return the first row of each distinct image."""
        found: dict[str, int] = {}
        with (self.folder / "rows.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                found.setdefault(json.loads(line)["sha256"], number)
        return found

    def check_encoder(self, encoder: DualEncoder) -> None:
        """Raise UserError unless the index was made with this encoder: other vectors cannot be compared with its."""
        if encoder.key != self.encoder["key"]:
            raise UserError(
                f"index={self.folder} was made with another encoder: {self.encoder['name']} then had the key "
                f"{self.encoder['key'][:12]}, and {encoder.name} has {encoder.key[:12]}; make the index again with it"
            )

    def search(self, queries: np.ndarray, k: int, *, approximate: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return (Q, K) cosines and row numbers, best first, K = min(k, N).

        `approximate` asks faiss for candidates, four times as many, and compares those exactly.
        """
        if not approximate:
            return exact_search(self.vectors, queries, k)
        path = self.folder / "faiss.index"
        if not path.is_file():
            raise UserError(f"index={self.folder} has no faiss.index: make it with faiss=FACTORY, or search exactly")
        faiss = _faiss()
        found = faiss.read_index(str(path)).search(np.ascontiguousarray(queries, np.float32), min(4 * k, len(self)))[1]
        scores, rows = [], []
        for query, near in zip(queries, found, strict=True):
            own = np.unique(near[near >= 0])  # faiss fills up with -1
            cosines, order = exact_search(self.vectors[own], query[None], k)
            if order.shape[1] < min(k, len(self)):
                raise UserError(f"faiss found {order.shape[1]} of {k} rows in {path}: lower k, or search exactly")
            scores.append(cosines[0])
            rows.append(own[order[0]])
        return np.stack(scores), np.stack(rows)


def exact_search(vectors: np.ndarray, queries: np.ndarray, k: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Return the (Q, K) largest of all cosines of (Q, E) queries with (N, E) vectors, and their rows, best first.

    Nothing depends on `block`: cosines count up to `DIGITS` decimals, and equal ones are in the order of the rows.
    """
    k = min(k, len(vectors))
    scores = np.zeros((len(queries), 0), dtype=np.float32)
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    for start in range(0, len(vectors), block):
        new = np.round(queries @ vectors[start : start + block].T, DIGITS)
        numbers = np.broadcast_to(np.arange(start, start + new.shape[1]), new.shape)
        scores, rows = _best(np.hstack([scores, new]), np.hstack([rows, numbers]), k)
    return scores, rows


def _best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first k columns by score, then row. Columns with equal scores are in the order of their rows."""
    k = min(k, scores.shape[1])
    kept_scores, kept_rows = np.empty((len(scores), k), scores.dtype), np.empty((len(scores), k), np.int64)
    for query, own in enumerate(scores):
        least = np.partition(own, -k)[-k]
        reach = np.flatnonzero(own >= least)  # those that tie with the last one too, of which the earliest stay
        order = reach[np.argsort(-own[reach], kind="stable")[:k]]
        kept_scores[query], kept_rows[query] = own[order], rows[query, order]
    return kept_scores, kept_rows


def write_index(
    folder: Path,
    entries: Iterable[Entry],
    encoder: DualEncoder,
    kind: str,
    *,
    faiss: str = "",
    overwrite: bool = False,
    limit: int | None = None,
) -> VectorIndex:
    """Write the index of the images, which is opened and returned. Images that cannot be decoded are left out, counted.

    Raises:
        UserError: the folder exists, no image is left, or faiss does not know the factory string.
    """
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"to={folder} is not empty: give another folder, or overwrite=true")
    if faiss:
        _faiss()  # before anything takes long
    faults: Counter[str] = Counter()
    first_fault: dict[str, str] = {}

    def batches() -> Iterator[tuple[list[Entry], np.ndarray]]:
        kept: list[Entry] = []
        frames: list[Any] = []
        taken = 0
        for entry in entries:
            if limit is not None and taken == limit:
                break
            try:
                frames.append(decoded(entry.image))
            except UserError as error:
                faults["cannot be decoded"] += 1
                first_fault.setdefault("cannot be decoded", f"{entry.source}: {error}")
                continue
            taken += 1
            kept.append(entry)
            if len(kept) == encoder.batch_size:
                yield kept, encoder.encode_decoded(frames)
                kept, frames = [], []
        if kept:
            yield kept, encoder.encode_decoded(frames)

    def write(partial: Path) -> None:
        count, width = _write_rows(partial, batches())
        if not count:
            why = f": {first_fault['cannot be decoded']}" if first_fault else ""
            raise UserError(f"no image is left to index{why}; give a folder of image files or of shards")
        name = str(Path(encoder.name).resolve()) if Path(encoder.name).exists() else encoder.name
        described = {"name": name, "key": encoder.key, "kind": kind}
        facts = {"format": FORMAT, "encoder": described, "rows": count, "width": width, "faiss": faiss}
        facts |= {"left_out": dict(faults), "first_left_out": first_fault}
        if faiss:
            _write_faiss(partial, (count, width), faiss)
        (partial / "index.json").write_bytes(json_bytes(facts, indent=1))

    write_folder(folder, write, overwrite=overwrite)
    return VectorIndex(folder)


def _write_rows(folder: Path, batches: Iterable[tuple[Sequence[Entry], np.ndarray]]) -> tuple[int, int]:
    offsets, width = [0], 0
    with (folder / "vectors.f32").open("wb") as vectors, (folder / "rows.jsonl").open("wb") as rows:
        for entries, encoded in batches:
            width = encoded.shape[1]
            vectors.write(np.ascontiguousarray(encoded, "<f4").tobytes())
            for entry in entries:
                facts = {"id": entry.id, "source": entry.source, "sha256": entry.image.sha256, "text": entry.text}
                line = json_bytes(facts)
                rows.write(line)
                offsets.append(offsets[-1] + len(line))
    np.array(offsets, "<i8").tofile(folder / "offsets.i64")
    return len(offsets) - 1, width


def json_bytes(value: object, indent: int | None = None) -> bytes:
    """Return JSON with a line feed. A file's name that is not UTF-8 holds half surrogates, which become escapes."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _write_faiss(folder: Path, shape: tuple[int, int], factory: str) -> None:
    faiss = _faiss()
    vectors = np.memmap(folder / "vectors.f32", dtype="<f4", mode="r", shape=shape)
    try:
        index = faiss.index_factory(shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(np.array(vectors[: 1 << 18]))
        for start in range(0, len(vectors), BLOCK):
            index.add(np.array(vectors[start : start + BLOCK]))
    except RuntimeError as error:
        sentence = first_line(error).rpartition("Error: ")[-1]
        raise UserError(f"faiss={factory} cannot be made of {shape[0]} vectors of {shape[1]}: {sentence}") from None
    faiss.write_index(index, str(folder / "faiss.index"))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("faiss= needs faiss: pip install 'flamingo-vlm[search]'") from None
    return faiss


def entries_of(source: Path) -> Iterator[Entry]:
    """Yield the images of a folder of image files, of a prepared folder of shards, or of one shard, in a fixed order.

    Raises:
        UserError: it is none of them.
    """
    if source.is_file() and source.suffix == ".tar":
        yield from _shard_entries(source)
    elif (source / MANIFEST).is_file():
        for shard in shards_of(source):
            yield from _shard_entries(shard)
    elif source.is_dir():
        for file in sorted(source.rglob("*")):
            if file.suffix.lower()[1:] in SUFFIXES and file.is_file():
                yield Entry(file.relative_to(source).as_posix(), str(file), stored(file))
    else:
        raise UserError(
            f"{source} is neither a folder nor a .tar: give a folder of image files, or of shards, or a shard"
        )


def _shard_entries(shard: Path) -> Iterator[Entry]:
    for document in read_documents(shard):
        where = f"{shard}: document {document.key}"
        for number, (image, question, answer) in enumerate(document_turns(document, where)):
            yield Entry(f"{document.key}.{number}", where, image, f"{question}{answer}".strip())
