"""On a GPU: xformers, SDPA and the slow twin agree, and a whole model says there what it says on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flamingo.layers import attention
from flamingo.layers.attention import attend, attend_segments
from flamingo.layers.media_mask import segments_from_slots
from tests.model import tiny
from tests.model.slow_attention import attend_segments_slow

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SLOTS = [[-1, 0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3, 3]]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((15, 8, 64), (4, 64, 8, 64), (4, 64, 8, 64))
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes)
    return q, k, v


@needs_gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("xformers", [True, False])
def test_forms_agree(dtype: torch.dtype, atol: float, xformers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not xformers:
        monkeypatch.setattr(attention, "xformers_error", lambda: "switched off")
    segments = segments_from_slots(torch.tensor(SLOTS, device="cuda"), 4)
    own = inputs(dtype)
    fast = attend_segments(*own, segments)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in own]
    slow = attend_segments_slow(q, k, v, segments)
    torch.testing.assert_close(fast.double(), slow, rtol=0, atol=atol)
    weight = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1)).cuda()
    ours = torch.autograd.grad((fast * weight.to(dtype)).sum(), own)
    theirs = torch.autograd.grad((slow * weight.double()).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5 * atol)
    q, k, v = (x.detach()[None] for x in (own[0][:4], own[1][0], own[2][0]))
    head_first = (x.double().transpose(1, 2) for x in (q, k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(*head_first)  # type: ignore[arg-type]
    torch.testing.assert_close(attend(q, k, v).double(), whole.transpose(1, 2), rtol=0, atol=atol)


@needs_gpu
def test_a_model_on_a_gpu_is_the_model_on_the_cpu() -> None:
    model, processor = tiny.flamingo("llama")
    batch = tiny.batch(processor)
    with torch.no_grad():
        here = model(**batch).logits
        model.to("cuda")  # type: ignore[arg-type]
        there = model(**{name: value.cuda() for name, value in batch.items()}).logits.cpu()
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(there[seen], here[seen], rtol=0, atol=1e-3)


def test_an_xformers_that_does_not_import_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("raise ImportError('built for another torch')\n")
    program = "from flamingo.layers.attention import xformers_error; print(xformers_error())"
    paths = os.pathsep.join([str(tmp_path), str(Path(attention.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "built for another torch", done.stderr
