from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, LlamaForCausalLM

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.backbones import load_language, load_vision, open_clip_config
from flamingo.config import VisionConfig
from flamingo.layers.attention import training_kernel
from flamingo.vision.encoder import VisionEncoder, patch_tokens
from tests.model import tiny

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": tiny.SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A contrastively trained encoder as open_clip itself lays one out."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**MODEL_CFG, quick_gelu=True)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "resize_mode": "squash"}
    document = {"model_cfg": {**MODEL_CFG, "quick_gelu": True}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_open_clip_from_a_folder(folder: Path) -> None:
    module, config = load_vision(folder)
    assert (config.kind, config.width, config.image_size, config.resize_mode) == ("open_clip", 32, 28, "squash")
    encoder = VisionEncoder(module, config)
    pixels = torch.stack([tiny.picture(0), tiny.picture(1)])[:, None]
    tokens = encoder(pixels)
    assert tokens.shape == (2, 1, 4, 32)
    # The tokens before the final norm, of the same weights, by open_clip's own way to them.
    reference, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    normalised = (pixels[:, 0].float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.2
    x = reference.visual.transformer(reference.visual._embeds(normalised))[:, 1:]
    torch.testing.assert_close(tokens[:, 0], x.detach())
    assert not torch.allclose(reference.visual.ln_post(x), x)


def test_model_around_an_open_clip_folder_saves_and_loads(folder: Path, tmp_path: Path) -> None:
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        folder, tiny.lm("opt"), tokenizer=tiny.tokenizer()
    )
    assert processor.image_transform.mode == "squash"
    inputs = processor(images=[[tiny.picture(0, 40)]], text=["<image>a"])
    model.save_pretrained(tmp_path / "saved")
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert isinstance(again.vision_encoder.tower, type(model.vision_encoder.tower))


def test_transformers_folders(tmp_path: Path) -> None:
    tiny.vision().save_pretrained(tmp_path / "vision")
    tiny.lm("llama").save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    encoder, config = load_vision(tmp_path / "vision")
    assert isinstance(encoder, CLIPVisionModel)
    assert (config.kind, config.width, config.image_size) == ("transformers", 24, tiny.SIZE)
    pixels = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(patch_tokens(encoder, pixels), encoder(pixels).last_hidden_state[:, 1:])
    lm, tokenizer = load_language(tmp_path / "lm")
    assert isinstance(lm, LlamaForCausalLM)
    assert len(tokenizer) == tiny.TOKENS


def test_quick_gelu_follows_the_weights() -> None:
    """ViT-L-14 is the plain architecture; OpenAI's weights for it are not."""
    assert open_clip_config("ViT-L-14").arch["quick_gelu"] is False  # type: ignore[index]
    assert open_clip_config("ViT-L-14", "openai").arch["quick_gelu"] is True  # type: ignore[index]
    assert open_clip_config("ViT-L-14-quickgelu").arch["quick_gelu"] is True  # type: ignore[index]
    assert open_clip_config("ViT-L-14").width == 1024


def test_encoder_normalises_uint8_only_and_has_no_gradient() -> None:
    config = VisionConfig(kind="transformers", width=24, image_size=tiny.SIZE, mean=(0.5, 0.5, 0.5), std=(0.25,) * 3)
    encoder = VisionEncoder(tiny.vision(), config)
    raw = tiny.picture(0)[None, None]
    torch.testing.assert_close(encoder(raw), encoder((raw.float() / 255 - 0.5) / 0.25))
    encoder.requires_grad_(False)
    assert not encoder(raw).requires_grad
    encoder.requires_grad_(True)
    assert encoder(raw).requires_grad


def test_tokens_do_not_depend_on_the_rows_that_show_the_image() -> None:
    """In bf16 two kernels differ in their last bits; which one runs must not follow from the text's length."""
    config = VisionConfig(kind="transformers", width=24, image_size=tiny.SIZE, mean=(0.5, 0.5, 0.5), std=(0.25,) * 3)
    encoder = VisionEncoder(tiny.vision().bfloat16(), config).requires_grad_(False)
    raw = tiny.picture(0)[None, None]
    with training_kernel(torch.zeros(2, 8), raw.device, in_bf16=True):
        inside = encoder(raw)
        plain = patch_tokens(encoder.tower, ((raw[0].float() / 255 - 0.5) / 0.25).bfloat16())
    assert torch.equal(inside, encoder(raw))
    assert not torch.equal(inside[0], plain)


def test_mistakes_are_one_sentence(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="holds no vision encoder"):
        load_vision(empty)
    with pytest.raises(UserError, match="needs image_size"):
        load_vision(tiny.vision())
    with pytest.raises(UserError, match="needs tokenizer"):
        load_language(tiny.lm("opt"))
    with pytest.raises(UserError, match="does not hold a usable language model"):
        load_language(empty)
    with pytest.raises(UserError, match="CLIPVisionModel does not take images of 42 px"):
        load_vision(tiny.vision(), image_size=42)
    with pytest.raises(UserError, match="no weights 'opnai'"):
        load_vision("ViT-L-14", pretrained="opnai")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights; open_clip_model\.safetensors is missing"):
        load_vision(folder)


OFFLINE = """
from flamingo.backbones import load_language, load_vision
from flamingo.errors import UserError
for load in (lambda: load_vision("ViT-B-32", pretrained="openai"), lambda: load_vision("some/encoder"),
             lambda: load_language("some/model")):
    try:
        load()
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_name_without_the_network_is_refused_at_once(tmp_path: Path) -> None:
    """In a process of its own, because the hub library reads its environment when it is imported."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, cwd=Path(__file__).parents[2], text=True, capture_output=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr
    assert all("network is not reachable" in line for line in lines)
