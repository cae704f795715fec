"""Mistakes of a user, through the commands a user types: one clear line, exit status 2, no traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import UserError
from flamingo.training.compose import compose
from flamingo.training.distributed.interruptions import exit_status
from tests.training.world import config, write_world
from train import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    train(config(root, root / "run", "flamingo", steps=1))
    return root


def one_error(status: int, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line]
    assert status == 2, stderr
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(*arguments: str) -> str:
    """Run a command that must fail with status 2 and one line; return the line."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    return one_error(done.returncode, done.stderr)


Refused = Callable[..., str]


@pytest.fixture
def refused_here(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The same for `train.py` in this process, which saves the seconds of a start; one test per command pays for it."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        return one_error(exit_status(lambda: train(compose(list(arguments[1:])))), capsys.readouterr().err)

    return run


def training(world: Path, shards: Path, *more: str) -> list[str]:
    return [
        "train.py",
        "objective=language",
        f"model.language.tokenizer={world / 'tokenizer'}",
        "model.language.config={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 1}",
        f"data.datasets={{words: {{shards: [{shards}], batch_size: 2}}}}",
        f"run.dir={world / f'never-{len(list(world.iterdir()))}'}",
        *more,
    ]


def test_a_missing_shard(world: Path) -> None:
    assert "gone.tar does not exist" in refused(*training(world, world / "gone.tar"))


def test_a_truncated_shard(world: Path, tmp_path: Path, refused_here: Refused) -> None:
    (whole,) = sorted((world / "words").glob("*-000000.tar"))
    cut = tmp_path / whole.name
    shutil.copy(whole.with_name(whole.name + ".idx"), tmp_path)
    cut.write_bytes(whole.read_bytes()[:-4096])
    line = refused_here(*training(world, cut))
    assert cut.name in line
    assert "truncated" in line or "changed" in line


def test_an_unknown_key_and_a_wrong_value(world: Path, refused_here: Refused) -> None:
    shards = world / "words"
    assert "unknown key run.stepps: did you mean run.steps?" in refused(*training(world, shards, "run.stepps=3"))
    assert "run.precision=fp8 is not one of fp32, bf16" in refused(*training(world, shards, "run.precision=fp8"))


def test_a_name_that_needs_the_network(world: Path, refused_here: Refused) -> None:
    line = refused_here(*training(world, world / "words", "model.language.name=facebook/opt-125m"))
    assert "facebook/opt-125m" in line
    assert "network" in line


def test_an_image_that_cannot_be_decoded(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more than that")
    model = str(world / "run" / "model")
    line = refused("-m", "flamingo", "generate", "--model", model, "--image", str(broken), "--prompt", "<image>a")
    assert "broken.png" in line


def test_more_tags_than_images_in_row_3(world: Path) -> None:
    processor = FlamingoProcessor.from_pretrained(world / "run" / "model")
    image = Image.new("RGB", (16, 16))
    with pytest.raises(UserError, match=r"row 3.* 2 .*<image>.* 1 "):
        processor(text=["<image>a"] * 3 + ["<image>a<image>b"], images=[[image]] * 4)


def test_a_folder_that_holds_no_model(world: Path) -> None:
    assert "config.json is missing" in refused("-m", "eval", f"model={world}", f"data={world}", "task=toy_caption")
    with pytest.raises((UserError, OSError)):
        FlamingoForConditionalGeneration.from_pretrained(world)
