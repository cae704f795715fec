"""docs/ecosystem.md: its blocks are run in its order, on two tiny backbones."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_page_runs(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tiny.lm("llama").save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    tiny.vision().save_pretrained(tmp_path / "clip")
    for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.jpg")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in (
        "new tokens: True",
        "answer: ['",
        "pipeline: str",
        "images of the conversation: [2]",
        "messages: 4",
        "without a gradient: 0 of ",
        "soft prompt: (4, 32)",
        "4 bits: True",
        "adapters: True",
        "steps: 2",
        "preferred: 2",
        "processes: 2 equal weights: True",
    ):
        assert expected in done.stdout, (expected, done.stdout, done.stderr[-1500:])
