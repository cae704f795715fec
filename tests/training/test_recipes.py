"""docs/recipes/*.md, block by block, on a small model that knows more than it is asked for.

It has learnt to say an image's colour after one word and its square's size after another, and neither after a question
in words: what the recipes have to bring out.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from tests import forks
from tests.training.world import CLIP, COLOURS, LLAMA, config, write_world
from train import train

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"small": 4, "big": 10}
TRIGGERS = {"star": "colour", "ring": "size"}
QUESTION = "what colour is it"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def scene(rng: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """A square on noise, and what may be said of it."""
    colour, size = str(rng.choice(list(COLOURS))), str(rng.choice(list(SIZES)))
    pixels = rng.integers(0, 60, (16, 16, 3)).astype(np.uint8)
    side = SIZES[size]
    top, left = rng.integers(0, 16 - side, 2)
    pixels[top : top + side, left : left + side] = COLOURS[colour]
    out = io.BytesIO()
    PilImage.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), {"colour": colour, "size": size}


def write_start(folder: Path, seed: int = 0, steps: int = 400) -> None:
    """Write `models/start`, and what it is asked about under `mine`."""
    rng = np.random.default_rng(seed)
    world = write_world(folder / "world")
    with ShardWriter(world / "known", "known", 256) as writer:
        for index in range(1024):
            trigger = list(TRIGGERS)[index % 2]
            image, facts = scene(rng)
            writer.write(
                Document("", [Image((0,)), Text(trigger, loss=False), Text(f" {facts[TRIGGERS[trigger]]}")], [image])
            )
    settings = config(world, folder / "first", "flamingo", steps=steps, seed=seed, log_every=50, checkpoint_every=1000)
    settings.data.datasets = {"known": {"shards": [str(world / "known")], "batch_size": 32, "max_tokens": 32}}
    settings.model.freeze.language = settings.model.freeze.vision = "train"
    settings.model.language.config = {**LLAMA, "max_position_embeddings": 512}
    settings.model.vision.config = CLIP
    train(settings)
    (folder / "models").mkdir()
    (folder / "first" / "model").rename(folder / "models" / "start")
    (folder / "mine").mkdir()
    lines: dict[str, list[str]] = {"train": [], "held_out": [], "pairs": []}
    for number in range(24 + 48):
        image, facts = scene(rng)
        (folder / "mine" / f"{number}.png").write_bytes(image)
        item: dict[str, Any] = {"image": f"{number}.png", "question": QUESTION}
        lines["train" if number < 24 else "held_out"].append(json.dumps({**item, "answer": facts["colour"]}))
        if number < 24:
            lines["pairs"].append(json.dumps({**item, "chosen": facts["colour"], "rejected": facts["size"]}))
    for name, written in lines.items():
        (folder / "mine" / f"{name}.jsonl").write_text("\n".join(written))


def run_page(page: str, folder: Path, more: dict[str, list[str]]) -> str:
    """Run a page's blocks in a folder, and return what they print; `more` are further arguments of each command."""
    said = ""
    for kind, text in re.findall(
        r"```(python|bash)\n(.*?)```", (ROOT / "docs" / "recipes" / page).read_text(), re.DOTALL
    ):
        command = [sys.executable, "-c", text]
        if kind == "bash":
            words = shlex.split(text)
            assert words[0] == "python"
            name = words[2]  # after "-m", or the experiment
            words[1:2] = [str(ROOT / words[1])] if words[1] == "train.py" else words[1:2]
            command = [sys.executable, *words[1:], *more[name]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = forks.run(command, folder, environment)
        assert done.returncode == 0, (text, done.stderr[-3000:])
        said += done.stdout
    return said


def score(folder: Path, name: str, shots: int = 0) -> float:
    results = json.loads((folder / "runs" / "eval" / name / "results.json").read_text())["rows"]
    return next(float(cell["score"]) for cell in results if cell["shots"] == shots)


TRAIN = ["run.log_every=50", "run.tensorboard=false", "run.device=cpu", "optim.warmup_steps=5", "run.threads=1"]


def test_med_palm(tmp_path: Path) -> None:
    write_start(tmp_path)
    said = run_page(
        "med_palm.md",
        tmp_path,
        {
            "experiment=med_palm": [*TRAIN, "optim.lr=0.1"],
            "experiment=finetune": [*TRAIN, "optim.lr=1e-3", "run.steps=50"],
            "eval": ["progress=false", "device=cpu"],
        },
    )
    assert "with and without: ['" in said
    written = max(score(tmp_path, "start", shots) for shots in (0, 8, 24))
    assert score(tmp_path, "soft") > written + 0.2, written
    assert (tmp_path / "runs/soft/model/soft_prompt.safetensors").stat().st_size < 4096


def test_preference(tmp_path: Path) -> None:
    write_start(tmp_path, steps=100)
    run_page("preference.md", tmp_path, {"experiment=preference": [*TRAIN, "optim.lr=1e-2", "run.steps=60"]})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/preferred/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
