"""Frozen vision encoders behind one call: pixels in, patch tokens out.

Each of these was learned the hard way:
- open_clip's `output_tokens` gives the tokens BEFORE the final norm up to 2.22 and AFTER it since 2.23. What Flamingo
  models were trained on are those before it, so `forward_intermediates(normalize_intermediates=False)` is asked, which
  is the same in every version and for every encoder.
- transformers' CLIP gives the tokens before its final norm, its SigLIP and ViT after it. Here `final_norm` decides for
  all of them, so that the same weights give the same tokens by way of either library.
- The OpenAI weights were trained with QuickGELU. `ViT-L-14` with the tag `openai` builds plain GELU in open_clip 3 and
  only warns; here the tag decides.
- The images come as uint8 and are normalised here, so that nothing between the shard and the encoder has to know the
  encoder's mean and deviation.

Letters: I images, F frames, C channels, S side in pixels, P patches, D width.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from flamingo.config import VisionConfig
from flamingo.errors import UserError
from flamingo.layers.attention import usual_kernel
from flamingo.transfer import sent
from flamingo.vision.features import FrozenFeatures

RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
"""open_clip's names -> ours."""


class VisionEncoder(nn.Module):
    """An encoder of any library: `(I, F, C, S, S)` pixels to `(I, F, P, D)` tokens, as a rule the patch tokens alone
    and before the final norm; `config.class_token` and `config.final_norm` say otherwise.

    `encoder` is open_clip's `visual`, a transformers vision model, or any module that maps (N, C, S, S) to (N, P, D) or
    to an object with `last_hidden_state`. uint8 pixels are raw RGB and are normalised with `config.mean` and
    `config.std`; floating-point pixels are taken as normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, config: VisionConfig) -> None:
        super().__init__()
        self.tower = encoder
        self.image_size = config.image_size
        self.class_token, self.final_norm = config.class_token, config.final_norm
        # A ViT has one, which cuts the image into patches.
        self._is_convolutional = sum(isinstance(module, nn.Conv2d) for module in encoder.modules()) > 1
        self.features: FrozenFeatures | None = None
        """Set for a run whose encoder is frozen (`model.vision.cache`): each image is then encoded once."""
        self._unread: tuple[tuple[int, ...], list[nn.Parameter]] = ((), [])
        self.statistics = {"mean": config.mean, "std": config.std}
        for name, values in self.statistics.items():
            self.register_buffer(name, torch.tensor(values))

    def forward(self, pixel_values: Shaped[Tensor, "I F C S S"]) -> Float[Tensor, "I F P D"]:
        """Return the patch tokens of every frame, with gradients where a weight or the pixels ask for them."""
        images, frames = pixel_values.shape[:2]
        pixels = pixel_values.flatten(0, 1)
        if self.features is not None and pixels.dtype == torch.uint8 and len(pixels):
            tokens = self.features(pixels, self._tokens, next(self.tower.parameters()).dtype)
        else:
            tokens = self._tokens(pixels)
        if self.training and torch.is_grad_enabled():
            tokens = touched(tokens, self._unread_by(tokens))
        return tokens.unflatten(0, (images, frames))

    def _tokens(self, pixels: Shaped[Tensor, "N C S S"]) -> Float[Tensor, "N P D"]:
        dtype = next(self.tower.parameters()).dtype
        if pixels.dtype == torch.uint8:
            shape = (1, -1, 1, 1)
            pixels = (pixels.float() / 255 - self.mean.float().view(shape)) / self.std.float().view(shape)
        if self._is_convolutional and not pixels.is_cuda:  # a third less time on a CPU: docs/benchmarks.md
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        # Autograd records nothing where neither weights nor pixels ask for it: a frozen encoder leaves no graph.
        with usual_kernel(pixels.device):  # an image's tokens do not depend on the rows of text that show it
            return patch_tokens(self.tower, pixels.to(dtype), class_token=self.class_token, final_norm=self.final_norm)

    def initialize(self) -> None:
        """Set mean and deviation as the config has them, for a file that lacks them."""
        for name, values in self.statistics.items():
            init.copy_(getattr(self, name), torch.tensor(values))

    def _unread_by(self, tokens: Tensor) -> list[nn.Parameter]:
        """Return the trained weights that the tokens do not depend on: of a final norm, of a pooling head.

        They have to get a gradient (of zeros) all the same, or DistributedDataParallel would wait for it.
        """
        trained = [p for p in self.tower.parameters() if p.requires_grad]
        key = tuple(map(id, trained))
        if self._unread[0] != key:
            read = leaves_of(tokens)
            self._unread = key, [p for p in trained if id(p) not in read]
        return self._unread[1]

    @torch.no_grad()
    def check(self) -> None:
        """Run a black image, so that an encoder without a class token or final norm is refused before it is used."""
        shape = (1, 1, 3, self.image_size, self.image_size)
        self(torch.zeros(shape, device=next(self.tower.parameters()).device))


def touched(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return `x`, whose backward pass also gives a gradient of zeros to `parameters`."""
    none = [p.flatten()[:0] for p in parameters if not hasattr(p, "full_tensor")]  # FSDP2 sees to its own
    return x + sum(part.sum() for part in none).to(x) if none else x  # type: ignore[union-attr]


def leaves_of(x: Tensor) -> set[int]:
    """Return the ids of all parameters that a tensor's gradient would go to."""
    leaves: set[int] = set()
    waiting, seen = [x.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return leaves


def patch_tokens(
    encoder: Any, pixels: Float[Tensor, "N C S S"], *, class_token: bool = False, final_norm: bool = False
) -> Float[Tensor, "N P D"]:
    """Return an encoder's patch tokens before its final norm, where it has one, or after it (`final_norm`).

    With `class_token`, its class and register tokens stand in front of them (P counts them then).

    Raises:
        UserError: the encoder has no such tokens, or no final norm that could be applied.
    """
    if hasattr(encoder, "forward_intermediates"):
        # A bare timm model calls it `norm`, open_clip's encoders `normalize_intermediates`.
        names = inspect.signature(encoder.forward_intermediates).parameters
        options: dict[str, Any] = {"norm" if "norm" in names else "normalize_intermediates": final_norm}
        if class_token and "output_extra_tokens" in names:
            options["output_extra_tokens"] = True
        out = encoder.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NCHW", **options)
        prefix = out.get("image_intermediates_prefix") if isinstance(out, dict) else None
        out = out["image_intermediates"] if isinstance(out, dict) else out
        tokens = out[-1].flatten(2).transpose(1, 2)
        if not class_token:
            return tokens
        if not prefix:
            raise UserError(f"vision_config.class_token: {type(encoder).__name__} has no class token")
        return torch.cat([prefix[-1], tokens], dim=1)
    tokens = _last_tokens(encoder, pixels, final_norm)
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if isinstance(patch, int) and not class_token:
        grid = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        tokens = tokens[:, tokens.shape[1] - grid :]
    return tokens


def _last_tokens(encoder: Any, pixels: Float[Tensor, "N C S S"], final_norm: bool) -> Float[Tensor, "N P D"]:
    """Return all tokens of an encoder that only has a `forward`, before or after its final norm.

    transformers' CLIP gives them before it, its SigLIP, ViT, DINOv2 and most others after it.
    """
    norm = _final_norm_of(encoder)
    if norm is None:
        if final_norm:
            raise UserError(
                "vision_config.final_norm is for open_clip's encoders and CLIP and its kin of transformers, not "
                f"{type(encoder).__name__}"
            )
        return _flat(encoder(pixels))
    if not any(hook is _note_input for hook in norm._forward_pre_hooks.values()):
        norm.register_forward_pre_hook(_note_input)
    _inputs.noted = []
    try:
        tokens = _flat(encoder(pixels))
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


def _final_norm_of(encoder: Any) -> nn.Module | None:
    """Return a transformers vision model's final norm, None where it has none or is of another library."""
    if not isinstance(encoder, PreTrainedModel):
        return None
    inner = getattr(encoder, "vision_model", encoder)  # CLIP before transformers 5.23
    norms = (getattr(inner, name, None) for name in ("post_layernorm", "layernorm", "norm", "rms_norm"))
    return next((module for module in norms if isinstance(module, nn.Module)), None)


class _Inputs(threading.local):
    """What went into a final norm while this thread runs its encoder; None: nobody asks."""

    noted: list[Tensor] | None = None


_inputs = _Inputs()


def _note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _inputs.noted is not None:
        _inputs.noted.append(args[0])


def token_width(encoder: nn.Module, image_size: int, channels: int = 3) -> int:
    """Return the width D of an encoder's patch tokens, by running it once on a black image."""
    parameter = next(encoder.parameters())
    with torch.no_grad():
        black = torch.zeros(1, channels, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
        tokens = patch_tokens(encoder, black)
    return int(tokens.shape[-1])


def build_encoder(config: VisionConfig, encoder_config: PreTrainedConfig | None = None) -> nn.Module:
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
    """Return open_clip's image encoder alone, with random weights; `arch` as in `VisionConfig.arch`."""
    from open_clip.model import _build_vision_tower

    vision_cfg = dict(arch["vision_cfg"])
    vision_cfg["timm_model_pretrained"] = False
    encoder = _build_vision_tower(arch["embed_dim"], vision_cfg, quick_gelu=bool(arch.get("quick_gelu", False)))
    # timm builds its own size whatever the config says; open_clip resizes after loading weights, and not here.
    native = getattr(getattr(getattr(encoder, "trunk", None), "patch_embed", None), "img_size", None)
    if native is not None and tuple(native) != tuple(encoder.image_size):
        encoder.set_input_size(encoder.image_size)
    return encoder


def vision_model_from_config(config: Any) -> PreTrainedModel:
    """Return a transformers vision model with random weights; of a dual encoder the image half."""
    return AutoModel.from_config(getattr(config, "vision_config", config))


def describe_encoder(encoder: nn.Module, *, name: str, image_size: int, **overrides: Any) -> VisionConfig:
    """Return the config of a module that the caller built; a transformers model can be rebuilt from it."""
    options: dict[str, Any] = {"kind": "module", "name": name, "image_size": image_size}
    if isinstance(encoder, PreTrainedModel):
        options |= {"kind": "transformers", "arch": encoder.config.to_dict()}
    options |= overrides
    return VisionConfig(width=token_width(encoder, image_size), **options)


def own_statistics(encoder: Any) -> dict[str, Any]:
    """Return what a built module of timm or open_clip says of its images: `mean`, `std`, `image_size`, `resize_mode`.

    Empty for modules that say nothing; these get CLIP's mean and deviation unless the caller names others.
    """
    described = getattr(encoder, "pretrained_cfg", None) or getattr(encoder, "preprocess_cfg", None) or {}
    described = described if isinstance(described, dict) else vars(described)
    own: dict[str, Any] = {name: tuple(described[name]) for name in ("mean", "std") if described.get(name)}
    if (mode := RESIZE_MODES.get(described.get("resize_mode", ""))) is not None:
        own["resize_mode"] = mode
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or described.get("input_size")
    return {**own, "image_size": int(size[-1])} if own and size else own


def repair_buffers(module: Any) -> None:
    """Recompute a timm module's unsaved buffers, which loading through the meta device leaves as garbage."""
    if hasattr(module, "init_non_persistent_buffers"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.init_non_persistent_buffers()


def flat_frames(
    pixel_values: Shaped[Tensor, "..."], frame_counts: Sequence[int] | None = None
) -> tuple[Shaped[Tensor, "N C S S"], list[int]]:
    """Return all frames in one stack and the number of frames of each image.

    `pixel_values` is (I, F, C, S, S), every image with F frames or, with `frame_counts`, with its first so many; or
    (N, C, S, S), the frames of all images with `frame_counts`, or one image each.

    Raises:
        UserError: the counts do not fit the frames, or an image has none.
    """
    if pixel_values.ndim not in (4, 5):
        raise UserError(
            f"pixel_values has {pixel_values.ndim} dimensions; it is (images, frames, channels, side, side), or "
            "(frames, channels, side, side) with frame_counts"
        )
    given = len(pixel_values)
    counts = None if frame_counts is None else list(frame_counts)
    if counts is not None and min(counts, default=1) < 1:
        raise UserError(f"frame_counts has an image of {min(counts)} frames; each has at least 1")
    if pixel_values.ndim == 4:
        counts = [1] * given if counts is None else counts
        if sum(counts) != given:
            raise UserError(f"frame_counts sum to {sum(counts)}, but pixel_values has {given} frames")
        return pixel_values, counts
    frames = pixel_values.shape[1]
    if counts is None:
        return pixel_values.flatten(0, 1), [frames] * given
    if len(counts) != given or max(counts, default=0) > frames:
        raise UserError(
            f"frame_counts has {len(counts)} entries up to {max(counts, default=0)}, but pixel_values has {given} "
            f"images of {frames} frames"
        )
    kept = (torch.arange(frames) < torch.tensor(counts, dtype=torch.long)[:, None]).flatten().nonzero()[:, 0]
    return pixel_values.flatten(0, 1).index_select(0, sent(kept, pixel_values.device)), counts


def distinct(frames: Shaped[Tensor, "N C S S"], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the first image of each kind, and for each image its index among those.

    Images a b a of one frame each: [0 1] and [0 1 0].
    """
    host = frames.detach().cpu().contiguous()
    marks = [hashlib.blake2b(frame.view(torch.uint8).numpy().tobytes(), digest_size=16).digest() for frame in host]
    first: dict[tuple[bytes, ...], int] = {}
    kept: list[int] = []
    positions = []
    start = 0
    for image, count in enumerate(counts):
        key = tuple(marks[start : start + count])
        if key not in first:
            first[key] = len(kept)
            kept.append(image)
        positions.append(first[key])
        start += count
    return kept, positions


def encode(
    encoder: Callable[[Tensor], Tensor],
    resampler: Callable[..., Tensor],
    frames: Shaped[Tensor, "N C S S"],
    counts: Sequence[int],
) -> Float[Tensor, "I L D"]:
    """Return the latents of each image: `encoder` as (I, F, C, S, S) to (I, F, P, D), `resampler` from there.

    Each is called once, whatever the counts: sharded modules must be called as often on every process.
    """
    if len(set(counts)) <= 1:
        return resampler(encoder(frames.unflatten(0, (len(counts), -1))))
    return resampler(encoder(frames[:, None])[:, 0], counts)


def frames_of(
    frames: Shaped[Tensor, "N C S S"], counts: Sequence[int], images: Sequence[int]
) -> tuple[Shaped[Tensor, "M C S S"], list[int]]:
    """Return the frames and counts of some of the images."""
    if len(images) == len(counts):
        return frames, list(counts)
    parts = frames.split(list(counts))
    return torch.cat([parts[image] for image in images]), [counts[image] for image in images]
