from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.layers.attention import SHORT_ROWS, attend, attend_segments, training_kernel
from flamingo.layers.media_mask import segments_from_slots
from tests.model.slow_attention import attend_segments_slow


@pytest.mark.parametrize(
    "slots",
    [
        [[-1, 0, 0, 0, 1], [2, 2, 3, 3, 3]],
        [[0, 0, 0, 1, 1, 1]],
        [[-1, -1], [-1, 3]],
        [[3, 1, 3, 1, 0]],
        [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]],
    ],
    ids=["ragged", "even", "one token", "out of order", "pieces"],
)
def test_segments_are_their_slow_twin(slots: list[list[int]]) -> None:
    """Values and gradients, for images that few, equally many or no tokens see."""
    segments = segments_from_slots(torch.tensor(slots), 4)
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(segments.tokens), 2, 8), (4, 3, 2, 8), (4, 3, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)
    fast, slow = attend_segments(q, k, v, segments), attend_segments_slow(q, k, v, segments)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_no_token_gives_zero_gradients_not_none() -> None:
    segments = segments_from_slots(torch.full((2, 3), -1), 0)
    q = torch.zeros(0, 2, 8, requires_grad=True)
    k, v = (torch.zeros(0, 4, 2, 8, requires_grad=True) for _ in range(2))
    out = attend_segments(q, k, v, segments)
    assert out.shape == (0, 2, 8)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_attend_is_softmax_attention() -> None:
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 5))
    weights = (torch.einsum("bshk,blhk->bhsl", q, k) / 8**0.5).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhsl,blhk->bshk", weights, v))


@pytest.mark.parametrize(
    ("tokens", "dtype", "plain"),
    [(SHORT_ROWS, torch.bfloat16, True), (129, torch.bfloat16, False), (16, torch.float32, False)],
)
def test_short_rows_in_bf16_train_with_plain_products(tokens: int, dtype: torch.dtype, plain: bool) -> None:
    """Which kernel ran is read from the graph; both gradients are those of float32 to bf16's precision."""
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    labels = torch.zeros(2, tokens, dtype=torch.long)

    def gradient(dtype: torch.dtype, labels: Tensor | None) -> tuple[str, Tensor]:
        leaf = q.to(dtype).requires_grad_()
        with training_kernel(labels, q.device, in_bf16=dtype is torch.bfloat16):
            out = F.scaled_dot_product_attention(leaf, k.to(dtype), v.to(dtype), is_causal=True)
        name = type(out.grad_fn).__name__
        return name, torch.autograd.grad(out.float().square().sum(), leaf)[0].float()  # outside, as a run does it

    chosen, ours = gradient(dtype, labels)
    usual, theirs = gradient(dtype, None)
    assert (chosen != usual) == plain, (chosen, usual)
    exact = gradient(torch.float32, None)[1]
    scale = float(exact.abs().max())
    for found in (ours, theirs):
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * scale)
