"""What the model has beside its forward pass: parts that freeze or train, saving, loading, recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo import hub, storage
from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.files import share
from flamingo.language.hooks import (
    NewTokens,
    recompute_in_call,
)
from flamingo.layers.connector import Connector
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.model_card import write_card
from flamingo.vision.encoder import (
    VisionEncoder,
    repair_buffers,
)

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
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class FlamingoPreTrainedModel(PreTrainedModel):
    """Parts, freezing, saving and loading of `FlamingoForConditionalGeneration`."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedCrossAttentionBlock"]  # noqa: RUF012  (those of the connector are its own)
    _keys_to_ignore_on_load_missing = [r"^vision_encoder\.(mean|std)$"]  # noqa: RUF012  (the config has them)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    lm_drops_out = True
    """Whether an LM in which something trains is in training mode; else only its adapters know that it trains."""

    vision_encoder: VisionEncoder
    language_model: PreTrainedModel
    resampler: Connector
    cross_attn_blocks: nn.ModuleDict
    new_tokens: NewTokens
    push_to_hub = hub.push_folder  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint lacks; the backbones initialise themselves."""
        if isinstance(module, GatedCrossAttentionBlock):
            init.constant_(module.attn_gate, module.gate_init)
            init.constant_(module.ff_gate, module.gate_init)
        elif isinstance(module, (Connector, VisionEncoder)):
            module.initialize()
        elif isinstance(module, nn.Linear):  # as torch's constructors, which draw these unless on the meta device
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                init.zeros_(bias)
        elif isinstance(module, NewTokens):
            init.normal_(module.input_rows, std=0.02)
            if module.output_rows is not None:
                init.normal_(module.output_rows, std=0.02)
        repair_buffers(module)

    def freeze(self, policy: Mapping[str, str] | None = None) -> None:
        """Decide which parts train. Parts that `policy` does not name follow the paper's policy.

        The policy is saved with the config and holds again after loading. Afterwards `requires_grad` is the truth:
        what is unfrozen by hand, or has adapters in it, trains as well. That is not saved, only what was given here.

        Raises:
            UserError: an unknown part, or a value that is neither "frozen" nor "train".
        """
        for part, value in (policy or {}).items():
            if part not in PAPER_POLICY or value not in ("frozen", "train"):
                known = ", ".join(PAPER_POLICY)
                raise UserError(f"freezing policy {part}={value!r}: parts are {known}; values are 'frozen' and 'train'")
        if (policy or {}).get("language") == "train" and storage.is_quantized(self.language_model):
            raise UserError(
                "freezing policy language='train': the language model is quantised, and packed weights have no "
                "gradient; leave it frozen and add LoRA adapters (docs/finetune.md, QLoRA)"
            )
        self.config.freezing_policy = {**PAPER_POLICY, **(policy or {})}
        for attribute, part in PARTS.items():
            getattr(self, attribute).requires_grad_(self.policy[part] == "train")
        self.train(self.training)

    @property
    def policy(self) -> dict[str, str]:
        """Which parts `freeze` was told to train, by their names."""
        return {**PAPER_POLICY, **(self.config.freezing_policy or {})}

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode; parts in which no parameter trains stay in eval mode; see also `lm_drops_out`."""
        super().train(mode)
        for attribute in PARTS:
            if not trains(getattr(self, attribute)):
                getattr(self, attribute).eval()
        if not self.lm_drops_out:
            self.language_model.eval()
        self._let_frozen_layers_recompute(mode and not self.language_model.training)
        return self

    def _let_frozen_layers_recompute(self, frozen: bool) -> None:
        """Where recomputation is on, mark the frozen LM's layers as training: transformers recomputes no others.

        Only the layer object itself is marked, its modules stay in eval; a dropout rate that it applies by its own
        `training` flag is set to zero, so its output is that of eval mode, and set back when the LM trains.
        """
        for layer in self.language_model.modules():
            if not isinstance(layer, GradientCheckpointingLayer):
                continue
            own: Any = layer
            for name, value in vars(layer).pop("_rates", {}).items():
                setattr(own, name, value)
            if frozen and layer.gradient_checkpointing:
                layer.training = True
                own._rates = {name: x for name, x in vars(layer).items() if "drop" in name and isinstance(x, float)}
                for name in own._rates:
                    setattr(own, name, 0.0)

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # its name since transformers 5.23
        activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable  # type: ignore[assignment]

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        """Have LM layers, blocks and resampler layers recompute their activations in the backward pass, or not.

        Always without reentrance (`use_reentrant=True` is overruled): with it the adapters in layers whose input has
        no gradient, those before the first gated block, would silently get none.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, partial(recompute_in_call, gradient_checkpointing_func), **options)
        self.train(self.training)

    def enable_input_require_grads(self) -> None:
        """Do nothing: non-reentrant recomputation does not need it, and it would walk back through frozen layers."""

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **options: Any) -> None:
        """Set the attention of LM and encoder, or of one of them ({"vision_config": ...}), as transformers does it."""
        own = self.config.vision_config
        before = own._attn_implementation
        if own.encoder_config is not None:
            # Set first: transformers would look for a model that holds this config, not the encoder's inside it, and
            # warn of undefined behaviour.
            wanted = attn_implementation
            for key in ("vision_config", ""):
                wanted = wanted.get(key, before) if isinstance(wanted, dict) else wanted
            own._attn_implementation_internal = wanted
        try:
            super().set_attn_implementation(attn_implementation, *args, **options)
        except BaseException:
            own._attn_implementation_internal = before
            raise

    def part_of(self, name: str) -> str:
        """Return the part ("vision", "language", "resampler", ...) that a parameter's name belongs to."""
        return PARTS[name.split(".", 1)[0]]

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of everything that trains."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        vision: nn.Module | None = None,
        language: Any = None,
        **options: Any,
    ) -> Any:
        """Load what `save_pretrained` wrote; `vision` and `language` are built modules where the config has none.

        Takes every option of transformers' own; `None` instead of a folder goes with `config=` and `state_dict=`.
        Weights keep the precision they were saved in unless `dtype=` names one. `quantization_config=` quantises the
        LM only.

        Raises:
            UserError: the folder holds no `config.json`, or a name needs a network that is not there; a weight is
                missing or not finite, or a file is damaged.
        """
        if pretrained_model_name_or_path is None and (
            options.get("config") is None or options.get("state_dict") is None
        ):
            raise UserError("from_pretrained(None) needs config=... and state_dict=...; or give a folder or a name")
        built = {"vision_module": vision, "causal_lm": language}
        options |= {name: module for name, module in built.items() if module is not None}
        if options.get("quantization_config") is not None:
            described = options.get("config") or FlamingoConfig.from_pretrained(
                str(pretrained_model_name_or_path), **hub_options(options)
            )
            given = options["quantization_config"]
            options["quantization_config"] = storage.language_only(given, cls, described.text_config)
        load = super().from_pretrained
        with_info = options.pop("output_loading_info", False)
        with storage.own_dtypes(options.get("dtype", options.get("torch_dtype"))):
            model, info = hub.loaded(
                lambda name, **rest: load(name, *args, output_loading_info=True, **rest),
                pretrained_model_name_or_path,
                "model",
                "config.json",
                options,
            )
        what = f"the model of {pretrained_model_name_or_path or 'the given state_dict'}"
        storage.refuse_incomplete(info, what)
        storage.hand_down(model)
        storage.refuse_nonfinite(model, what)
        model.freeze(model.policy)  # loading makes some parameters anew, and those would train
        return (model, info) if with_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *args: Any, built_modules: bool = False, **options: Any
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
        with storage.described(self):
            super().save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        if (written := folder / "config.json").exists():
            share(folder.glob("*.safetensors"), written.stat().st_mode)
        write_card(folder, self)

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any) -> Any:
        """Load the weights, each in its own precision."""
        storage.match_dtypes(model, state_dict, files, load_config)
        return PreTrainedModel._load_pretrained_model(model, state_dict, files, load_config, *args)

    @classmethod
    def parts_beside_language(cls) -> list[str]:
        """Return the attributes that hold all parts but the LM."""
        return [attribute for attribute in PARTS if attribute != storage.LANGUAGE]


def trains(part: nn.Module) -> bool:
    """Say whether a part has a parameter that trains."""
    return any(parameter.requires_grad for parameter in part.parameters())


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `from_pretrained`'s options that say where on the hub a file is."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}
