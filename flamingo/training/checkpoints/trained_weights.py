"""What was trained, and a manifest that says for which backbones it is.

A checkpoint of trained tensors is useless, and silently so, beside another encoder or LM. The manifest
therefore holds a fingerprint of each frozen part (its configuration and the values of a few of its tensors), and
loading compares before it copies anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flamingo.errors import UserError
from flamingo.modeling import FlamingoForConditionalGeneration

MANIFEST, TENSORS = "manifest.json", "trained.safetensors"
FORMAT = 1


def fingerprint(module: nn.Module, config: Mapping[str, Any] | None = None, *, tensors: int = 4) -> str:
    """Return a short hash of a module: its config, the names and shapes of its weights, and some of their values.

    Values are taken in bfloat16 from `tensors` weights spread over the module, at most 4096 of each, so that a module
    stored in bfloat16 and its float32 original have one fingerprint, and a large LM is not read through.
    """
    state = module.state_dict()
    digest = hashlib.sha256(json.dumps(config or {}, sort_keys=True, default=str).encode())
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
    names = [name for name in sorted(state) if state[name].is_floating_point() and state[name].ndim >= 2]
    for name in names[:: max(1, len(names) // tensors)]:
        flat = state[name].detach().flatten()
        values = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def manifest_of(model: FlamingoForConditionalGeneration) -> dict[str, Any]:
    """Return what a checkpoint of this model has to say about it."""
    config = model.config
    parts = {"vision": model.vision_encoder.tower, "language": model.language_model}
    return {
        "format": FORMAT,
        "policy": dict(model.policy),
        "vision": {"name": config.vision.name, "kind": config.vision.kind, "width": config.vision.width},
        "language": {"name": model.language_model.name_or_path, "type": type(model.language_model).__name__},
        "tokenizer": {
            "image_token_id": config.image_token_id,
            "eoc_token_id": config.eoc_token_id,
            "new_token_ids": config.new_token_ids,
        },
        "resampler": config.resampler_config,
        "cross_attention": config.cross_attention_config,
        "cross_attn_layers": config.cross_attn_layers,
        "fingerprints": {part: fingerprint(module) for part, module in parts.items() if model.policy[part] == "frozen"},
    }


def save_trained(
    model: FlamingoForConditionalGeneration, folder: str | Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the parameters that train and a manifest; `tensors` are those parameters if they are gathered already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = {name: parameter.detach() for name, parameter in model.trainable_parameters()}
    save_file({name: value.to("cpu").contiguous() for name, value in tensors.items()}, folder / TENSORS)
    (folder / MANIFEST).write_text(json.dumps(manifest_of(model), indent=2) + "\n")


def load_trained(model: FlamingoForConditionalGeneration, folder: str | Path) -> None:
    """Copy a checkpoint's tensors into a model with the same backbones; nothing is copied unless everything fits.

    Raises:
        UserError: a file is missing or broken, another LM, encoder or tokenizer, a name or shape that does not fit.
    """
    folder = Path(folder)
    for name in (MANIFEST, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a checkpoint: {name} is missing")
    try:
        saved = json.loads((folder / MANIFEST).read_text())
        tensors = load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from error
    _compare(saved, model, folder)
    own = dict(model.named_parameters())
    expected = {name for name in own if saved["policy"][model.part_of(name)] == "train"}
    if missing := sorted(expected - set(tensors)):
        raise UserError(f"the checkpoint {folder} lacks {missing[0]} (and {len(missing) - 1} more)")
    if unknown := sorted(set(tensors) - set(own)):
        raise UserError(f"the checkpoint {folder} has {unknown[0]}, which this model does not")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)} in {folder} but {tuple(own[name].shape)} in this model"
            )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _compare(saved: dict[str, Any], model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Refuse a checkpoint of other backbones, naming what differs."""
    if saved.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} has format {saved.get('format')!r}; this version reads {FORMAT}")
    parts = {"vision": model.vision_encoder.tower, "language": model.language_model}
    titles = {"vision": "vision encoder", "language": "language model"}
    current = manifest_of(model)
    for part, expected in saved["fingerprints"].items():
        if (found := fingerprint(parts[part])) != expected:
            was, here = (m[part].get("name") or m[part].get("type") or "?" for m in (saved, current))
            raise UserError(
                f"the checkpoint {folder} belongs to another {titles[part]}: it was trained with {was!r} "
                f"(fingerprint {expected}), this model has {here!r} ({found}); build the model with the former"
            )
    for key in ("tokenizer", "cross_attn_layers"):
        if saved[key] != current[key]:
            raise UserError(f"the checkpoint {folder} has {key} {saved[key]}, this model {current[key]}")
