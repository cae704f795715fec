"""Clips of different lengths on two processes: each must call the same sharded modules as often as the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo.conformance.tiny_models import SIZE, document, subject, tiny_lm
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.distributed.fsdp import Processes, ShardingStrategy, full_tensor, prepare_backward, shard, spawn
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.optim import adamw
from tests.training.test_parallel import distance

FRAMES = {0: [1, 3], 1: [2]}
"""Of the images in rows 0 and 1 of `document`: a process of two has two lengths, the other one."""
LABELS = 20.0


def clips(model: FlamingoForConditionalGeneration, rows: list[int]) -> dict[str, Any]:
    """Rows of `document` whose images are clips, as the processor gives them."""
    batch: dict[str, Any] = dict(document(model, rows, side="right"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["frame_counts"] = torch.tensor([frames for row in rows for frames in FRAMES[row]])
    pixels = []
    for row in rows:
        shape = (sum(FRAMES[row]), 3, SIZE, SIZE)
        pixels.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(row)))
    batch["pixel_values"] = torch.cat(pixels)
    return batch


def updates(vision: str, processes: Processes | None = None) -> dict[str, Any]:
    """Losses and trained weights after two updates on both rows, of which each of two processes has one."""
    model = subject(partial(tiny_lm, "llama"))
    model.freeze({"vision": vision})
    rows, size = [0, 1], 1
    if processes is not None:
        rows, size = [processes.rank], processes.size
        shard(model, flamingo_units(model), processes, ShardingStrategy())
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw([{"params": trained, "lr": 1e-3, "weight_decay": 0.1}], betas=(0.9, 0.95), eps=1e-3)
    losses = []
    for _ in range(2):
        if processes is not None:
            prepare_backward(model, ShardingStrategy(), last=True)
        loss = FlamingoObjective().sums(model, clips(model, rows))["text"] / LABELS
        (loss * size).backward()
        losses.append(float(loss.detach()) if processes is None else processes.sum([float(loss.detach())])[0])
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: full_tensor(p.detach()).float() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "weights": weights}


def _work(processes: Processes, kinds: list[str], file: str) -> None:
    found = [updates(vision, processes) for vision in kinds]
    if processes.is_main:
        torch.save(found, file)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_with_clips_of_different_lengths_are_one(tmp_path: Path) -> None:
    kinds = ["frozen", "train"]
    spawn(_work, 2, kinds, str(tmp_path / "found.pt"))
    for vision, sharded in zip(kinds, torch.load(tmp_path / "found.pt"), strict=True):
        losses, weights = distance(sharded, updates(vision))
        assert losses < 2e-5, vision
        assert weights < 5e-5, vision


def test_lengths_do_not_decide_how_often_a_module_is_called() -> None:
    model = subject(partial(tiny_lm, "llama"))
    called: list[str] = []
    for part in ("vision_encoder", "resampler"):
        getattr(model, part).register_forward_hook(lambda *_, part=part: called.append(part))
    for rows in ([0], [1], [0, 1]):
        FlamingoObjective().sums(model, clips(model, rows))["text"]
    assert called == ["vision_encoder", "resampler"] * 3
