"""Objective `contrastive`: an open_clip model on image-text pairs. Its image encoder is what a flamingo run freezes.

The model is a new one of the shape `model.vision.config`, or goes on from the weights of `model.vision.name`: one of
open_clip's with its tag, or a folder in open_clip's layout, such as this objective writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flamingo.backbones import OPEN_CLIP_CONFIG, cached_open_clip, open_clip_config, read_open_clip_config
from flamingo.errors import UserError, first_line
from flamingo.processor import ImageTransform
from flamingo.training.checkpoints.trained_weights import tokenizer_fingerprint
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.distributed.units import layer_units
from flamingo.training.model_config import ModelConfig, VisionSource
from flamingo.training.objectives.build import load_tokenizer
from flamingo.training.objectives.protocol import BatchShape, Setup
from flamingo.transfer import sent
from flamingo.vision.encoder import RESIZE_MODES

NEW = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
"""How a new encoder gets its images, in open_clip's words; written beside its weights."""


class ContrastiveObjective:
    """open_clip's contrastive loss over the pairs of all processes."""

    host_inputs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, rank: int = 0, world_size: int = 1, images: Mapping[str, Any] = NEW) -> None:
        """The loss compares every image with every text of the whole batch, gathered with gradients.

        `images` has the `mean` and `std` that images are normalised with.
        """
        self._loss = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world_size)
        self._mean, self._std = images["mean"], images["std"]

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of pairs."""
        return {"pairs": int(batch["text"].shape[0])}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over the whole batch times the pairs of this process.

        The mean is the same on all processes. Weighted by this process's pairs it survives the division by all pairs
        unchanged, and FSDP2's average over processes then matches the gathered gradients.
        """
        raw = batch["image"].float() / 255.0
        mean, std = (sent(torch.tensor(value)[:, None, None], raw.device) for value in (self._mean, self._std))
        images, texts, scale = model((raw - mean) / std, batch["text"])[:3]
        # CLIP's own limit on the temperature (Radford et al. 2021, section 2.5) keeps training stable.
        loss: Tensor = self._loss(images, texts, scale.clamp(max=100.0))
        return {"pairs": loss * batch["text"].shape[0]}

    def fsdp_units(self, model: nn.Module) -> Iterator[FsdpUnit]:
        """Return a unit for each transformer block of the image and of the text encoder."""
        return layer_units(self.compiled_layers(model))

    def compiled_layers(self, model: Any) -> Iterator[nn.Module]:
        """Return the transformer blocks of the image and of the text encoder."""
        for encoder in (model.visual, model):
            yield from getattr(getattr(encoder, "transformer", None), "resblocks", ())

    def largest_batch(self, model: Any, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return `rows` pairs; the shape of a pair is the model's."""
        side = model.visual.image_size
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        text = torch.full((rows, model.context_length), model.vocab_size - 1)
        return {"image": torch.empty((rows, 3, height, width), dtype=torch.uint8, device="meta"), "text": text}


class PairTokenizer:
    """Texts to `(B, context)` ids for open_clip's text encoder: text, end of text, padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        """`context_length` counts the end of text."""
        self._tokenizer, self._context = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Cut what is too long, keeping the end of text, where the encoder reads its feature."""
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        rows = torch.full((len(texts), self._context), pad, dtype=torch.long)
        for row, ids in zip(rows, self._tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            kept = [*ids[: self._context - 1], eos]
            row[: len(kept)] = torch.tensor(kept)
        return rows


@dataclass(frozen=True)
class Clip:
    """An open_clip model with all that its folder describes."""

    model: Any
    config: dict[str, Any]
    """open_clip's `model_cfg`."""
    images: Mapping[str, Any]
    """open_clip's `preprocess_cfg`."""
    texts: Callable[[list[str]], Tensor]
    """B texts to `(B, context)` ids."""
    tokenizer: PreTrainedTokenizerBase | None
    """What `texts` uses; None: open_clip's own, which needs no files."""


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Build an open_clip model of random weights or load one; all of it trains."""
    clip = load_clip(model.vision) if model.vision.name else new_clip(model)
    # The temperature becomes a vector of one element: FSDP2 has no scalars.
    clip.model.logit_scale = nn.Parameter(clip.model.logit_scale.detach().reshape(1))
    size, (mean, std) = clip.model.visual.image_size, (tuple(clip.images[key]) for key in ("mean", "std"))
    mode = RESIZE_MODES[clip.images.get("resize_mode") or "shortest"]
    transform = ImageTransform(size=size if isinstance(size, int) else size[0], mean=mean, std=std, mode=mode)
    return Setup(
        clip.model,
        ContrastiveObjective(processes.rank, processes.size, clip.images),
        part_of=lambda name: "vision",
        collate=lambda classes: classes.PairCollate(clip.texts, transform),
        export=lambda weights, folder: export(weights, clip, folder),
        frozen={"tokenizer": tokenizer_fingerprint(clip.tokenizer) if clip.tokenizer else "open_clip"},
    )


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, ContrastiveObjective]:
    """Build the same without memory; the tokenizer says how many embedding rows there are."""
    config = dict(model.vision.config or {})
    with torch.device("meta"):
        if model.vision.name:  # its shape has been looked up
            custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
            clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        else:
            clip = build_clip(config, load_tokenizer(str(model.language.tokenizer)))[0]
    clip.logit_scale = nn.Parameter(torch.empty(1, device="meta"))
    return clip, ContrastiveObjective(0, processes)


def new_clip(model: ModelConfig) -> Clip:
    """Build a model of random weights, whose text encoder is as large as the tokenizer."""
    tokenizer = load_tokenizer(str(model.language.tokenizer))
    clip, config = build_clip(model.vision.config or {}, tokenizer)
    texts = PairTokenizer(tokenizer, int(config["text_cfg"].get("context_length", 77)))
    return Clip(clip, config, NEW, texts, tokenizer)


def load_clip(vision: VisionSource) -> Clip:
    """Load the whole of an open_clip model, by its name and tag or from a folder.

    Raises:
        UserError: there is no such model, its weights cannot be had, or it was trained with another loss.
    """
    name, size, described = str(vision.name), vision.image_size, Path(str(vision.name)) / OPEN_CLIP_CONFIG
    options: dict[str, Any] = {"force_image_size": size}
    if described.is_file():
        source, config = f"local-dir:{name}", read_open_clip_config(described)[0]
    elif name in open_clip.list_models():
        if vision.pretrained is None:
            raise UserError(f"model.vision.pretrained is missing: name open_clip's weights of {name}, or their file")
        known = open_clip_config(name, vision.pretrained, size)
        source, config = name, open_clip.get_model_config(name)
        config["quick_gelu"] = options["force_quick_gelu"] = bool((known.arch or {})["quick_gelu"])
        is_file = Path(vision.pretrained).is_file()
        options["pretrained"] = vision.pretrained if is_file else cached_open_clip(name, vision.pretrained)
        modes = {ours: theirs for theirs, ours in RESIZE_MODES.items()}
        shown = {"mean": known.mean, "std": known.std, "resize_mode": modes[known.resize_mode]}
        options["force_preprocess_cfg"] = shown  # a cached file does not say which tag it is
    else:
        raise UserError(
            f"model.vision.name={name} is neither a name of open_clip nor a folder with {OPEN_CLIP_CONFIG}: objective "
            "contrastive goes on with open_clip's models"
        )
    try:
        clip = open_clip.create_model(source, **options)
        texts: Any = open_clip.get_tokenizer(source)
    except Exception as error:  # a file that is no checkpoint, or that of another model, raises any
        raise UserError(f"model.vision.name={name} cannot be loaded by open_clip: {first_line(error)}") from error
    if not isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP) or clip.logit_bias is not None:
        raise UserError(
            f"model.vision.name={name} is not a CLIP (a {type(clip).__name__} with a loss of its own): objective "
            "contrastive has CLIP's loss alone"
        )
    rows = config["text_cfg"].get("vocab_size", 49408)
    tokens = len(texts.tokenizer) if hasattr(texts, "tokenizer") else texts.vocab_size
    if tokens > rows and "hf_model_name" not in config["text_cfg"]:
        raise UserError(f"model.vision.name={name}: its tokenizer has {tokens} tokens and its text encoder {rows}")
    if size is not None:
        config["vision_cfg"]["image_size"] = size
    images = {key: clip.visual.preprocess_cfg[key] for key in NEW}
    return Clip(clip, config, images, texts, getattr(texts, "tokenizer", None))


def build_clip(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, dict[str, Any]]:
    """Build an open_clip model of random weights from `{embed_dim, vision_cfg, text_cfg}` and the tokenizer's ids.

    Return the model and the completed config.

    Raises:
        UserError: open_clip does not accept the config.
    """
    text = {
        "vocab_size": len(tokenizer),
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        **config.get("text_cfg", {}),
    }
    full = {"embed_dim": config.get("embed_dim"), "vision_cfg": config.get("vision_cfg"), "text_cfg": text}
    try:
        model = open_clip.CLIP(**full)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model.vision.config is not accepted by open_clip ({error}): see open_clip's model configs"
        ) from error
    return model, full


def export(state: dict[str, Tensor], clip: Clip, folder: Path) -> None:
    """Write open_clip's own local folder: `create_model` and `get_tokenizer` of `local-dir:FOLDER` read it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(tensors, str(folder / "open_clip_model.safetensors"))
    config = clip.config
    if clip.tokenizer is not None:
        own = isinstance(clip.texts, PairTokenizer)
        (ending_texts(clip.tokenizer) if own else clip.tokenizer).save_pretrained(str(folder))
        # open_clip takes its own tokenizer unless a name is given, and then the one beside the weights.
        config = {**config, "text_cfg": {"hf_tokenizer_name": "local", **config["text_cfg"]}}
    description = {"model_cfg": config, "preprocess_cfg": clip.images}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(description, indent=2))


def ending_texts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that ends each text as `PairTokenizer` does, for libraries that do not do it themselves."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return tokenizer
    rules, eos = Tokenizer.from_str(backend.to_str()), tokenizer.eos_token
    rules.post_processor = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
    names = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **names)
