"""The shards of a dataset: found, counted, and their indexes mapped when they are first needed.

What is notable: a plan needs one number a shard, so starting reads the first bytes of each sidecar, or a single
catalogue (`python -m data index FOLDER` writes one), and no index as a whole; 20,000 shards are 160 kB of counts. Each
rank checks the sizes of its own share of the shards, so that together they check all before the first batch; a shard's
digest is compared when a process first reads it.
"""

from __future__ import annotations

import contextlib
import glob
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

from data.remote.download import expand, is_remote
from data.remote.shard_cache import ShardCache
from data.shards.index import IndexHead, TarIndex, build_index, check_tar, index_path, load_index, read_head, wrong_size
from data.shards.writer import MANIFEST, read_manifest
from flamingo.errors import UserError
from flamingo.files import write_atomically

CATALOGUE = "_catalogue.json"
MAPPED = 512  # indexes of a dataset that stay mapped in a process


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a dataset; `path` is a file's path or a URL, `samples` how many the dataset can use."""

    path: str
    tar_size: int
    digest: str
    samples: int


class Indexes(Sequence[TarIndex]):
    """The indexes of a dataset's shards, mapped on first use; the least used are let go."""

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
            return _checked(build_index(shard.path), shard)  # the folder cannot be written to
        index = load_index(shard.path, sidecar, check=False)
        if sidecar is None and number not in self._checked:  # a remote tar is compared when it is fetched
            check_tar(shard.path, index.tar_size, index.digest, shard.path)
        self._checked.add(number)
        return _checked(index, shard)

    @overload
    def __getitem__(self, number: int) -> TarIndex: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[TarIndex]: ...
    def __getitem__(self, number: int | slice) -> TarIndex | Sequence[TarIndex]:
        """The index of one shard. Raises UserError when it does not belong to its tar."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return self._entry(number)[0]

    def row(self, shard: int, number: int) -> int:
        """The row in the shard of its sample `number` among those that count."""
        rows = self._entry(shard)[1]
        return number if rows is None else int(rows[number])


def _checked(index: TarIndex, shard: Shard) -> TarIndex:
    if index.digest != shard.digest:
        raise UserError(
            f"the index of shard {shard.path} is not the one that its catalogue or plan was made of; index the folder "
            "again: python -m data index FOLDER"
        )
    return index


class Corpus:
    """The opened shards of a dataset: `counts` (S,) samples that count for each, and their indexes."""

    def __init__(self, shards: Sequence[Shard], kind: str, cache: ShardCache | None = None) -> None:
        self.shards = list(shards)
        self.indexes = Indexes(self.shards, kind, cache)
        self.cache = cache

    @property
    def counts(self) -> NDArray[np.int64]:
        """(S,) samples that count, for each shard."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    def row(self, shard: int, number: int) -> int:
        """The row in the shard of its sample `number` among those that count."""
        return self.indexes.row(shard, number)

    def local(self, path: str) -> str:
        """The file that holds a shard; a remote one is fetched if it is not here yet."""
        return self.cache.local(path) if self.cache is not None and is_remote(path) else path


def resolve_shards(patterns: Sequence[str], *, owner: str = "") -> list[str]:
    """Tars, folders, patterns and URLs (braces are expanded) to a list of tars.

    Raises UserError for one that leads to no shard.
    """
    found: list[str] = []
    for pattern in patterns:
        if is_remote(pattern):
            found += expand(pattern)
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
        found += more
    return found


def open_shards(
    paths: Sequence[str],
    kind: str,
    *,
    owner: str = "",
    share: tuple[int, int] = (0, 1),
    cache: ShardCache | None = None,
) -> Corpus:
    """Find out what is in every shard, and check that those of this share (rank, world size) are whole.

    Raises UserError, naming the shard, for one that is missing, truncated or damaged, and when none has such a sample.
    """
    catalogues: dict[Path, dict[str, IndexHead]] = {}
    if cache is not None:
        cache.sidecars(path for path in paths if is_remote(path))
    shards = []
    for number, path in enumerate(paths):
        if is_remote(path):
            if cache is None:
                raise UserError(
                    f"{owner}shard {path} is remote: set the dataset's cache to a folder on this machine's disk"
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
    return Corpus(shards, kind, cache)


def _local_head(path: str, known: IndexHead | None, owner: str, mine: bool) -> IndexHead:
    """A local shard's head: from the catalogue, its sidecar, or a walk over the tar (which leaves a sidecar)."""
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
    """Shard name to head, of a folder that has a catalogue; empty where there is none, or the folder changed since."""
    path = folder / CATALOGUE
    try:
        if path.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            return {}
        body = json.loads(path.read_bytes())
        return {name: IndexHead(size, digest, usable) for name, size, digest, usable in body["shards"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); write it again: python -m data index {folder}") from None


def write_catalogue(folder: Path, heads: dict[str, IndexHead]) -> Path:
    """Write what `read_catalogue` reads."""
    rows = [[name, head.tar_size, head.digest, head.usable] for name, head in sorted(heads.items())]
    path = folder / CATALOGUE
    write_atomically(path, json.dumps({"v": 1, "shards": rows}, separators=(",", ":")))
    os.utime(path)  # newer than the folder, which its own arrival has just changed
    return path
