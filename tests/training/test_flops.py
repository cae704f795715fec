"""Counted FLOPs against torch's own counter, for what is frozen, trained and recomputed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flamingo.training.flops import Flops, peak_tflops
from tests.model import tiny


@pytest.mark.parametrize("recompute", [False, True])
def test_all_but_attention_is_counted(recompute: bool) -> None:
    model, processor = tiny.flamingo("llama")
    model.train()
    inputs = dict(tiny.batch(processor, [0, 1], padding_side="right"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    counted = FlopCounterMode(display=False)
    with counted:
        model(**inputs, labels=labels, num_items_in_batch=10).loss.backward()
    by_kind = counted.get_flop_counts()["Global"]
    layers = sum(count for kind, count in by_kind.items() if "attention" not in str(kind) and "bmm" not in str(kind))
    if recompute:
        model.activation_checkpointing_enable()
    flops = Flops(model)
    model(**inputs, labels=labels, num_items_in_batch=10).loss.backward()
    found = flops.take()
    assert found == pytest.approx(layers, rel=0.12)
    assert found <= sum(by_kind.values())
    assert flops.take() == 0
    flops.close()
    model(**inputs)
    assert flops.take() == 0


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_tflops(torch.device("cpu")) is None
