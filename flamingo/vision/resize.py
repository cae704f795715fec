"""Encoders at another resolution than they were trained at, and timm's encoders by name.

Learned positions are interpolated bicubically with antialiasing, as open_clip's `force_image_size` and timm
do, whatever the library, so that the same weights give the same tokens. transformers' own `interpolate_pos_encoding`
has no antialiasing (and another cubic), which `antialias=False` reproduces. It is done once, to the weights, so what is
saved is an encoder of the new size. A side that is not a multiple of the patch loses the remainder at the right and the
bottom: at patch 14, 322 or 336 px make better use of an image than the paper's 320.

Letters: G side of a grid of patches, R rows before it (class token), D width.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flamingo.config import VisionConfig
from flamingo.errors import UserError, first_line
from flamingo.hub import hub_reachable, read_safetensors
from flamingo.vision.encoder import build_open_clip, token_width

TIMM = "timm/"


def resized_positions(
    table: Float[Tensor, "N D"], grid: int, *, prefix: int, antialias: bool = True
) -> Float[Tensor, "M D"]:
    """Return a table of R + G*G positions with its grid at `grid` x `grid`; the first `prefix` rows stay.

    Raises:
        UserError: the rows after the prefix do not form a square.
    """
    first, old = table[:prefix], table[prefix:]
    side = math.isqrt(len(old))
    if side * side != len(old):
        raise UserError(f"{len(old)} position embeddings do not form a square grid, so they cannot be interpolated")
    if side == grid:
        return table
    image = old.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([first, image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)])


@torch.no_grad()
def resize_encoder(encoder: Any, image_size: int, *, antialias: bool = True) -> None:
    """Make an encoder take images of `image_size` px, in place.

    open_clip's encoders, timm's models, and transformers' ViT, DeiT, CLIP, SigLIP and the like, bare or inside another
    module. Convolutional encoders and those that interpolate in every forward pass (DINOv2) stay as they are.
    `antialias=False` is transformers' own `interpolate_pos_encoding`; timm and open_clip have no such thing.

    Raises:
        UserError: timm needs a multiple of the patch size; the positions are of a kind that is not known here.
    """
    trunk = getattr(encoder, "trunk", encoder)
    if hasattr(trunk, "set_input_size"):  # timm, inside open_clip's adapter or bare
        patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", (1, 1))[0]
        if image_size % patch:
            raise UserError(
                f"{type(trunk).__name__} of timm takes sides that are multiples of its patch, {patch} px; "
                f"image_size={image_size} is none, {image_size // patch * patch} is"
            )
        encoder.set_input_size((image_size, image_size))
        return
    if isinstance(getattr(encoder, "positional_embedding", None), nn.Parameter):  # open_clip's own
        grid = _grid(image_size, encoder.patch_size)
        old = encoder.positional_embedding
        encoder.positional_embedding = nn.Parameter(resized_positions(old, grid, prefix=1), old.requires_grad)
        encoder.image_size, encoder.grid_size = (image_size, image_size), (grid, grid)
    for module in encoder.modules():
        if isinstance(getattr(module, "position_embedding", None), nn.Embedding):  # transformers' CLIP, SigLIP, ...
            _resize_embedding(module, image_size, antialias)
        elif _has_fixed_positions(module):  # its ViT, DeiT, ...
            _resize_parameter(module, image_size, antialias)
        else:
            continue
        if hasattr(encoder, "config"):
            encoder.config.image_size = image_size
    try:
        token_width(encoder, image_size)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise UserError(
            f"{type(encoder).__name__} does not take images of {image_size} px ({first_line(error)}), and its "
            "positions are not of a kind that is interpolated here; build it for that size"
        ) from error


def _grid(image_size: int, patch_size: int | Sequence[int]) -> int:
    patch = patch_size if isinstance(patch_size, int) else patch_size[0]
    if image_size < patch:
        raise UserError(f"image_size={image_size} is smaller than the encoder's patch, {patch} px")
    return image_size // patch


def _prefix(rows: int) -> int:
    """Return how many of a table's rows stand before its grid: 197 = 1 + 14 * 14 has 1, 196 has none."""
    return rows - math.isqrt(rows) ** 2


def _resize_embedding(module: Any, image_size: int, antialias: bool) -> None:
    """Resize positions that are an `nn.Embedding`, and what their module remembers of its size."""
    grid, old = _grid(image_size, module.patch_size), module.position_embedding
    table = resized_positions(old.weight, grid, prefix=_prefix(len(old.weight)), antialias=antialias)
    module.position_embedding = nn.Embedding.from_pretrained(table.clone(), freeze=not old.weight.requires_grad)
    module.image_size, module.num_patches, module.num_positions = image_size, grid * grid, len(table)
    module.position_ids = torch.arange(len(table), device=table.device).expand(1, -1)


def _has_fixed_positions(module: Any) -> bool:
    """Say whether a module adds a table (1, N, D) as it is, unless `forward` is asked to interpolate it."""
    table = getattr(module, "position_embeddings", None)
    fixed = isinstance(table, nn.Parameter) and table.ndim == 3 and hasattr(module, "patch_embeddings")
    return fixed and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters


def _resize_parameter(module: Any, image_size: int, antialias: bool) -> None:
    """Resize positions that are a parameter (1, N, D), and what their module remembers of its size."""
    patches, old = module.patch_embeddings, module.position_embeddings
    grid = _grid(image_size, patches.patch_size)
    table = resized_positions(old[0], grid, prefix=_prefix(old.shape[1]), antialias=antialias)
    module.position_embeddings = nn.Parameter(table[None].clone(), old.requires_grad)
    patches.num_patches = grid * grid
    for one in (module, patches):
        if hasattr(one, "image_size"):
            one.image_size = (image_size, image_size)


def checked_width(encoder: nn.Module, image_size: int, name: str) -> int:
    """Return the width D of an encoder's tokens, from a run at this size.

    Raises:
        UserError: the encoder does not take images of this size.
    """
    try:
        return token_width(encoder, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{name} does not take images of {image_size} px ({first_line(error)}); "
            f"flamingo.vision.resize.resize_encoder(module, {image_size}) interpolates learned positions"
        ) from error


def timm_arch(name: str, image_size: int) -> dict[str, Any]:
    """Return how open_clip describes one of timm's encoders, `timm/...`; `image_size` in pixels."""
    model = name.removeprefix(TIMM)
    vision_cfg = {"timm_model_name": model, "timm_pool": "", "timm_proj": "none", "image_size": image_size}
    return {"embed_dim": 0, "vision_cfg": vision_cfg, "quick_gelu": False}


def load_timm(name: str, pretrained: str | None, image_size: int | None) -> tuple[nn.Module, VisionConfig]:
    """Return one of timm's encoders with its config: `timm/dm_nfnet_f6` with the tag `dm_in1k` is the paper's.

    `pretrained` is one of timm's tags, a file of weights, or None for random weights.

    Raises:
        UserError: an unknown name or tag, no network, or a file that does not fit.
    """
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise UserError(f"timm has no model {model!r}; timm.list_models('*{model[:8]}*') lists names like it")
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    tagged = f"{model}.{pretrained}" if pretrained and file is None else model
    if tagged != model and tagged not in timm.list_pretrained():
        tags = ", ".join(known.split(".", 1)[-1] for known in timm.list_pretrained(f"{model}.*"))
        raise UserError(f"timm has no weights {pretrained!r} for {model}; known are {tags or 'none'}")
    described: Any = timm.get_pretrained_cfg(tagged)
    native = int(described.input_size[-1])
    arch = timm_arch(name, native)
    vision_cfg = arch["vision_cfg"]
    encoder: Any = build_open_clip(arch)
    if pretrained:
        _load_timm_weights(encoder.trunk, tagged, file)
    size = image_size or native
    if size != native:
        resize_encoder(encoder, size)
        vision_cfg["image_size"] = size
    config = VisionConfig(
        kind="open_clip",
        name=name,
        arch=arch,
        width=checked_width(encoder.eval(), size, name),
        image_size=size,
        mean=tuple(described.mean),
        std=tuple(described.std),
    )
    return encoder, config


def _load_timm_weights(trunk: Any, tagged: str, file: Path | None) -> None:
    """Fill a trunk from a file, or with timm's weights of a tag; a classifier, which the trunk lacks, is left out."""
    import timm

    if file is not None:
        weights = _weights_of(file)
    elif hub_reachable():
        weights = timm.create_model(tagged, pretrained=True, num_classes=0, global_pool="").state_dict()
    else:
        raise UserError(
            f"timm's weights {tagged} are not at hand: the network is not reachable; give vision_pretrained= a file"
        )
    own = trunk.state_dict()
    with torch.device("meta"):
        head = set(timm.create_model(tagged).state_dict()) - own.keys()
    names = trunk.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    extra = {key for key in weights.keys() - own.keys() if key not in head and not key.startswith(prefixes)}
    unfit = {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape}
    if wrong := sorted(own.keys() - weights.keys() | extra | unfit):
        raise UserError(f"{file or tagged} does not fit {tagged}: {len(wrong)} keys differ, the first is {wrong[0]}")
    trunk.load_state_dict({key: weights[key] for key in own})


def _weights_of(file: Path) -> Mapping[str, Tensor]:
    """Return the weights in a file by their names; nothing but tensors is unpickled."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        with warnings.catch_warnings():  # of a pickle's protocol: it is read, or refused below
            warnings.simplefilter("ignore")
            weights = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # unpicklers raise all kinds of exceptions for foreign bytes
        raise UserError(f"{file} cannot be read as weights: {first_line(error)}; save a state_dict") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file} is not a table of weights by name; save the model's state_dict alone")
    return weights
