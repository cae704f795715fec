"""torch.compile: a decode step is one graph with the tokens of eager ones; training compiles a bounded number."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from flamingo.conformance.tiny_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SLIDING = "counts the positions of its sliding windows in Python: transformers compiles each of its steps"
NOT_STATIC = {
    "gpt_neo": "is wrong with a static cache",
    "mpt": "asks its mask for a number",
    **dict.fromkeys(("mistral", "gemma2", "gemma3"), SLIDING),
}
"""What transformers' own code of a family says or does to a compiled step with a static cache."""
MOST = 12
"""Graphs of a training run: of a decoder layer and of the two feed-forwards, for sizes 0, 1 and any."""


def graphs(work: str, families: list[str]) -> dict[str, list[int]]:
    program = [sys.executable, "-m", "tests.model.compiled", work, *families]
    done = subprocess.run(program, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    return {family: [int(number) for number in numbers] for family, *numbers in rows}


def test_a_decode_step_is_one_graph() -> None:
    families = [name for name in FAMILIES if name not in NOT_STATIC]
    if shutil.which("g++") is None:  # inductor needs a C++ compiler on a CPU
        families.remove("llama")
    assert graphs("decode", families) == {family: [1] for family in families}


def test_ragged_batches_compile_a_bounded_number_of_graphs() -> None:
    found = graphs("train", list(FAMILIES))
    assert list(found) == list(FAMILIES)
    for family, (first, half, last) in found.items():
        assert first <= half == last <= MOST, family
