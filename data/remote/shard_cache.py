"""A folder on this machine's disk that holds copies of remote shards, within a limit of bytes.

All processes of the machine that name the same folder share it: a file lock per shard keeps two of them from fetching
the same one, and the least recently used copy is removed when room is needed. A copy appears under its name only when
it is complete and is the tar that its index belongs to. A reader that has a removed copy open keeps reading it; one
that comes too late fetches it again.

    {hash of the URL}.tar   .idx (never removed)   .partial   .lock (holds the size of a running download)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from data.remote.download import NAMED_ONLY, Trust, download, free_bytes, is_command
from data.shards.index import build_index, check_tar, read_head
from data.shards.retry import ATTEMPTS, FIRST_WAIT
from flamingo.errors import UserError

SIDECARS_AT_ONCE = 16


class ShardCache:
    """Copies of remote shards. `limit` is in bytes; `fetched` counts the bytes that this process has downloaded."""

    def __init__(
        self,
        folder: str | Path,
        limit: int,
        *,
        attempts: int = ATTEMPTS,
        first_wait: float = FIRST_WAIT,
        trust: Trust = NAMED_ONLY,
    ) -> None:
        self.folder, self.limit, self.trust = Path(folder), limit, trust
        self.attempts, self.first_wait = attempts, first_wait
        self.fetched = self.broken_off = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be created ({error}); give another folder as cache"
            ) from None

    def _file(self, url: str, suffix: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}{suffix}"

    def has(self, url: str) -> bool:
        """Return whether a shard is here; if so, it counts as just used."""
        try:
            os.utime(self._file(url, ".tar"))
        except FileNotFoundError:
            return False
        return True

    def local(self, url: str, wanted: Callable[[], bool] | None = None) -> str:
        """Return the path of a shard's copy, fetching it unless it is here, as long as it is still `wanted`.

        Raises UserError as `download`, and when the limit or the disk is too small.
        """
        if not self.has(url):
            size = read_head(url, self.sidecar(url)).tar_size
            with self._lock(url, size) as partial:
                if not self.has(url):
                    self._fetch(url, partial, size, wanted)
        return str(self._file(url, ".tar"))

    def sidecar(self, url: str) -> Path:
        """Return the path of a copy of a shard's index: the one beside it, or else one made from the shard itself."""
        path = self._file(url, ".idx")
        if path.exists():
            return path
        with self._lock(url, 0) as partial:
            if path.exists():
                return path
            fetched = path.with_suffix(f".{os.getpid()}.fetched")
            if not is_command(url):
                try:
                    download(
                        f"{url}.idx", fetched, attempts=self.attempts, first_wait=self.first_wait, trust=self.trust
                    )
                    fetched.replace(path)
                    return path
                except UserError:
                    fetched.unlink(missing_ok=True)  # there is no index beside it
            self._fetch(url, partial, None)
            index = build_index(self._file(url, ".tar"))
            index.save(path)
        return path

    def sidecars(self, urls: Iterable[str]) -> None:
        """Fetch the indexes of many shards, several at a time."""
        with ThreadPoolExecutor(SIDECARS_AT_ONCE) as pool:
            list(pool.map(self.sidecar, urls))

    def _fetch(self, url: str, partial: Path, size: int | None, wanted: Callable[[], bool] | None = None) -> None:
        if size is not None:
            self._make_room(size)
        before = partial.stat().st_size if partial.exists() else 0
        if before != size:  # else it only has to be checked and renamed
            self.broken_off += download(
                url, partial, attempts=self.attempts, first_wait=self.first_wait, wanted=wanted, trust=self.trust
            )
        self.fetched += partial.stat().st_size - before
        if size is None:
            self._make_room(0)
        else:
            try:
                self._check(url, partial)
            except UserError:
                partial.unlink()
                if before:  # begun by a process that was killed, perhaps from another shard: start over
                    return self._fetch(url, partial, size, wanted)
                raise
        partial.replace(self._file(url, ".tar"))

    def _check(self, url: str, partial: Path) -> None:
        head = read_head(url, self.sidecar(url))
        try:
            check_tar(url, head.tar_size, head.digest, partial)
        except UserError as error:
            raise UserError(f"{error} (index copied to {self._file(url, '.idx')}: remove it too)") from None

    @contextmanager
    def _lock(self, url: str, size: int) -> Iterator[Path]:
        """Hold a shard's lock, reserving `size` bytes; yield the path for an incomplete copy."""
        descriptor = os.open(self._file(url, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.pwrite(descriptor, b"%20d" % size, 0)
            yield self._file(url, ".partial")
        finally:
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly: a forked child may hold the file open
            os.close(descriptor)

    def used(self) -> int:
        """Return the bytes of all copies, complete or not."""
        return sum(_size(path) for suffix in ("tar", "partial") for path in self.folder.glob(f"*.{suffix}"))

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies until `size` more bytes fit. Raises UserError."""
        if size > self.limit:
            raise UserError(
                f"the cache {self.folder} may hold {self.limit} bytes but a shard has {size}; raise cache_gb"
            )
        descriptor = os.open(self.folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            taken = self._promised()  # includes this shard's own size
            whole = sorted((path.stat().st_mtime_ns, path.name, _size(path)) for path in self.folder.glob("*.tar"))
            taken += sum(bytes_here for _, _, bytes_here in whole)
            for _, name, bytes_here in whole:
                if taken <= self.limit:
                    break
                (self.folder / name).unlink(missing_ok=True)
                taken -= bytes_here
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        if size > (free := free_bytes(self.folder)):
            raise UserError(
                f"the disk of the cache {self.folder} has {free} bytes left but a shard has {size}; free some space"
            )

    def _promised(self) -> int:
        """Return the bytes reserved by the locks of running downloads, and those of interrupted ones."""
        total = 0
        for path in self.folder.glob("*.lock"):
            promised = 0
            with path.open("r+b") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    # Nobody holds it: its content was left by a process that was killed.
                    fcntl.flock(lock, fcntl.LOCK_UN)
                except BlockingIOError:
                    promised = int(lock.read() or 0)
            total += max(promised, _size(path.with_suffix(".partial")))
        return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
