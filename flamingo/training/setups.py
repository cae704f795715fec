"""What differs between the objectives, gathered in one small record: the engine in `train.py` sees nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flamingo.backbones import load_language
from flamingo.checkpoint import manifest_of
from flamingo.processor import FlamingoProcessor, ImageTransform
from flamingo.training import build
from flamingo.training.config import ModelConfig
from flamingo.training.objectives import (
    ContrastiveObjective,
    FlamingoObjective,
    LanguageObjective,
    Objective,
)
from flamingo.training.parallel import Processes


@dataclass(frozen=True)
class Setup:
    """One objective, ready to train."""

    model: nn.Module
    objective: Objective
    part_of: Callable[[str], str]
    """Parameter name to part of the model."""
    export: Callable[[dict[str, Tensor], Path], Any]
    """Writes the whole state dict into a folder."""
    tokenizer: PreTrainedTokenizerBase
    processor: FlamingoProcessor | None = None
    pairs: build.PairTokenizer | None = None
    transform: ImageTransform | None = None
    frozen: dict[str, str] = field(default_factory=dict)
    """Frozen part to a fingerprint of its weights: they are not in a checkpoint, so it must say whose they were."""


def language_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """A causal LM on the text of pages, with a tokenizer of its own where none is named."""
    language = model.language
    if language.name:
        lm, tokenizer = load_language(language.name, language.tokenizer)
    elif language.tokenizer:
        tokenizer = build.load_tokenizer(language.tokenizer)
    else:
        folder = run_dir / "tokenizer"
        if processes.is_main and not folder.exists():
            build.train_tokenizer(texts(), language.vocab_size).save_pretrained(str(folder))
        processes.wait()  # the others, until it is written
        tokenizer = build.load_tokenizer(str(folder))
    if not language.name:
        lm = build.build_language(language.config or {}, tokenizer)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        lm.save_pretrained(str(folder), state_dict=weights)
        tokenizer.save_pretrained(str(folder))

    return Setup(lm, LanguageObjective(), lambda name: "language", export, tokenizer)


def contrastive_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """An open_clip model on pairs; its picture tower is the encoder that a flamingo run freezes."""
    tokenizer = build.load_tokenizer(str(model.language.tokenizer))
    clip, described = build.build_contrastive(model.vision.config or {}, tokenizer)
    return Setup(
        clip,
        ContrastiveObjective(processes.rank, processes.size),
        lambda name: "vision",
        lambda weights, folder: build.export_contrastive(weights, described, tokenizer, folder),
        tokenizer,
        pairs=build.PairTokenizer(tokenizer, int(described["text_cfg"].get("context_length", 77))),
        transform=ImageTransform(
            size=int(described["vision_cfg"]["image_size"]),
            mean=ContrastiveObjective.MEAN,
            std=ContrastiveObjective.STD,
            mode="squash",
        ),
    )


def flamingo_setup(
    model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]
) -> Setup:
    """Frozen backbones, and between them what trains."""
    flamingo, processor = build.build_flamingo(model)
    flamingo.freeze(asdict(model.freeze))

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        flamingo.save_pretrained(str(folder), state_dict=weights)
        processor.save_pretrained(str(folder))

    return Setup(
        flamingo,
        FlamingoObjective(),
        flamingo.part_of,
        export,
        processor.tokenizer,
        processor=processor,
        transform=processor.image_transform,
        frozen=manifest_of(flamingo)["fingerprints"],
    )


SETUPS = {"language": language_setup, "contrastive": contrastive_setup, "flamingo": flamingo_setup}
