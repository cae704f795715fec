"""A dataset's shards on disk: listed, counted, and their indexes mapped when they are first needed.

The order needs only the number of samples in each shard, so starting reads the first bytes of each index, or a single
catalogue (`python -m data index FOLDER` writes one), and never a whole index; 20,000 shards are 160 kB of counts. Each
rank checks the sizes of its own share of the shards, so that together they check all before the first batch; a shard's
digest is compared when a process first reads it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from data.remote.download import expand, is_command, is_remote, refuse_command
from data.remote.shard_cache import ShardCache
from data.shards.index import (
    VERSION,
    IndexHead,
    TarIndex,
    build_index,
    check_tar,
    index_path,
    load_index,
    read_head,
    wrong_size,
)
from data.shards.mmc4 import Mmc4Rule
from data.shards.reader import RawSample, ShardReader
from data.shards.writer import MANIFEST, read_manifest
from flamingo.errors import UserError
from flamingo.files import write_atomically

CATALOGUE = "_catalogue.json"
MAPPED = 512  # most indexes of a dataset that stay mapped in a process


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of a dataset: its path or URL, bytes, digest, and how many of its samples the dataset can use."""

    path: str
    tar_size: int
    digest: str
    samples: int


class Indexes(Sequence[TarIndex]):
    """The indexes of a dataset's shards, mapped on first use; the least recently used are unmapped."""

    def __init__(self, shards: Sequence[Shard], kind: str, cache: ShardCache | None, mapped: int = MAPPED) -> None:
        self.shards, self.kind, self.cache, self.mapped = shards, kind, cache, mapped
        self._known: OrderedDict[int, tuple[TarIndex, NDArray[np.int64] | None]] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()  # a thread that loads ahead, and the caller

    def __reduce__(self) -> tuple[type[Indexes], tuple[Any, ...]]:
        return Indexes, (self.shards, self.kind, self.cache, self.mapped)

    def __len__(self) -> int:
        return len(self.shards)

    def _entry(self, number: int) -> tuple[TarIndex, NDArray[np.int64] | None]:
        with self._lock:
            if (entry := self._known.get(number)) is not None:
                self._known.move_to_end(number)
                return entry
        index = self._open(number)
        entry = index, index.usable(self.kind)
        with self._lock:
            self._known[number] = entry
            if len(self._known) > self.mapped:
                self._known.popitem(last=False)
        return entry

    def _open(self, number: int) -> TarIndex:
        shard = self.shards[number]
        sidecar = None
        if self.cache is not None and is_remote(shard.path):
            sidecar = self.cache.sidecar(shard.path)
        elif not index_path(shard.path).exists():
            return _checked(build_index(shard.path), shard)  # nowhere to save it: the folder is read-only
        index = load_index(shard.path, sidecar, check=False)
        if sidecar is None and number not in self._checked:  # a remote tar was compared when it was fetched
            check_tar(shard.path, index.tar_size, index.digest, shard.path)
        self._checked.add(number)
        return _checked(index, shard)

    @overload
    def __getitem__(self, number: int) -> TarIndex: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[TarIndex]: ...
    def __getitem__(self, number: int | slice) -> TarIndex | Sequence[TarIndex]:
        """Return the index of a shard. Raises UserError when it does not belong to its tar."""
        if isinstance(number, slice):
            return [self[shard] for shard in range(*number.indices(len(self)))]
        return self._entry(number)[0]

    def row(self, shard: int, number: int) -> int:
        """Return the row in a shard of sample `number` of those that the dataset can use."""
        rows = self._entry(shard)[1]
        return number if rows is None else int(rows[number])


def _checked(index: TarIndex, shard: Shard) -> TarIndex:
    if index.digest != shard.digest:
        raise UserError(
            f"the index of shard {shard.path} changed after the catalogue was written or the run began; index the "
            "folder again: python -m data index FOLDER"
        )
    return index


class ShardStore:
    """The samples of a dataset in tars (a `data.store.DocumentStore`); each tar is a part.

    `reader` reads them; `cache` holds the copies of remote shards.
    """

    def __init__(
        self, shards: Sequence[Shard], kind: str, cache: ShardCache | None = None, mmc4: Mmc4Rule | None = None
    ) -> None:
        self.shards, self.kind, self.cache = list(shards), kind, cache
        self.indexes = Indexes(self.shards, kind, cache)
        self.reader = ShardReader(self.indexes, local=self.local, mmc4=mmc4)

    def lengths(self) -> list[int]:
        """Return how many samples of each shard the dataset can use."""
        return [shard.samples for shard in self.shards]

    def key(self, part: int, row: int) -> tuple[str, str]:
        """Return (path of the shard, key of the sample)."""
        index = self.indexes[part]
        return index.path, index.key(self.indexes.row(part, row))

    def read(self, part: int, row: int, *, images: bool = True) -> RawSample:
        """Return a sample; its text is read now, its images when asked for. Raises as `ShardReader.sample`."""
        return self.reader.sample(part, self.indexes.row(part, row), images=images)

    def fingerprint(self) -> dict[str, Any]:
        """Return the numbers of shards and samples, a digest of the shards, and the kind that selects the samples."""
        digest = hashlib.sha256("".join(shard.digest for shard in self.shards).encode()).hexdigest()[:16]
        sizes = {"shards": len(self.shards), "samples": sum(self.lengths()), "shards_sha256": digest}
        return sizes | {"kind": self.kind}

    def local(self, path: str) -> str:
        """Return the file that holds a shard; a remote one is fetched unless its copy is here."""
        return self.cache.local(path) if self.cache is not None and is_remote(path) else path

    def limit_files(self, limit: int) -> None:
        """Keep at most `limit` tars open and `limit` indexes mapped in a process."""
        self.reader.max_open = min(self.reader.max_open, limit)
        self.indexes.mapped = min(self.indexes.mapped, limit)


def resolve_shards(patterns: Sequence[str], *, owner: str = "", allow_pipe: bool = False) -> list[str]:
    """Return the tars that paths, folders, patterns and URLs (braces are expanded) stand for.

    Raises UserError when there are none, when a pattern matches none, and for commands unless they are allowed.
    """
    if not patterns:
        raise UserError(f"{owner}shards is empty; give at least one tar, folder or pattern")
    paths: list[str] = []
    for pattern in patterns:
        if is_remote(pattern):
            paths += expand(pattern)
            continue
        path = Path(pattern)
        if path.is_dir():
            if (path / MANIFEST).exists():
                parts = read_manifest(path)["parts"].values()
                more = sorted(str(path / entry["name"]) for part in parts for entry in part["shards"])
            else:
                more = sorted(str(tar) for tar in path.glob("*.tar"))
        elif any(c in pattern for c in "*?["):
            more = sorted(glob.glob(pattern))  # noqa: PTH207 (the pattern may be absolute)
        else:
            more = expand(pattern)
        if not more:
            raise UserError(f"{owner}no shards in {pattern}: prepare the data first, or correct the path")
        paths += more
    if not allow_pipe and (command := next(filter(is_command, paths), None)):
        refuse_command(command, owner)
    return paths


def open_shards(
    paths: Sequence[str],
    kind: str,
    *,
    owner: str = "",
    share: tuple[int, int] = (0, 1),
    cache: ShardCache | None = None,
    mmc4: Mmc4Rule | None = None,
) -> ShardStore:
    """Count the samples of every shard, and check the sizes of those in this share (rank, world size).

    Raises UserError, naming the shard, for one that is missing, truncated or damaged, and when no sample has this kind.
    """
    catalogues: dict[Path, dict[str, IndexHead]] = {}
    if cache is not None:
        cache.sidecars(path for path in paths if is_remote(path))
    shards = []
    for number, path in enumerate(paths):
        if is_remote(path):
            if cache is None:
                raise UserError(
                    f"{owner}shard {path} is remote; set the dataset's cache to a folder on this machine's disk"
                )
            head = read_head(path, cache.sidecar(path))
        else:
            folder = Path(path).parent
            if folder not in catalogues:
                catalogues[folder] = read_catalogue(folder)
            mine = number % share[1] == share[0]
            head = _local_head(path, catalogues[folder].get(Path(path).name), owner, mine)
        shards.append(Shard(path, head.tar_size, head.digest, head.usable[kind]))
    if sum(shard.samples for shard in shards) == 0:
        raise UserError(f"{owner.removesuffix(': ')} has no sample of kind {kind!r} in its {len(shards)} shards")
    return ShardStore(shards, kind, cache, mmc4)


def _local_head(path: str, known: IndexHead | None, owner: str, mine: bool) -> IndexHead:
    """Return a local shard's head: from the catalogue, its index, or a walk over the tar (which leaves an index)."""
    try:
        size = Path(path).stat().st_size if mine or known is None else None
    except FileNotFoundError:
        raise UserError(f"{owner}shard {path} does not exist; prepare the data first, or correct the path") from None
    if known is not None:
        head = known
    elif index_path(path).exists():
        head = read_head(path)
    else:
        index = build_index(path)
        with contextlib.suppress(OSError):
            index.save(index_path(path))
        head = index.head()
    if size is not None and size != head.tar_size:
        raise wrong_size(path, size, head.tar_size)
    return head


def read_catalogue(folder: Path) -> dict[str, IndexHead]:
    """Return shard name to head from a folder's catalogue; empty without one, or when the folder changed since.

    Raises UserError for a damaged catalogue and for one of another version.
    """
    path = folder / CATALOGUE
    try:
        if path.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            return {}
        body = json.loads(path.read_bytes())
        if body["v"] != VERSION:
            raise UserError(
                f"catalogue {path} has version {body['v']}, this program reads version {VERSION}; write it again: "
                f"python -m data index {folder}"
            )
        return {name: IndexHead(size, digest, usable) for name, size, digest, usable in body["shards"]}
    except FileNotFoundError:
        return {}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"catalogue {path} is damaged ({error}); write it again: python -m data index {folder}"
        ) from None


def write_catalogue(folder: Path, heads: dict[str, IndexHead]) -> Path:
    """Write a folder's catalogue and return its path."""
    rows = [[name, head.tar_size, head.digest, head.usable] for name, head in sorted(heads.items())]
    path = folder / CATALOGUE
    write_atomically(path, json.dumps({"v": VERSION, "shards": rows}, separators=(",", ":")))
    os.utime(path)  # the rename has just changed the folder, and the catalogue must not be older than it
    return path
