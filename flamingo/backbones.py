"""Turning names, folders and built modules into an encoder and a language model.

A name that would need the network is refused at once and in one sentence where there is none, instead of
after a minute of silent retries; what is in the local cache is used.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flamingo.config import (
    OPENAI_MEAN,
    OPENAI_STD,
    FlamingoConfig,
    VisionConfig,
)
from flamingo.errors import UserError, first_line
from flamingo.hub import from_hub, hub_reachable, read_safetensors
from flamingo.language.hooks import embedding_table, place_beside
from flamingo.processing.begin import start_ids
from flamingo.processor import FlamingoProcessor
from flamingo.storage import refuse_incomplete, refuse_nonfinite
from flamingo.vision.encoder import (
    RESIZE_MODES,
    VisionEncoder,
    build_open_clip,
    describe_encoder,
    own_statistics,
    vision_model_from_config,
)
from flamingo.vision.resize import TIMM, checked_width, load_timm, resize_encoder
from flamingo.vision.transform import ImageTransform

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Of `VisionConfig`, what a caller may say of any encoder, and what of a built module.
VISION_OPTIONS = ("mean", "std", "resize_mode", "class_token", "final_norm")
_IDS = ("image_token_id", "eoc_token_id", "new_token_ids")  # of the processor, which the config has as well
BUILT_OPTIONS = (*VISION_OPTIONS, "kind", "arch")


def load_vision(
    vision: str | Path | nn.Module, *, pretrained: str | None = None, image_size: int | None = None, **options: Any
) -> tuple[nn.Module, VisionConfig]:
    """Return an encoder with its weights, and its config.

    `vision` is an open_clip name (then `pretrained` is one of its tags, a file, or None for random weights), `timm/`
    with one of timm's names (likewise), a folder (open_clip's layout or transformers'), a transformers name, or a built
    module (then `image_size` is needed, unless it is timm's). Another `image_size` than the encoder's own, in pixels,
    interpolates its positions. `options` are `mean`, `std`, `resize_mode`, `class_token` and `final_norm` of
    `VisionConfig`, where they are to be others than the encoder's.

    Raises:
        UserError: unknown name, tag or option, missing files, no network, an encoder that cannot do what is asked.
    """
    known = BUILT_OPTIONS if isinstance(vision, nn.Module) else VISION_OPTIONS
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"vision_options.{unknown[0]} is not an option; known are {', '.join(known)}")
    if isinstance(vision, nn.Module):
        own = own_statistics(vision)
        size = own.pop("image_size", None) if image_size is None else image_size
        if size is None:
            raise UserError("a built vision module needs image_size=..., the side of its images in pixels")
        checked_width(vision, size, type(vision).__name__)
        described = {**own, "image_size": size, **options}
        encoder, config = vision, describe_encoder(vision, name=type(vision).__name__, **described)
    else:
        encoder, config = _vision_by_name(vision, pretrained, image_size)
    if options:
        config = replace(config, **options)
        VisionEncoder(encoder, config).check()
    return encoder, config


def _vision_by_name(
    vision: str | Path, pretrained: str | None, image_size: int | None
) -> tuple[nn.Module, VisionConfig]:
    path = Path(vision)
    if path.is_dir():
        return _vision_from_folder(path, image_size)
    import open_clip

    if str(vision) in open_clip.list_models():
        return _vision_from_open_clip(str(vision), pretrained, image_size)
    if str(vision).startswith(TIMM):
        return load_timm(str(vision), pretrained, image_size)
    return _vision_from_transformers(str(vision), image_size)


def read_open_clip_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return open_clip's `model_cfg` and `preprocess_cfg` from a file; what is not readable is a UserError."""
    try:
        document = json.loads(file.read_text())
        return document.get("model_cfg", document), document.get("preprocess_cfg", {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def _vision_from_folder(path: Path, image_size: int | None) -> tuple[nn.Module, VisionConfig]:
    if not (path / OPEN_CLIP_CONFIG).is_file():
        if (path / "config.json").is_file():
            return _vision_from_transformers(str(path), image_size)
        raise UserError(f"{path} holds no vision encoder: neither {OPEN_CLIP_CONFIG} nor config.json is there")
    model_cfg, preprocess = read_open_clip_config(path / OPEN_CLIP_CONFIG)
    if not (path / OPEN_CLIP_WEIGHTS).is_file():
        raise UserError(f"{path} has an {OPEN_CLIP_CONFIG} but no weights; {OPEN_CLIP_WEIGHTS} is missing")
    config = _open_clip_config(str(path), model_cfg, preprocess)
    encoder = build_open_clip(config.arch or {})
    weights = read_safetensors(path / OPEN_CLIP_WEIGHTS)
    visual = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    try:
        encoder.load_state_dict(visual)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{path / OPEN_CLIP_WEIGHTS} does not fit {OPEN_CLIP_CONFIG} beside it: {first}") from error
    if image_size not in (None, config.image_size):
        resize_encoder(encoder, image_size)
        model_cfg["vision_cfg"]["image_size"] = image_size
        config = _open_clip_config(str(path), model_cfg, preprocess)
    return encoder.eval(), replace(config, width=checked_width(encoder, config.image_size, config.name))


def open_clip_config(name: str, pretrained: str | None = None, image_size: int | None = None) -> VisionConfig:
    """Return an open_clip encoder's config by its name, unbuilt; `width` is 0 for timm's. An unknown tag: UserError."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tag = dict(get_pretrained_cfg(name, pretrained)) if pretrained else {}
    if pretrained and not tag and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise UserError(f"open_clip has no weights {pretrained!r} for {name}; known are {tags or 'none'}")
    model_cfg = open_clip.get_model_config(name)
    # The tag knows how its weights were trained; the name may be that of the plain-GELU architecture.
    model_cfg["quick_gelu"] = bool(tag.get("quick_gelu", model_cfg.get("quick_gelu", False)))
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    return _open_clip_config(name, model_cfg, tag)


def _vision_from_open_clip(name: str, pretrained: str | None, image_size: int | None) -> tuple[nn.Module, VisionConfig]:
    import open_clip

    config = open_clip_config(name, pretrained, image_size)
    arch = config.arch or {}
    if pretrained is None:
        encoder = build_open_clip(arch)
    else:
        weights = pretrained if Path(pretrained).is_file() else cached_open_clip(name, pretrained)
        options = {"force_quick_gelu": arch["quick_gelu"], "force_image_size": image_size}
        try:
            encoder = open_clip.create_model(name, pretrained=weights, **options).visual
        except Exception as error:  # a file that is no checkpoint, or that of another model, raises any
            raise UserError(f"the weights {weights} of {name} cannot be loaded: {first_line(error)}") from error
    return encoder.eval(), replace(config, width=checked_width(encoder, config.image_size, name))


def cached_open_clip(name: str, pretrained: str) -> str:
    """Return what to give open_clip as `pretrained`: the tag where the network is there, else the cached file."""
    if hub_reachable():
        return pretrained
    from huggingface_hub import try_to_load_from_cache
    from open_clip.pretrained import get_pretrained_cfg

    repo = str(get_pretrained_cfg(name, pretrained).get("hf_hub", "")).strip("/")
    for file in (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin"):
        if repo.count("/") == 1 and isinstance(cached := try_to_load_from_cache(repo, file), str):
            return cached
    raise UserError(
        f"the weights {pretrained!r} of open_clip's {name} are not in the local cache and the network is not "
        "reachable; give vision= a local folder, or vision_pretrained= a file"
    )


def _open_clip_config(name: str, model_cfg: dict[str, Any], preprocess: dict[str, Any]) -> VisionConfig:
    size = model_cfg["vision_cfg"].get("image_size", 224)
    mode = RESIZE_MODES[preprocess.get("resize_mode") or "shortest"]
    return VisionConfig(
        kind="open_clip",
        name=name,
        arch={key: model_cfg.get(key, False) for key in ("embed_dim", "vision_cfg", "quick_gelu")},
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
        resize_mode=mode,
    )


def _vision_from_transformers(name: str, image_size: int | None) -> tuple[nn.Module, VisionConfig]:
    config = from_hub(AutoConfig, name, "vision encoder")
    vision_config = getattr(config, "vision_config", config)
    with torch.device("meta"):  # to learn the class
        model_class = type(vision_model_from_config(vision_config))
    encoder = from_hub(model_class, name, "vision encoder", config=vision_config).eval()
    size = int(getattr(vision_config, "image_size", None) or image_size or 224)
    if image_size not in (None, size):
        resize_encoder(encoder, image_size)
        size = int(image_size)
    checked_width(encoder, size, name)
    return encoder, describe_encoder(encoder, name=name, image_size=size, **_image_statistics(name))


def _image_statistics(name: str) -> dict[str, Any]:
    """Return mean and deviation of a transformers encoder's image processor where it has one, else CLIP's."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=not hub_reachable())
    except (OSError, ValueError, ImportError):
        return {}
    return {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}


def load_language(
    language: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal LM with its weights, and its tokenizer. A built LM needs `tokenizer`, or it is a UserError.

    `quantization_config` is transformers', for an LM given by name.
    """
    if isinstance(language, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a built language model needs tokenizer=...")
        if quantization_config is not None:
            raise UserError(
                "quantization_config= is for a language model given by name: load yours with it, by "
                "AutoModelForCausalLM.from_pretrained"
            )
        lm = language
    elif isinstance(language, nn.Module):
        raise UserError(f"language= is a {type(language).__name__}; a transformers causal LM is needed")
    else:
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        lm, info = from_hub(AutoModelForCausalLM, str(language), "language model", output_loading_info=True, **options)
        refuse_incomplete(info, f"the language model {language}")
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return lm, tokenizer
    return lm, from_hub(AutoTokenizer, str(tokenizer or language), "tokenizer")


def _check_and_cast(encoder: nn.Module, name: str, lm: PreTrainedModel, dtype: Any) -> None:
    """Refuse weights that are not finite; store both backbones in `dtype`."""
    refuse_nonfinite(encoder, f"the vision encoder {name}")
    refuse_nonfinite(lm, f"the language model {lm.config.name_or_path or type(lm).__name__}")
    _cast((encoder, lm), dtype)


def from_backbones(
    model_class: Any,
    vision: Any,
    language: Any,
    *,
    vision_pretrained: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    add_bos_token: bool | None = None,
    image_size: int | None = None,
    cross_attn_every_n_layers: int = 1,
    cross_attn_layers: list[int] | None = None,
    connector: str = "perceiver",
    resampler: Mapping[str, Any] | None = None,
    cross_attention: Mapping[str, Any] | None = None,
    max_frames: int | None = None,
    decoder_layers_path: str | None = None,
    vision_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    quantization_config: Any = None,
    seed: int = 0,
) -> tuple[Any, FlamingoProcessor]:
    """Return (model, processor) around an encoder and a causal LM; new parts start from `seed`, gates closed.

    Args:
        model_class: `FlamingoForConditionalGeneration`.
        vision: open_clip name, folder, transformers name, or built module (`image_size` in pixels, but for timm's).
        language: folder, GGUF file, transformers name, or built causal LM (then `tokenizer`).
        vision_pretrained: open_clip's tag or a file of weights; None: random weights.
        tokenizer: of the LM; by default the one beside it. A copy gets the new tokens.
        add_bos_token: whether that copy begins each row with its BOS; None: as it does by itself.
        image_size: side of the images in pixels, where it is not the encoder's own.
        cross_attn_every_n_layers: a block before layers n-1, 2n-1, ...; `cross_attn_layers` numbers them instead.
        connector: "perceiver", or another of `CONNECTORS`, of options `resampler`; `cross_attention`: of the blocks.
        max_frames: `resampler={"max_frames": ...}`, and the most frames the processor takes of a clip.
        decoder_layers_path: attribute path of the LM's layers, if they are not recognised.
        vision_options: `mean`, `std`, `resize_mode`, `class_token`, `final_norm` of `VisionConfig`.
        dtype: of both backbones, built ones included; None: as they come. What joins them, and trains, is in float32.
        quantization_config: transformers', for the LM by name: 4 or 8 bits. `seed`: of the new parts' weights.

    Raises:
        UserError: a name that cannot be had, a missing argument, an option that does not exist.
    """
    named = {"image_size": image_size, **(vision_options or {})}
    encoder, described = load_vision(vision, pretrained=vision_pretrained, **named)
    lm, lm_tokenizer = load_language(language, tokenizer, quantization_config)
    _check_and_cast(encoder, described.name, lm, dtype)
    resampler = dict(resampler or {}) | ({} if max_frames is None else {"max_frames": max_frames})
    processor = _processor(_own_tokenizer(lm_tokenizer, add_bos_token), described, resampler.get("max_frames"))
    config = FlamingoConfig(
        vision_config=asdict(described),
        text_config=lm.config,
        connector=connector,
        resampler_config=resampler,
        cross_attention_config=dict(cross_attention or {}),
        cross_attn_layers=cross_attn_layers,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        **{name: getattr(processor, name) for name in _IDS},
        language_kind="transformers" if type(lm.config) in AutoModelForCausalLM._model_mapping else "module",
        decoder_layers_path=decoder_layers_path,
    )
    return _assemble(model_class, config, encoder, lm, processor, seed), processor


def _processor(tokenizer: PreTrainedTokenizerBase, vision: VisionConfig, max_frames: int | None) -> FlamingoProcessor:
    transform = ImageTransform(vision.image_size, vision.mean, vision.std, mode=vision.resize_mode)
    return FlamingoProcessor(tokenizer, transform, max_frames=max_frames)


def _own_tokenizer(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None) -> PreTrainedTokenizerBase:
    """Return a copy which begins texts with its BOS, or does not; such an LM sees little of an image at position 0."""
    own = copy.deepcopy(tokenizer)
    if add_bos_token is not None:
        if add_bos_token and own.bos_token_id is None:
            raise UserError("add_bos_token=True, but the language model's tokenizer has no BOS: set its bos_token")
        own.add_bos_token = add_bos_token
        if start_ids(own) != [own.bos_token_id] * add_bos_token:
            raise UserError(
                f"add_bos_token={add_bos_token}, but a {type(own).__name__} begins texts in its own way: "
                "give a tokenizer with another post-processor"
            )
    return own


def _cast(modules: tuple[nn.Module, ...], dtype: torch.dtype | str | None) -> None:
    """Store the weights in another precision, in place; packed ones stay packed, and buffers as they are."""
    if dtype is None:
        return
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"dtype={dtype!r} is not a floating-point precision: give torch.bfloat16, torch.float32, ...")
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point() and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.to(wanted)
        if isinstance(module, PreTrainedModel):
            module.config.dtype = wanted


def _assemble(
    model_class: Any,
    config: FlamingoConfig,
    encoder: nn.Module,
    lm: PreTrainedModel,
    processor: FlamingoProcessor,
    seed: int,
) -> Any:
    """The model around both backbones, its new parts drawn from `seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, vision_module=encoder, causal_lm=lm)
    model.new_tokens.init_from(lm, seed=seed)
    if getattr(lm, "hf_device_map", None):
        for part in (model.vision_encoder, model.resampler, model.new_tokens):
            part.to(embedding_table(lm).weight.device)
        place_beside(lm, model.cross_attn_blocks, decoder_layers_path=config.decoder_layers_path)
    if model.generation_config.eos_token_id == [config.eoc_token_id] and processor.eos_token_id is not None:
        model.generation_config.eos_token_id = [config.eoc_token_id, processor.eos_token_id]
    model.generation_config.pad_token_id = processor.pad_token_id
    return model.eval()
