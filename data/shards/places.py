"""Where files are read and shards written: a folder on a disk, or a URL of fsspec's, such as s3://bucket/folder.

`place` makes a `pathlib.Path` of the one and a `RemotePath` of the other, which has the few of its methods that
preparing takes. An object of a store appears when all of it has arrived, so nothing there is ever half written. A store
that does not answer, or is busy, is asked again for `PATIENCE` seconds.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar

from data.errors import StorageError
from data.shards.retry import FIRST_WAIT, PATIENCE, Backoff
from flamingo.errors import UserError
from flamingo.files import write_atomically

T = TypeVar("T")
AHEAD = 4 << 20  # bytes that are asked for at once of a file that is read piece by piece


class _AwayError(OSError):
    """A store that does not answer or is busy: another attempt may end otherwise."""


def is_store(name: str | Path) -> bool:
    """Return whether a name is a URL of a store that has folders: not a path, nor http, nor a command."""
    scheme, found, _ = str(name).partition("://")
    return bool(found) and scheme.isalnum() and scheme not in ("http", "https", "file")


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn what the clients of stores raise into OSError, or UserError where another attempt would end the same way."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, UserError):
        raise
    except PermissionError as error:
        raise UserError(
            f"{url} is refused ({error or 'permission denied'}); check the credentials and the URL"
        ) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no object can have this name
            raise FileNotFoundError(f"{url}: {error}") from None
        answer = getattr(error.__cause__, "response", None) or {}
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if isinstance(error, ConnectionError | TimeoutError) or status in (408, 429) or status >= 500:
            raise _AwayError(str(error) or type(error).__name__) from error
        if status >= 400:
            raise UserError(f"{url} is refused ({error}); correct the URL") from None
        raise
    except Exception as error:  # botocore's have no common base with OSError
        name, said = type(error).__name__, " ".join(str(error).split())
        if "Credential" in name or "Token" in name or name in ("ProfileNotFound", "PartialCredentialsError"):
            raise UserError(f"{url}: {said}; give credentials as its command line tool takes them") from None
        if isinstance(error, ValueError) or name in ("ParamValidationError", "NoRegionError", "InvalidRegionError"):
            raise UserError(f"{url}: {said}; correct the URL") from None
        raise _AwayError(f"{url}: {said or name}") from error


def ask(url: str, question: Callable[[Any], T]) -> T:
    """Return what `question` makes of the file system of a URL; it is asked again while the store is away.

    Raises:
        FileNotFoundError: there is no such file or bucket.
        StorageError: the store was away for `PATIENCE` seconds.
        UserError: the store refuses; another attempt would end the same way.
    """
    system, backoff = file_system(url), Backoff(url, PATIENCE, None, FIRST_WAIT)
    while True:
        try:
            with store_errors(url):
                return question(system)
        except _AwayError as error:
            if not backoff.wait(error):
                raise StorageError(
                    f"{url} could not be reached in {backoff.spent()}: {error}; run the same command again when the "
                    "store answers"
                ) from None


def _write(url: str, question: Callable[[Any], object]) -> None:
    try:
        ask(url, question)
    except FileNotFoundError as error:
        raise UserError(f"cannot write {url}: {error}; create the bucket, or correct the URL") from None


def file_system(url: str) -> Any:
    """Return the fsspec file system of a URL. Raises UserError when its package is missing or nobody knows it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.filesystem(scheme, use_listings_cache=False)  # others write there too
    except ImportError as error:
        raise UserError(
            f"{url}: {scheme}:// needs a package that is not installed ({error}); for s3 install the extra "
            "'flamingo-vlm[s3]'"
        ) from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder of a store, with methods as those of `pathlib.Path`. A folder is there when it holds a file."""

    url: str
    size: int | None = field(default=None, compare=False)
    """Of a file in bytes, where a listing has told it."""

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the last part, from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that this is in."""
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Return its neighbour."""
        return self.parent / name

    def _kind(self) -> str:
        try:
            return str(ask(self.url, lambda system: system.info(self.url))["type"])
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        """Return whether it is there."""
        return bool(self._kind())

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return self._kind() == "directory"

    def stat(self) -> Any:
        """Return an object with `st_size`. Raises FileNotFoundError."""
        size = self.size if self.size is not None else ask(self.url, lambda system: system.size(self.url))
        return SimpleNamespace(st_size=int(size))

    def read_bytes(self, begin: int | None = None, end: int | None = None) -> bytes:
        """Return a file, or bytes [begin, end) of it. Raises FileNotFoundError."""
        return bytes(ask(self.url, lambda system: system.cat_file(self.url, start=begin, end=end)))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open a file for reading bytes, of which a few MB are asked for at once. Raises FileNotFoundError."""
        return io.BufferedReader(_Ranges(self), AHEAD)

    def write_bytes(self, body: bytes) -> None:
        """Write a file."""
        _write(self.url, lambda system: system.pipe_file(self.url, body))

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in a folder."""
        return (self / name for name in sorted(sizes_in(self)))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            ask(self.url, lambda system: system.rm_file(self.url))
        except FileNotFoundError:
            if not missing_ok:
                raise


class _Ranges(io.RawIOBase):
    """The bytes of a file of a store, each piece asked for by itself, so that a broken connection costs one piece."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.at, self.size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        if (end := min(self.at + len(buffer), self.size)) <= self.at:
            return 0
        body = self.path.read_bytes(self.at, end)
        if len(body) != end - self.at:
            raise UserError(f"{self.path} became shorter while it was read; start again when it is complete")
        buffer[: len(body)] = body
        self.at = end
        return len(body)


Place = Path | RemotePath


def place(name: str | Path | RemotePath) -> Place:
    """Return where a name points to."""
    return RemotePath(str(name).rstrip("/")) if is_store(str(name)) else Path(name)


def sizes_in(folder: Place) -> dict[str, int]:
    """Return the name and the bytes of every file in a folder, from one listing. Empty when it is not there."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        listed = ask(folder.url, lambda system: system.ls(folder.url, detail=True))
        return {str(e["name"]).rpartition("/")[2]: int(e["size"]) for e in listed if e["type"] == "file"}
    except FileNotFoundError:
        return {}


def files_below(folder: Place) -> dict[str, int]:
    """Return the name below a folder and the bytes of every file in it and in its folders. Empty when it is none."""
    if isinstance(folder, Path):
        inside = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
        return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in inside}
    root = f"{folder}/"
    return {path.url.removeprefix(root): path.stat().st_size for path in matches(root) if path.url.startswith(root)}


def matches(pattern: str) -> list[RemotePath]:
    """Return the files of a store that a pattern with `*`, `?` or `[` stands for; of a folder ("/" at its end) all."""
    search = "find" if pattern.endswith("/") else "glob"
    try:
        listed = ask(pattern, lambda system: getattr(system, search)(pattern, detail=True))
    except FileNotFoundError:
        return []
    scheme = pattern.partition("://")[0]
    paths = {
        f"{scheme}://{name.lstrip('/')}": int(info["size"]) for name, info in listed.items() if info["type"] == "file"
    }
    return [RemotePath(url, size) for url, size in sorted(paths.items()) if not url.endswith("/")]


def put(target: Place, body: bytes) -> None:
    """Write a file; it appears under its name when it is complete. Several processes may write the same one."""
    if isinstance(target, Path):
        write_atomically(target, body, shared=True)
    else:
        target.write_bytes(body)


def send(file: Path, target: Place) -> None:
    """Copy a complete file to its place. Raises OSError."""
    if isinstance(target, Path):
        write_atomically(target, lambda temporary: shutil.copyfile(file, temporary), shared=True)
        return
    _write(target.url, lambda system: system.put_file(str(file), target.url))


def move(file: Path, target: Place) -> None:
    """Put a complete file in its place; it is gone from where it was. Raises OSError."""
    if isinstance(target, Path):
        file.replace(target)
        return
    send(file, target)
    file.unlink()


def fetch(source: Place, target: Path) -> None:
    """Copy a file to the disk. Raises FileNotFoundError, OSError."""
    if isinstance(source, Path):
        shutil.copyfile(source, target)
        return
    ask(source.url, lambda system: system.get_file(source.url, str(target)))


@contextmanager
def fetched(source: Place) -> Iterator[Path]:
    """Yield a file on the disk under its own name: itself, or a copy that is removed afterwards."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="flamingo-") as folder:
        fetch(source, copy := Path(folder) / source.name)
        yield copy


def remove_folder(folder: Place) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    if folder.exists():
        ask(folder.url, lambda system: system.rm(folder.url, recursive=True))
