"""What the model has beside its forward pass: parts that are frozen or train, saving, recomputation.

Notable: a frozen part stays in eval mode when the model trains, so dropout never acts in it; and recomputation of
activations never asks the input embeddings for gradients, so nothing is kept or walked through below the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.config import FlamingoConfig
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.errors import UserError
from flamingo.hub import hub_reachable
from flamingo.language.hooks import CallState, NewTokens
from flamingo.layers.resampler import PerceiverResampler
from flamingo.vision.encoder import VisionEncoder, repair_buffers

PARTS = {
    "vision_encoder": "vision",
    "language_model": "language",
    "resampler": "resampler",
    "cross_attn_blocks": "cross_attention",
    "new_tokens": "new_tokens",
}
"""Attribute of the model -> name of the part in a freezing policy."""

PAPER_POLICY = {
    "vision": "frozen",
    "language": "frozen",
    "resampler": "train",
    "cross_attention": "train",
    "new_tokens": "train",
}
"""Which parts train: "frozen" or "train"."""


class FlamingoPreTrainedModel(PreTrainedModel):
    """Parts, freezing, saving and loading of `FlamingoForConditionalGeneration`."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedCrossAttentionBlock", "PerceiverLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    _state: CallState
    vision_encoder: VisionEncoder
    language_model: PreTrainedModel
    resampler: PerceiverResampler
    cross_attn_blocks: nn.ModuleDict
    new_tokens: NewTokens
    policy: dict[str, str]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint lacks; the backbones initialise themselves."""
        if isinstance(module, GatedCrossAttentionBlock):
            init.constant_(module.attn_gate, module.gate_init)
            init.constant_(module.ff_gate, module.gate_init)
        elif isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=module.init_std)
            if module.frame_embeddings is not None:
                init.normal_(module.frame_embeddings, std=module.init_std)
        elif isinstance(module, NewTokens):
            init.normal_(module.input_rows, std=0.02)
            if module.output_rows is not None:
                init.normal_(module.output_rows, std=0.02)
        repair_buffers(module)

    def freeze(self, policy: Mapping[str, str] | None = None) -> None:
        """Decide which parts train. Parts that `policy` does not name follow the paper's policy.

        Raises:
            UserError: an unknown part, or a value that is neither "frozen" nor "train".
        """
        for part, value in (policy or {}).items():
            if part not in PAPER_POLICY or value not in ("frozen", "train"):
                known = ", ".join(PAPER_POLICY)
                raise UserError(f"freezing policy {part}={value!r}: parts are {known}; values are 'frozen' and 'train'")
        self.policy = {**PAPER_POLICY, **(policy or {})}
        for attribute, part in PARTS.items():
            getattr(self, attribute).requires_grad_(self.policy[part] == "train")
        self.vision_encoder.frozen = self.policy["vision"] == "frozen"
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode; frozen parts stay in eval mode."""
        super().train(mode)
        for attribute, part in PARTS.items():
            if self.policy[part] == "frozen":
                getattr(self, attribute).eval()
        if mode and self.policy["language"] == "frozen":
            self._let_frozen_layers_recompute()
        return self

    def _let_frozen_layers_recompute(self) -> None:
        """Where recomputation is on, mark the frozen LM's layers as training: transformers recomputes no others.

        Only the layer object itself is marked, its modules stay in eval; a dropout rate that it applies by its own
        `training` flag is set to zero, so its output is that of eval mode.
        """
        for layer in self.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True
                for name, value in vars(layer).items():
                    if "drop" in name and isinstance(value, float):
                        setattr(layer, name, 0.0)

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # its name since transformers 5.23
        activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable  # type: ignore[assignment]

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        """Have LM layers, blocks and resampler layers recompute their activations in the backward pass, or not."""
        super()._set_gradient_checkpointing(enable, partial(self._recompute, gradient_checkpointing_func), **options)
        self.train(self.training)

    def _recompute(self, recompute: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
        """Run a layer whose hooks know of this call again when they run again, as before transformers 5.23 they do."""
        call = self._state.call

        def again(*args: Any) -> Any:
            with self._state.running(call):
                return layer(*args)

        return recompute(again, *args)

    def enable_input_require_grads(self) -> None:
        """Do nothing: non-reentrant recomputation does not need it, and it would walk back through frozen layers."""

    def part_of(self, name: str) -> str:
        """Return the part ("vision", "language", "resampler", ...) that a parameter's name belongs to."""
        return PARTS[name.split(".", 1)[0]]

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of everything that trains."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *args: Any, vision: nn.Module | None = None, language: Any = None, **options: Any
    ) -> Any:
        """Load what `save_pretrained` wrote; `vision` and `language` are built modules where the config has none.

        Raises:
            UserError: the folder holds no `config.json`, or a name needs a network that is not there.
        """
        if not (Path(folder) / "config.json").is_file() and (Path(folder).exists() or not hub_reachable()):
            raise UserError(
                f"{folder} holds no model (config.json is missing), and the hub is not reachable or not meant"
            )
        built = {"vision_tower": vision, "causal_lm": language}
        options |= {name: module for name, module in built.items() if module is not None}
        loaded = super().from_pretrained(folder, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze(model.policy)  # loading makes some parameters anew, and those would train
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, *, built_modules: bool = False, **options: Any
    ) -> None:
        """Write the config and all weights.

        Raises:
            UserError: a backbone was built by the caller, so that loading could not rebuild it; with
                `built_modules=True` it is saved all the same, for `from_pretrained(..., vision=..., language=...)`.
        """
        kinds = {"vision": self.config.vision.kind, "language": self.config.language_kind}
        if (names := [name for name, kind in kinds.items() if kind == "module"]) and not built_modules:
            raise UserError(
                f"the {' and '.join(names)} module was built by you and cannot be rebuilt from a config; save with "
                f"built_modules=True and give {', '.join(f'{name}=...' for name in names)} to from_pretrained"
            )
        super().save_pretrained(folder, **options)
