"""A dataset's shards on disk: listed, counted, and their indexes mapped when they are first needed.

The order needs only the number of samples in each shard, so starting reads the first bytes of each index, or a single
catalogue (`python -m data index FOLDER` writes one), and never a whole index; 20,000 shards are 160 kB of counts. Each
rank checks the sizes of its own share of the shards, so that together they check all before the first batch; some of a
shard's bytes are compared with its index when a process first reads it, all of them when a remote one is copied.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.errors import warn
from data.records import parse_json
from data.remote.download import expand, is_command, is_remote, refuse_command
from data.remote.shard_cache import ShardCache
from data.shards.index import (
    KINDS,
    VERSION,
    DamagedIndexError,
    IndexHead,
    TarIndex,
    build_index,
    check_tar,
    index_path,
    load_index,
    make_index,
    read_head,
    remake_index,
    wrong_size,
)
from data.shards.mmc4 import Mmc4Rule
from data.shards.places import Place, is_store, place, sizes_in
from data.shards.reader import RawSample, ShardReader
from data.shards.retry import Retry
from data.shards.writer import MANIFEST, read_manifest
from flamingo.errors import UserError
from flamingo.files import write_atomically

CATALOGUE = "_catalogue.json"
SUM_AT = b'"shards":'  # the checksum of a catalogue is of all bytes behind this
CLOCKS = 60.0  # seconds by which the clocks of machines may differ
MAPPED = 512  # most indexes of a dataset that stay mapped in a process


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of a dataset: its path or URL, what its index says of it, and how many samples the dataset can use."""

    path: str
    head: IndexHead
    samples: int


class Indexes(Sequence[TarIndex]):
    """The indexes of a dataset's shards, mapped on first use; the least recently used are unmapped."""

    def __init__(
        self,
        shards: Sequence[Shard],
        kind: str,
        cache: ShardCache | None,
        mapped: int = MAPPED,
        retry: Retry | None = None,
    ) -> None:
        self.shards, self.kind, self.cache, self.mapped, self.retry = shards, kind, cache, mapped, retry or Retry()
        self._known: OrderedDict[int, tuple[TarIndex, NDArray[np.int64] | None]] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()  # a thread that loads ahead, and the caller

    def __reduce__(self) -> tuple[type[Indexes], tuple[Any, ...]]:
        return Indexes, (self.shards, self.kind, self.cache, self.mapped, self.retry)

    def __len__(self) -> int:
        return len(self.shards)

    def _entry(self, number: int) -> tuple[TarIndex, NDArray[np.int64] | None]:
        with self._lock:
            if (entry := self._known.get(number)) is not None:
                self._known.move_to_end(number)
                return entry
        index = self.retry(lambda: self._open(number), f"shard {self.shards[number].path}")
        entry = index, index.usable(self.kind)
        with self._lock:
            self._known[number] = entry
            if len(self._known) > self.mapped:
                self._known.popitem(last=False)
        return entry

    def _open(self, number: int) -> TarIndex:
        """Return the index of a shard. Raises OSError when it cannot be read, UserError when it is another tar's."""
        shard, first_time = self.shards[number], number not in self._checked
        if self.cache is not None and is_remote(shard.path):
            index = self.cache.index(shard.path)  # the tar is compared when it is fetched
        else:
            if first_time:
                Path(shard.path).stat()  # storage that is away: not a shard without an index
            try:
                index = load_index(shard.path, check=False, read=first_time)
            except FileNotFoundError:  # it could not be saved: the folder is read-only
                index = build_index(shard.path, shard.head.digest)
            except DamagedIndexError as error:
                index = remake_index(shard.path, error)
            if first_time:
                check_tar(shard.path, shard.head if index.digest == shard.head.digest else index.head(), shard.path)
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
    if index.digest != shard.head.digest:
        remedy = "start again" if is_remote(shard.path) else f"index it again: python -m data index {shard.path}"
        raise UserError(
            f"the index of shard {shard.path} changed after the folder's catalogue was written or the run began; "
            f"{remedy}"
        )
    return index


class ShardStore:
    """The samples of a dataset in tars (a `data.store.DocumentStore`); each tar is a part.

    `reader` reads them; `cache` holds the copies of remote shards.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        kind: str,
        cache: ShardCache | None = None,
        mmc4: Mmc4Rule | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.shards, self.kind, self.cache = list(shards), kind, cache
        self.indexes = Indexes(self.shards, kind, cache, retry=retry)
        self.reader = ShardReader(self.indexes, local=self.local, mmc4=mmc4, retry=self.indexes.retry)

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
        digest = hashlib.sha256("".join(shard.head.digest for shard in self.shards).encode()).hexdigest()[:16]
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
            expanded = expand(pattern)
            more = [tar for url in expanded for tar in (shards_in(place(url)) if is_folder(url) else [url])]
        elif (path := Path(pattern)).is_dir():
            more = shards_in(path)
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


def is_folder(url: str) -> bool:
    """Return whether a URL is a folder of a store rather than a shard, whose name has ".tar" in it."""
    return is_store(url) and ".tar" not in url.rstrip("/").rpartition("/")[2]


def shards_in(folder: Place) -> list[str]:
    """Return the tars of a folder: those of its manifest if it has one, else all."""
    names: Iterable[str] = sizes_in(folder)
    if MANIFEST in names:
        parts = read_manifest(folder)["parts"].values()
        names = [entry["name"] for part in parts for entry in part["shards"]]
    else:
        names = [name for name in names if name.endswith(".tar")]
    before = str(folder / "_")[:-1]  # joined once: see `open_shards`
    return sorted(before + name for name in names)


def open_shards(
    paths: Sequence[str],
    kind: str,
    *,
    owner: str = "",
    share: tuple[int, int] = (0, 1),
    cache: ShardCache | None = None,
    mmc4: Mmc4Rule | None = None,
    retry: Retry | None = None,
) -> ShardStore:
    """Count the samples of every shard, and check the sizes of those in this share (rank, world size).

    Raises UserError, naming the shard, for one that is missing, truncated or damaged, and when no sample has this kind.
    """
    retry = retry or Retry()
    catalogues: dict[str, dict[str, IndexHead]] = {}
    if cache is not None:
        cache.sidecars(path for path in paths if is_remote(path))
    shards = []
    for number, path in enumerate(paths):
        if is_remote(path):
            if cache is None:
                raise UserError(
                    f"{owner}shard {path} is remote; set the dataset's cache to a folder on this machine's disk"
                )
            head = cache.head(path)
        else:
            folder, name = os.path.split(path)  # a Path for each of 20,000 shards takes as long as all the rest
            if folder not in catalogues:
                catalogues[folder] = read_catalogue(Path(folder))
            mine = number % share[1] == share[0]
            known = catalogues[folder].get(name)
            try:
                head = _local_head(path, known, owner, mine)
            except OSError:
                head = retry(partial(_local_head, path, known, owner, mine), f"{owner}shard {path}")
        shards.append(Shard(path, head, head.usable[kind]))
    if sum(shard.samples for shard in shards) == 0:
        raise UserError(f"{owner.removesuffix(': ')} has no sample of kind {kind!r} in its {len(shards)} shards")
    return ShardStore(shards, kind, cache, mmc4, retry)


def _local_head(path: str, known: IndexHead | None, owner: str, mine: bool) -> IndexHead:
    """Return a local shard's head: from the catalogue, its index, or a walk over the tar (which leaves an index)."""
    try:
        size = Path(path).stat().st_size if mine or known is None else None
    except FileNotFoundError:
        raise UserError(f"{owner}shard {path} does not exist; prepare the data first, or correct the path") from None
    if known is not None:
        if size is not None and size != known.tar_size:
            raise wrong_size(path, size, known.tar_size)
        return known
    try:
        head = read_head(path)
    except FileNotFoundError:
        return make_index(path).head()
    except DamagedIndexError as error:
        return remake_index(path, error).head()
    if size != head.tar_size:
        raise wrong_size(path, size or 0, head.tar_size)
    return head


def read_catalogue(folder: Path) -> dict[str, IndexHead]:
    """Return shard name to head from a folder's catalogue; empty without one, or when the folder changed since.

    One from the future is left aside too: no change of the folder would be newer. Raises UserError for a damaged
    catalogue and for one of another version.
    """
    path = folder / CATALOGUE
    try:
        written = path.stat().st_mtime
        if path.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            return {}
        if written > time.time() + CLOCKS:
            warn(f"catalogue {path} is dated in the future and not used; write it again: python -m data index {folder}")
            return {}
        raw = path.read_bytes()
        body = parse_json(raw)
        if type(body["v"]) is not int or body["v"] != VERSION:
            raise UserError(
                f"catalogue {path} has version {body['v']}, this program reads version {VERSION}; write it again: "
                f"python -m data index {folder}"
            )
        if body["checksum"] != xxhash.xxh3_128_hexdigest(raw.partition(SUM_AT)[2]):
            raise ValueError("wrong checksum")
        return _heads(body["shards"])
    except FileNotFoundError:
        return {}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"catalogue {path} is damaged ({error}); write it again: python -m data index {folder}"
        ) from None


def _heads(rows: Sequence[tuple[str, int, str, str, dict[str, int]]]) -> dict[str, IndexHead]:
    """Return the rows of a catalogue by name. Raises ValueError, KeyError or TypeError for what cannot be."""
    heads = {name: IndexHead(size, digest, sampled, usable) for name, size, digest, sampled, usable in rows}
    sizes = np.array([head.tar_size for head in heads.values()])
    for kind in KINDS:
        usable = np.array([head.usable[kind] for head in heads.values()])
        # A sample has a member at least, and that a header of 512 bytes.
        if len(rows) and (usable.dtype != np.int64 or sizes.dtype != np.int64 or (usable > sizes // 512).any()):
            raise ValueError("more samples than the shards can hold")
        if (usable < 0).any():
            raise ValueError("counts below zero")
    return heads


def write_catalogue(folder: Path, heads: dict[str, IndexHead]) -> Path:
    """Write a folder's catalogue and return its path."""
    rows = [[name, head.tar_size, head.digest, head.sampled, head.usable] for name, head in sorted(heads.items())]
    path = folder / CATALOGUE
    listed = json.dumps(rows, separators=(",", ":")).encode() + b"}"
    start = f'{{"v":{VERSION},"checksum":"{xxhash.xxh3_128_hexdigest(listed)}",'.encode() + SUM_AT
    write_atomically(path, start + listed)
    os.utime(path)  # the rename has just changed the folder, and the catalogue must not be older than it
    return path


def save_index(tar: Path, index: TarIndex) -> None:
    """Save the index of one shard, and bring its row of the folder's catalogue up to date, where there is one."""
    path = tar.parent / CATALOGUE
    try:
        heads = read_catalogue(tar.parent)  # before the folder changes
    except UserError:
        heads = {}
    index.save(index_path(tar))
    if tar.name in heads:
        write_catalogue(tar.parent, heads | {tar.name: index.head()})
    else:
        path.unlink(missing_ok=True)  # of no use any more: the indexes serve without it
