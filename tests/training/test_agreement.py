"""Processes that have other files, that wait long for each other, that hang: real ones, which meet over loopback."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.shards.document import Document, Text
from data.shards.writer import ShardWriter
from flamingo.training.config import TrainConfig
from tests.forks import Fork
from tests.training.commands import begin_two, given, lines
from tests.training.world import config, swap_words, write_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 240


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def two(settings: TrainConfig, folder: Path, nodes: list[Path], code: str = "") -> list[Fork]:
    """Start both processes, each in the folder of its node; `code` runs first, with `rank` set."""
    program = "import os, time, signal, train\nrank = int(os.environ['RANK'])\n"
    program += code + "\ntrain.compose.main(train.train, check=lambda config: train.checked(config)[1])\n"
    programs = [f"import os; os.chdir({str(node)!r})\n{program}" for node in nodes]
    return begin_two(programs, given(settings, folder), folder)


def said(folder: Path) -> str:
    return "".join((folder / f"log-{rank}").read_text() for rank in range(2))


def other_documents(node: Path) -> None:
    shutil.rmtree(node / "pages")
    with ShardWriter(node / "pages", "pages", 12) as writer:
        for _ in range(48):
            writer.write(Document("", [Text("a big red square")], []))


def other_tokenizer(node: Path) -> None:
    swap_words(node / "tokenizer")


def nothing(node: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        (other_documents, "", "dataset 'pages'"),
        (other_tokenizer, "", "tokenizer"),
        (
            nothing,
            "plain = train.torch.manual_seed\ntrain.torch.manual_seed = lambda seed: plain(seed + rank)",
            "weights",
        ),
        (nothing, "import flamingo.training.distributed.agreement as a\nif rank: a.CODE = ('data',)", "the code of"),
    ],
)
def test_who_differs_is_named(
    world: Path, tmp_path: Path, change: Callable[[Path], None], code: str, what: str
) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(world, node)
    change(nodes[1])
    processes = two(config(Path(), tmp_path / "run", "flamingo", steps=4), tmp_path, nodes, code)
    assert [process.wait(PATIENCE) for process in processes] == [2, 2], said(tmp_path)
    assert "process 1 (host " in said(tmp_path)
    (sentence,) = {
        line.split(" (process ")[0] for line in said(tmp_path).splitlines() if "differs from process 0" in line
    }
    assert what in sentence
    assert "Traceback" not in said(tmp_path)
    assert lines(tmp_path / "run") == []


def test_a_run_folder_that_only_one_machine_has_is_refused(world: Path, tmp_path: Path) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    code = "import flamingo.training.run_folder as r\nr.SHARED_SECONDS = 1.0"
    processes = two(config(world, Path("run"), "flamingo", steps=4), tmp_path, nodes, code)
    statuses = [process.wait(PATIENCE) for process in processes]
    assert 0 not in statuses
    assert "differs from process 0 (host " in said(tmp_path)
    assert " in run.dir=run (which all machines must share): give all" in said(tmp_path)


SHORT = "import flamingo.training.distributed.fsdp as f\nf.start_processes.__kwdefaults__['timeout_minutes'] = 0.15\n"


def test_a_model_that_takes_long_to_write_is_waited_for(world: Path, tmp_path: Path) -> None:
    """Collectives give up after 9 s here, and the model takes 20."""
    code = SHORT + (
        "import flamingo.training.run_folder as r\nplain = r.export\n"
        "def slow(*given):\n    time.sleep(20)\n    plain(*given)\nr.export = slow"
    )
    settings = config(world, tmp_path / "run", "flamingo", steps=2)
    settings.data.storage_minutes = 0.0
    processes = two(settings, tmp_path, [tmp_path, tmp_path], code)
    assert [process.wait(PATIENCE) for process in processes] == [0, 0], said(tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_tokenizer_that_takes_long_to_train_is_waited_for(world: Path, tmp_path: Path) -> None:
    code = SHORT + (
        "import flamingo.training.objectives.build as b\nplain = b.train_tokenizer\n"
        "def slow(*given):\n    time.sleep(20)\n    return plain(*given)\nb.train_tokenizer = slow"
    )
    settings = config(world, tmp_path / "run", "language", steps=2)
    settings.model.language.tokenizer, settings.model.language.vocab_size = None, 300
    settings.data.storage_minutes = 0.0
    processes = two(settings, tmp_path, [tmp_path, tmp_path], code)
    assert [process.wait(PATIENCE) for process in processes] == [0, 0], said(tmp_path)


def test_a_slow_loader_ends_with_its_own_sentence(world: Path, tmp_path: Path) -> None:
    code = SHORT + (
        "import data.shards.reader as d\nplain, calls = d.ShardReader._once, iter(range(10**6))\n"
        "def slow(*given):\n    if rank and next(calls) == 25: time.sleep(60)\n    return plain(*given)\n"
        "d.ShardReader._once = slow"
    )
    settings = config(world, tmp_path / "run", "flamingo", steps=20)
    settings.data.storage_minutes = 0.01
    processes = two(settings, tmp_path, [tmp_path, tmp_path], code)
    statuses = [process.wait(PATIENCE) for process in processes]
    assert 0 not in statuses
    assert "error: no batch for " in (tmp_path / "log-1").read_text()
    assert "no batch for " in (tmp_path / "log-0").read_text()


def test_sigterm_ends_a_process_that_waits_for_one_that_hangs(world: Path, tmp_path: Path) -> None:
    settings: Any = config(world, tmp_path / "run", "flamingo", steps=100000, checkpoint_every=1000)
    settings.run.checkpoint.grace_seconds = 4.0
    processes = two(settings, tmp_path, [tmp_path, tmp_path])
    try:
        deadline = time.monotonic() + PATIENCE
        while len(lines(tmp_path / "run")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(processes[0].pid, signal.SIGTERM)
        assert processes[0].wait(60) == 128 + signal.SIGTERM, said(tmp_path)
        assert "did not finish within 4 s of SIGTERM" in said(tmp_path)
    finally:
        for process in processes:
            process.kill()
            process.wait()
