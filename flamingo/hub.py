"""The model hub, where there is one: a name that needs the network is refused at once where there is none.

Without this, transformers and open_clip try again, silently, for up to a minute each.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo.errors import UserError, first_line


def from_hub(cls: Any, name: str, what: str, **options: Any) -> Any:
    """Return `cls.from_pretrained(name)` of a folder or a name on the hub.

    Raises:
        UserError: the folder does not hold a `what`, or the name cannot be had, with or without a network.
    """
    local = Path(name).is_dir()
    online = not local and hub_reachable()
    try:
        return cls.from_pretrained(name, local_files_only=not online, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if local:
            raise UserError(f"the folder {name} does not hold a usable {what}: {first_line(error)}") from error
        if not online:
            raise UserError(
                f"the {what} {name!r} is neither a local folder nor in the local cache, and the network is not "
                "reachable; give a folder or a built module"
            ) from error
        raise UserError(f"the {what} {name!r} cannot be loaded: {first_line(error)}") from error


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
