"""A shard that is looked at once, as `inspect`, `verify` and `index` do: a remote one is copied for that long."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.remote.download import download, is_remote
from data.shards.index import index_path
from flamingo.errors import UserError


@contextmanager
def shard_copy(shard: str) -> Iterator[Path]:
    """Yield a shard on the disk: itself, or a copy of it and of its index, where it has one, which is then removed.

    Raises UserError as `download`.
    """
    if not is_remote(shard):
        yield Path(shard)
        return
    with tempfile.TemporaryDirectory(prefix="flamingo-") as folder:
        copy = Path(folder) / "shard.tar"
        download(shard, copy)
        if not shard.startswith("pipe:"):
            with contextlib.suppress(UserError):
                download(f"{shard}.idx", index_path(copy))
        try:
            yield copy
        except UserError as error:
            if str(copy) not in str(error):
                raise
            raise UserError(str(error).replace(str(copy), shard)) from None
