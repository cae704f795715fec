"""Small random models of the projects whose numbers must come out, and their files in the released layout."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MptConfig

from tests.model import tiny

SIZE = 28
ARCH: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "quick_gelu": True,
}
FAMILIES = ["opt", "llama", "gpt_neox", "mpt"]
EOC, IMAGE = "<|endofchunk|>", "<image>"


def open_flamingo() -> ModuleType:
    """The peer's package, or a skip that says how to get it."""
    try:
        return importlib.import_module("open_flamingo")
    except ImportError:
        pytest.skip("open_flamingo is not installed: pip install --no-deps -r requirements-peers.txt (`make setup`)")


def randomise(module: nn.Module, seed: int, scale: float = 0.2) -> Any:
    """Weights that matter everywhere: matrices of `scale`, gates open and different, norms away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("_gate") or ".alpha_" in name:
                parameter.copy_(0.6 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(scale * noise)
    return module.eval()


def gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def language(family: str, vocab: int = tiny.TOKENS) -> Any:
    """A base LM as its own folder on the hub would give it."""
    if family == "mpt":
        config = MptConfig(d_model=32, n_heads=2, n_layers=4, max_seq_len=128, vocab_size=vocab)
        torch.manual_seed(0)
        return randomise(AutoModelForCausalLM.from_config(config), 0)
    return tiny.lm(family, vocab)


def clip() -> Any:
    torch.manual_seed(1)
    return randomise(open_clip.CLIP(**ARCH, text_cfg=TEXT_CFG), 1)


TEXT_CFG = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


class RawTokens(nn.Module):
    """open_clip's encoder as the releases were trained with it: (pooled, patch tokens before the final norm)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.visual.transformer(self.visual._embeds(pixels))
        return tokens[:, 0], tokens[:, 1:]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.visual.state_dict(*args, **kwargs)


class Clip(nn.Module):
    """What open_flamingo takes as its encoder: something with `visual`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual


def source_tokenizer() -> Any:
    """The tokenizer after open_flamingo's factory has added its tokens, in its order."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [EOC, IMAGE]})
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def flamingo(family: str, every: int, *, vocab: int = tiny.TOKENS) -> tuple[Any, Any]:
    """open_flamingo's model built as its factory does, without the network, and its tokenizer."""
    package = open_flamingo()
    factory, utils = (importlib.import_module(f"{package.__name__}.src.{name}") for name in ("factory", "utils"))
    tokenizer, lm = source_tokenizer(), language(family, vocab)
    utils.extend_instance(lm, factory.FlamingoLMMixin)
    names = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
    lm.set_decoder_layers_attr_name(names.get(family) or factory._infer_decoder_layers_attr_name(lm))
    # The table is as long as the tokenizer, though the LM may have had rows to spare.
    lm.resize_token_embeddings(len(tokenizer))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (EOC, IMAGE)]
    width = ARCH["vision_cfg"]["width"]
    model = package.Flamingo(Clip(RawTokens(clip().visual)), lm, *ids, vis_dim=width, cross_attn_every_n_layers=every)
    randomise(model.perceiver, 2)
    randomise(lm.gated_cross_attn_layers, 3)
    model.requires_grad_(False)
    for part in (model.perceiver, lm.gated_cross_attn_layers, lm.get_input_embeddings()):
        part.requires_grad_(True)
    with torch.no_grad():  # the rows that training moves
        lm.get_input_embeddings().weight[ids].normal_(0, 0.3)
    return model.eval(), tokenizer


def trained_only(model: Any, *, head: bool = False) -> dict[str, Tensor]:
    """The state dict that open_flamingo saves, by the rules of its filter (which wants a logging service to import).

    `head`: with a frozen head called `lm_head`, which the filter drops together with its new rows (LLaMA).
    """
    state = dict(model.state_dict())
    if model.lang_encoder.config.model_type == "gpt_neox":  # of that time; has "embed" in its name, so is kept
        state["lang_encoder.embed_out.weight"] = state.pop("lang_encoder.lm_head.weight")
    for name, parameter in model.named_parameters():
        kept = "embed" in name or (head and "lm_head" in name)
        if not kept and not parameter.requires_grad:
            state.pop(name.replace("vision_encoder.visual.", "vision_encoder."), None)
    dropped = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", "vision_encoder")
    return {name: value.clone() for name, value in state.items() if not any(part in name for part in dropped)}


def exact_norms(model: nn.Module) -> nn.Module:
    """Put torch's RMSNorm, which computes in the dtype of its input, for transformers', which compute in float32."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                weight: Any = child.weight
                norm = nn.RMSNorm(len(weight), eps=float(child.variance_epsilon), dtype=weight.dtype)  # type: ignore[arg-type]
                norm.weight = weight
                setattr(module, name, norm)
    return model


def plain_gelu(visual: Any) -> Any:
    """The encoder with the activation that open_clip 3 builds for a name without `quickgelu`."""
    for module in visual.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "QuickGELU":
                setattr(module, name, nn.GELU())
    return visual
