"""Fingerprints of frozen weights: they are not in a checkpoint, so it has to say whose they were.

A checkpoint of trained tensors is useless, and silently so, beside another encoder or LM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flamingo.modeling import FlamingoForConditionalGeneration


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


def frozen_fingerprints(model: FlamingoForConditionalGeneration) -> dict[str, str]:
    """Return the fingerprint of each backbone that is frozen, by the name of its part."""
    parts = {"vision": model.vision_encoder.tower, "language": model.language_model}
    return {part: fingerprint(module) for part, module in parts.items() if model.policy[part] == "frozen"}
