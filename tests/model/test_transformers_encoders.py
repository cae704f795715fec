"""transformers' vision models: tokens on either side of the final norm, and other sizes than their own."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.backbones import load_vision
from flamingo.vision.encoder import patch_tokens
from flamingo.vision.resize import resize_encoder
from tests.model import tiny
from tests.model.test_encoders import PATCH, SIZE, WIDTH, open_clip_encoder, pixels

SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
CONVOLUTIONS: dict[str, Any] = {"hidden_sizes": [8, 16, 24, WIDTH], "depths": [1, 1, 1, 1], "image_size": SIZE}
# name -> (config, tokens in front of the patches', positions are interpolated here)
ENCODERS: dict[str, tuple[type[PreTrainedConfig], int, bool]] = {
    "CLIP": (CLIPVisionConfig, 1, True),
    "SigLIP": (SiglipVisionConfig, 0, True),
    "ViT": (ViTConfig, 1, True),
    "DeiT": (DeiTConfig, 2, True),
    "I-JEPA": (IJepaConfig, 0, True),
    "BEiT": (BeitConfig, 1, False),
    "DINOv2": (Dinov2Config, 1, False),
    "DINOv2 with registers": (Dinov2WithRegistersConfig, 5, False),
    "DINOv3": (DINOv3ViTConfig, 5, False),
    "ConvNeXt": (ConvNextConfig, 0, False),
}
RESIZED = [name for name, (_, _, resized) in ENCODERS.items() if resized]


def tiny_encoder(name: str) -> Any:
    """A tiny one whose norms are not the identity."""
    kind = ENCODERS[name][0]
    options = CONVOLUTIONS if name == "ConvNeXt" else dict(SMALL)
    if name == "DINOv3":
        options |= {"num_register_tokens": 4}
    torch.manual_seed(0)
    encoder = AutoModel.from_config(kind(**options))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


def flat(tokens: Tensor, prefix: int) -> Tensor:
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens[:, prefix:]


def norm_of(encoder: Any) -> Any:
    return getattr(encoder, "post_layernorm", None) or getattr(encoder, "layernorm", None) or encoder.norm


@pytest.mark.parametrize("name", ENCODERS)
def test_the_switch_decides_on_which_side_of_the_final_norm(name: str) -> None:
    """Whatever `last_hidden_state` is: transformers' own record of its layers is the reference."""
    encoder, prefix = tiny_encoder(name), ENCODERS[name][1]
    with torch.no_grad():
        last = flat(encoder(pixels(), output_hidden_states=True).hidden_states[-1], prefix)
        torch.testing.assert_close(patch_tokens(encoder, pixels()), last)
        after = patch_tokens(encoder, pixels(), final_norm=True)
        if name != "BEiT":  # pools its patches, and norms only what it has pooled
            torch.testing.assert_close(after, norm_of(encoder)(last))
            assert float((after - last).abs().max()) > 1e-2
        if prefix:
            whole = patch_tokens(encoder, pixels(), class_token=True)
            torch.testing.assert_close(whole[:, prefix:], last)
            assert whole.shape[1] == last.shape[1] + prefix


def test_two_threads_ask_for_either_side() -> None:
    encoder = tiny_encoder("SigLIP")
    wanted = {norm: patch_tokens(encoder, pixels(), final_norm=norm) for norm in (True, False)}
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    barrier = threading.Barrier(2)

    def met(*_: Any) -> None:
        barrier.wait(timeout=60)

    encoder.embeddings.register_forward_hook(met)

    def ask(norm: bool) -> None:
        for _ in range(5):
            found[norm].append(patch_tokens(encoder, pixels(), final_norm=norm))

    threads = [threading.Thread(target=ask, args=(norm,)) for norm in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for norm, values in found.items():
        assert len(values) == 5
        assert all(torch.equal(value, wanted[norm]) for value in values)


def test_siglip_is_the_same_by_way_of_either_library() -> None:
    """open_clip builds it of timm's ViT, transformers by itself; the same weights give the same tokens."""
    theirs = open_clip_encoder("SigLIP")
    weights = theirs.trunk.state_dict()
    config = SiglipVisionConfig(
        **{**SMALL, "intermediate_size": 4 * WIDTH, "hidden_act": "gelu"}, vision_use_head=False
    )
    ours: Any = AutoModel.from_config(config).eval()
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp": "mlp"}
    own: dict[str, Tensor] = {"embeddings.position_embedding.weight": weights["pos_embed"][0]}
    for end in ("weight", "bias"):
        own[f"embeddings.patch_embedding.{end}"] = weights[f"patch_embed.proj.{end}"]
        own[f"post_layernorm.{end}"] = weights[f"norm.{end}"]
        for i in range(SMALL["num_hidden_layers"]):
            parts = weights[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                own[f"encoder.layers.{i}.self_attn.{part}_proj.{end}"] = value
    for key, value in weights.items():
        for source, target in names.items():
            if key.startswith("blocks.") and f".{source}." in key:
                own[key.replace("blocks.", "encoder.layers.").replace(f".{source}.", f".{target}.")] = value
    ours.load_state_dict(own)
    with torch.no_grad():
        for norm in (False, True):
            torch.testing.assert_close(
                patch_tokens(ours, pixels(), final_norm=norm), patch_tokens(theirs, pixels(), final_norm=norm)
            )


@pytest.mark.parametrize("size", [96, 48, 70])
@pytest.mark.parametrize("name", RESIZED)
def test_without_antialiasing_positions_are_transformers_own(name: str, size: int) -> None:
    theirs, prefix = tiny_encoder(name), ENCODERS[name][1]
    ours = copy.deepcopy(theirs)
    resize_encoder(ours, size, antialias=False)
    with torch.no_grad():
        options: dict[str, Any] = {"output_hidden_states": True, "interpolate_pos_encoding": True}
        wanted = flat(theirs(pixels(size), **options).hidden_states[-1], prefix)
        torch.testing.assert_close(patch_tokens(ours, pixels(size)), wanted)
        smooth = copy.deepcopy(theirs)
        resize_encoder(smooth, size)
        off = float((patch_tokens(smooth, pixels(size)) - wanted).abs().max())
        assert (off > 1e-4) == (size != 70)  # which is 4 x 4 patches, as 64 is
    assert ours.config.image_size == size


@pytest.mark.parametrize("name", ENCODERS)
def test_another_size_in_a_flamingo(name: str, tmp_path: Path) -> None:
    """Right tokens, and the same after saving and loading; a width that no patch divides loses its rest."""
    tiny_encoder(name).save_pretrained(tmp_path / "encoder")
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        tmp_path / "encoder", tiny.lm("opt"), tokenizer=tiny.tokenizer(), image_size=96
    )
    inputs = processor(images=[[tiny.picture(0, 80)]], text=["<image>a"])
    features = model.vision_encoder(inputs["pixel_values"])
    assert features.shape == (1, 1, 9 if name == "ConvNeXt" else (96 // PATCH) ** 2, WIDTH)
    model.save_pretrained(tmp_path / "saved")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.vision_encoder(inputs["pixel_values"]), features, rtol=0, atol=0)


class Own(nn.Module):
    """Learned positions under a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.where = nn.Parameter(torch.randn(16, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).flatten(2).transpose(1, 2) + self.where


def test_what_cannot_be_resized_says_so() -> None:
    with pytest.raises(UserError, match=r"Own does not take .* 96 px .* not of a kind that is interpolated here"):
        resize_encoder(Own(), 96)
    with pytest.raises(UserError, match="image_size=8 is smaller than the encoder's patch, 16 px"):
        resize_encoder(tiny_encoder("ViT"), 8)
    oblong = tiny_encoder("ViT")
    oblong.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 16, WIDTH))  # 3 x 5 patches
    with pytest.raises(UserError, match="ViTModel does not take images of 96 px"):
        resize_encoder(oblong, 96)


def test_options_of_an_encoder_that_is_named(tmp_path: Path) -> None:
    tiny_encoder("ViT").save_pretrained(tmp_path)
    encoder, config = load_vision(tmp_path, class_token=True, final_norm=True, resize_mode="squash")
    assert (config.class_token, config.final_norm, config.resize_mode) == (True, True, "squash")
    assert patch_tokens(encoder, pixels(), class_token=True).shape[1] == 17
    with pytest.raises(UserError, match=r"vision_options\.norm is not an option; known are mean, std, resize_mode"):
        load_vision(tmp_path, norm=True)
    with pytest.raises(UserError, match="final_norm is for open_clip's encoders and CLIP and its kin"):
        load_vision(Own(), image_size=SIZE, final_norm=True)
