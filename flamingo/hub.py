"""The model hub, where there is one: a name that needs the network is refused at once where there is none.

Without this, transformers and open_clip try again, silently, for up to a minute each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from flamingo.errors import UserError, first_line
from flamingo.gguf_files import from_gguf, gguf_file

LFS = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""


def from_hub(cls: Any, name: str, what: str, **options: Any) -> Any:
    """Return `cls.from_pretrained(name)` of a folder, a GGUF file or a name on the hub.

    Raises:
        UserError: the folder does not hold a `what`, or the name cannot be had, with or without a network.
    """
    if (packed := gguf_file(name)) is not None:
        return from_gguf(cls, packed, what, **options)
    local = Path(name).is_dir()
    online = not local and hub_reachable()
    options = {"trust_remote_code": False, **options}  # left out, transformers would ask on the terminal
    try:
        return cls.from_pretrained(name, local_files_only=not online, **options)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # damaged files raise exceptions of every kind
        if local:
            raise UserError(f"the folder {name} does not hold a usable {what}: {_why(error, Path(name))}") from error
        if not online and isinstance(error, OSError | ValueError):
            raise UserError(
                f"the {what} {name!r} is neither a local folder nor in the local cache, and the network is not "
                "reachable; give a folder or a built module"
            ) from error
        raise UserError(f"the {what} {name!r} cannot be loaded: {_why(error)}") from error


def loaded(load: Callable[..., Any], name: Any, what: str, file: str, options: dict[str, Any]) -> Any:
    """Return `load(name, **options)` of a folder that has `file`, of the local cache, or of the hub.

    `options` are transformers' (`subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, ...).

    Raises:
        UserError: there is no `what`, or its name needs a network that is not there.
    """
    if name is None:  # transformers: everything comes from the options
        return load(name, **options)
    options = {"trust_remote_code": False, **options}  # left out, transformers would ask on the terminal
    folder = Path(name) / (options.get("subfolder") or "")
    local = Path(name).exists()
    if local and not (folder / file).is_file() and options.get("config") is None:
        raise UserError(f"{folder} holds no Flamingo {what}: {file} is missing")
    if not local and (str(name).count("/") > 1 or str(name).startswith((".", "/", "~"))):
        raise UserError(f"{folder} holds no Flamingo {what}: there is no such folder, and it is not a name on the hub")
    online = not local and not options.get("local_files_only") and hub_reachable()
    if not local and not online:
        options = {**options, "local_files_only": True}
        if cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **_where(options)) is None:
            raise UserError(
                f"the name {name} holds no Flamingo {what} ({file} is missing): it is neither a local folder nor in "
                "the local cache, and the hub is not reachable or not meant"
            )
    try:
        return load(name, **options)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # damaged files raise exceptions of every kind
        if torch.get_default_device().type == "meta":  # where transformers loads nothing, and says so
            raise
        why = _why(error, folder if local else None)
        raise UserError(f"the {what} of {folder if local else name} cannot be loaded: {why}") from error


def _why(error: Exception, folder: Path | None = None) -> str:
    """Return why loading failed: a file that Git LFS has not fetched, pickled code, or the error's words."""
    for file in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            return f"{file} is a pointer of git-lfs and not the file; fetch it with git lfs pull"
    if "Weights only load failed" in str(error):
        return "its torch file holds more than tensors, which could run code, so it is not read"
    return first_line(error)


def _where(options: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
    given = {name: options[name] for name in names if options.get(name) is not None}
    return {**given, "_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}


def push_folder(saved: Any, repo_id: str, **options: Any) -> Any:
    """Upload what `saved.save_pretrained` writes, model card included; a card that the repository has already is kept.

    transformers' own `push_to_hub` puts an empty card over it. `options`: `commit_message`, `commit_description`,
    `private`, `token`, `revision`, `create_pr`, and what `save_pretrained` takes.
    """
    commit = {name: options.pop(name, None) for name in ("commit_message", "commit_description", "create_pr")}
    revision = options.pop("revision", None)
    api = HfApi(token=options.pop("token", None))
    repo_id = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder, **options)
        kept = ["README.md"] if api.file_exists(repo_id, "README.md", revision=revision) else None
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=kept, **commit)


def read_safetensors(file: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        UserError: it is truncated or not a safetensors file.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def hub_reachable(timeout: float = 3.0) -> bool:
    """Say whether the model hub answers at all; a proxy in the environment counts as yes, offline mode as no."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    endpoint = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=timeout):
            return True
    except OSError:
        return False
