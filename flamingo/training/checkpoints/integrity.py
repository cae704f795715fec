"""Checkpoint files that are what was written: checksums on the way out, compared before anything is loaded.

`checksums.json` names every file of a checkpoint with its length and the XXH3 of its bytes, taken while they are
written. It is there before `.metadata`, DCP's marker of completeness, and has that file's own checksum too. The marker
is a pickle: it is compared first, and then read by an unpickler that knows the classes of DCP's metadata and nothing
else, so a folder from elsewhere runs no code.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flamingo.errors import UserError
from flamingo.files import write_atomically

T = TypeVar("T")
MARKER = ".metadata"
CHECKSUMS = "checksums.json"
VERSION = 1
READ_BYTES = 1 << 22
WAITS = (0.5, 1.0, 2.0)
"""Seconds before a failed read is repeated."""
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 writes it
}


class _HashedFile(io.BufferedWriter):
    """A file that knows the checksum of what was written into it, from its start to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.size, self._hash = 0, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        """Write bytes, and hash them."""
        self._hash.update(data)
        written = super().write(data)
        self.size += written
        return written

    def checksum(self) -> list[Any]:
        """Return the length in bytes and the hash."""
        return [self.size, self._hash.hexdigest()]


class _HashedFiles(FileSystem):
    """DCP's files, each hashed; the checksums of all processes are written before the marker appears."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; one that is written is hashed."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashedFile(Path(path)) as file:
            yield file
        self.sums[Path(path).name] = file.checksum()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give the marker its name; then the checkpoint is complete, and that is written down beside the folder."""
        folder = Path(new_path).parent
        self.sums[MARKER] = self.sums.pop(Path(path).name)
        text = json.dumps({"v": VERSION, "files": self.sums}, indent=0)
        write_atomically(folder / CHECKSUMS, lambda temporary: _write_synced(temporary, text))
        super().rename(path, new_path)
        with suppress(OSError):  # it is complete, whether or not that can be written down
            write_atomically(record_of(folder.parent), json.dumps({"newest": folder.name}) + "\n")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def record_of(root: Path) -> Path:
    """Return the file beside the folder of all checkpoints that names the newest one that was complete."""
    return root.with_name(f"{root.name}.json")


class Writer(FileSystemWriter):
    """DCP's writer, with checksums. Those of the other processes travel with what they report to the first one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files = self.fs = _HashedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's files; report their checksums behind the rest."""
        results = super().write_data(plan, planner).wait()
        sums = [
            WriteResult(MetadataIndex(name), size, {CHECKSUMS: digest})
            for name, (size, digest) in self._files.sums.items()
        ]
        both: Future[list[WriteResult]] = Future()
        both.set_result([*results, *sums])
        return both

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the checksums of all processes, and the marker."""
        kept: list[list[WriteResult]] = []
        for of_process in results:
            kept.append([])
            for result in of_process:
                if isinstance(result.storage_data, dict):
                    self._files.sums[result.index.fqn] = [result.size_in_bytes, result.storage_data[CHECKSUMS]]
                else:
                    kept[-1].append(result)
        super().finish(metadata, kept)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's metadata and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the classes that metadata is made of."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a checkpoint's metadata")


def unpickle_metadata(raw: bytes) -> Metadata:
    """Return DCP's metadata from its bytes.

    Raises:
        ValueError: they are something else.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO(raw)).load()
    except Exception as error:  # damaged pickles end in nearly any exception
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error
    if not isinstance(found, Metadata):
        raise ValueError(f"a {type(found).__name__} is no metadata")
    return found


class Reader(FileSystemReader):
    """DCP's reader, which runs no code from the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata.

        Raises:
            UserError: it cannot be read, or is something else.
        """
        path = Path(self.path) / MARKER
        try:
            metadata = unpickle_metadata(read_patiently(path.read_bytes, path))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"checkpoint metadata {path} cannot be read ({error}): use another checkpoint") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        cast(StorageMeta, metadata.storage_meta).load_id = self.load_id
        return metadata


def read_patiently(read: Callable[[], T], what: Path) -> T:
    """Return `read()`, repeated when it fails for a reason that may pass.

    Raises:
        FileNotFoundError: and its like: nothing is there.
        UserError: it keeps failing. That says nothing of what is stored, so nothing is decided on it.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if error.errno in GONE:
                raise
            if wait is None or isinstance(error, PermissionError):
                raise UserError(
                    f"{what} cannot be read ({error}), which may pass and is not taken for damage: repair the storage "
                    "and give the same command again; nothing was changed"
                ) from error
            time.sleep(wait)
    raise AssertionError


def damage(folder: Path, *, rank: int = 0, size: int = 1, contents: bool = True) -> str:
    """Return what is wrong with a complete checkpoint, or nothing.

    Args:
        folder: of the checkpoint.
        rank: of this process among `size`, which share the reading: each hashes its part of the files.
        size: number of processes.
        contents: also read every byte; otherwise lengths alone are compared.

    Raises:
        UserError: a file cannot be read for a reason that may pass.
    """
    try:
        files = _read_checksums(folder)
        for name, (length, _) in files.items():
            file = folder / name
            found = read_patiently(file.stat, file).st_size
            if found != length:
                return f"{file} has {found} of {length} bytes"
        for name in sorted(files)[rank::size] if contents else ():
            file = folder / name
            if read_patiently(lambda file=file: _hash(file), file) != files[name][1]:  # type: ignore[misc]
                return f"{file} has other bytes than were written"
        if contents and rank == 0:
            _check_places(unpickle_metadata((folder / MARKER).read_bytes()), files)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (NotADirectoryError, IsADirectoryError) as error:
        return f"{error.filename} is not a file"
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        return f"{folder / MARKER} is not a checkpoint's ({error})"
    return ""


def _read_checksums(folder: Path) -> dict[str, list[Any]]:
    path = folder / CHECKSUMS
    described = json.loads(read_patiently(path.read_bytes, path))
    if not isinstance(described, dict) or described.get("v") != VERSION:
        raise ValueError(f"{CHECKSUMS} is not of version {VERSION}")
    files = described.get("files")
    if not isinstance(files, dict) or MARKER not in files or any("/" in name or name == ".." for name in files):
        raise ValueError(f"{CHECKSUMS} does not list the files of a checkpoint")
    for entry in files.values():
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str]):
            raise ValueError(f"{CHECKSUMS} does not give lengths and checksums")
    return files


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_places(metadata: Metadata, files: dict[str, list[Any]]) -> None:
    """Raise ValueError where the metadata points outside the files that were checked."""
    for part in (metadata.storage_data or {}).values():
        name, end = getattr(part, "relative_path", None), getattr(part, "offset", 0) + getattr(part, "length", 0)
        if name not in files or end > files[name][0]:
            raise ValueError(f"it points to byte {end} of {name!r}")
