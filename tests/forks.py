"""Processes that are forks of the server of conftest.py, which has imported once what a new one imports for 5 s."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context, set_start_method
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any


class Fork:
    """A process in a session of its own that calls a function; what it says goes to the end of `log`, where given."""

    def __init__(
        self, target: Callable[..., object], *arguments: Any, log: Path | None = None, errors: Path | None = None
    ) -> None:
        given = (target, arguments, log, errors or log, dict(os.environ))
        self.process = get_context("forkserver").Process(target=_run, args=given)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it runs on after {seconds} s"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """As `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)`, for a command of Python."""
    assert command[0] == sys.executable
    with TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        status = Fork(
            run_python, command[1:], cwd, dict(os.environ if env is None else env), log=out, errors=err
        ).wait()
        return CompletedProcess(command, status, out.read_text(), err.read_text())


def run_python(words: list[str], cwd: Path, environment: Mapping[str, str]) -> None:
    """As `python words`, a program after -c, a module after -m or a script, in a folder and with an environment."""
    os.chdir(cwd)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _run(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    log: Path | None,
    errors: Path | None,
    environment: dict[str, str],
) -> None:
    os.setsid()
    for number, path in ((1, log), (2, errors)):
        if path is not None:
            with path.open("ab") as file:
                os.dup2(file.fileno(), number)
    set_start_method(None, force=True)  # its own processes begin as those of any
    os.environ.update(environment)  # the server has that of its start
    target(*arguments)
