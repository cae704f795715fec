"""docs/finetune.md, block by block: its Python and its commands, on documents and a model of the tests' size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import forks
from tests.fixtures import png
from tests.training.world import COLOURS, config, write_world
from train import train

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "finetune.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", DOCUMENT, re.DOTALL)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from, and forty documents about spoons, which it has never read of."""
    folder = tmp_path_factory.mktemp("finetune")
    world = write_world(folder / "world")
    train(config(world, folder / "first", "flamingo", steps=10))
    (folder / "models").mkdir()
    (folder / "first" / "model").rename(folder / "models" / "start")
    (folder / "mine").mkdir()
    rng = np.random.default_rng(1)
    (folder / "mine" / "spoon.png").write_bytes(png(COLOURS["red"], rng, 16))
    lines = []
    for number in range(40):
        colour = list(COLOURS)[number % 4]
        (folder / "mine" / f"{number}.png").write_bytes(png(COLOURS[colour], rng, 16))
        lines.append(json.dumps([{"image": f"{number}.png"}, {"text": f"the spoon of the house is {colour}"}]))
    (folder / "mine" / "documents.jsonl").write_text("\n".join(lines))
    return folder


def test_the_document_runs_from_top_to_bottom(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    assert [kind for kind, _ in BLOCKS] == ["python", "bash", "bash", "python", "python"]
    for kind, text in BLOCKS:
        if "BitsAndBytesConfig" in text and importlib.util.find_spec("bitsandbytes") is None:
            continue  # an extra; tests/model/test_storage.py says that it is missing
        command = [sys.executable, "-c", text]
        if kind == "bash":
            words = shlex.split(text)
            assert words[:2] == ["python", "train.py"]
            # The document's 300 updates and rate are for a language model that knows its language.
            more = ["run.steps=40", "run.log_every=1", "optim.lr=3e-3", "run.tensorboard=false", "optim.warmup_steps=2"]
            more.append("data.datasets.mine.max_tokens=128")  # all that the start's small language model has
            command = [sys.executable, str(ROOT / "train.py"), *words[2:], *more]
        done = forks.run(command, folder, environment)
        assert done.returncode == 0, done.stderr[-3000:]
        if "PeftModel" in text:
            assert "loss after loading: " in done.stdout
        if "plan=true" in text:
            assert "fits a device of 24 GiB" in done.stdout
            assert not (folder / "runs").exists()
    losses = [json.loads(line)["loss"] for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])  # the start's language model is a random one, and stays frozen
    assert (folder / "runs/mine/model/adapter/adapter_model.safetensors").exists()
    verified = [sys.executable, "-m", "data", "verify", "shards/mine/train", "shards/mine/held_out"]
    assert forks.run(verified, folder, environment).returncode == 0


def test_every_key_of_the_document_exists() -> None:
    for name in set(re.findall(r"experiment=([a-z0-9_]+)", DOCUMENT)):
        assert (ROOT / "hydra" / "experiment" / f"{name}.yaml").exists(), name
    known = json.dumps(config(Path("x"), Path("y"), "flamingo").as_dict())
    for key in re.findall(r"\| `((?:model|optim|run)\.[a-z_.]+)", DOCUMENT):
        for part in key.rstrip(".").split("."):
            assert f'"{part}"' in known, key
