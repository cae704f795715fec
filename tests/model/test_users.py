"""What users of the libraries before this one met, and what no other test holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import flamingo.__main__ as command
from flamingo import FlamingoConfig, FlamingoForConditionalGeneration
from tests.model import tiny


def waves(module: torch.nn.Module) -> None:
    """Weights by arithmetic, so that they depend on no version's random numbers."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(sorted(module.named_parameters())):
            count = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(count * 0.7310585 + place).view(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * values)
            elif name.endswith("_gate"):
                parameter.fill_(0.7)
            else:
                parameter.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.05 * values)


# The last token's first logits; computed once, with torch 2.15.0, transformers 5.23.0 and open_clip 3.3.0.
GOLDEN = {
    "llama": [-0.30712, 0.77454, 0.04799, -0.79059],
    "gpt2": [-0.22754, 0.07062, 0.20392, -0.13884],
}


@pytest.mark.parametrize("family", GOLDEN)
def test_another_version_of_a_dependency_gives_the_same_numbers(family: str) -> None:
    """A new torch or transformers that changes what is computed is noticed here and not by a user."""
    model, processor = tiny.flamingo(family)
    waves(model)
    with torch.no_grad():
        logits = model(**tiny.batch(processor, [0])).logits[0, -1, :4]
    torch.testing.assert_close(logits, torch.tensor(GOLDEN[family]), rtol=0, atol=2e-4)


def test_doctor_names_versions_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said
    assert "attention by torch's SDPA" in said
    assert re.search(r"cpu: [\d,]+ GFLOP/s in float32, [\d,]+ in bfloat16\n", said)
    for demonstration in ("demo", "real"):
        assert re.search(rf"make {demonstration}: about \d+ minutes here", said)
    monkeypatch.setattr(command, "NEEDED", (*command.NEEDED, "no-such-package"))
    assert command.main(["doctor"]) == 1
    assert "no-such-package" in (said := capsys.readouterr().out)
    assert "MISSING" in said


@pytest.mark.parametrize("lean", [True, False])
def test_labels_that_are_all_masked_give_zero_and_no_nan(lean: bool) -> None:
    model, processor = tiny.flamingo()
    model.train()
    inputs = dict(tiny.batch(processor, padding_side="right"))
    labels = torch.full_like(inputs["input_ids"], -100)
    loss = model(**inputs, labels=labels, skip_logits=lean).loss
    assert float(loss.detach()) == 0.0
    loss.backward()
    gradients = [p.grad for _, p in model.trainable_parameters() if p.grad is not None]
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_the_end_of_a_chunk_is_learnt(tied: bool) -> None:
    """Else a caption never stops: its row trains on both sides, and the rows of other tokens do not."""
    model, processor = tiny.flamingo("llama", tied=tied)
    model.train()
    inputs = dict(tiny.batch(processor, [0], padding_side="right"))
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    place = int((ids[0] == processor.eoc_token_id).nonzero()[0, 0])
    labels[0, place] = processor.eoc_token_id  # only this one is asked for
    before = model(**inputs, labels=labels).loss
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    before.backward()
    row = model.new_tokens.ids.index(processor.eoc_token_id)
    rows = model.new_tokens.input_rows if tied else model.new_tokens.output_rows
    assert rows is not None
    assert rows.grad is not None
    assert bool(rows.grad[row].any())
    assert model.language_model.get_input_embeddings().weight.grad is None
    optimizer.step()
    assert model(**inputs, labels=labels).loss.item() < before.item()


@pytest.mark.parametrize(("max_frames", "matters"), [(3, True), (None, False)])
def test_the_order_of_frames(max_frames: int | None, matters: bool) -> None:
    """With time embeddings a clip is a sequence; without them a bag of patches, which says so by not changing."""
    resampler = {"depth": 2, "heads": 2, "head_dim": 8, "latents": 4, "max_frames": max_frames}
    model, processor = tiny.flamingo(resampler=resampler)
    frames = [tiny.picture(i) for i in range(3)]

    def logits(clip: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**processor(images=[[clip]], text=["<image>a"])).logits

    forwards, backwards = logits(frames), logits(frames[::-1])
    assert (float((forwards - backwards).abs().max()) > 1e-3) == matters
    still = [frames[0]] * 3
    assert float((logits(still) - forwards).abs().max()) > 1e-3


def test_transformers_own_classes_load_a_folder(tmp_path: Path) -> None:
    model, processor = tiny.flamingo()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FlamingoConfig)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert [name for name, _ in again.trainable_parameters()] == [name for name, _ in model.trainable_parameters()]
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = tiny.batch(processor)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
