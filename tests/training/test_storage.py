"""Storage that goes away for good, data that cannot be read, and half of a tokenizer: what a run does about them."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import StorageError
from data.loading.step_dataset import StepDataset
from data.shards.writer import MANIFEST
from tests.training.commands import losses
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_a_run_whose_storage_stays_away_saves_before_it_ends(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(world, tmp_path / "whole", "language", steps=8, checkpoint_every=100)
    train(whole)
    settings = config(world, tmp_path / "run", "language", steps=8, checkpoint_every=100)
    settings.data.storage_minutes = 0.001
    read = StepDataset._batch

    def away(self: StepDataset, index: tuple[int, int, int]) -> Any:
        if index[1] == 5:
            raise StorageError("shard x could not be read")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(StepDataset, "_batch", away)
        with pytest.raises(StorageError, match=r"shard x could not be read; saved in .*/step-00000005$"):
            train(settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000005"]
    train(settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def broken(world: Path, folder: Path) -> Path:
    """The world's words, and a shard with a document that is cut off."""
    shutil.copytree(world / "words", folder)
    (folder / MANIFEST).unlink()
    with tarfile.open(folder / "zz.tar", "w") as tar:
        for key, body in (("good", b'{"v":1,"nodes":[{"t":"a red circle"}]}'), ("bad", b'{"v":1,"nodes":[{"t":"a')):
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return folder


def test_a_tokenizer_is_trained_without_what_cannot_be_read(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(world, tmp_path / "run", "language", steps=2)
    settings.data.datasets["words"]["shards"] = [str(broken(world, tmp_path / "words"))]
    settings.model.language.tokenizer, settings.model.language.vocab_size = None, 300
    train(settings)
    said = "dataset 'words': 1 documents are left out (1 bad text or JSON), the first one key 'bad' of "
    assert said in capsys.readouterr().err


def cut(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def lost(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def not_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[")


@pytest.mark.parametrize("hurt", [cut, lost, emptied, not_json])
def test_half_a_tokenizer_is_trained_again(world: Path, tmp_path: Path, hurt: Callable[[Path], None]) -> None:
    def settings(steps: int) -> Any:
        made = config(world, tmp_path, "language", steps=steps)
        made.model.language.tokenizer, made.model.language.vocab_size = None, 300
        return made

    train(settings(2))
    whole = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    hurt(tmp_path / "tokenizer")
    train(settings(4))
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == whole
    assert len(losses(tmp_path)) == 4
