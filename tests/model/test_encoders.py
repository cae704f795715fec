"""Encoders of every library, small: their tokens, another resolution, and save and load in a Flamingo."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.backbones import load_vision
from flamingo.config import VisionConfig
from flamingo.vision.encoder import build_encoder, patch_tokens
from flamingo.vision.resize import resize_encoder, resized_positions
from tests.model import tiny

SIZE, PATCH, WIDTH = 64, 16, 32
SMALL: dict[str, Any] = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": SIZE}


@register_model
def flamingo_tiny_eva02(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As EVA02's CLIP encoders are: rotary positions in a buffer that no checkpoint has."""
    own = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "swiglu_mlp": True, "scale_mlp": True}
    return _create_eva("eva02_tiny_patch14_224", pretrained=pretrained, **{**SMALL, **own, **kwargs})


@register_model
def flamingo_tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    own = {"class_token": False, "global_pool": "map"}
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224", pretrained=pretrained, **{**SMALL, **own, **kwargs}
    )


VIT = {"image_size": SIZE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH}
TIMM = {"image_size": SIZE, "timm_proj": "linear", "timm_pool": ""}
# name -> (config of the open_clip encoder, tokens at 64 px, their width)
OPEN_CLIP_ENCODERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "ViT": (VIT, 16, WIDTH),
    "CoCa": ({**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}, 16, WIDTH),
    "EVA": (
        {"image_size": SIZE, "timm_model_name": "flamingo_tiny_eva02", "timm_pool": "token", "timm_proj": ""},
        16,
        WIDTH,
    ),
    "SigLIP": (
        {"image_size": SIZE, "timm_model_name": "flamingo_tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        16,
        WIDTH,
    ),
    "ConvNeXt": ({**TIMM, "timm_model_name": "test_convnext"}, 4, 64),
    "NFNet": ({**TIMM, "timm_model_name": "test_nfnet"}, 4, 192),
}


def arch(name: str, **options: Any) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": {**OPEN_CLIP_ENCODERS[name][0], **options}, "quick_gelu": name == "ViT"}


def open_clip_encoder(name: str) -> Any:
    torch.manual_seed(0)
    config = VisionConfig(kind="open_clip", arch=arch(name), image_size=SIZE, width=1)
    return build_encoder(config).eval()


def transformers_encoder(name: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH}
    if name == "CLIP":
        return CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**sizes)).eval()


def folder_of(name: str, path: Path) -> Path:
    """The encoder as open_clip lays a model out in a folder."""
    visual = {f"visual.{key}": value.contiguous() for key, value in open_clip_encoder(name).state_dict().items()}
    save_file(visual, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": arch(name)}))
    return path


def pixels(size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", OPEN_CLIP_ENCODERS)
@pytest.mark.parametrize("size", [SIZE, 96])
def test_open_clip_in_a_flamingo(name: str, size: int, tmp_path: Path) -> None:
    """Right tokens at either size, and the same after saving and loading, rotary and other unsaved buffers included."""
    _, tokens, width = OPEN_CLIP_ENCODERS[name]
    (tmp_path / "encoder").mkdir()
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        folder_of(name, tmp_path / "encoder"), tiny.lm("opt"), tokenizer=tiny.tokenizer(), image_size=size
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_gate"):
                parameter.fill_(0.7)
    assert (model.config.vision.image_size, model.config.vision.width) == (size, width)
    inputs = processor(images=[[tiny.picture(0, 80)]], text=["<image>a"])
    features = model.vision_encoder(inputs["pixel_values"])
    assert features.shape == (1, 1, tokens * (size // 32) ** 2 // 4, width)
    assert float(features.std(dim=2).mean()) > 1e-3
    model.save_pretrained(tmp_path / "saved")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.vision_encoder(inputs["pixel_values"]), features)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
@pytest.mark.parametrize("size", [SIZE, 96])
def test_transformers_in_a_flamingo(name: str, size: int, tmp_path: Path) -> None:
    transformers_encoder(name).save_pretrained(tmp_path / "encoder")
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        tmp_path / "encoder", tiny.lm("opt"), tokenizer=tiny.tokenizer(), image_size=size
    )
    inputs = processor(images=[[tiny.picture(0, 80)]], text=["<image>a"])
    features = model.vision_encoder(inputs["pixel_values"])
    assert features.shape == (1, 1, (size // PATCH) ** 2, WIDTH)
    model.save_pretrained(tmp_path / "saved")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.vision_encoder(inputs["pixel_values"]), features)


@pytest.mark.parametrize("size", [96, 48, 70])
def test_positions_are_interpolated_as_open_clip_does(size: int, tmp_path: Path) -> None:
    """Larger, smaller, and no multiple of the patch; open_clip's own loading with another size is the reference."""
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=VIT, text_cfg=text, quick_gelu=True)
    document = {"model_cfg": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text, "quick_gelu": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    weights = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).visual.eval()
    ours, config = load_vision(tmp_path, image_size=size)
    assert config.image_size == size
    with torch.no_grad():
        assert torch.equal(patch_tokens(ours, pixels(size)), patch_tokens(theirs, pixels(size)))
        assert patch_tokens(ours, pixels(size)).shape[1] == (size // PATCH) ** 2


def test_positions_of_transformers_are_those_of_open_clip() -> None:
    clip, siglip = transformers_encoder("CLIP"), transformers_encoder("SigLIP")
    for encoder, prefix in ((clip, 1), (siglip, 0)):
        before = copy.deepcopy(encoder.embeddings.position_embedding.weight)
        resize_encoder(encoder, 96)
        after = encoder.embeddings.position_embedding.weight
        torch.testing.assert_close(after, resized_positions(before, 6, prefix=prefix))
        assert torch.equal(after[:prefix], before[:prefix])
        assert encoder.config.image_size == 96
    with torch.no_grad():
        assert patch_tokens(clip, pixels(96)).shape == (2, 36, WIDTH)
    # An image that changes slowly is kept: the middle of the grid, away from its edges, to which a ramp is linear.
    ramp = torch.arange(8.0)[:, None].expand(8, 8).reshape(64, 1)
    larger = resized_positions(ramp, 16, prefix=0).view(16, 16)
    torch.testing.assert_close(larger[4:12, 3], (torch.arange(4.0, 12) + 0.5) / 2 - 0.5, rtol=0, atol=1e-4)


def test_timm_by_name_and_bare() -> None:
    """The paper's family: convolutions, so any size, and no final norm."""
    loaded: Any = load_vision("timm/test_nfnet", image_size=96)
    encoder, config = loaded
    assert (config.kind, config.image_size, config.width, config.mean) == ("open_clip", 96, 192, (0.5, 0.5, 0.5))
    bare: Any = timm.create_model("test_nfnet", num_classes=0)
    again: Any = build_encoder(config)
    for target in (bare, again.trunk):
        target.load_state_dict(encoder.trunk.state_dict())
    with torch.no_grad():
        wanted = bare.eval().forward_intermediates(pixels(96), intermediates_only=True)[-1].flatten(2).transpose(1, 2)
        for one in (encoder, bare, again.eval()):
            torch.testing.assert_close(patch_tokens(one, pixels(96)), wanted)
    built, described = load_vision(bare, image_size=96)
    assert built is bare
    assert (described.kind, described.width) == ("module", 192)
    assert timm.is_model("dm_nfnet_f6")


def test_timm_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source: Any = timm.create_model("test_nfnet")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    encoder, _ = load_vision("timm/test_nfnet", pretrained=str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(patch_tokens(encoder, pixels()), patch_tokens(source.eval(), pixels()))
    save_file({"stem.conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises((UserError, RuntimeError), match=r"does not fit|size mismatch"):
        load_vision("timm/test_nfnet", pretrained=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "test_resnet"])
def test_timm_weights_with_any_head(name: str, tmp_path: Path) -> None:
    """The classifier has another name in every family; nothing but it may be in the file beside the encoder."""
    torch.manual_seed(0)
    whole: dict[str, Any] = timm.create_model(name, num_classes=7).state_dict()
    file = tmp_path / "weights.safetensors"
    save_file(whole, file)
    encoder: Any = load_vision(f"timm/{name}", pretrained=str(file))[0]
    own = encoder.trunk.state_dict()
    assert 0 < len(whole.keys() - own.keys()) <= 4
    assert all(torch.equal(value, whole[key]) for key, value in own.items())
    torch.save(whole, tmp_path / "weights.pth")
    load_vision(f"timm/{name}", pretrained=str(tmp_path / "weights.pth"))
    first = next(iter(own))
    for changed, wrong in (
        ({**whole, "header.weight": torch.zeros(1)}, "header.weight"),
        ({key: value for key, value in whole.items() if key != first}, first),
        ({**whole, first: whole[first].flatten()}, first),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=rf"does not fit {name}: 1 keys differ, the first is {wrong}"):
            load_vision(f"timm/{name}", pretrained=str(file))


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "torn.pth").write_bytes(b"not weights")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "training.pth")
    for name, sentence in (("torn", "cannot be read as weights"), ("training", "is not a table of weights by name")):
        with pytest.raises(UserError, match=sentence):
            load_vision("timm/test_nfnet", pretrained=str(tmp_path / f"{name}.pth"))


def test_a_built_module_has_its_own_statistics() -> None:
    """timm's and open_clip's modules know how their images are normalised."""
    built, config = load_vision(timm.create_model("test_nfnet", num_classes=0))
    cfg: Any = built.pretrained_cfg
    assert (config.mean, config.std, config.image_size) == (cfg["mean"], cfg["std"], cfg["input_size"][-1])
    assert config.mean == (0.5, 0.5, 0.5)
    vit: Any = timm.create_model("test_vit", num_classes=0, img_size=96)
    assert load_vision(vit)[1].image_size == 96
    _, described = load_vision(built, image_size=96, mean=(0.1, 0.2, 0.3))
    assert (described.image_size, described.mean, described.std) == (96, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    visual: Any = open_clip_encoder("ViT")
    visual.preprocess_cfg = {"mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3), "resize_mode": "squash", "size": 64}
    _, described = load_vision(visual, image_size=SIZE)
    assert (described.mean, described.std, described.resize_mode) == ((0.4,) * 3, (0.3,) * 3, "squash")
    with pytest.raises(UserError, match="needs image_size="):
        load_vision(visual)
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        timm.create_model("test_nfnet", num_classes=0), tiny.lm("opt"), tokenizer=tiny.tokenizer()
    )
    assert processor.image_transform.mean == (0.5, 0.5, 0.5)
    assert torch.equal(model.vision_encoder.mean, torch.tensor([0.5, 0.5, 0.5]))


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: load_vision("timm/no_such_net"), "timm has no model 'no_such_net'"),
    (
        lambda: load_vision("timm/test_nfnet", pretrained="in22k"),
        "no weights 'in22k' for test_nfnet; known are r160_in1k",
    ),
    (lambda: load_vision("timm/test_nfnet", pretrained="r160_in1k"), "the network is not reachable"),
    (
        lambda: load_vision("timm/test_vit", image_size=100),
        "multiples of its patch, 16 px; image_size=100 is none, 96 is",
    ),
    (lambda: load_vision(open_clip_encoder("ViT"), image_size=96), "resize_encoder.module, 96. interpolates"),
]


@pytest.mark.parametrize(("load", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(load: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load()


def test_a_built_module_can_be_resized_first() -> None:
    encoder = open_clip_encoder("ViT")
    resize_encoder(encoder, 96)
    _, config = load_vision(encoder, image_size=96)
    assert (config.image_size, config.width) == (96, WIDTH)
