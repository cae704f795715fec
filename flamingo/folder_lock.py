"""One user of a folder at a time: a training run, a preparation or an evaluation, on any of the machines that see it.

Two things are held. `.lock` is locked in the kernel (flock), which lets go of it however the process ends. Some shared
file systems keep such locks on each machine alone, or know none; so `.lock.json` names the holder (host, process, start
time), and a thread of the holder writes a growing number into it. Whoever finds the record of another machine watches
that number for a while: one that grows belongs to a process that lives, one that stands still to one that is gone. No
two clocks are ever compared.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flamingo.errors import UserError
from flamingo.files import write_atomically

BEAT_SECONDS = 5.0
WATCH_SECONDS = 4 * BEAT_SECONDS
"""How long the record of another machine is watched before its holder counts as gone."""
WAIT_SECONDS = 3.0
"""How long a lock of this machine is waited for: a process that was just killed may still be on its way out."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
Record = dict[str, Any]


@contextmanager
def lock_folder(folder: Path, use: str, remedy: str, name: str = ".lock") -> Iterator[str]:
    """Hold a folder, which is made where it is missing; give a token that `holds` finds in it on every machine.

    Args:
        folder: to be held.
        use: what holds it, such as `a training run`: others are told so.
        remedy: ends the sentence of those who are refused.
        name: of the lock; two of different names do not know each other.

    Raises:
        UserError: somebody else holds it.
        OSError: the folder cannot be made or written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, record = FileLock(folder / name, fallback_to_soft=False), folder / f"{name}.json"
    is_native = True
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        raise _in_use(folder, _read(record), remedy) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        is_native = False
    beat = None
    try:
        earlier = _read(record)
        # With the kernel's lock in hand, a record of this very machine is of a process that was killed.
        if earlier and not (is_native and earlier.get("boot") == _boot()):
            _watch(folder, record, earlier, remedy)
        beat = _Heartbeat(folder, record, use, remedy)
        yield beat.token
    finally:
        if beat is not None:
            beat.close()
        if is_native:
            if beat is not None:
                with suppress(OSError):
                    Path(lock.lock_file).unlink()  # while it is held: whoever opened it meanwhile tries again
            lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written into it


def holds(folder: Path, token: str, name: str = ".lock") -> bool:
    """Return whether the holder with this token is seen in the folder from here."""
    record = _read(folder / f"{name}.json")
    return record is not None and record.get("token") == token


class _Heartbeat:
    """The holder's record, and the thread that keeps it fresh; a holder that finds another's record ends."""

    def __init__(self, folder: Path, record: Path, use: str, remedy: str) -> None:
        self.token = secrets.token_hex(8)
        self._folder, self._path, self._remedy = folder, record, remedy
        self._record: Record = {
            "use": use,
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": self.token,
            "beat": 0,
        }
        self._write()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="folder lock", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._record) + "\n", shared=True)

    def _run(self) -> None:
        # The first look comes early: two machines without common locks may have begun in the same second.
        wait = 1.0
        while not self._closed.wait(wait):
            wait = BEAT_SECONDS
            found = _read(self._path)
            if found and found.get("token") != self.token:
                print(f"error: {_in_use(self._folder, found, self._remedy)}", file=sys.stderr, flush=True)
                os._exit(2)
            self._record["beat"] += 1
            with suppress(OSError):  # a full or lost disk is reported by whoever writes what matters
                if self._folder.is_dir():
                    self._write()

    def close(self) -> None:
        """Remove the record, if it is still this holder's."""
        self._closed.set()
        self._thread.join()
        if holds(self._folder, self.token, self._path.name.removesuffix(".json")):
            with suppress(OSError):
                self._path.unlink()


def _watch(folder: Path, path: Path, earlier: Record, remedy: str) -> None:
    """Return once the holder of a record of another machine is gone.

    Raises:
        UserError: it lives.
    """
    print(
        f"{folder} was held by {_holder(earlier)}: looking for {WATCH_SECONDS:g} s whether it lives",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(BEAT_SECONDS / 5)
        found = _read(path)
        if found is None:
            return
        if found != earlier:
            raise _in_use(folder, found, remedy)


def _read(path: Path) -> Record | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # it is replaced as a whole, so what cannot be read is not a holder's
        return None
    return found if isinstance(found, dict) else None


def _holder(record: Record) -> str:
    who = f"{record.get('use')} on {record.get('host')} (pid {record.get('pid')}, since {record.get('started')})"
    return "".join(letter if letter.isprintable() else "?" for letter in who)


def _in_use(folder: Path, record: Record | None, remedy: str) -> UserError:
    return UserError(f"{folder} is in use by {_holder(record) if record else 'another process'}: {remedy}")


def _boot() -> str:
    """Return what tells machines apart whose containers have one name; it changes with every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
