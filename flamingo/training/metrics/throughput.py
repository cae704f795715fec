"""Figures of a step (losses, norms, rates, memory) and the lines that a run begins with."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo.training.distributed.fsdp import Processes, full_tensor
from flamingo.training.metrics.flops import Flops, peak_tflops


def describe_model(
    model: nn.Module, part_of: Callable[[str], str], processes: Processes, checkpoint: Path | None = None
) -> str:
    """Return the parameters of each part, trained and frozen, where the run computes, and what it resumes."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(part_of(name), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    lines = [f"  {part:<16} {trained:>14,} trained {frozen:>14,} frozen" for part, (trained, frozen) in rows.items()]
    resumed = [f"resumed {checkpoint}"] if checkpoint else []
    where = f"{processes.size} process(es) on {processes.device.type}, {torch.get_num_threads()} threads each"
    return "\n".join([f"{where}, torch {torch.__version__}, Python {platform.python_version()}", *lines, *resumed])


def mean_terms(
    prefix: str, sums: Mapping[tuple[str, str], float], divisors: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Return `<prefix>/<dataset>`, the sum of its terms' means, and `<prefix>/<dataset>/<term>` if it has several."""
    terms: dict[str, dict[str, float]] = {}
    for (dataset, term), total in sums.items():
        terms.setdefault(dataset, {})[term] = total / divisors[dataset, term]
    values = {f"{prefix}/{dataset}": sum(means.values()) for dataset, means in terms.items()}
    for dataset, means in terms.items():
        if len(means) > 1:
            values |= {f"{prefix}/{dataset}/{term}": mean for term, mean in means.items()}
    return values


def mean_losses(
    weights: Mapping[str, float],
    sums: Mapping[tuple[str, str], float],
    divisors: Mapping[tuple[str, str], float],
) -> dict[str, float]:
    """Return the means of all processes' loss terms, and `loss`, their weighted sum, which an update minimises."""
    means = mean_terms("loss", sums, divisors)
    return {"loss": sum(weight * means[f"loss/{name}"] for name, weight in weights.items()), **means}


def model_values(model: nn.Module) -> dict[str, float]:
    """Return the mean |tanh| of the attention and feed-forward gates (0 = the frozen LM alone), and the memory used."""
    gates: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("attn_gate", "ff_gate"):
            gates.setdefault(f"gate/{leaf.removesuffix('_gate')}", []).append(full_tensor(parameter.detach()).float())
    values = {name: float(torch.cat(parts).tanh().abs().mean()) for name, parts in gates.items()}
    return {**values, "memory_gib": memory_gib()}


def part_norms(model: nn.Module, part_of: Callable[[str], str]) -> dict[str, float]:
    """Return the norms of the trained weights and gradients of each part of the model. Called by every process."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    norms = {}
    for part, members in parts.items():
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        weights = [parameter.detach() for parameter in members]
        norms[f"norm/{part}"] = float(full_tensor(nn.utils.get_total_norm(weights)))
        norms[f"grad_norm/{part}"] = float(full_tensor(nn.utils.get_total_norm(gradients))) if gradients else 0.0
    return norms


def memory_gib() -> float:
    """Return the most memory of this process so far: of the GPU as torch allocated it, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Throughput:
    """Tokens, images and FLOPs a second over all processes, and the share of time spent waiting for data."""

    def __init__(self, processes: Processes, flops: Flops) -> None:
        """Start counting now."""
        self._processes, self._flops = processes, flops
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: something other than training took its time."""
        self._began = time.perf_counter()
        self._tokens = self._images = 0
        self._waited = 0.0
        self._flops.take()

    def add(self, micro_batches: Mapping[str, Iterable[Mapping[str, Tensor]]], waited: float) -> None:
        """Count a step: the micro-batches of each dataset on this process, and the seconds it waited for them."""
        self._waited += waited
        for tensors in chain.from_iterable(micro_batches.values()):
            if "attention_mask" in tensors:
                self._tokens += int(tensors["attention_mask"].sum())
            images = tensors.get("pixel_values", tensors.get("image"))
            self._images += 0 if images is None else int(images.shape[0])

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading. Called by every process."""
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
