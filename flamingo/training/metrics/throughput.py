"""Figures of a step (losses, norms, rates, memory) and the lines that a run begins with."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flamingo.training.distributed.fsdp import Processes, full_tensor


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
    weights: Mapping[str, float], sums: Mapping[tuple[str, str], float], divisors: Mapping[tuple[str, str], float]
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


PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) by a word of the device's name, from NVIDIA's data sheets; the H100's is the SXM model's."""

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, Conv1D)
Inputs = tuple[Any, ...]


class Flops:
    """A counter of the matrix products of every forward and backward of a model from now on."""

    def __init__(self, model: nn.Module) -> None:
        """Hooks on layers with weights and on attention, wherever in the model they are.

        What `compile_layers` has compiled is counted from outside, by the shape of its input: a hook inside would break
        the compiled graph.
        """
        self._count = 0
        self._hooks: list[Any] = []
        inside: set[nn.Module] = set()
        for module in model.modules():
            if module in inside:
                continue
            add: Any = None
            if hasattr(module.forward, "_torchdynamo_orig_callable"):
                inside |= set(module.modules())
                add = self._add_compiled
            elif isinstance(module, LAYERS):
                add = self._add_layer
            elif is_attention(module):
                add = self._add_attention
            if add is not None:
                self._hooks.append(module.register_forward_hook(add, with_kwargs=True))

    def _add_layer(self, module: nn.Module, args: Inputs, kwargs: Mapping[str, Any], output: Any) -> None:
        if isinstance(output, Tensor) and not _again():
            self._count += 2 * layer_products(module, output) * _passes(module, _learns(args))

    def _add_attention(self, module: nn.Module, args: Inputs, kwargs: Mapping[str, Any], output: Any) -> None:
        if _again():
            return
        learns = _learns(chain(args, kwargs.values()))
        self._count += 2 * attention_products(module, args, kwargs) * (3 if _flows(module, learns) else 1)
        for rows, weight in packed_projections(module, args, kwargs):
            self._count += 2 * rows * weight.numel() * (1 + torch.is_grad_enabled() * (learns + weight.requires_grad))

    def _add_compiled(self, module: nn.Module, args: Inputs, kwargs: Mapping[str, Any], output: Any) -> None:
        """Count a decoder layer or a feed-forward, each of whose parts sees every token of the input once."""
        if _again():
            return
        x = _tokens(args, kwargs)
        learns = _flows(module, x.requires_grad)
        rows = x.numel() // x.shape[-1]
        for part in module.modules():
            if isinstance(part, nn.Linear | Conv1D):
                self._count += 2 * rows * _matrix(part) * _passes(part, learns)
            elif is_attention(part):
                self._count += 2 * attention_products(part, (x,), {}) * (3 if learns else 1)

    def take(self) -> int:
        """Return the FLOPs of this process since the last call."""
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()


def layer_products(module: nn.Module, output: Tensor) -> int:
    """Return the multiply-adds of a layer with weights. The LM's head may give one loss a position for its logits."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return output.numel() * prod(module.weight.shape[1:])
    return output.shape[:-1].numel() * _matrix(module)


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is attention and not a wrapper around it, going by the name of its class."""

    def named(module: nn.Module) -> bool:
        return type(module).__name__.endswith("Attention")

    return named(module) and not any(named(part) for part in module.modules() if part is not module)


def attention_products(module: nn.Module, args: Inputs, kwargs: Mapping[str, Any]) -> int:
    """Return the multiply-adds of queries with keys and of weights with values."""
    if (own := getattr(module, "attention_products", None)) is not None:
        return int(own(*args, **kwargs))
    x = _tokens(args, kwargs)
    y = x
    if isinstance(module, nn.MultiheadAttention):
        y = args[1] if len(args) > 1 else kwargs["key"]
        if not module.batch_first:
            x, y = (value.transpose(0, 1) for value in (x, y))
    return 2 * x.shape[:-1].numel() * y.shape[-2] * _width(module, x)


def packed_projections(module: nn.Module, args: Inputs, kwargs: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Yield (rows, weight) of projections that attention of torch or open_clip computes without calling a layer."""
    packed = getattr(module, "in_proj_weight", None)
    if packed is None:
        return
    x = _tokens(args, kwargs)
    rows = x.numel() // x.shape[-1]
    if not isinstance(module, nn.MultiheadAttention):
        yield rows, packed
        return
    y = args[1] if len(args) > 1 else kwargs["key"]
    others = y.numel() // y.shape[-1]
    queries, keys, values = packed.chunk(3)
    yield rows, queries
    yield others, keys
    yield others, values
    yield rows, module.out_proj.weight


def _matrix(module: Any) -> int:
    """Return the entries of a layer's weight; 4-bit layers store fewer values."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


def _width(module: Any, x: Tensor) -> int:
    """Return heads times their width, by the names the libraries use; without such, the width of the input."""
    owners = (module, getattr(module, "config", None))
    names = ("num_heads", "num_attention_heads", "n_heads")
    heads = next((n for owner in owners for name in names if isinstance(n := getattr(owner, name, None), int)), 0)
    head = next((n for name in ("head_dim", "head_size") if isinstance(n := getattr(module, name, None), int)), 0)
    return heads * head or x.shape[-1]


def _tokens(args: Inputs, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input (B, T, D): the first, or the one that transformers and torch give by name."""
    tensor: Tensor = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["query"]
    return tensor


def _again() -> bool:
    """Return whether this is inside a backward, where activation checkpointing repeats the forward."""
    return torch._C._current_graph_task_id() != -1


def _learns(values: Any) -> bool:
    """Return whether a gradient goes to one of the inputs."""
    flat = chain.from_iterable(value if isinstance(value, tuple | list) else (value,) for value in values)
    return any(isinstance(value, Tensor) and value.requires_grad for value in flat)


def _flows(module: nn.Module, learns: bool) -> bool:
    """Return whether a gradient goes through a module, or to something inside it."""
    return torch.is_grad_enabled() and (learns or any(parameter.requires_grad for parameter in module.parameters()))


def _passes(module: Any, learns: bool) -> int:
    """Return the number of passes: forward, and backward to the input and to the weight."""
    return 1 + torch.is_grad_enabled() * (learns + module.weight.requires_grad)


def peak_tflops(device: torch.device) -> float | None:
    """Return the peak of one device, or None where it is unknown: a share of a guess is not a measurement."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name.replace("-", " ").split()), None)
