"""docs/model.md: its blocks are run in its order, and its tables are those of the tests' own lists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.__main__ import main
from tests.model import otter, page_tables, peers, tiny
from tests.model import test_parity_idefics as idefics
from tests.model.test_convert_folders import shards
from tests.model.test_convert_openflamingo import write_backbones

ROOT = Path(__file__).resolve().parents[2]
TEXT = page_tables.PAGE.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the page takes for granted: backbones, two images, released files."""
    for name in ("openflamingo", "otter", "idefics"):
        (tmp_path / "released" / name).mkdir(parents=True)
    write_backbones(tmp_path / "backbones", "gpt_neox")
    (tmp_path / "backbones" / "lm").rename(tmp_path / "backbones" / "base")
    tiny.vision().save_pretrained(tmp_path / "backbones" / "encoder")
    tiny.lm("llama").save_pretrained(tmp_path / "backbones" / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "backbones" / "lm")
    for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.jpg")
    released = tmp_path / "released"
    torch.save(peers.trained_only(peers.flamingo("gpt_neox", 2)[0]), released / "openflamingo" / "checkpoint.pt")
    model: Any = otter.Otter("llama", 2, None)
    shards(model.released(), released / "otter")
    (released / "otter" / "config.json").write_text(json.dumps(otter.config(model, 2)))
    otter.tokenizer().save_pretrained(released / "otter")
    idefics.idefics(2).save_pretrained(released / "idefics", max_shard_size="100KB")
    idefics.tokenizer().save_pretrained(released / "idefics")
    return tmp_path


def test_python_of_the_page_runs(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 15
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert "['cross_attention', 'language', 'new_tokens', 'resampler']" in said
    assert "latents of an image: 4\n" in said
    assert re.search(r"^constrained:  (cat|dog)$", said, re.MULTILINE)
    assert re.search(r"^likelier:  (cat|dog)$", said, re.MULTILINE)
    maps = r"^maps: \(2, 8, \d+, 16\) images seen by the last token of each row: \[2, 1\]$"
    assert re.search(maps, said, re.MULTILINE)
    assert "{torch.float32} torch.Size([1, 2])" in said
    assert len(re.findall(r"^ +-\d+\.\d\d ['\"]", said, re.MULTILINE)) == 3


def test_commands_of_the_page_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[:4] for words in commands] == [
        ["python", "-m", "flamingo", "convert"],
    ] * 3
    for words in commands:
        assert main(words[3:]) == 0
        out = words[words.index("--out") + 1]
        processor = FlamingoProcessor.from_pretrained(out)
        inputs = processor(images=[tiny.picture(0)], text="<image>A")
        assert FlamingoForConditionalGeneration.from_pretrained(out).generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_tables_are_those_of_the_lists() -> None:
    assert len(page_tables.MARK.findall(TEXT)) == 5
    assert page_tables.filled(TEXT) == TEXT, "python -m tests.model.page_tables"
