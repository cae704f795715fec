"""Fingerprints of what is not in a checkpoint: frozen weights, shapes, the tokenizer.

A checkpoint of trained tensors is useless, and silently so, beside another encoder, LM or tokenizer. Folders may move,
so these are compared by content and not by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flamingo.fingerprints import fingerprint, hash_tensors
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.pretrained import PARTS

# Of a config, what says nothing of the shape: where it came from, who wrote it, how it is stored and computed.
_INCIDENTAL = re.compile(r"_?(name_or_path|commit_hash|attn_implementation\w*|experts_implementation\w*)")
_INCIDENTAL_KEYS = {"name", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"}


def trained_fingerprint(module: nn.Module) -> str:
    """Return a short hash of the weights that train, as they are before the first update or the checkpoint's."""
    return hash_tensors({name: weight for name, weight in module.named_parameters() if weight.requires_grad})


def frozen_fingerprints(
    model: FlamingoForConditionalGeneration, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str]:
    """Return the fingerprint of each part that is frozen, by its name, of the config and of the tokenizer."""
    modules = {part: getattr(model, attribute) for attribute, part in PARTS.items()}
    modules["vision"] = model.vision_encoder.tower
    frozen = {part: fingerprint(module) for part, module in modules.items() if model.policy[part] == "frozen"}
    if tokenizer is not None:
        frozen["tokenizer"] = tokenizer_fingerprint(tokenizer)
    return {**frozen, "config": config_fingerprint(model.config)}


class FrozenWeights:
    """What the weights that do not train are before a run, to show after it that they still are.

    A run may keep them in float32 or in bfloat16, so each is known in both; buffers, as of batch norms, are among them.
    """

    def __init__(self, model: FlamingoForConditionalGeneration) -> None:
        every = model.named_parameters(remove_duplicate=False)  # a tied one has several names
        trained = {name for name, weight in every if weight.requires_grad}
        self._before = {
            name: [hash_tensors({name: value}, dtype) for dtype in (torch.float32, torch.bfloat16)]
            for name, value in model.state_dict().items()
            if name not in trained
        }
        self._parts = [part for part, policy in model.policy.items() if policy == "frozen"]

    def require_unchanged(self, weights: Mapping[str, Tensor]) -> str:
        """Return a sentence that says what is unchanged.

        Raises:
            RuntimeError: a weight is missing or another than before; this is a fault of the library.
        """
        odd = [
            name
            for name, before in self._before.items()
            if name not in weights or hash_tensors({name: weights[name]}, weights[name].dtype) not in before
        ]
        if odd:
            raise RuntimeError(
                f"{len(odd)} frozen weights are not what they were before the run, the first is {odd[0]}: the model is "
                "not written; its checkpoint is there. Please report this"
            )
        return f"frozen, and bit for bit as before: {', '.join(self._parts)}" if self._parts else ""


def config_fingerprint(config: PreTrainedConfig) -> str:
    """Return a short hash of a model's config, without what says nothing of its shape."""
    return _digest(_shape_of(config.to_dict()))


def _shape_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if key not in _INCIDENTAL_KEYS}
        return {str(key): _shape_of(inner) for key, inner in kept.items() if not _INCIDENTAL.fullmatch(str(key))}
    return [_shape_of(inner) for inner in value] if isinstance(value, list | tuple) else value


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short hash of what a tokenizer does: its vocabulary and rules, and the ids of its special tokens."""
    rules: Any = sorted(tokenizer.get_vocab().items())
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}  # of a call
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return _digest([rules, ids])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
