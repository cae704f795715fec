"""Runs over several stages: as by hand, killed between and inside stages, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flamingo.errors import UserError
from flamingo.files import folder_hash
from flamingo.training.config import TrainConfig
from flamingo.training.stages import problems, stages_of
from tests.training.commands import ROOT, begin, given, lines, losses, torchrun
from tests.training.world import config, write_world
from train import train

PATIENCE = 280
pytestmark = pytest.mark.timeout(900)
Stages = Mapping[str, dict[str, Any] | None]
STAGES: dict[str, dict[str, Any]] = {
    "align": {"run": {"steps": 3}},
    "tune": {"model": {"freeze": {"language": "train"}}, "optim": {"lr": 1e-3}, "run": {"steps": 4}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def staged(world: Path, run_dir: Path, stages: Stages = STAGES, **run: Any) -> TrainConfig:
    settings = config(world, run_dir, "flamingo", **run)
    settings.stages = dict(stages)
    return settings


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over both stages that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(staged(world, folder)) == folder / "tune" / "model"
    return folder


def test_stages_are_the_same_runs_one_after_the_other(world: Path, whole: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "align", "flamingo", steps=3))
    second = config(world, tmp_path / "tune", "flamingo", steps=4)
    second.model.init = str(tmp_path / "align" / "model")
    second.model.vision.config = second.model.language.config = second.model.language.tokenizer = None
    second.model.freeze.language, second.optim.lr = "train", 1e-3
    train(second)
    for stage in ("align", "tune"):
        assert losses(whole / stage) == losses(tmp_path / stage)
        assert folder_hash(whole / stage / "model") == folder_hash(tmp_path / stage / "model")
    record = json.loads((whole / "stages.json").read_text())["stages"]
    assert record["tune"]["began"] == record["align"]["model"] == folder_hash(whole / "align" / "model")
    assert sorted(path.name for path in whole.iterdir()) == ["align", "stages.json", "tune"]


def test_the_same_command_runs_nothing_twice(world: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert train(staged(world, whole)) == whole / "tune" / "model"
    said = capsys.readouterr().out
    assert f"stage align is finished: {whole}/align/model" in said
    assert f"stage tune is finished: {whole}/tune/model" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_stage_may_start_from_another_than_the_one_before(world: Path, tmp_path: Path) -> None:
    """Two models trained apart from the same start, as Multimodal-CoT's are; a third goes on from the first."""
    short: dict[str, Any] = {"run": {"steps": 1}}
    stages = {"one": short, "two": {**short, "after": None}, "three": {**short, "after": "one"}}
    train(staged(world, tmp_path / "run", stages))
    record = json.loads((tmp_path / "run" / "stages.json").read_text())["stages"]
    assert record["two"]["began"] is None
    assert record["three"]["began"] == record["one"]["model"]
    assert losses(tmp_path / "run" / "one") == losses(tmp_path / "run" / "two") != losses(tmp_path / "run" / "three")


def test_a_longer_last_stage_goes_on_and_a_longer_first_one_is_refused(world: Path, tmp_path: Path) -> None:
    run_dir, short = tmp_path / "run", {"run": {"steps": 1}}
    train(staged(world, run_dir, {"align": short, "tune": short}))
    first = losses(run_dir / "tune")
    train(staged(world, run_dir, {"align": short, "tune": {"run": {"steps": 3}}}))
    assert losses(run_dir / "tune")[:1] == first
    assert len(losses(run_dir / "tune")) == 3
    with pytest.raises(UserError, match=r"stages\.align\.run\.steps=2, but stage tune has begun from its model of 1"):
        train(staged(world, run_dir, {"align": {"run": {"steps": 2}}, "tune": {"run": {"steps": 3}}}))
    with pytest.raises(UserError, match=r"stage align is finished with another config: optim\.lr \(0\.003 -> 0\.5\)"):
        train(staged(world, run_dir, {"align": {**short, "optim": {"lr": 0.5}}, "tune": {"run": {"steps": 3}}}))
    with pytest.raises(UserError, match="stage tune began from the model of stage align as it was then, and would go"):
        train(staged(world, run_dir, {"align": short, "tune": {"run": {"steps": 3}, "after": None}}))


def test_a_predecessor_that_is_missing_or_another_is_refused(world: Path, tmp_path: Path) -> None:
    run_dir, short = tmp_path / "run", {"run": {"steps": 1}}
    train(staged(world, run_dir, {"align": short}))
    longer = staged(world, run_dir, {"align": short, "tune": short})
    weights = run_dir / "align" / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"align/model is not the model that stage align has written: restore it"):
        train(longer)
    weights.write_bytes(kept)
    (run_dir / "align" / "model").rename(tmp_path / "away")
    train(staged(world, run_dir, {"align": short}))  # which writes it again from its last checkpoint
    assert weights.read_bytes() == kept
    (run_dir / "align").rename(tmp_path / "all")
    (run_dir / "align").mkdir()
    (tmp_path / "all" / "config.yaml").rename(run_dir / "align" / "config.yaml")
    (run_dir / "align" / "model").mkdir()
    with pytest.raises(UserError, match=r"stage tune starts from the model of stage align, and .*model is missing"):
        train(longer)


def test_never_moves_all_stages_aside(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, short = tmp_path / "run", {"run": {"steps": 1}}
    train(staged(world, run_dir, {"align": short, "tune": short}))
    train(staged(world, run_dir, {"align": {"run": {"steps": 2}}}, resume="never"))
    assert f"the stages that {run_dir} held are now in {run_dir}/previous-1" in capsys.readouterr().out
    assert sorted(path.name for path in (run_dir / "previous-1").iterdir()) == ["align", "stages.json", "tune"]
    assert len(losses(run_dir / "align")) == 2
    inside = staged(world, run_dir, {"align": short}, resume="never")
    inside.model.init = str(run_dir / "align" / "model")
    inside.model.vision.config = inside.model.language.config = inside.model.language.tokenizer = None
    with pytest.raises(UserError, match=r"model\.init=.* lies in run\.dir=.*, which run\.resume=never moves aside"):
        train(inside)


def test_a_folder_of_another_kind_of_run_is_refused(world: Path, whole: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path / "plain", "flamingo", steps=1))
    with pytest.raises(UserError, match="holds a run without stages: choose another"):
        train(staged(world, tmp_path / "plain"))
    with pytest.raises(UserError, match=r"holds stages\.json and no config\.yaml of a run"):
        train(config(world, whole, "flamingo", steps=1))
    (tmp_path / "strange" / "align").mkdir(parents=True)
    (tmp_path / "strange" / "align" / "file").touch()
    with pytest.raises(UserError, match=r"align is there and .*stages\.json does not know it"):
        train(staged(world, tmp_path / "strange"))
    (tmp_path / "spoiled").mkdir()
    (tmp_path / "spoiled" / "stages.json").write_text('{"stages": {"align": 3}}')
    with pytest.raises(UserError, match=r"stages\.json is not the record of a run over stages"):
        train(staged(world, tmp_path / "spoiled"))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            {"a": {"after": "b"}, "b": {}},
            "stages.a.after=b is not a stage before it (there is none): name one, or null",
        ),
        ({"a": {}, "b": {"after": ["a"]}}, "stages.b.after=['a'] is not a stage before it (there is a)"),
        ({"a": None}, "stages are all null: leave one"),
        ({"a b": {}}, "stages.a b: a stage's name is that of a folder"),
        ({"../a": {}}, "stages.../a: a stage's name is that of a folder"),
        ({"a": {"modle": {}}}, "unknown key stages.a.modle: a stage has objective, model, data, optim, run, after"),
        ({"a": {"optim": 3}}, "stages.a.optim=3 must be a table"),
        ({"a": {"optim": {"lrr": 3}}}, "unknown key stages.a.optim.lrr: did you mean stages.a.optim.lr?"),
        ({"a": {"run": {"dir": "x"}}}, "stages.a.run.dir is that of the whole run: set run.dir"),
        ({"a": {}, "b": {"model": {"init": "x"}}}, "stages.b.model.init has no effect, since the stage starts from"),
        (
            {"a": {}, "b": {"model": {"vision": {"name": "x", "cache": "memory"}}}},
            "stages.b.model.vision.name has no effect, since the stage starts from the model of stage a: remove it",
        ),
        ({"a": {}, "b": {"objective": "language"}}, "stages.b starts from the model of stage a, which only objective"),
        (
            {"a": {}, "b": {"data": {"datasets": {"pages": {"batch_size": 0}}}}},
            "stage b: data.datasets.pages.batch_size",
        ),
        (
            {"a": {}, "b": {"data": {"datasets": {"pages": {"shards": ["none"]}}}}},
            "stage b: dataset 'pages': shard none does not",
        ),
        (
            {"a": {}, "b": {"data": {"datasets": {"pages": {"max_tokens": 999}}}}},
            "stage b: data.datasets.pages.max_tok",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(world: Path, tmp_path: Path, stages: Stages, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        train(staged(world, tmp_path / "run", stages))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_all_stages_get_wrong_is_said_once(world: Path, tmp_path: Path) -> None:
    settings = staged(world, tmp_path / "run")
    settings.data.datasets["pages"]["max_tokens"] = 999
    (said,) = problems(settings)
    assert said.startswith("data.datasets.pages.max_tokens=999 is above")


def test_a_stage_keeps_the_cache_and_the_sources_of_the_one_before(world: Path, tmp_path: Path) -> None:
    settings = staged(world, tmp_path / "run", {"a": {}, "b": {"model": {"vision": {"cache": "memory"}}}})
    first, second = stages_of(settings)[0]
    assert (first.config.model.vision.cache, second.config.model.vision.cache) == (None, "memory")
    assert second.config.model.init == str(tmp_path / "run" / "a" / "model")
    assert second.config.model.language.config is None
    assert second.planned.model.language.config == first.planned.model.language.config
    assert second.planned.model.init is None


def test_a_plan_covers_all_stages(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = staged(world, tmp_path / "run")
    settings.plan, settings.model.language.vocab_size = True, 600
    train(settings)
    said = capsys.readouterr().out
    assert said.index("stage align: memory of each of 1") < said.index("stage tune: memory of each of 1")
    gradients = [float(line.split()[1]) for line in said.splitlines() if line.strip().startswith("optimizer")]
    assert len(gradients) == 2
    assert not (tmp_path / "run").exists()
    settings.plan_for.gib = 1.6
    settings.stages = {**STAGES, "large": {"data": {"datasets": {"pages": {"batch_size": 4096, "max_tokens": 128}}}}}
    with pytest.raises(UserError, match="stage large: the run does not fit"):
        train(settings)


def _killed(command: list[str], folder: Path, when: Callable[[], bool]) -> None:
    process = begin(command, folder / "log")
    deadline = time.monotonic() + PATIENCE
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, (folder / "log").read_text()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_inside_and_between_stages_it_is_the_run_that_nothing_interrupts(world: Path, tmp_path: Path) -> None:
    stages = {"align": {"run": {"steps": 20}}, "tune": {**STAGES["tune"], "run": {"steps": 20}}}
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *given(staged(world, run_dir, stages, checkpoint_every=3), tmp_path),
    ]

    def finished(name: str) -> bool:
        file = run_dir / "stages.json"
        return file.exists() and json.loads(file.read_text())["stages"].get(name, {}).get("steps") == 20

    _killed(command, tmp_path, lambda: len(lines(run_dir / "align")) > 7)
    assert not finished("align")
    _killed(command, tmp_path, lambda: finished("align"))
    model = (run_dir / "align" / "model" / "model.safetensors").stat()
    _killed(command, tmp_path, lambda: len(lines(run_dir / "tune")) > 7)
    last = begin(command, tmp_path / "last")
    assert last.wait(PATIENCE) == 0, (tmp_path / "last").read_text()[-3000:]
    assert "stage align is finished" in (tmp_path / "last").read_text()
    assert (run_dir / "align" / "model" / "model.safetensors").stat().st_mtime_ns == model.st_mtime_ns
    again = staged(world, tmp_path / "again", stages, checkpoint_every=3)
    train(again)
    for stage in stages:
        assert losses(run_dir / stage) == losses(tmp_path / "again" / stage)
        assert folder_hash(run_dir / stage / "model") == folder_hash(tmp_path / "again" / stage / "model")


@pytest.mark.slow
def test_two_processes_train_the_same_stages(world: Path, whole: Path, tmp_path: Path) -> None:
    arguments = given(staged(world, tmp_path / "run"), tmp_path)
    done = begin([*torchrun("--standalone", "--nproc-per-node=2"), *arguments], tmp_path / "log")
    assert done.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    for stage in STAGES:
        assert losses(tmp_path / "run" / stage) == pytest.approx(losses(whole / stage), abs=1e-5)
    again = begin([*torchrun("--standalone", "--nproc-per-node=2"), *arguments], tmp_path / "log-again")
    assert again.wait(PATIENCE) == 0, (tmp_path / "log-again").read_text()[-3000:]
    assert "stage tune is finished" in (tmp_path / "log-again").read_text()
