"""torch.compile: a decode step is one graph with the tokens of eager ones; training compiles a bounded number."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from flamingo.conformance.tiny_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOT_STATIC = {"gpt_neo": "is wrong with a static cache", "mpt": "asks its mask for a number"}
"""What transformers' own code of a family says or does to a compiled step with a static cache."""
MOST = 12
"""Graphs of a training run: of a decoder layer and of the two feed-forwards, for sizes 0, 1 and any."""


def graphs(work: str, family: str) -> list[int]:
    program = [sys.executable, "-m", "tests.model.compiled", work, family]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()[1:]]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_STATIC])
def test_a_decode_step_is_one_graph(family: str) -> None:
    if family == "llama" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    assert graphs("decode", family) == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_compile_a_bounded_number_of_graphs(family: str) -> None:
    first, half, last = graphs("train", family)
    assert first <= half == last <= MOST
