from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.__main__ import main
from flamingo.training.checkpoints.trained_weights import fingerprint, load_trained, save_trained
from tests.model import tiny

Trained = tuple[FlamingoForConditionalGeneration, FlamingoProcessor, Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    model, processor = tiny.flamingo("llama")
    save_trained(model, tmp_path / "checkpoint")
    return model, processor, tmp_path / "checkpoint"


def test_save_then_load_is_the_same(trained: Trained) -> None:
    model, processor, folder = trained
    fresh, _ = tiny.flamingo("llama", gates=0.0, seed=9)
    inputs = tiny.batch(processor)
    load_trained(fresh, folder)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def test_backbones_in_bfloat16_have_the_same_fingerprint() -> None:
    lm = tiny.lm("opt")
    before = fingerprint(lm)
    assert fingerprint(lm.bfloat16()) == before
    assert fingerprint(tiny.lm("opt", vocab=300)) != before


def test_other_backbones_are_refused(trained: Trained) -> None:
    _, _, folder = trained
    model, _ = tiny.flamingo("llama")
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1.0)
    with pytest.raises(UserError, match="belongs to another language model"):
        load_trained(model, folder)
    other, _ = tiny.flamingo("gpt_neox")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(UserError, match="belongs to another language model"):
        load_trained(other, folder)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    elsewhere, _ = tiny.flamingo("llama", cross_attn_every_n_layers=4)
    with pytest.raises(UserError, match=r"cross_attn_layers \[1, 3\], this model \[3\]"):
        load_trained(elsewhere, folder)


def test_broken_checkpoints(trained: Trained) -> None:
    model, _, folder = trained
    file = folder / "trained.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_trained(model, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"trained\.safetensors is missing"):
        load_trained(model, folder)
    tensors = {name: p.detach() for name, p in model.trainable_parameters()}
    save_trained(model, folder, tensors={name: t for name, t in tensors.items() if name != "resampler.latents"})
    with pytest.raises(UserError, match=r"lacks resampler\.latents"):
        load_trained(model, folder)
    save_trained(model, folder, tensors={**tensors, "resampler.latents": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"shape \(2, 3\)"):
        load_trained(model, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_trained(model, folder)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    from torchvision.transforms.v2.functional import to_pil_image  # type: ignore[import-untyped]

    to_pil_image(tiny.picture(0, 40)).save(tmp_path / "a.png")
    options = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--max-new-tokens", "5"]
    assert main(["generate", *options, "--prompt", "A"]) == 0
    expected = model.generate(**processor(images=[[str(tmp_path / "a.png")]], text=["<image>A"]), max_new_tokens=5)
    assert capsys.readouterr().out.strip() == processor.batch_decode(expected)[0].strip()
    assert main(["generate", *options, "--prompt", "<image> and <image>"]) == 2
    assert "error: row 0 has 2 <image> tags but 1 images" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert main(["generate", *options]) == 2
    assert "error: image 0 of row 0 cannot be decoded" in capsys.readouterr().err
    assert main(["generate", "--model", str(tmp_path / "none")]) == 2
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
