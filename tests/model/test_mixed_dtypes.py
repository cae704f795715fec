"""Parts in different dtypes: each computes in its own, the result is that of fp32 within 16 bits, on a CPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo import FlamingoForConditionalGeneration
from tests.model import tiny
from tests.model.test_odd_lms import distance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "bf16"), ("fp16", "fp16")]


def model_of(encoder: str, lm: str, family: str = "llama") -> tuple[FlamingoForConditionalGeneration, Any]:
    """A model whose frozen parts are stored so; what trains is in fp32."""
    model, processor = tiny.flamingo(family)
    model.vision_encoder.tower.to(DTYPES[encoder])
    model.language_model.to(DTYPES[lm])  # type: ignore[arg-type]
    return model, processor


def gradients(model: Any, processor: Any, *, recompute: bool = False, autocast: bool = False) -> dict[str, Tensor]:
    if recompute:
        model.activation_checkpointing_enable()
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss
    loss.backward()
    return {name: p.grad for name, p in model.trainable_parameters() if p.grad is not None}


def share_off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Distance of all gradients together, as a share of their length."""
    assert ours.keys() == theirs.keys()
    off = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    return (off / sum(float(g.double().square().sum()) for g in theirs.values())) ** 0.5


@pytest.mark.parametrize(("encoder", "lm"), STORED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_computed_is_that_of_fp32(family: str, encoder: str, lm: str) -> None:
    reference, processor = tiny.flamingo(family)
    model, _ = model_of(encoder, lm, family)
    inputs = dict(tiny.batch(processor))
    with torch.no_grad():
        features, wanted = (m.encode_media(inputs["pixel_values"]) for m in (model, reference))
    assert features.dtype == torch.float32  # the resampler's own
    assert float((features - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    assert 0 < distance(model, reference, inputs) < 0.05
    assert model.generate(**inputs, max_new_tokens=3, num_beams=2)[:, inputs["input_ids"].shape[1] :].shape == (3, 3)
    scores = model.score_candidates(inputs, [[40, 41], [40, 42], [43]])
    theirs = reference.score_candidates(inputs, [[40, 41], [40, 42], [43]])
    torch.testing.assert_close(scores.float(), theirs, rtol=0, atol=0.3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("encoder", "lm"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_gradients_are_those_of_fp32(encoder: str, lm: str, autocast: bool) -> None:
    reference, processor = tiny.flamingo()
    wanted = gradients(reference, processor)
    model, _ = model_of(encoder, lm)
    found = gradients(model, processor, autocast=autocast)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert share_off(found, wanted) < 0.1
    again = gradients(model_of(encoder, lm)[0], processor, autocast=autocast, recompute=True)
    assert share_off(again, found) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_whole_model_in_one_dtype(dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=...)` and `model.to(...)` give it."""
    reference, processor = tiny.flamingo()
    model, _ = tiny.flamingo()
    model.to(dtype)  # type: ignore[arg-type]
    inputs = dict(tiny.batch(processor))
    assert model.encode_media(inputs["pixel_values"]).dtype == dtype
    assert distance(model, reference, inputs) < 0.05
    assert model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :].shape == (3, 3)
    found = gradients(model, processor)
    assert {g.dtype for g in found.values()} == {dtype}
    assert all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize(("encoder", "lm"), [("bf16", "bf16"), ("fp32", "bf16")])
def test_dtypes_survive_saving(encoder: str, lm: str, tmp_path: Any) -> None:
    """`dtype="auto"` reads one dtype from the config; what each tensor is stored in, the file says."""
    model, processor = model_of(encoder, lm)
    inputs = dict(tiny.batch(processor))
    with torch.no_grad():
        wanted = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.vision_encoder.tower.to(DTYPES[encoder])
    loaded.language_model.to(DTYPES[lm])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, wanted)
