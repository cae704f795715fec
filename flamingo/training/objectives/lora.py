"""Low-rank adapters in the frozen language model and in frozen gated blocks, through peft.

Only the linear layers are exchanged, so the LM keeps its class and the gated blocks their hooks. The adapters
train in fp32 beside a base that may be stored in bf16, and what a run writes is an ordinary model with the adapters
added into its weights, which loads without peft; the adapters alone lie beside it in peft's own format.

Hu et al. 2021: y = W x + (alpha / rank) B A x, with B starting at zero, so the model starts as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flamingo.errors import UserError
from flamingo.language.hooks import find_decoder_layers

ADAPTER = "adapter"
"""Folder beside an exported model with the adapters alone."""
_BASE = re.compile(r"(.*)\.base_layer\.(\w+)$")
_LOW_RANK = re.compile(r"(.*)\.lora_([AB])\.default\.weight$")


def linear_layers(lm: PreTrainedModel, targets: list[str] | None, layers_path: str | None = None) -> list[str]:
    """Return the names of the linear layers that get an adapter: all of the decoder layers, or those named.

    Raises:
        UserError: a target that no decoder layer has; names those there are.
    """
    inside = {id(part) for layer in find_decoder_layers(lm, layers_path) for part in layer.modules()}
    names = [name for name, part in lm.named_modules() if isinstance(part, nn.Linear | Conv1D) and id(part) in inside]
    known = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in targets or ():
        if target not in known:
            raise UserError(
                f"model.lora.targets: {target} is not a linear layer of {type(lm).__name__}'s decoder layers; "
                f"they have {', '.join(known)}"
            )
    return [name for name in names if targets is None or name.rsplit(".", 1)[-1] in targets]


def add_adapters(
    lm: PreTrainedModel, *, rank: int, alpha: float, targets: list[str] | None = None, layers_path: str | None = None
) -> Any:
    """Put an adapter on each chosen linear layer, in place; return peft's config. Only the adapters train.

    Raises:
        UserError: peft is missing, or a target that does not exist.
    """
    return _inject(lm, linear_layers(lm, targets, layers_path), rank, alpha)


def add_block_adapters(blocks: nn.ModuleDict, *, rank: int, alpha: float) -> Any:
    """Put an adapter on every linear layer of the gated blocks, in place; return peft's config.

    Raises:
        UserError: peft is missing.
    """
    names = [name for name, part in blocks.named_modules() if isinstance(part, nn.Linear)]
    return _inject(blocks, names, rank, alpha)


def _inject(module: nn.Module, names: list[str], rank: int, alpha: float) -> Any:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("model.freeze.language=lora needs peft: pip install 'flamingo-vlm[run]'") from error
    transposed = any(isinstance(module.get_submodule(name), Conv1D) for name in names)
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": names, "fan_in_fan_out": transposed}
    config = LoraConfig(**options)
    inject_adapter_in_model(config, module)
    return config


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model answer as it was before its adapters, for a while.

    peft's own switch also stops the adapters from training, which a sharded weight does not take back.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge(weights: Mapping[str, Tensor], configs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict without adapters: each is added into the weight that it adapts.

    `configs` are peft's, by the beginning of the names of the weights that they are for.
    """
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _LOW_RANK.match(name):
            continue
        if not (base := _BASE.match(name)):
            merged[name] = value
            continue
        stem, leaf = base.groups()
        if leaf == "weight":
            config = next(config for prefix, config in configs.items() if name.startswith(prefix))
            scale = config.lora_alpha / config.r
            down, up = (weights[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")
            update = scale * (up @ down)
            value = (value.float() + (update.T if config.fan_in_fan_out else update)).to(value.dtype)
        merged[f"{stem}.{leaf}"] = value
    return merged


def save_adapters(weights: Mapping[str, Tensor], config: Any, prefix: str, folder: Path) -> None:
    """Write the adapters for `peft.PeftModel.from_pretrained(lm, folder)`; `prefix` is where `weights` has the LM."""
    tensors = {}
    for name, value in weights.items():
        if (match := _LOW_RANK.match(name)) and name.startswith(prefix):
            inside = match[1].removeprefix(prefix)
            tensors[f"base_model.model.{inside}.lora_{match[2]}.weight"] = value.to(torch.float32).contiguous()
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
