"""The README is true: its Python runs in the order of the text; its make targets, experiments and folders exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from PIL import Image as PILImage

from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from tests.training.world import COLOURS, config, write_world
from train import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    train(config(world, tmp_path / "runs/demo/flamingo", "flamingo", steps=1))
    with ShardWriter(tmp_path / "runs/demo/data/toy/heldout/scene_pairs", "scene_pairs", layout="pairs") as writer:
        for name, colour in list(COLOURS.items())[:3]:
            image = tmp_path / f"{name}.png"
            PILImage.new("RGB", (16, 16), colour).save(image)
            writer.write(Document("", [Image((0,)), Text(name)], [image.read_bytes()], {"caption": name}))
    PILImage.new("RGB", (40, 30), (90, 80, 70)).save(tmp_path / "cat.jpg")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)]
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "a model of type" not in done.stderr  # transformers warns of a type it does not know
    assert (tmp_path / "shards" / "mine" / "mine-000000.tar").exists()


def test_every_target_experiment_and_folder_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z][a-z-]*)`?", README)):
        assert f"\n{target}:" in makefile, target
    for name in set(re.findall(r"experiment=([a-z0-9_]+)", README)):
        assert (ROOT / "hydra" / "experiment" / f"{name}.yaml").exists(), name
    for name in set(re.findall(r"^\| `([a-z/.A-Z]+?)/?` \|", README, re.MULTILINE)):
        assert (ROOT / name).exists(), name
