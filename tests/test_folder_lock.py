"""One user of a folder at a time: on this machine, on another one, after a kill, and in forked workers."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flamingo import folder_lock
from flamingo.errors import UserError
from flamingo.folder_lock import holds, lock_folder

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from flamingo.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "a training run", "wait"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder: Path, seconds: float = 120.0) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.25)


def test_a_second_user_is_told_who_and_a_killed_one_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        with pytest.raises(UserError) as caught, lock_folder(tmp_path, "an evaluation", "wait for its end"):
            pass
        for part in (str(tmp_path), "is in use by a training run on ", f"(pid {other.pid}, since 20", ": wait for"):
            assert part in str(caught.value)
    finally:
        other.kill()
        other.wait()
    with lock_folder(tmp_path, "an evaluation", "wait") as token:
        assert holds(tmp_path, token)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b", "a training run", "wait"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with lock_folder(tmp_path / "c", "a training run", "wait"):
        (tmp_path / "c" / "result").write_text("")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["result"]


def test_forked_workers_do_not_keep_it(tmp_path: Path) -> None:
    held = lock_folder(tmp_path, "a training run", "wait")
    held.__enter__()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    held.__exit__(None, None, None)
    try:
        with lock_folder(tmp_path, "a training run", "wait"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def elsewhere(folder: Path, **changed: Any) -> None:
    """The record of another machine, whose lock is not seen here."""
    record = {"use": "a training run", "host": "far", "boot": "another", "pid": 7, "started": "then", "token": "t"}
    (folder / ".lock.json").write_text(json.dumps({**record, "beat": 3, **changed}))


def test_another_machine_that_lives_keeps_it_and_one_that_is_gone_does_not(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    with lock_folder(tmp_path, "a training run", "wait") as token:
        assert holds(tmp_path, token)
    elsewhere(tmp_path)
    timer = threading.Timer(0.3, elsewhere, (tmp_path,), {"beat": 4})
    timer.start()
    with pytest.raises(UserError, match=r"in use by a training run on far \(pid 7, since then\)"):
        lock_folder(tmp_path, "a training run", "wait").__enter__()
    timer.join()


def test_a_file_system_without_locks_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(self: FileLock, timeout: float) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    other = hold(tmp_path)
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 20.0)  # the other one beats every 5 s
    try:
        with pytest.raises(UserError, match="in use by a training run"):
            lock_folder(tmp_path, "a training run", "wait").__enter__()
    finally:
        other.kill()
        other.wait()
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 1.0)
    with lock_folder(tmp_path, "a training run", "wait"):
        pass
    assert not (tmp_path / ".lock.json").exists()


def test_a_holder_whose_folder_was_taken_ends(tmp_path: Path) -> None:
    """Two machines without common locks that begin in the same second; or one that slept for an hour."""
    other = hold(tmp_path)
    elsewhere(tmp_path)
    assert other.wait(60) == 2
    assert json.loads((tmp_path / ".lock.json").read_text())["host"] == "far"


def test_names_do_not_know_each_other_and_records_are_shown_harmlessly(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "a", "wait", ".lock-a"), lock_folder(tmp_path, "b", "wait", ".lock-b"):
        assert {".lock-a", ".lock-b"} <= {path.name for path in tmp_path.iterdir()}
    elsewhere(tmp_path, host="\x1b[2Jfar")
    assert "\x1b" not in folder_lock._holder(json.loads((tmp_path / ".lock.json").read_text()))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x00"])
def test_a_record_that_is_none_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock.json").write_text(content)
    with lock_folder(tmp_path, "a training run", "wait") as token:
        assert holds(tmp_path, token)
