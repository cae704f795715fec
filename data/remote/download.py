"""Downloads shards: from any URL that webdataset opens, from http(s) with resuming, and from what fsspec knows (s3).
Commands (`pipe:`) are run, and redirects to other hosts followed, only where `Trust` says so.

    https://host/laion/{00000..00999}.tar    pipe:aws s3 cp s3://bucket/00000.tar -    s3://bucket/{00000..00099}.tar

An interrupted download resumes where it was (http, fsspec) and gives up only after several attempts *without any
progress*. A shard that the server does not have is an error at once.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError

from data.remote.redirects import urlopen
from data.shards.retry import ATTEMPTS, FIRST_WAIT
from flamingo.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
GONE = (400, 401, 403, 404, 405, 410)  # the next attempt would get the same answer


@dataclass(frozen=True)
class Trust:
    """What a list of shards, perhaps somebody else's, may make a download do beyond fetching from the servers named."""

    allow_pipe: bool = False
    """Whether `pipe:COMMAND` runs in a shell, with all that the user of this process may do."""
    redirect_hosts: tuple[str, ...] = ()
    """Hosts that a server may send a download on to."""


NAMED_ONLY = Trust()


def is_command(path: str) -> bool:
    """Return whether a shard is named by a shell command, however it is written."""
    return path.strip().lower().startswith("pipe:")


def refuse_command(path: str, owner: str = "") -> None:
    """Raise UserError: a command is not run unless it is allowed."""
    raise UserError(
        f"{owner}shard {path} is a shell command, which this program would run as you: read it, and if you trust it "
        "and whoever wrote the list, set data.allow_pipe=true (of one dataset: allow_pipe: true)"
    )


def is_remote(path: str) -> bool:
    """Return whether a shard is named by a URL (or a command, `pipe:`) rather than a path."""
    return path.startswith("pipe:") or ("://" in path and not path.startswith("file://"))


def expand(pattern: str) -> list[str]:
    """Expand braces and `::` as webdataset does: `{00..02}` is 00, 01, 02. Raises UserError for unbalanced braces."""
    from braceexpand import braceexpand

    try:
        parts = [pattern] if "[" in pattern else pattern.split("::")  # but not the colons of [::1]
        urls = [url for part in parts for url in (braceexpand(part) if "{" in part else [part])]
    except ValueError:
        raise UserError(f"shards {pattern}: the braces are not balanced") from None
    return [url.removeprefix("file://") for url in urls]


def download(
    url: str,
    target: Path,
    *,
    attempts: int = ATTEMPTS,
    first_wait: float = FIRST_WAIT,
    wanted: Callable[[], bool] | None = None,
    trust: Trust = NAMED_ONLY,
) -> int:
    """Write what a URL returns to a file, resuming after what the file already has; return how often it was
    interrupted.

    Raises UserError, naming the URL, when it does not exist, when `attempts` attempts in a row brought nothing new, and
    as soon as it is no longer `wanted`; and for what `trust` does not allow.
    """
    if is_command(url) and not trust.allow_pipe:
        refuse_command(url)
    failed = broken = 0
    begun = time.monotonic()
    while True:
        have = target.stat().st_size if target.exists() else 0
        try:
            with target.open("r+b" if have else "wb") as file:
                _copy(url, file, have, wanted, trust)
            return broken
        except HTTPError as error:
            error.close()
            if error.code in GONE:
                raise UserError(
                    f"shard {url} cannot be fetched: the server answers {error.code} {error.reason}; correct the URL"
                ) from None
            failure: Exception = error
        except FileNotFoundError as error:
            raise UserError(f"shard {url} does not exist ({error}); correct the URL") from None
        except (OSError, HTTPException) as error:
            failure = error
        broken += 1
        grown = (target.stat().st_size if target.exists() else 0) > have
        failed = 0 if grown and resumes(url) else failed + 1
        if failed >= attempts:
            raise UserError(
                f"shard {url} could not be fetched: {failed} attempts in a row over {time.monotonic() - begun:.1f} s "
                f"brought nothing, the last one: {failure}; start again when the server responds"
            ) from None
        time.sleep(first_wait * 2 ** max(0, failed - 1))


def resumes(url: str) -> bool:
    """Return whether a download of this URL can be resumed."""
    return not url.startswith("pipe:") and (url.startswith(("http://", "https://")) or not _webdataset_opens(url))


def _copy(url: str, file: BinaryIO, have: int, wanted: Callable[[], bool] | None, trust: Trust) -> None:
    with _opened(url, have, trust) as (stream, start, expected):
        file.seek(start)
        file.truncate()
        got = 0
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            got += len(chunk)
            if wanted is not None and got != expected and not wanted():
                raise UserError(f"shard {url} is no longer wanted")
    if expected is not None and got < expected:
        raise OSError(f"the connection closed after {got} of {expected} bytes")


@contextmanager
def _opened(url: str, have: int, trust: Trust) -> Iterator[tuple[BinaryIO, int, int | None]]:
    """Open a URL, from byte `have` on where that is possible: (stream, its first byte, how many bytes to expect)."""
    if url.startswith(("http://", "https://")):
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            answer = urlopen(request, trust.redirect_hosts, TIMEOUT)
        except HTTPError as error:
            if error.code != 416:  # the local file is longer than the remote one: start over
                raise
            error.close()
            answer = urlopen(urllib.request.Request(url), trust.redirect_hosts, TIMEOUT)
        with answer:
            length = answer.headers.get("Content-Length")
            yield answer, have if answer.status == 206 else 0, None if length is None else int(length)
    elif _webdataset_opens(url):
        import webdataset

        with webdataset.gopen(url) as stream:  # leaving raises IOError when a command failed
            yield stream, 0, None
    else:
        with _fsspec_opened(url) as stream:
            stream.seek(have)
            yield stream, have, None


def _webdataset_opens(url: str) -> bool:
    from webdataset.gopen import gopen_schemes

    return url.split(":", 1)[0] in gopen_schemes


def _fsspec_opened(url: str) -> BinaryIO:
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.open(url, "rb").open()
    except ImportError as error:
        scheme = url.split(":", 1)[0]
        raise UserError(
            f"shard {url}: {scheme}:// needs a package that is not installed ({error}); for s3 install the extra "
            "'flamingo-vlm[s3]', or name the shards as pipe:COMMAND"
        ) from None
    except ValueError as error:
        raise UserError(f"shard {url} cannot be opened: {error}") from None


def free_bytes(folder: Path) -> int:
    """Return the free bytes on a folder's disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
