"""Objective `contrastive`: an open_clip model on image-text pairs. Its image encoder is what a flamingo run freezes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flamingo.errors import UserError
from flamingo.processor import ImageTransform
from flamingo.training.checkpoints.trained_weights import tokenizer_fingerprint
from flamingo.training.config import ModelConfig
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.distributed.units import layer_units
from flamingo.training.objectives.build import load_tokenizer
from flamingo.training.objectives.protocol import BatchShape, Setup
from flamingo.transfer import sent

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Normalisation of images that an encoder trained here expects; written beside its weights."""


class ContrastiveObjective:
    """open_clip's contrastive loss over the pairs of all processes."""

    host_inputs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        """The loss compares every image with every text of the whole batch, gathered with gradients."""
        self._loss = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world_size)

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of pairs."""
        return {"pairs": int(batch["text"].shape[0])}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over the whole batch times the pairs of this process.

        The mean is the same on all processes. Weighted by this process's pairs it survives the division by all pairs
        unchanged, and FSDP2's average over processes then matches the gathered gradients.
        """
        raw = batch["image"].float() / 255.0
        mean, std = (sent(torch.tensor(value)[:, None, None], raw.device) for value in (MEAN, STD))
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


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Build an open_clip model of random weights; all of it trains."""
    tokenizer = load_tokenizer(str(model.language.tokenizer))
    clip, described = build_clip(model.vision.config or {}, tokenizer)
    pairs = PairTokenizer(tokenizer, int(described["text_cfg"].get("context_length", 77)))
    size = int(described["vision_cfg"]["image_size"])
    return Setup(
        clip,
        ContrastiveObjective(processes.rank, processes.size),
        part_of=lambda name: "vision",
        collate=lambda classes: classes.PairCollate(
            pairs, ImageTransform(size=size, mean=MEAN, std=STD, mode="squash")
        ),
        export=lambda weights, folder: export(weights, described, tokenizer, folder),
        frozen={"tokenizer": tokenizer_fingerprint(tokenizer)},
    )


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, ContrastiveObjective]:
    """Build the same without memory; the tokenizer says how many embedding rows there are."""
    tokenizer = load_tokenizer(str(model.language.tokenizer))
    with torch.device("meta"):
        return build_clip(model.vision.config or {}, tokenizer)[0], ContrastiveObjective(0, processes)


def build_clip(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, dict[str, Any]]:
    """Build an open_clip model of random weights from `{embed_dim, vision_cfg, text_cfg}` and the tokenizer's ids.

    Return the model and the completed config. The temperature becomes a vector of one element: FSDP2 has no scalars.

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
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    return model, full


def export(state: dict[str, Tensor], config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write open_clip's own local folder: `open_clip.create_model("local-dir:FOLDER")` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    save_file(tensors, str(folder / "open_clip_model.safetensors"))
    tokenizer.save_pretrained(str(folder))
    mean, std = list(MEAN), list(STD)
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash"}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2))
