"""What stands in a run's way at its beginning and at its end is one sentence, and nothing good is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flamingo.errors import UserError
from tests.training.test_checkpoints import files_of_at_most
from tests.training.world import config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_a_disk_that_is_full_at_the_end_leaves_the_old_model_and_the_same_command_writes_it(
    world: Path, tmp_path: Path
) -> None:
    settings = config(world, tmp_path, "flamingo", steps=2)
    train(settings)
    file = tmp_path / "model" / "model.safetensors"
    before, size = load_file(file), file.stat().st_size
    with (
        files_of_at_most(size - 1),
        pytest.raises(UserError, match=r"the model cannot be written to .*/model \(") as caught,
    ):
        train(settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.partial").exists()
    assert all(torch.equal(value, before[name]) for name, value in load_file(file).items())
    shutil.rmtree(tmp_path / "model")
    train(settings)
    assert all(torch.equal(value, before[name]) for name, value in load_file(file).items())


@pytest.mark.parametrize(
    ("text", "said"),
    [("run: [1", r"config\.yaml cannot be read \("), ("- a list", r"config\.yaml does not describe a run")],
)
def test_a_config_that_is_none_is_not_continued(world: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        train(config(world, tmp_path, "language"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_folder_that_cannot_be_made_is_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*/file/run cannot be written"):
        train(config(world, tmp_path / "file" / "run", "language"))
