"""What travels between the processes of a step, measured for every sharding strategy.

    python -m flamingo.training.memory_plan.collectives           # 2 and 4 gloo processes, a Flamingo on a small LLaMA
    python -m flamingo.training.memory_plan.collectives --family gpt2 --processes 2 --micro-batches 4

Counted where torch hands collectives to its backend, in a real step of real processes. A collective's bytes are those
of its larger side: an all-gather's output, a reduce-scatter's input, the tensor of an all-reduce; of n processes each
receives (n - 1) / n of that, of an all-reduce twice as much. Also shown are the bytes that a process keeps: its part of
the weights, of the gradients and of AdamW's two moments.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.conformance.tiny_models import FAMILIES, document, subject, tiny_lm
from flamingo.labels import IGNORED
from flamingo.training.distributed.fsdp import Processes, ShardingStrategy, local_tensor, prepare_backward, shard, spawn
from flamingo.training.distributed.traffic import KINDS, CountTraffic
from flamingo.training.distributed.units import flamingo_units
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.optim import adamw, parameter_groups

STRATEGIES = {
    "full shard": ShardingStrategy(),
    "full shard, kept gathered": ShardingStrategy(keep_gathered=True),
    "full shard, every micro-batch reduced": ShardingStrategy(sync_every_micro_batch=True),
    "hybrid: 2 share a copy": ShardingStrategy(shard_size=2),
    "frozen replicated": ShardingStrategy(frozen="replicate"),
    "frozen replicated, kept gathered": ShardingStrategy(frozen="replicate", keep_gathered=True),
    "full shard, CPU offload": ShardingStrategy(offload=True),
    "full shard, bf16": ShardingStrategy(precision="bf16", frozen_dtype=torch.bfloat16),
    "frozen replicated, bf16": ShardingStrategy(precision="bf16", frozen="replicate", frozen_dtype=torch.bfloat16),
}


def local_bytes(tensors: Any) -> int:
    """Return the bytes of this process's part of the tensors."""
    own = [local_tensor(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes kept between backward and update: trained and frozen weights, gradients, AdamW's state."""
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    with torch.no_grad():
        return {
            "trained": local_bytes(p for p in parameters if p.requires_grad),
            "frozen": local_bytes(p for p in parameters if not p.requires_grad),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "frozen gradients": local_bytes(p.grad for p in parameters if p.grad is not None and not p.requires_grad),
            "optimizer": local_bytes(state for state in states if state.ndim),
        }


def measure(processes: Processes, family: str, name: str, micro_batches: int) -> dict[str, Any]:
    """Measure an update of `micro_batches` under a strategy of `STRATEGIES`; the first update is not counted."""
    strategy = STRATEGIES[name]
    model = subject(partial(tiny_lm, family))
    shard(model, flamingo_units(model), processes, strategy)
    groups = parameter_groups(model.named_parameters(), lr=1e-3, weight_decay=0.1, lr_factors={}, part_of=model.part_of)
    optimizer = adamw(groups, betas=(0.9, 0.95), eps=1e-8)
    batch = document(model, (0, 1, 2), side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    model.train()
    counted: dict[str, Any] = {}
    for _ in range(2):
        with CountTraffic() as seen:
            for index in range(micro_batches):
                prepare_backward(model, strategy, last=index + 1 == micro_batches)
                FlamingoObjective().sums(model, batch)["text"].backward()
        counted = {"calls": seen.traffic.calls, "bytes": seen.traffic.bytes, "kept": kept_bytes(model, optimizer)}
        optimizer.step()
        counted["kept"]["optimizer"] = kept_bytes(model, optimizer)["optimizer"]
        optimizer.zero_grad()
    return counted


def _all(processes: Processes, family: str, micro_batches: int, file: str) -> None:
    names = [name for name, strategy in STRATEGIES.items() if processes.size % (strategy.shard_size or 1) == 0]
    traffic = {name: measure(processes, family, name, micro_batches) for name in names}
    if processes.is_main:
        Path(file).write_text(json.dumps(traffic))


def measure_all(family: str, processes: int, micro_batches: int) -> dict[str, dict[str, Any]]:
    """Return every strategy's traffic and kept bytes, as the first of `processes` gloo processes sees them."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "traffic.json")
        spawn(_all, processes, family, micro_batches, str(file))
        measured: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return measured


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table; kB are 1,000 bytes."""
    kinds = list(KINDS.values())
    head = ["strategy", *(f"{kind} (kB)" for kind in kinds), "trained kB", "frozen kB", "gradients kB", "AdamW kB"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, row in measured.items():
        sent = [f"{row['calls'].get(kind, 0)} ({row['bytes'].get(kind, 0) / 1e3:.1f})" for kind in kinds]
        kept = [f"{row['kept'][part] / 1e3:.1f}" for part in ("trained", "frozen", "gradients", "optimizer")]
        lines.append(" | ".join([name, *sent, *kept]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m flamingo.training.memory_plan.collectives", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", default="llama", choices=list(FAMILIES), help="of the tiny language model")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, default=1, help="of an update")
    options = parser.parse_args(arguments)
    for processes in options.processes:
        print(f"\n{options.family}, {processes} processes, {options.micro_batches} micro-batches an update:\n")
        print(table(measure_all(options.family, processes, options.micro_batches)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
