"""A folder of what was computed of images, which processes and runs share.

An image is one file, under the key of what computed it and a hash of its own. It is written next to its final path and
then renamed: processes need no locks, and a file that a killed process left incomplete is never read. It carries a
checksum of its tensors; one that is damaged is as good as none, and written anew. When the folder is full, the least
recently used files are removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flamingo.errors import UserError
from flamingo.files import write_atomically

SUFFIX = ".safetensors"
CHECKSUM = "xxh3_128"


class ImageStore:
    """A folder of files `key/ab/abcdef....safetensors`, which use at most `limit` bytes together."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self._root = folder
        self._folder = folder / key[:32]
        self._limit = limit
        self._used: set[Path] = set()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise UserError(f"cache={folder} cannot be used: {error}; give a writable folder, or null") from None

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / f"{sha256}{SUFFIX}"

    def _files(self) -> list[tuple[float, int, Path]]:
        files = []
        for path in self._root.rglob(f"*{SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        return files

    def read(self, sha256: str) -> dict[str, Tensor] | None:
        """Return what was stored for an image; None if there is nothing, or not what was written."""
        path = self._path(sha256)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                if (file.metadata() or {}).get(CHECKSUM) != _checksum(tensors):
                    return None
            if path not in self._used:
                os.utime(path)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError):  # a header may say anything
            return None
        self._used.add(path)
        return tensors

    def write(self, sha256: str, tensors: dict[str, Tensor]) -> bool:
        """Store an image, unless the files that this run uses fill the folder; return whether it is stored."""
        path = self._path(sha256)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._bytes + size > self._limit and not self._make_room(size):
            return False
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            metadata = {CHECKSUM: _checksum(copies)}
            write_atomically(path, lambda temporary: save_file(copies, temporary, metadata), shared=True)
        except OSError as error:
            raise UserError(
                f"cache={self._root} cannot be written: {error}; free some space, or give another folder"
            ) from None
        self._used.add(path)
        self._bytes += path.stat().st_size
        return True

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used files until a tenth is free, but none that this run uses."""
        files = sorted(self._files())
        self._bytes = sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, path in files:
            if self._bytes + size <= 0.9 * self._limit:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                self._bytes -= bytes_
        return self._bytes + size <= self._limit


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of tensors: names, types, shapes and values."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """Return a hash over names, types, shapes and values of a module's parameters and buffers."""
    return _checksum(module.state_dict())
