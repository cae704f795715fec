"""A tiny real world for the engine's tests: shards, a tokenizer, backbones, and configs around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from data.toy.vocabulary import write_tokenizer
from flamingo.config import CrossAttentionConfig
from flamingo.layers.resampler import ResamplerConfig
from flamingo.training.checkpoints.ema import Ema
from flamingo.training.checkpoints.store import Checkpoints
from flamingo.training.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.model_config import LanguageSource, ModelConfig, VisionSource
from tests.fixtures import png

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (230, 230, 230)}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
}


def write_world(root: Path) -> Path:
    """`documents` (0 to 2 images each), `textless` (images only now and then), `pairs`, `tokenizer`."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    with ShardWriter(root / "pages", "pages", 12) as writer:
        for index in range(48):
            document = Document("", [], [])
            for image in range(index % 3):
                name = names[int(rng.integers(len(names)))]
                document.nodes += [Image((image,)), Text(f"a big {name} square")]
                document.images.append(png(COLOURS[name], rng, 16))
            if not document.nodes:
                document.nodes.append(Text("two small green stars at the top left"))
            writer.write(document)
    with ShardWriter(root / "pairs", "pairs", 16, layout="pairs") as writer:
        for index in range(32):
            name = names[index % 4]
            writer.write(Document("", [Image((0,)), Text(f"a {name} square")], [png(COLOURS[name], rng, 16)]))
    with ShardWriter(root / "words", "words", 16) as writer:
        for index in range(32):
            writer.write(
                Document("", [Text(f"a {names[index % 4]} circle left of a {names[index // 4 % 4]} ring")], [])
            )
    write_tokenizer(root / "tokenizer")
    return root


def config(world: Path, run_dir: Path, objective: Any, **run: Any) -> TrainConfig:
    """A run of a few updates on the world."""
    pairs = {"pairs": {"shards": [str(world / "pairs")], "batch_size": 8, "kind": "pairs"}}
    datasets: dict[str, dict[str, dict[str, Any]]] = {
        "align": pairs,
        "contrastive": pairs,
        "language": {"words": {"shards": [str(world / "words")], "batch_size": 8, "max_tokens": 32}},
        "flamingo": {
            "pages": {"shards": [str(world / "pages")], "batch_size": 8, "max_tokens": 32},
            "pairs": {"shards": [str(world / "pairs")], "batch_size": 4, "kind": "pairs", "weight": 0.5},
        },
    }
    return TrainConfig(
        objective=objective,
        model=ModelConfig(
            vision=VisionSource(config=CLIP),
            language=LanguageSource(config=LLAMA, tokenizer=str(world / "tokenizer")),
            resampler=ResamplerConfig(depth=1, heads=2, head_dim=16, latents=4, ff_mult=2.0),
            cross_attention=CrossAttentionConfig(heads=2, head_dim=16, ff_mult=2.0),
        ),
        data=DataConfig(datasets=datasets[objective]),
        optim=OptimConfig(lr=3e-3, weight_decay=0.01),
        run=RunConfig(
            **{
                "dir": str(run_dir),
                "steps": 4,
                "log_every": 1,
                "checkpoint_every": 2,
                "tensorboard": False,
                "threads": 1,
                "device": "cpu",
                **run,
            }
        ),
    )


def save_checkpoint(
    root: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    *,
    keep_last: int,
    averages: Ema | None = None,
) -> Path:
    """Write one checkpoint as a run does, and wait until it is complete."""
    alone = Processes(0, 1, torch.device("cpu"))
    checkpoints = Checkpoints(root, model, optimizer, alone, RunConfig(keep_last=keep_last), averages)
    try:
        return checkpoints.save(step, extra, wait=True)
    finally:
        checkpoints.close()


def swap_words(folder: Path) -> None:
    """Make another tokenizer of the same size of the one in a folder: two words change places."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
