"""Frozen vision encoders behind one call: pixels in, patch tokens out.

Notable, each learned the hard way:
- open_clip's `output_tokens` gives the tokens BEFORE the final norm up to 2.22 and AFTER it since 2.23. What Flamingo
  models were trained on are those before it, so `forward_intermediates(normalize_intermediates=False)` is asked, which
  is the same in every version and for every tower.
- transformers' CLIP gives the tokens before its final norm, its SigLIP and ViT after it. Here `final_norm` decides for
  all of them, so that the same weights give the same tokens by way of either library.
- The OpenAI weights were trained with QuickGELU. `ViT-L-14` with the tag `openai` builds plain GELU in open_clip 3 and
  only warns; here the tag decides.
- The images come as uint8 and are normalised here, so that nothing between the shard and the encoder has to know the
  encoder's mean and deviation.

Letters: I images, F frames, C channels, S side in pixels, P patches, D width.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from flamingo.config import VisionConfig
from flamingo.errors import UserError


class VisionEncoder(nn.Module):
    """An encoder of any library: `(I, F, C, S, S)` pixels to `(I, F, P, D)` tokens, as a rule the patch tokens alone
    and before the final norm; `config.class_token` and `config.final_norm` say otherwise.

    `tower` is open_clip's `visual`, a transformers vision model, or any module that maps (N, C, S, S) to (N, P, D) or
    to an object with `last_hidden_state`. uint8 pixels are raw RGB and are normalised with `config.mean` and
    `config.std`; floating-point pixels are taken as normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, config: VisionConfig) -> None:
        super().__init__()
        self.tower = tower
        self.image_size = config.image_size
        self.class_token, self.final_norm = config.class_token, config.final_norm
        self.frozen = True
        self.statistics = {"mean": config.mean, "std": config.std}
        for name, values in self.statistics.items():
            self.register_buffer(name, torch.tensor(values))

    def forward(self, pixel_values: Shaped[Tensor, "I F C S S"]) -> Float[Tensor, "I F P D"]:
        """Return the patch tokens of every frame; without gradients where the encoder is frozen."""
        images, frames = pixel_values.shape[:2]
        pixels = pixel_values.flatten(0, 1)
        dtype = next(self.tower.parameters()).dtype
        if pixels.dtype == torch.uint8:
            shape = (1, -1, 1, 1)
            pixels = (pixels.float() / 255 - self.mean.float().view(shape)) / self.std.float().view(shape)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = patch_tokens(
                self.tower, pixels.to(dtype), class_token=self.class_token, final_norm=self.final_norm
            )
        return tokens.unflatten(0, (images, frames))

    def initialize(self) -> None:
        """Set mean and deviation as the config has them, for a file that lacks them."""
        for name, values in self.statistics.items():
            init.copy_(getattr(self, name), torch.tensor(values))

    @torch.no_grad()
    def check(self) -> None:
        """Run a black image, so that an encoder without a class token or final norm is refused before it is used."""
        shape = (1, 1, 3, self.image_size, self.image_size)
        self(torch.zeros(shape, device=next(self.tower.parameters()).device))


def patch_tokens(
    tower: Any, pixels: Float[Tensor, "N C S S"], *, class_token: bool = False, final_norm: bool = False
) -> Float[Tensor, "N P D"]:
    """Return a tower's patch tokens before its final norm, where it has one, or after it (`final_norm`).

    With `class_token`, its class and register tokens stand in front of them (P counts them then).

    Raises:
        UserError: the tower has no such tokens, or no final norm that could be applied.
    """
    if hasattr(tower, "forward_intermediates"):
        # A bare timm model calls it `norm`, open_clip's towers `normalize_intermediates`.
        names = inspect.signature(tower.forward_intermediates).parameters
        options: dict[str, Any] = {"norm" if "norm" in names else "normalize_intermediates": final_norm}
        if class_token and "output_extra_tokens" in names:
            options["output_extra_tokens"] = True
        out = tower.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NCHW", **options)
        prefix = out.get("image_intermediates_prefix") if isinstance(out, dict) else None
        out = out["image_intermediates"] if isinstance(out, dict) else out
        tokens = out[-1].flatten(2).transpose(1, 2)
        if not class_token:
            return tokens
        if not prefix:
            raise UserError(f"vision_config.class_token: {type(tower).__name__} has no class token")
        return torch.cat([prefix[-1], tokens], dim=1)
    tokens = _last_tokens(tower, pixels, final_norm)
    patch = getattr(getattr(tower, "config", None), "patch_size", None)
    if isinstance(patch, int) and not class_token:
        grid = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        tokens = tokens[:, tokens.shape[1] - grid :]
    return tokens


def _last_tokens(tower: Any, pixels: Float[Tensor, "N C S S"], final_norm: bool) -> Float[Tensor, "N P D"]:
    """Return all tokens of a tower that only has a `forward`, before or after its final norm.

    transformers' CLIP gives them before it, its SigLIP, ViT, DINOv2 and most others after it.
    """
    norm = _final_norm_of(tower)
    if norm is None:
        if final_norm:
            raise UserError(
                "vision_config.final_norm is for open_clip's towers and CLIP and its kin of transformers, not "
                f"{type(tower).__name__}"
            )
        return _flat(tower(pixels))
    if not any(hook is _note_input for hook in norm._forward_pre_hooks.values()):
        norm.register_forward_pre_hook(_note_input)
    _inputs.noted = []
    try:
        tokens = _flat(tower(pixels))
        # A norm that only a pooled token went through (CLIP's, ConvNeXt's) has had another shape.
        before = [x for x in _inputs.noted if x.shape == tokens.shape]
    finally:
        _inputs.noted = None
    if before:
        return tokens if final_norm else before[-1]
    return norm(tokens) if final_norm else tokens


def _flat(out: Any) -> Float[Tensor, "N P D"]:
    tokens = getattr(out, "last_hidden_state", out)
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens  # convolutional: (N, D, h, w)


def _final_norm_of(tower: Any) -> nn.Module | None:
    """Return a transformers vision model's final norm, None where it has none or is of another library."""
    if not isinstance(tower, PreTrainedModel):
        return None
    inner = getattr(tower, "vision_model", tower)  # CLIP before transformers 5.23
    found = (getattr(inner, name, None) for name in ("post_layernorm", "layernorm", "norm", "rms_norm"))
    return next((module for module in found if isinstance(module, nn.Module)), None)


class _Inputs(threading.local):
    """What went into a final norm while this thread runs its tower; None: nobody asks."""

    noted: list[Tensor] | None = None


_inputs = _Inputs()


def _note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _inputs.noted is not None:
        _inputs.noted.append(args[0])


def token_width(tower: nn.Module, image_size: int, channels: int = 3) -> int:
    """Return the width D of a tower's patch tokens, by running it once on a black image."""
    parameter = next(tower.parameters())
    with torch.no_grad():
        black = torch.zeros(1, channels, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
        tokens = patch_tokens(tower, black)
    return int(tokens.shape[-1])


def build_tower(config: VisionConfig, encoder_config: PreTrainedConfig | None = None) -> nn.Module:
    """Return the encoder that a config describes, with random weights.

    `encoder_config`, where it is given, is the object that a model of transformers shall hold: `arch` says the same.

    Raises:
        UserError: the encoder was built by the caller, who then has to pass it again.
    """
    if config.kind == "open_clip":
        return build_open_clip(config.arch or {})
    if config.kind == "transformers":
        if encoder_config is not None:
            return vision_model_from_config(encoder_config)
        options = dict(config.arch or {})
        return vision_model_from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    raise UserError(
        f"the vision encoder {config.name!r} was built by the caller and cannot be rebuilt from the config; "
        "pass it as vision=..."
    )


def build_open_clip(arch: dict[str, Any]) -> nn.Module:
    """Return open_clip's image tower alone, with random weights; `arch` as in `VisionConfig.arch`."""
    from open_clip.model import _build_vision_tower

    vision_cfg = dict(arch["vision_cfg"])
    vision_cfg["timm_model_pretrained"] = False
    tower = _build_vision_tower(arch["embed_dim"], vision_cfg, quick_gelu=bool(arch.get("quick_gelu", False)))
    # timm builds its own size whatever the config says; open_clip resizes after loading weights, and not here.
    native = getattr(getattr(getattr(tower, "trunk", None), "patch_embed", None), "img_size", None)
    if native is not None and tuple(native) != tuple(tower.image_size):
        tower.set_input_size(tower.image_size)
    return tower


def vision_model_from_config(config: Any) -> PreTrainedModel:
    """Return a transformers vision model with random weights; of a dual encoder the image half."""
    return AutoModel.from_config(getattr(config, "vision_config", config))


def describe_tower(tower: nn.Module, *, name: str, image_size: int, **overrides: Any) -> VisionConfig:
    """Return the config of a module that the caller built; a transformers model can be rebuilt from it."""
    options: dict[str, Any] = {"kind": "module", "name": name, "image_size": image_size}
    if isinstance(tower, PreTrainedModel):
        options |= {"kind": "transformers", "arch": tower.config.to_dict()}
    options |= overrides
    return VisionConfig(width=token_width(tower, image_size), **options)


def repair_buffers(module: Any) -> None:
    """Recompute a timm module's unsaved buffers, which loading through the meta device leaves as garbage."""
    if hasattr(module, "init_non_persistent_buffers"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.init_non_persistent_buffers()
