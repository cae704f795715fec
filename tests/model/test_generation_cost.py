"""What a decode step costs: nothing in it grows with the number of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.model import tiny


class Sizes(TorchDispatchMode):
    """The most floating-point numbers that an operation made anew; views make none."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and not any(r.alias_info for r in func._schema.returns):
            self.largest = max(self.largest, out.numel())
        return out


def metered(block: nn.Module, sizes: list[int]) -> None:
    meter = Sizes()

    def before(*_: Any) -> None:
        meter.__enter__()

    def after(*_: Any) -> None:
        meter.__exit__(None, None, None)
        sizes.append(meter.largest)

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_decode_step_does_not_depend_on_the_number_of_images(beams: int) -> None:
    """Work and the largest tensor that the blocks make, at 1, 4 and 16 images."""
    costs = []
    for number in (1, 4, 16):
        model, processor = tiny.flamingo()
        inputs = processor(images=[[tiny.picture(j) for j in range(number)]], text=["<image>a" * number])
        sizes: list[int] = []
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            cache.batch_repeat_interleave(beams)
            for block in model.cross_attn_blocks.values():
                metered(block, sizes)
            step = {"input_ids": torch.full((beams, 1), 40), "phi": torch.full((beams, 1), number)}
            with FlopCounterMode(display=False) as counter:
                model(**step, past_key_values=cache)
        spent = {name: sum(found.values()) for name, found in counter.get_flop_counts().items() if "blocks." in name}
        costs.append((sizes, spent))
    assert costs[0] == costs[1] == costs[2]
    assert len(costs[0][0]) == 2
    assert sum(costs[0][1].values()) > 0
