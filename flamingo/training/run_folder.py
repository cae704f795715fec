"""The run folder: claimed at the start, filled with the model and the loss plot at the end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor

from flamingo.configs.validate import flatten
from flamingo.errors import UserError
from flamingo.files import write_atomically, write_folder
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Ema
from flamingo.training.config import TrainConfig, differences
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.launch import restarted
from flamingo.training.metrics.loss_plot import draw_losses
from flamingo.training.metrics.sinks import plain
from flamingo.training.objectives.protocol import Setup
from flamingo.training.optim import scheduled_scale


def claim_folder(config: TrainConfig, processes: Processes) -> Path | None:
    """Make the run folder ready and return the checkpoint to resume, if any.

    A folder that holds another run is refused rather than continued or overwritten. Where there is a checkpoint,
    `config.yaml` stays as it is until the checkpoint fits (`describe_run`): places in it may have changed.

    Raises:
        UserError: the folder belongs to a run whose updates differ, or cannot be written.
    """
    run_dir = Path(config.run.dir)
    described, checkpoints = run_dir / "config.yaml", run_dir / "checkpoints"
    if described.exists() and (config.run.resume == "auto" or restarted()):
        changed = differences(_described(described), config.as_dict())
        if changed:
            raise UserError(
                f"{run_dir} holds a run with another config: {', '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}: choose another run.dir, or run.resume=never to start anew"
            )
    try:
        if processes.is_main:
            if config.run.resume == "never" and not restarted():  # what the launcher starts again goes on
                for stale in (checkpoints, run_dir / "model", run_dir / "tensorboard", run_dir / "tokenizer"):
                    shutil.rmtree(stale, ignore_errors=True)
                (run_dir / "metrics.jsonl").unlink(missing_ok=True)
            run_dir.mkdir(parents=True, exist_ok=True)
            if store.newest(checkpoints) is None:
                describe_run(config, processes)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written ({error}): choose another folder") from error
    processes.wait()  # nobody looks for checkpoints before the folder is ready
    chosen = [store.newest(checkpoints) if processes.is_main else None]
    if processes.size > 1:  # a shared file system may show them something else
        dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def describe_run(config: TrainConfig, processes: Processes) -> None:
    """Write `config.yaml`, on the first process.

    Raises:
        UserError: the run folder cannot be written.
    """
    if not processes.is_main:
        return
    try:
        write_atomically(Path(config.run.dir) / "config.yaml", as_yaml(config))
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir} cannot be written ({error}): choose another folder") from error


def as_yaml(config: TrainConfig) -> str:
    """Return the config with floats and tuples as YAML understands them, so that a later start compares equal."""
    return yaml.safe_dump(plain(config.as_dict()), sort_keys=False)


def continuation(config: TrainConfig, step: int) -> Iterator[str]:
    """Yield a sentence for each change since the run's last start that shows in its figures.

    Args:
        config: of this start; that of the last one is still in `config.yaml`.
        step: updates that the checkpoint has behind it.
    """
    file = Path(config.run.dir) / "config.yaml"
    before = flatten(_described(file)) if file.exists() else {}
    steps, micro_batches = (before.get(f"run.{key}", getattr(config.run, key)) for key in ("steps", "micro_batches"))
    old, new = (scheduled_scale(step, number, config.optim) * config.optim.lr for number in (steps, config.run.steps))
    if old != new:
        yield (
            f"run.steps {steps} -> {config.run.steps} changes the {config.optim.schedule} schedule: the learning rate "
            f"of update {step + 1} is {new:.3g} where it was {old:.3g}"
        )
    if micro_batches != config.run.micro_batches:
        yield (
            f"run.micro_batches {micro_batches} -> {config.run.micro_batches}: the same batches, their gradients "
            "summed in another order, so figures agree to rounding; dropout and packed rows fall out differently"
        )


def _described(file: Path) -> dict[str, Any]:
    try:
        described = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read ({why}): repair it, or choose another run.dir") from error
    if not isinstance(described, dict):
        raise UserError(f"{file} does not describe a run: choose another run.dir")
    return described


def check_backbones(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse a checkpoint of other frozen weights: what it trained would be meaningless beside these.

    Raises:
        UserError: naming the part.
    """
    titles = {"vision": "vision encoder", "language": "language model", "config": "model config"}
    titles["features"] = "image encoding"
    for part in sorted(saved.keys() | now.keys()):
        if saved.get(part) != now.get(part):
            raise UserError(
                f"checkpoint {checkpoint} belongs to another {titles.get(part, part)} (fingerprint {saved.get(part)}, "
                f"this one has {now.get(part)}): give the one it was trained with, or choose another run.dir"
            )


def export(write: Callable[[dict[str, Tensor], Path], Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Let `write` fill a new folder that then replaces `folder`: no half-written model looks complete.

    Raises:
        UserError: the disk is full or the folder cannot be written; what there was of a model before stays.
    """
    try:
        write_folder(folder, lambda temporary: write(weights, temporary), overwrite=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be written to {folder} ({error}): free space and give the same command again, which "
            "writes it from the last checkpoint"
        ) from error


def write_results(
    setup: Setup,
    averages: Ema | None,
    processes: Processes,
    run_dir: Path,
    *,
    title: str,
    replaced: Mapping[tuple[str, str], int],
) -> Path:
    """Write `model`, `model-ema` where means of the weights are kept, and the loss plot; print where.

    Args:
        setup: the trained model and its export.
        averages: of its weights.
        processes: all of them call this.
        run_dir: where it all goes.
        title: of the curve.
        replaced: (dataset, reason) to the number of its samples that were bad.
    """
    kinds = {"model": nullcontext()} | ({"model-ema": averages.applied()} if averages else {})
    for name, weights_in_place in kinds.items():
        with weights_in_place:  # on the CPU the whole weights are the model's own memory
            weights = store.full_weights(setup.model)
            if processes.is_main:
                export(setup.export, weights, run_dir / name)
    if processes.is_main:
        for (name, reason), number in replaced.items():
            print(f"{number} samples of dataset {name} were replaced: {reason}", flush=True)
        print(f"model in {run_dir / 'model'}", flush=True)
        try:
            draw_losses(run_dir / "metrics.jsonl", run_dir / "loss.png", title=f"{title} ({run_dir})")
            print(f"losses in {run_dir / 'loss.png'}", flush=True)
        except OSError as error:  # a missing plot must not make a finished run fail
            print(f"{run_dir / 'loss.png'} cannot be written: {error}", file=sys.stderr, flush=True)
    processes.wait()  # nobody leaves while the model is being written
    return run_dir / "model"
