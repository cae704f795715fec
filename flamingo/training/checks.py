"""What a config asks for and this machine or installation does not have, found before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from flamingo.training.config import TrainConfig


def unavailable(config: TrainConfig) -> Iterator[str]:
    """One clause for each thing that is missing: the key, what is missing, the remedy."""
    run = config.run
    uses_gpu = run.device != "cpu" and torch.cuda.is_available()
    if run.device == "cuda" and not torch.cuda.is_available():
        yield "run.device=cuda, but torch sees no GPU here: set run.device=cpu or install a CUDA build"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_gpu and local > torch.cuda.device_count():
        yield f"{local} processes on this machine share {torch.cuda.device_count()} GPUs: start one process for each"
    if uses_gpu and run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "run.precision=bf16, but this GPU does not compute in bf16: set run.precision=fp32"
    if run.compile and not uses_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "run.compile=true needs a C++ compiler on a CPU: install g++, or set run.compile=false"
    if config.model.freeze.language == "lora" and importlib.util.find_spec("peft") is None:
        yield "model.freeze.language=lora needs peft: pip install 'flamingo-vlm[run]'"
    if run.wandb and importlib.util.find_spec("wandb") is None:
        yield f"run.wandb={run.wandb} needs wandb: pip install 'flamingo-vlm[wandb]', or run.wandb=null"
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "run.tensorboard=true needs tensorboard: pip install 'flamingo-vlm[run]', or run.tensorboard=false"
    if (init := config.model.init) is not None and not (Path(init) / "config.json").is_file():
        yield f"model.init={init} holds no model (config.json is missing): give a folder that a run has written"
