"""Files and folders that are whole under their name, or not there at all, and logs of which every line is whole.

What writes does so under another name beside the target and renames at the end: a reader, or the next run after a kill,
never meets half of a file. A log grows by lines, of which the last one counts once it ends in a newline.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""The end of the name that a file or folder has until it is whole."""


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file, in place of an older one; its folder is made where it is missing.

    Args:
        path: the file.
        content: text (written as UTF-8), bytes, or a function that writes the file whose path it is given.
        shared: several processes may write this file at the same time; each gets a temporary name of its own.

    Raises:
        OSError: the file cannot be written, or whatever `content` raises. The older file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random rather than the process's id: two containers on one file system often have the same one.
    unique = f".{secrets.randbelow(10**12)}" if shared else ""
    temporary = path.with_name(f".{path.name}{unique}{PARTIAL}")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        if callable(content):
            temporary.touch()
            mode = temporary.stat().st_mode
            content(temporary)
            share([temporary], mode)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, *writers: Callable[[Path], object], overwrite: bool = False) -> None:
    """Have each of `writers` write into a new folder, which then becomes `folder`.

    Args:
        folder: is not there yet, or empty.
        writers: each is given the temporary folder, `{folder}.partial`.
        overwrite: `folder` may hold files; it is removed once the new one is complete.

    Raises:
        OSError: the folder cannot be written, or whatever a writer raises. The older folder stays, the temporary one
            is removed, which also frees its space.
    """
    temporary = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        for write in writers:
            write(temporary)
        share(temporary.rglob("*.safetensors"), temporary.stat().st_mode)
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def share(files: Iterable[Path], mode: int) -> None:
    """Let whoever may read a file of `mode` read these too: safetensors 0.8 writes for its owner alone."""
    for file in files:
        with suppress(PermissionError):  # a file system without permissions
            file.chmod(mode & 0o666)


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a log without their newlines; none where there is no file, and no incomplete last line."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


class LineLog:
    """A log that one process appends to. A line that was cut off by a kill is removed before the first new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False

    def append(self, lines: Iterable[str]) -> None:
        """Write lines and hand them to the operating system, which keeps them if this process is killed.

        Raises OSError.
        """
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            self._begun = True
        with self.path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a model folder's weights and configuration files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".txt"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
