"""Downloads shards: from any URL that webdataset opens, from http(s) with resuming, and from what fsspec knows (s3).
Commands (`pipe:`) are run, and redirects to other hosts followed, only where `Trust` says so.

    https://host/laion/{00000..00999}.tar    pipe:aws s3 cp s3://bucket/00000.tar -    s3://bucket/{00000..00099}.tar

An interrupted download resumes where it was (http, fsspec) and gives up only after a time *without any progress*; a
server that asks to be left alone for a while (Retry-After) is. One that only drips counts as one that gives nothing. A
shard that the server does not have is an error at once.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError

from data.errors import StorageError
from data.shards.places import file_system, store_errors
from data.shards.retry import FIRST_WAIT, PATIENCE, Backoff
from flamingo.errors import UserError
from flamingo.redirects import urlopen

TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 10_000  # bytes a second, over that time
CHUNK = 1 << 20
GONE = (400, 401, 403, 404, 405, 410)  # the next attempt would get the same answer


class NotThereError(UserError):
    """What a URL names does not exist, or is not for us."""


class _TooSlow(OSError):  # noqa: N818 (counts as a failed attempt, whatever it brought)
    pass


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
    attempts: int | None = None,
    first_wait: float = FIRST_WAIT,
    patience: float = PATIENCE,
    wanted: Callable[[], bool] | None = None,
    trust: Trust = NAMED_ONLY,
) -> int:
    """Write what a URL returns to a file, resuming after what the file already has; return how often it was
    interrupted.

    Raises NotThereError, naming the URL, when it does not exist; StorageError when nothing new came for `patience`
    seconds, or in `attempts` attempts in a row; UserError as soon as it is no longer `wanted`, and for what `trust`
    does not allow.
    """
    if is_command(url) and not trust.allow_pipe:
        refuse_command(url)
    broken = 0
    backoff = Backoff(f"shard {url}", patience, attempts, first_wait)
    while True:
        have = target.stat().st_size if target.exists() else 0
        pause = 0.0
        try:
            with target.open("r+b" if have else "wb") as file:
                _copy(url, file, have, wanted, trust)
            return broken
        except HTTPError as error:
            error.close()
            if error.code in GONE:
                raise NotThereError(
                    f"shard {url} cannot be fetched: the server answers {error.code} {error.reason}; correct the URL"
                ) from None
            failure: Exception = error
            pause = _asked_to_wait(error)
        except (FileNotFoundError, PermissionError) as error:
            what = "does not exist" if isinstance(error, FileNotFoundError) else "may not be read"
            raise NotThereError(f"shard {url} {what} ({error}); correct the URL") from None
        except (OSError, HTTPException) as error:
            failure = error
        broken += 1
        grown = (target.stat().st_size if target.exists() else 0) > have
        if grown and resumes(url) and not isinstance(failure, _TooSlow):
            backoff.restart()
            time.sleep(first_wait)
        elif not backoff.wait(failure, pause):
            raise StorageError(
                f"shard {url} could not be fetched: {backoff.spent().replace('attempts', 'attempts in a row')} "
                f"brought nothing, the last one: {failure}; start again when the server responds"
            ) from None


def _asked_to_wait(error: HTTPError) -> float:
    """Return the seconds for which an answer asks to be left alone: Retry-After, a number or a date."""
    value = error.headers.get("Retry-After", "0") if error.headers else "0"
    try:
        return float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def resumes(url: str) -> bool:
    """Return whether a download of this URL can be resumed."""
    return not url.startswith("pipe:") and (url.startswith(("http://", "https://")) or not _webdataset_opens(url))


def _copy(url: str, file: BinaryIO, have: int, wanted: Callable[[], bool] | None, trust: Trust) -> None:
    with _opened(url, have, trust) as (stream, start, expected):
        file.seek(start)
        file.truncate()
        got = recent = 0
        since = time.monotonic()
        while chunk := _chunk(stream):
            file.write(chunk)
            got += len(chunk)
            recent += len(chunk)
            if (seconds := time.monotonic() - since) >= TIMEOUT:
                if recent < SLOWEST * seconds:
                    raise _TooSlow(f"it only drips: {recent} bytes in {seconds:.0f} s")
                recent, since = 0, time.monotonic()
            if wanted is not None and got != expected and not wanted():
                raise UserError(f"shard {url} is no longer wanted")
    if expected is not None and got < expected:
        raise OSError(f"the connection closed after {got} of {expected} bytes")


def _chunk(stream: BinaryIO) -> bytes:
    """Return about CHUNK bytes of a stream, or what came within a second; nothing at its end."""
    some = getattr(stream, "read1", None)
    if some is None:
        return stream.read(CHUNK)
    parts, left, begun = [], CHUNK, time.monotonic()
    while left > 0 and time.monotonic() - begun < 1 and (part := some(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


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
        with store_errors(url), file_system(url).open(url, "rb") as stream:
            stream.seek(have)
            yield stream, have, None


def _webdataset_opens(url: str) -> bool:
    from webdataset.gopen import gopen_schemes

    return url.split(":", 1)[0] in gopen_schemes


def free_bytes(folder: Path) -> int:
    """Return the free bytes on a folder's disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
