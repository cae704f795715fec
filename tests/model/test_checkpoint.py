from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo.__main__ import main
from flamingo.training.checkpoints.trained_weights import FrozenWeights, fingerprint, frozen_fingerprints
from tests.model import tiny


def test_backbones_in_bfloat16_have_the_same_fingerprint() -> None:
    lm = tiny.lm("opt")
    before = fingerprint(lm)
    assert fingerprint(lm.bfloat16()) == before
    assert fingerprint(tiny.lm("opt", vocab=300)) != before


def test_frozen_backbones_are_told_apart() -> None:
    """By the values of their weights too, and what trains is not among them."""
    model, _ = tiny.flamingo("llama")
    before = frozen_fingerprints(model)
    assert list(before) == ["vision", "language", "config"]
    assert frozen_fingerprints(tiny.flamingo("llama")[0]) == before
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1.0)
    after = frozen_fingerprints(model)
    assert after["language"] != before["language"]
    assert after["vision"] == before["vision"]
    assert frozen_fingerprints(tiny.flamingo("gpt_neox")[0])["language"] != before["language"]
    model.freeze({"language": "train"})
    assert list(frozen_fingerprints(model)) == ["vision", "config"]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    from torchvision.transforms.v2.functional import to_pil_image  # type: ignore[import-untyped]

    to_pil_image(tiny.picture(0, 40)).save(tmp_path / "a.png")
    options = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--max-new-tokens", "5"]
    assert main(["generate", *options, "--prompt", "A"]) == 0
    inputs = processor(images=[[str(tmp_path / "a.png")]], text=["<image>A"])
    expected = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == processor.batch_decode(expected)[0].strip()
    assert main(["generate", *options, "--prompt", "<image> and <image>"]) == 2
    assert "error: row 0 has 2 <image> tags but 1 images" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert main(["generate", *options]) == 2
    error = capsys.readouterr().err
    assert f"error: image 0 of row 0 ({tmp_path / 'a.png'}) cannot be decoded: begins with b'nothing'" in error
    assert main(["generate", "--model", str(tmp_path / "none")]) == 2
    folder = str(tmp_path / "model")
    for arguments, said in (
        (["generate", *options, "--beams", "0"], "--beams 0 must be at least 1"),
        (["generate", "--model", folder, "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["chat", folder, "--max-new-tokens", "-1"], "--max-new-tokens -1 must be at least 1"),
        (["chat", folder, "--temperature", "nan"], "--temperature nan must be 0 (greedy) or more"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_what_is_frozen_is_shown_to_be_unchanged() -> None:
    """In float32 and rounded to bfloat16, buffers too; a single bit of a single weight is found, and a missing one."""
    model, _ = tiny.flamingo("llama")
    frozen = FrozenWeights(model)
    weights = model.state_dict()
    assert frozen.require_unchanged(weights) == "frozen, and bit for bit as before: vision, language"
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    frozen.require_unchanged(half)
    trained = {name: value + 1 for name, value in weights.items() if name.startswith("resampler.")}
    frozen.require_unchanged(weights | trained)
    tied, _ = tiny.flamingo("gpt2")
    tied.freeze({"language": "train"})
    assert tied.language_model.get_output_embeddings().weight is tied.language_model.get_input_embeddings().weight
    moved = {key: value + 1 for key, value in tied.state_dict().items() if key.startswith("language_model.")}
    assert FrozenWeights(tied).require_unchanged(tied.state_dict() | moved).endswith("before: vision")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    changed = weights[name].clone()
    changed.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(RuntimeError, match=rf"^1 frozen weights are not what they were .* the first is {name}: the"):
        frozen.require_unchanged(weights | {name: changed})
    with pytest.raises(RuntimeError, match=name):
        frozen.require_unchanged({key: value for key, value in weights.items() if key != name})
