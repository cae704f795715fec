"""A folder on this machine's disk that holds copies of remote shards, within a limit of bytes.

All processes of the machine that name the same folder share it: a file lock per shard keeps two of them from fetching
the same one, and the least recently used copy is removed when room is needed. What comes from the network appears under
its name only when it is complete and is, to the last byte, the tar that its index belongs to; an index, when its
checksum holds. A copy that changed on the disk since then, or is older than the machine's start (a disk may lose what a
crash interrupted), is compared again before it is used, and fetched again when it is damaged. A reader that has a
removed copy open keeps reading it; one that comes too late fetches it again.

    {hash of the URL}.tar   .ok (it was whole; its time says when it was last used)   .idx (never removed)
                    .partial   .lock (holds the size of a running download)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from data.errors import warn
from data.remote.download import NAMED_ONLY, NotThereError, Trust, download, free_bytes, is_command
from data.shards.index import DamagedIndexError, IndexHead, TarIndex, build_index, check_tar, load_index, read_head
from data.shards.retry import FIRST_WAIT, PATIENCE
from flamingo.errors import UserError

T = TypeVar("T")
SIDECARS_AT_ONCE = 16
TRIALS = 3  # downloads of something that turns out to be something else


class ShardCache:
    """Copies of remote shards. `limit` is in bytes; `fetched` counts the bytes that this process has downloaded.

    A server that gives nothing is asked again for `patience` seconds, or `attempts` times.
    """

    def __init__(
        self,
        folder: str | Path,
        limit: int,
        *,
        attempts: int | None = None,
        first_wait: float = FIRST_WAIT,
        patience: float = PATIENCE,
        trust: Trust = NAMED_ONLY,
    ) -> None:
        self.folder, self.limit, self.trust = Path(folder), limit, trust
        self.attempts, self.first_wait, self.patience = attempts, first_wait, patience
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
        """Return whether a shard is here, as it was when it was found to be whole; if so, it counts as just used."""
        whole = self._file(url, ".ok")
        try:
            if whole.read_text() != _state(self._file(url, ".tar")):
                return False
            os.utime(whole)
        except FileNotFoundError:
            return False
        return True

    def local(self, url: str, wanted: Callable[[], bool] | None = None) -> str:
        """Return the path of a shard's copy, fetching it unless it is here, as long as it is still `wanted`.

        Raises UserError as `download`, and when the limit or the disk is too small.
        """
        if not self.has(url):
            head = self.head(url)
            with self._lock(url, 0):
                kept = self.has(url) or self._is_whole(url, head)
            if not kept:
                with self._lock(url, head.tar_size) as partial:
                    if not self.has(url):
                        self._fetch(url, partial, head, wanted)
        return str(self._file(url, ".tar"))

    def _is_whole(self, url: str, head: IndexHead) -> bool:
        """Compare a copy, if there is one, with its index, byte by byte; remove it when it is damaged."""
        copy = self._file(url, ".tar")
        if not copy.exists():
            return False
        try:
            check_tar(url, head, copy, whole=True)
        except UserError:
            warn(f"the copy {copy} of shard {url} is damaged; it is fetched again")
            self._remove(copy)
            return False
        self._note_whole(copy)
        return True

    def head(self, url: str) -> IndexHead:
        """Return what the index of a shard says of it."""
        return self._from_index(url, read_head)

    def index(self, url: str) -> TarIndex:
        """Return the index of a shard."""
        return self._from_index(url, lambda tar, path: load_index(tar, path, check=False))

    def _from_index(self, url: str, read: Callable[[str, Path], T]) -> T:
        """Return what `read` makes of a shard's index, which is fetched again when its copy is damaged or old."""
        path = self.sidecar(url)
        try:
            return read(url, path)
        except UserError as error:
            warn(f"{str(error).partition(';')[0]}; it is fetched again")
            path.unlink(missing_ok=True)
        return read(url, self.sidecar(url))

    def sidecar(self, url: str) -> Path:
        """Return the path of a copy of a shard's index: the one beside it, or else one made from the shard itself."""
        path = self._file(url, ".idx")
        if path.exists():
            return path
        with self._lock(url, 0) as partial:
            if path.exists():
                return path
            if not is_command(url):
                with suppress(NotThereError):
                    self._fetch_index(url, path)
                    return path
            built = None if self.has(url) else self._fetch(url, partial, None)
            (build_index(self._file(url, ".tar")) if built is None else built).save(path)
        return path

    def _fetch_index(self, url: str, path: Path) -> None:
        """Copy the index beside a shard. Raises NotThereError when there is none, UserError for another version."""
        fetched = path.with_suffix(f".{os.getpid()}.fetched")
        try:
            for trial in range(TRIALS):
                fetched.unlink(missing_ok=True)
                self._download(f"{url}.idx", fetched)
                try:
                    load_index(url, fetched, check=False)
                except DamagedIndexError:
                    time.sleep(self.first_wait * 2**trial)
                except UserError as error:
                    raise UserError(_as_of(url, error, fetched, f"{url}.idx")) from None
                else:
                    fetched.replace(path)
                    return
            warn(f"what {url}.idx returns is not an index, {_start_of(fetched)}; it is made from the shard itself")
            raise NotThereError(f"{url}.idx is not an index")
        finally:
            fetched.unlink(missing_ok=True)

    def sidecars(self, urls: Iterable[str]) -> None:
        """Fetch the indexes of many shards, several at a time."""
        with ThreadPoolExecutor(SIDECARS_AT_ONCE) as pool:
            list(pool.map(self.sidecar, urls))

    def _download(self, url: str, target: Path, wanted: Callable[[], bool] | None = None) -> int:
        how = {"attempts": self.attempts, "first_wait": self.first_wait, "patience": self.patience, "trust": self.trust}
        return download(url, target, wanted=wanted, **how)  # type: ignore[arg-type]

    def _fetch(
        self, url: str, partial: Path, head: IndexHead | None, wanted: Callable[[], bool] | None = None
    ) -> TarIndex | None:
        """Fetch a shard; without a `head` to compare it with, it must be a tar, whose index is returned."""
        built = None
        if head is not None:
            self._make_room(head.tar_size)
        for trial in range(TRIALS):
            before = _size(partial)
            if head is None or before != head.tar_size:  # else it only has to be checked and renamed
                self.broken_off += self._download(url, partial, wanted)
            self.fetched += max(0, _size(partial) - before)
            try:
                if head is None:
                    built = build_index(partial)
                else:
                    check_tar(url, head, partial, whole=True)
                break
            except UserError as error:
                failure = f"{_as_of(url, error, partial, url)} (what came {_start_of(partial)})"
                partial.unlink()
                time.sleep(self.first_wait * 2**trial)
        else:
            # The server may have new shards with new indexes: the next start will compare with those.
            self._file(url, ".idx").unlink(missing_ok=True)
            raise UserError(f"{failure}; it was fetched {TRIALS} times, the next start will fetch its index again too")
        if head is None:
            self._make_room(0)
        copy = self._file(url, ".tar")
        partial.replace(copy)
        self._note_whole(copy)
        return built

    def _note_whole(self, copy: Path) -> None:
        copy.with_suffix(".ok").write_text(_state(copy))

    def _remove(self, copy: Path) -> None:
        copy.unlink(missing_ok=True)
        copy.with_suffix(".ok").unlink(missing_ok=True)

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
            whole = sorted((_used(path), path.name, _size(path)) for path in self.folder.glob("*.tar"))
            taken += sum(bytes_here for _, _, bytes_here in whole)
            for _, name, bytes_here in whole:
                if taken <= self.limit:
                    break
                self._remove(self.folder / name)
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


@cache
def _machine_start() -> str:
    """Return what changes whenever the machine starts anew; nothing where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _state(copy: Path) -> str:
    """Return what changes when a file does, or the machine starts anew."""
    stat = copy.stat()
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {_machine_start()}"


def _used(copy: Path) -> int:
    """Return when a copy was last used, in ns."""
    for path in (copy.with_suffix(".ok"), copy):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime_ns
    return 0


def _as_of(url: str, error: UserError, path: Path, name: str) -> str:
    """Return an error with the name of what was fetched to `path`, and a remedy that can be done where that is."""
    text = str(error).replace(str(path), name)
    return text.replace(f"python -m data index {url}", "python -m data index, on the machine that has the shards")


def _start_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"begins with {file.read(24)!r}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
