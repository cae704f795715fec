"""Packed pairs feeding a training step: `python -m data.bench.feeding FOLDER` prints one JSON line.

Measured is what a run logs as `data_wait`, the share of time that training waits for a batch, and how much of the
processor time the loader takes. The model is made of ViT-B/32 and an OPT of 12 layers x 768, with random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import OPTConfig

from data.batches.collate import FlamingoCollate
from data.bench.material import Material, tokenizer_of
from data.bench.measure import cpu_seconds, processes
from data.bench.ours import spec_of
from data.loading.loader import MixLoader
from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.optim import adamw
from flamingo.vision.transform import ImageTransform

PACK, SIDE = 256, 224


def model_of(processor: FlamingoProcessor, layers: int) -> FlamingoForConditionalGeneration:
    """Return a model whose backbones have `layers` layers of 768 each."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "layers": layers, "width": 768, "patch_size": 32}
    language = OPTConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=768,
        word_embed_proj_dim=768,
        ffn_dim=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=2 * PACK,
        dropout=0.0,
    )
    config = FlamingoConfig(
        vision_config={"arch": {"embed_dim": 512, "vision_cfg": vision}, "image_size": SIDE},
        text_config=language,
        image_token_id=processor.image_token_id,
        eoc_token_id=processor.eoc_token_id,
    )
    return FlamingoForConditionalGeneration(config).train()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, value in (("batch", 32), ("workers", 2), ("warm", 2), ("count", 10), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    material = Material.at(args.folder)
    processor = FlamingoProcessor(tokenizer_of(material), ImageTransform(SIDE, mode="crop"))
    model = model_of(processor, args.layers)
    trained = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = adamw(
        [{"params": trained, "lr": 1e-4, "initial_lr": 1e-4, "weight_decay": 0.1}], betas=(0.9, 0.95), eps=1e-8
    )
    objective = FlamingoObjective()
    loader = MixLoader(
        [spec_of(material, "pairs", args.batch, pack=PACK)], FlamingoCollate(processor), num_workers=args.workers
    )
    steps = iter(loader)
    waited, began, cpu, images = 0.0, 0.0, 0.0, 0
    training = time.process_time()
    for step in range(args.warm + args.count):
        if step == args.warm:
            waited, began, images = 0.0, time.perf_counter(), 0
            cpu, training = cpu_seconds(), time.process_time()
        since = time.perf_counter()
        batch = next(steps).batches["pairs"][0]
        waited += time.perf_counter() - since
        (objective.sums(model, batch.tensors)["text"] / objective.counts(batch.tensors)["text"]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        images += batch.stats["images"]
    wall, all_cpu = time.perf_counter() - began, cpu_seconds() - cpu
    loading = max(0.0, all_cpu - (time.process_time() - training))
    assert len(processes()) == 1 + args.workers
    print(
        json.dumps(
            {"wait": waited / wall, "loading": loading / all_cpu, "wall": wall / args.count, "images": images / wall}
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
