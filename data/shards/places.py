"""Where shards are written: a folder on a disk, or behind a URL that fsspec writes to, such as s3://bucket/folder.

`place` makes a `pathlib.Path` of the one and a `RemotePath` of the other, which has the few of its methods that
writing shards takes. An object of a store appears when all of it has arrived, so nothing there is ever half written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flamingo.errors import UserError
from flamingo.files import write_atomically


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
    except OSError:
        raise
    except Exception as error:  # botocore's have no common base with OSError
        name, said = type(error).__name__, " ".join(str(error).split())
        if "Credential" in name or "Token" in name:
            raise UserError(f"{url}: {said}; give credentials as its command line tool takes them") from None
        if name in ("ParamValidationError", "NoRegionError", "InvalidRegionError"):
            raise UserError(f"{url}: {said}; correct the URL") from None
        raise OSError(f"{url}: {said or name}") from error


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        with store_errors(url):
            yield
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
    def parent(self) -> RemotePath:
        """The folder that this is in."""
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Return its neighbour."""
        return self.parent / name

    def exists(self) -> bool:
        """Return whether it is there."""
        with store_errors(self.url):
            return bool(file_system(self.url).exists(self.url))

    def stat(self) -> Any:
        """Return an object with `st_size`. Raises FileNotFoundError."""
        with store_errors(self.url):
            return SimpleNamespace(st_size=int(file_system(self.url).size(self.url)))

    def read_bytes(self) -> bytes:
        """Return a file. Raises FileNotFoundError."""
        with store_errors(self.url):
            return bytes(file_system(self.url).cat_file(self.url))

    def write_bytes(self, body: bytes) -> None:
        """Write a file."""
        with _writing(self.url):
            file_system(self.url).pipe_file(self.url, body)

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in a folder."""
        return (self / name for name in sorted(sizes_in(self)))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            with store_errors(self.url):
                file_system(self.url).rm_file(self.url)
        except FileNotFoundError:
            if not missing_ok:
                raise


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
        with store_errors(folder.url):
            listed = file_system(folder.url).ls(folder.url, detail=True)
        return {str(e["name"]).rpartition("/")[2]: int(e["size"]) for e in listed if e["type"] == "file"}
    except FileNotFoundError:
        return {}


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
    with _writing(target.url):
        file_system(target.url).put_file(str(file), target.url)


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
    with store_errors(source.url):
        file_system(source.url).get_file(source.url, str(target))


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
    with store_errors(folder.url):
        system = file_system(folder.url)
        if system.exists(folder.url):
            system.rm(folder.url, recursive=True)
