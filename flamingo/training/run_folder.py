"""The run folder and what is printed about a run."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from flamingo.errors import UserError
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Averages
from flamingo.training.config import TrainConfig, differences
from flamingo.training.metrics.loss_plot import draw_losses
from flamingo.training.metrics.flops import Flops, peak_tflops
from flamingo.training.distributed.launch import restarted
from flamingo.training.distributed.fsdp import Processes, whole


def claim_folder(config: TrainConfig, processes: Processes) -> Path | None:
    """Makes the run folder ready and returns the checkpoint to resume, if any.

    A folder that holds another run is refused rather than continued or overwritten. `config.yaml` is written once.

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
            # Floats and tuples as YAML understands them, so that a later start compares equal.
            write_atomically(described, yaml.safe_dump(_plain(config.as_dict()), sort_keys=False))
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written ({error}): choose another folder") from error
    processes.wait()  # nobody looks for checkpoints before the folder is ready
    chosen = [store.newest(checkpoints) if processes.is_main else None]
    if processes.size > 1:  # a shared file system may show them something else
        dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _described(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read ({why}): mend it, or choose another run.dir") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} does not describe a run: choose another run.dir")
    return found


def same_backbones(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path) -> None:
    """Refuses a checkpoint whose frozen weights were others: what it trained would be meaningless beside these.

    Raises:
        UserError: naming the part.
    """
    titles = {"vision": "vision encoder", "language": "language model"}
    for part in sorted(saved.keys() | now.keys()):
        if saved.get(part) != now.get(part):
            raise UserError(
                f"checkpoint {checkpoint} belongs to another {titles.get(part, part)} (fingerprint {saved.get(part)}, "
                f"this one has {now.get(part)}): give the one it was trained with, or choose another run.dir"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def write_atomically(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def export(write: Callable[[dict[str, Tensor], Path], Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Lets `write` fill a new folder beside `folder` and then takes its place: no half-written model looks whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; what there was of a model before stays.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(weights, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # which also frees space
        raise UserError(
            f"the model cannot be written to {folder} ({error}): free space and give the same command again, which "
            "writes it from the last checkpoint"
        ) from error


def finish(
    write: Callable[[dict[str, Tensor], Path], Any],
    model: nn.Module,
    averages: Averages | None,
    processes: Processes,
    *,
    run_dir: Path,
    title: str,
    replaced: Mapping[tuple[str, str], int],
) -> Path:
    """Writes `model`, `model-ema` where means of the weights are kept, and the curve of the losses; says so.

    Args:
        write: of the objective.
        model: trained.
        averages: of its weights.
        processes: all of them call this.
        run_dir: where it all goes.
        title: of the curve.
        replaced: (dataset, reason) to the number of its samples that were bad.
    """
    kinds = {"model": nullcontext()} | ({"model-ema": averages.in_place()} if averages else {})
    for name, weights_in_place in kinds.items():
        with weights_in_place:  # on the CPU the whole weights are the model's own memory
            weights = store.whole_weights(model)
            if processes.is_main:
                export(write, weights, run_dir / name)
    if processes.is_main:
        for (name, reason), number in replaced.items():
            print(f"{number} samples of dataset {name} were replaced: {reason}", flush=True)
        print(f"model in {run_dir / 'model'}", flush=True)
        try:
            draw_losses(run_dir / "metrics.jsonl", run_dir / "loss.png", title=f"{title} ({run_dir})")
            print(f"losses in {run_dir / 'loss.png'}", flush=True)
        except OSError as error:  # a picture is no reason to call a finished run failed
            print(f"{run_dir / 'loss.png'} cannot be written: {error}", file=sys.stderr, flush=True)
    processes.wait()  # nobody leaves while the model is being written
    return run_dir / "model"


def describe(
    model: nn.Module, part_of: Callable[[str], str], processes: Processes, checkpoint: Path | None = None
) -> str:
    """Parameters of each part, trained and frozen, where the run computes, and what it goes on from."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(part_of(name), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    lines = [f"  {part:<16} {trained:>14,} trained {frozen:>14,} frozen" for part, (trained, frozen) in rows.items()]
    resumed = [f"resumed {checkpoint}"] if checkpoint else []
    where = f"{processes.size} process(es) on {processes.device.type}, {torch.get_num_threads()} threads each"
    return "\n".join([f"{where}, torch {torch.__version__}, Python {platform.python_version()}", *lines, *resumed])


def mean_losses(weights: Mapping[str, float], sums: list[float], counts: list[float]) -> dict[str, float]:
    """`loss/<dataset>` over all labels of all processes, and `loss`, their weighted sum: what an update minimises."""
    means = {name: total / count for name, total, count in zip(weights, sums, counts, strict=True)}
    loss = sum(weight * means[name] for name, weight in weights.items())
    return {"loss": loss, **{f"loss/{name}": mean for name, mean in means.items()}}


def model_values(model: nn.Module) -> dict[str, float]:
    """Mean |tanh| of the attention and feed-forward gates (0 = the frozen LM alone), and the memory used so far."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("attn_gate", "ff_gate"):
            found.setdefault(f"gate/{leaf.removesuffix('_gate')}", []).append(whole(parameter.detach()).float())
    values = {name: float(torch.cat(gates).tanh().abs().mean()) for name, gates in found.items()}
    return {**values, "memory_gib": memory_gib()}


def part_norms(model: nn.Module, part_of: Callable[[str], str]) -> dict[str, float]:
    """Norm of the trained weights and of their gradients, for each part of the model. Called by every process."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    norms = {}
    for part, members in parts.items():
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        weights = [parameter.detach() for parameter in members]
        norms[f"norm/{part}"] = float(whole(nn.utils.get_total_norm(weights)))
        norms[f"grad_norm/{part}"] = float(whole(nn.utils.get_total_norm(gradients))) if gradients else 0.0
    return norms


def memory_gib() -> float:
    """Most memory of this process so far: of the GPU as torch allocated it, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Throughput:
    """Tokens, pictures and FLOPs a second over all processes, and the share of time spent waiting for data."""

    def __init__(self, processes: Processes, flops: Flops) -> None:
        """Starts counting now."""
        self._processes, self._flops = processes, flops
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: something else than training took its time."""
        self._began = time.perf_counter()
        self._tokens = self._images = 0
        self._waited = 0.0
        self._flops.take()

    def add(self, batches: Iterable[Mapping[str, Tensor]], waited: float) -> None:
        """One step: its batches on this process and the seconds it waited for them."""
        self._waited += waited
        for tensors in batches:
            if "attention_mask" in tensors:
                self._tokens += int(tensors["attention_mask"].sum())
            pictures = tensors.get("pixel_values", tensors.get("image"))
            self._images += 0 if pictures is None else int(pictures.shape[0])

    def read(self) -> dict[str, float]:
        """Rates since the last reading. Called by every process."""
        own = [float(self._tokens), float(self._images), float(self._flops.take())]
        tokens, images, flops = self._processes.sum(own)
        seconds = max(1e-9, time.perf_counter() - self._began)
        values = {
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "data_wait": min(1.0, self._waited / seconds),
            "model_tflops_per_s": flops / seconds / 1e12,
        }
        if peak := peak_tflops(self._processes.device):
            values["mfu"] = values["model_tflops_per_s"] / (peak * self._processes.size)
        self.restart()
        return values
