"""A run folder is never restarted in silence, and what is in it is moved, never removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from flamingo.errors import UserError
from flamingo.folder_lock import lock_folder
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.integrity import MARKER
from flamingo.training.checkpoints.trained_weights import fingerprint
from flamingo.training.compose import compose
from flamingo.training.metrics import sinks
from tests.training.adversities import snapshot
from tests.training.commands import lines
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 updates with checkpoints of 4 and 6, and no model."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    train(config(world, run_dir, "language", steps=6))
    shutil.rmtree(run_dir / "model")
    return run_dir


def test_none_that_can_be_used_stops_the_run_and_says_what_is_wrong_with_each(
    world: Path, stopped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    for step, path in store.step_folders(run_dir / "checkpoints"):
        file = next(path.glob("*.distcp"))
        if step == 4:
            os.truncate(file, 100)
        else:
            file.unlink()
    before = snapshot(run_dir)
    with pytest.raises(UserError) as caught:
        train(config(world, run_dir, "language", steps=8))
    for said in ("none can be used", "step-00000006: ", "is missing", "step-00000004: ", "has 100 of", "resume=never"):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(run_dir) == before


@pytest.mark.parametrize("lost", ["markers", "newest marker and the rest", "folder", "folder and record"])
def test_what_is_lost_whole_is_missed(world: Path, stopped: Path, tmp_path: Path, lost: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    for step, path in store.step_folders(run_dir / "checkpoints"):
        if lost == "newest marker and the rest" and step == 4:
            shutil.rmtree(path)
        (path / MARKER).unlink(missing_ok=True)
    if lost.startswith("folder"):
        shutil.rmtree(run_dir / "checkpoints")
    if lost.endswith("record"):
        (run_dir / "checkpoints.json").unlink()
    before = snapshot(run_dir)
    with pytest.raises(UserError, match=r"none can be used|no checkpoint to go on from"):
        train(config(world, run_dir, "language", steps=8))
    assert snapshot(run_dir) == before


def test_a_finished_model_is_not_trained_again_over(world: Path, stopped: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config(world, run_dir, "language", steps=1, checkpoint_every=100))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints.json").unlink()
    with pytest.raises(UserError, match="holds a finished model and no checkpoint"):
        train(config(world, run_dir, "language", steps=1, checkpoint_every=100))


def test_a_damaged_newest_one_is_named_and_kept(
    world: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    file = next((run_dir / "checkpoints" / "step-00000006").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    train(config(world, run_dir, "language", steps=8))
    said = capsys.readouterr().out
    assert "step-00000006 is passed over (" in said
    assert "goes on from step-00000004" in said
    kept = run_dir / "checkpoints" / "damaged-step-00000006.0"
    assert (kept / file.name).read_bytes() == content
    assert [line["step"] for line in lines(run_dir)] == list(range(1, 9))


def test_interrupted_before_its_first_checkpoint_it_begins_again_and_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(world, tmp_path, "language", steps=2, checkpoint_every=2)
    train(settings)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "checkpoints.json").unlink()
    (tmp_path / "checkpoints" / "step-00000002" / MARKER).unlink()
    capsys.readouterr()
    train(settings)
    assert "was stopped after 2 updates, before its first checkpoint: it begins again" in capsys.readouterr().out


def test_a_checkpoint_under_another_name_is_refused(world: Path, stopped: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    (run_dir / "checkpoints" / "step-00000006").rename(run_dir / "checkpoints" / "step-00000007")
    with pytest.raises(UserError, match="is of update 6"):
        train(config(world, run_dir, "language", steps=8))


def test_never_moves_the_old_run_aside(world: Path, stopped: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    (run_dir / "notes.txt").write_text("mine")
    before = {name: content for name, content in snapshot(run_dir).items() if name != "notes.txt"}
    train(config(world, run_dir, "language", steps=1, resume="never"))
    assert snapshot(run_dir / "previous-1") == before
    assert (run_dir / "notes.txt").read_text() == "mine"
    assert [line["step"] for line in lines(run_dir)] == [1]
    train(config(world, run_dir, "language", steps=1, resume="never"))
    assert snapshot(run_dir / "previous-1") == before
    assert (run_dir / "previous-2" / "model").is_dir()
    assert not (run_dir / ".fresh").exists()


def test_never_trains_its_tokenizer_anew_too(world: Path, tmp_path: Path) -> None:
    for size in (262, 300):
        settings = config(world, tmp_path, "language", steps=1, resume="never")
        settings.model.language.tokenizer, settings.model.language.vocab_size = None, size
        train(settings)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() != (
        tmp_path / "previous-1" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_never_changes_nothing_before_the_new_run_is_known_to_be_right(
    world: Path, stopped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    before = snapshot(run_dir)
    torn = tmp_path / "torn"
    shutil.copytree(world / "tokenizer", torn)
    os.truncate(torn / "tokenizer.json", 100)
    settings = config(world, run_dir, "language", steps=1, resume="never")
    settings.model.language.tokenizer = str(torn)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a torn tokenizer ends in
        train(settings)
    left = {name: content for name, content in snapshot(run_dir).items() if not name.startswith(".fresh")}
    assert left == before


def test_never_leaves_what_the_new_run_starts_from(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config(world, run_dir, "flamingo", steps=1))
    before = snapshot(run_dir)
    settings = config(world, run_dir, "flamingo", steps=1, resume="never")
    settings.model.init = str(run_dir / "model")
    settings.model.vision.config = settings.model.language.config = settings.model.language.tokenizer = None
    with pytest.raises(UserError, match=r"model\.init=.* lies in run\.dir=.*: choose another run\.dir"):
        train(settings)
    assert snapshot(run_dir) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_is_not_a_runs_is_left_alone(world: Path, tmp_path: Path, resume: str) -> None:
    for name in ("model", "checkpoints", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("years of work")
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"no config\.yaml of"):
        train(config(world, tmp_path, "language", steps=1, resume=resume))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_run_dir_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.dir=\s*'?\s*'? is empty"):
        compose(["experiment=demo", f"run.dir='{name}'", "run.resume=never"])


def test_a_start_that_fails_leaves_the_figures(world: Path, stopped: Path, tmp_path: Path) -> None:
    """The checkpoint is of update 4, the figures go to 6; the data is another one."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    figures = (run_dir / "metrics.jsonl").read_bytes()
    other = config(world, run_dir, "language", steps=8)
    other.data.datasets["words"]["shards"] = [str(world / "pages")]
    with pytest.raises(UserError):
        train(other)
    assert (run_dir / "metrics.jsonl").read_bytes() == figures


def test_a_run_in_a_folder_that_is_in_use_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flamingo.folder_lock.WAIT_SECONDS", 0.1)
    with (
        lock_folder(tmp_path, "a training run", "wait"),
        pytest.raises(UserError, match=r"is in use by a training run on .*\(pid \d+, since .*torchrun or srun"),
    ):
        train(config(world, tmp_path, "language", steps=1))


def test_one_weight_of_many_is_another_model() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(50, 50) for _ in range(12)))
    before = fingerprint(model)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            kept = weight.view(-1)[7].item()
            weight.view(-1)[7] += 1.0
            assert fingerprint(model) != before, name
            weight.view(-1)[7] = kept
    assert fingerprint(model) == before


def test_figures_that_a_full_disk_does_not_take_are_one_sentence_at_the_end_too(world: Path, tmp_path: Path) -> None:
    """What is buffered is written once more when the run closes them, which is after the first sentence."""
    reports = sinks.MetricSinks(tmp_path, config(world, tmp_path, "language"), start=0, is_main=True)
    reports._figures._file = Path("/dev/full").open("a")  # noqa: SIM115
    for again in (lambda: reports.log(1, {"loss": 1.0}), reports.close):
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(.*No space left.*: free space or"):
            again()
    reports.close()
