"""The steps of `python -m benchmarks gpu`, each in a process of its own; prints its rows as one line of JSON.

python -m benchmarks.gpu_steps decode --device cpu --size tiny
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LogitsProcessorList

from benchmarks import evaluation
from benchmarks.measure import Stamps, timed
from benchmarks.ours import Ours
from benchmarks.sizes import SIZES, Size
from benchmarks.work import Row, class_names, prompt, training_steps
from flamingo.inference.scoring import Trie
from flamingo.labels import IGNORED
from flamingo.layers import attention
from flamingo.layers.media_mask import segments_from_slots
from flamingo.training.checkpoints import store
from flamingo.training.config import OptimConfig, RunConfig
from flamingo.training.distributed import fsdp
from flamingo.training.memory_plan.dry_run import plan_step
from flamingo.training.memory_plan.ledger import Ledger
from flamingo.training.metrics.throughput import Flops
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.objectives.protocol import on_device, parallelize
from flamingo.training.optim import build_optimizer

REPEATS = 5
PEAK_SHARE, DECODE_RATIO, PLAN_APART = 0.5, 1.15, 0.15
"""What is wanted: of the matrix peak in a training step at 3b; of the bare LM's time in a decode step; of the plan."""


def row(what: str, value: Any, wanted: str = "", holds: bool | None = None) -> dict[str, Any]:
    """Return a row of the table; `holds`: whether what is wanted is reached, None where nothing is."""
    return {"what": what, "value": value, "wanted": wanted, "holds": holds}


def at_most(what: str, value: float, limit: float, judged: bool = True) -> dict[str, Any]:
    """Return a row whose value must not be above a limit, where it is judged."""
    return row(what, value, f"<= {limit:g}", value <= limit) if judged else row(what, value)


def finish(device: str) -> None:
    """Wait until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """Return the median seconds of a call, after one that warms up."""

    def whole() -> None:
        work()
        finish(device)

    return median(timed(whole, repeats)[0])


# Steps that do not depend on the size.


def device_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Name the device and the versions."""
    name = platform.processor() or platform.machine()
    rows = []
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        name = facts.name
        rows = [row("memory, GiB", facts.total_memory / 2**30), row("CUDA", torch.version.cuda)]
    names = ("torch", "transformers", "open_clip")
    versions = [row(library, str(import_module(library).__version__)) for library in names]
    found = row("xformers", attention.xformers_error() or str(import_module("xformers").__version__))
    return [row("device", name), *rows, *versions, found]


def attention_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Compare the ways to attend, values and gradients, with the formula in float64.

    Heads are those of the released models: 8 and 16 of 64, one of 96; images have 64 latents.
    """
    limits = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value; fp32 may be TF32
    ways = {"SDPA": lambda q: False}
    if device == "cuda" and attention.xformers_error() is None:
        ways["xformers"] = lambda q: True
    rows = []
    for heads, width in ((8, 64), (16, 64), (8, 96)):
        for dtype, limit in limits.items():
            if device == "cpu" and dtype == torch.float16:
                continue
            given = _attention_inputs(heads, width, device)
            exact = _attended([x.double() for x in given], _formula)
            for name, takes in ways.items():
                with patch.object(attention, "_xformers_takes", takes):
                    found = _attended([x.to(dtype) for x in given], attention.attend_segments)
                apart = max(_apart(a, b) for a, b in zip(found, exact, strict=True))
                what = f"{name} and the formula, {heads} x {width}, {str(dtype).removeprefix('torch.')}"
                rows.append(at_most(what, apart, limit))
    if "xformers" not in ways:
        rows.append(row("xformers", f"not compared: {attention.xformers_error() or 'it has no CPU operator'}"))
    return rows


def _segments(device: str) -> Any:
    """Return which of nine images each token of three ragged rows sees."""
    slots, image = torch.full((3, 96), -1), 0
    for number, starts in enumerate(((0,), (7, 20, 50), (0, 3, 40, 41, 90))):
        for start in starts:
            slots[number, start:] = image
            image += 1
    return segments_from_slots(slots.to(device), image)


def _attention_inputs(heads: int, width: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * width)
    queries = sum(_segments("cpu").lengths)
    shapes = ((queries, heads, width), *(((9, 64, heads, width),) * 2))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _attended(given: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """Return the values and the gradients of queries, keys and values."""
    inputs = [x.detach().requires_grad_() for x in given]
    out = attend(*inputs, _segments(inputs[0].device.type))
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


def _formula(q: Tensor, k: Tensor, v: Tensor, segments: Any) -> Tensor:
    """Attend query by query, as the paper writes it."""
    lengths = torch.tensor(segments.lengths, device=q.device)
    own = segments.images.repeat_interleave(lengths)
    weights = torch.einsum("nhk,nlhk->nhl", q, k[own]).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("nhl,nlhk->nhk", weights, v[own])


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def collectives_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Run the collectives of sharding in a group of one process."""
    with _group(device) as processes:
        mine = torch.arange(1 << 20, dtype=torch.float32, device=processes.device)
        whole, part = torch.empty_like(mine), torch.empty_like(mine)
        dist.all_gather_into_tensor(whole, mine)
        dist.reduce_scatter_tensor(part, mine)
        same = torch.equal(whole, mine) and torch.equal(part, mine)
        dist.all_reduce(whole)
        seconds = seconds_of(lambda: dist.all_reduce(whole), device)
        backend = "NCCL" if device == "cuda" else "gloo"
        return [
            row(f"{backend} with one process gives what it was given", same, "True", same),
            row("all-reduce of 4 MiB, ms", 1000 * seconds),
        ]


@contextmanager
def _group(device: str) -> Iterator[fsdp.Processes]:
    try:
        yield fsdp.start_processes(device, need_group=True)
    finally:
        fsdp.stop_processes()


# Training, through the parts that `train.py` uses.


def _batch(rows: list[Row], device: str) -> dict[str, Tensor]:
    counts = torch.tensor([len(each.images) for each in rows])
    ids, labels = (torch.stack([getattr(each, name) for each in rows]) for name in ("ids", "labels"))
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "image_counts": counts}
    batch["pixel_values"] = torch.cat([each.images for each in rows])[:, None]
    return on_device(FlamingoObjective(), batch, torch.device(device))


class Training:
    """A model, sharded over one process in bf16 as a run does it, and its optimizer."""

    def __init__(self, size: Size, device: str, processes: fsdp.Processes) -> None:
        self.model = Ours(size, device=device).model
        self.objective, self.device = FlamingoObjective(), device
        run = RunConfig(precision="bf16", device=device)  # type: ignore[arg-type]
        self.strategy = fsdp.sharding_strategy(run, 1)
        parallelize(self.model, self.objective, run, processes, self.strategy)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-5), self.model.part_of)
        self.trained = [parameter for _, parameter in self.model.trainable_parameters()]
        self.model.train()

    def update(self, batch: dict[str, Tensor]) -> Tensor:
        """Make an update; return the loss, which nothing has waited for."""
        assert self.strategy is not None
        fsdp.prepare_backward(self.model, self.strategy, last=True)
        loss = self.objective.sums(self.model, batch)["text"] / batch["labels"].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def matrix_peak(device: str) -> float:
    """Return the operations a second of a large bf16 matrix product."""
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 20)


def train_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Time updates in bf16, against the measured matrix peak, and count what waits for the GPU."""
    peak = matrix_peak(device)
    with _group(device) as processes:
        training = Training(size, device, processes)
        batch = _batch(training_steps(size)[1], device)
        first = float(training.update(batch))
        flops = Flops(training.model)
        training.update(batch)
        flop = flops.take()
        flops.close()
        seconds = seconds_of(lambda: training.update(batch), device)
        waits = _waits(lambda: training.update(batch)) if device == "cuda" else None
        last = float(training.update(batch))
    share = flop / seconds / peak
    wanted = size is SIZES["3b"]
    return [
        row("update, ms", 1000 * seconds),
        row("tokens a second", batch["input_ids"].numel() / seconds),
        row("matrix peak measured, TFLOP/s", peak / 1e12),
        row("model TFLOP/s", flop / seconds / 1e12),
        row("share of the peak", share, f">= {PEAK_SHARE}" * wanted, share >= PEAK_SHARE if wanted else None),
        row("waits of an update", "not counted on a CPU" if waits is None else waits),
        row("loss before and after", f"{first:.3f} {last:.3f}", "falls", last < first),
    ]


def _waits(work: Callable[[], Any]) -> int:
    """Return how many operators of a call wait for the GPU, as torch counts them."""
    finish("cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def memory_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Compare the most memory of two updates with the plan."""
    rows = training_steps(size)[1]
    objective = FlamingoObjective()
    with torch.device("meta"):
        model = Ours(size).model
    strategy = fsdp.sharding_strategy(RunConfig(precision="bf16"), 1)
    planned = plan_step(model, objective, [_batch(rows, "cpu")], strategy=strategy, device=device)
    with _group(device) as processes:
        training = Training(size, device, processes)
        batch = _batch(rows, device)
        training.update(batch)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            training.update(batch)
            found = torch.cuda.max_memory_allocated()
        else:  # no allocator to ask, so the live tensors are counted
            with Ledger() as ledger:
                moments = (value for state in training.optimizer.state.values() for value in state.values())
                ledger.own((*training.model.parameters(), *training.model.buffers(), *moments), "kept")
                training.update(batch)
            found = ledger.peak
    apart = abs(planned.device - found) / found
    parts = [row(f"planned, {part}, GiB", value / 2**30) for part, value in planned.parts.items()]
    return [
        *parts,
        row("planned in all, GiB", planned.device / 2**30),
        row("measured, GiB", found / 2**30),
        at_most("apart, share of the measured", apart, PLAN_APART, judged=device == "cuda"),
    ]


def checkpoint_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Save, change everything, resume, and compare."""
    with _group(device) as processes, tempfile.TemporaryDirectory() as folder:
        training = Training(size, device, processes)
        batch = _batch(training_steps(size)[1], device)
        training.update(batch)
        saved = [fsdp.full_tensor(parameter.detach()).clone() for parameter in training.trained]
        checkpoints = store.Checkpoints(
            Path(folder),
            training.model,
            training.optimizer,
            processes,
            RunConfig(device=device),  # type: ignore[arg-type]
        )
        began = time.perf_counter()
        path = checkpoints.save(1, {"step": 1}, wait=True)
        wrote = time.perf_counter() - began
        expected = float(training.update(batch))
        began = time.perf_counter()
        store.load(path, training.model, training.optimizer)
        read = time.perf_counter() - began
        pairs = zip(saved, training.trained, strict=True)
        same = all(torch.equal(a, fsdp.full_tensor(b.detach())) for a, b in pairs)
        again = float(training.update(batch))
        checkpoints.close()
        size_gib = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30
    return [
        row("checkpoint, GiB", size_gib),
        row("saved in s", wrote),
        row("resumed in s", read),
        row("weights as they were", same, "True", same),
        row("loss of the next update, before and again", f"{expected:.6f} {again:.6f}", "equal", expected == again),
    ]


# Inference.


def _frozen(size: Size, device: str) -> Ours:
    library = Ours(size, "bf16" if device == "cuda" else "fp32", device=device)
    library.model.requires_grad_(False)
    return library


def decode_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Time a new token with the images' keys cached, and the bare LM's after as many tokens."""
    library, work = _frozen(size, device), prompt(size, size.shots)

    def clock() -> float:
        finish(device)
        return time.perf_counter()

    def bare(stamps: Stamps) -> None:
        ids = work.ids.clamp(max=size.vocab - 1)[None].to(device)
        count = {"max_new_tokens": size.new_tokens + 1, "min_new_tokens": size.new_tokens + 1}
        library.model.language_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            logits_processor=LogitsProcessorList([stamps]),
            **count,
        )

    taken: dict[str, list[float]] = {"ours": [], "bare": []}
    for repeat in range(REPEATS + 1):
        ours, theirs = Stamps(clock), Stamps(clock)
        library.generate(work, size.new_tokens + 1, 1, ours)
        with library.casting():
            bare(theirs)
        if repeat:
            taken["ours"] += ours.steps()[1:]
            taken["bare"] += theirs.steps()[1:]
    own, alone = median(taken["ours"]), median(taken["bare"])
    return [
        row(f"decode step after {size.shots} shots, ms", 1000 * own),
        row("the bare LM's, ms", 1000 * alone),
        at_most("ratio, both eager", own / alone, DECODE_RATIO, judged=device == "cuda"),
    ]


def ranking_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Time the ranking of class names, and check a score against a pass over the whole text."""
    library, work, names = _frozen(size, device), prompt(size, size.rank_shots), class_names(size)
    scores = library.rank(work, names)
    seconds = seconds_of(lambda: library.rank(work, names), device, 3)
    chosen = names[-1]
    ids = torch.cat([work.ids, torch.tensor(chosen)])
    whole = Row(ids, work.images, torch.full_like(ids, IGNORED))
    log_p = library.logits(whole)[len(work.ids) - 1 : -1].log_softmax(-1)
    expected = float(log_p.gather(1, torch.tensor(chosen, device=log_p.device)[:, None]).sum())
    apart, limit = abs(expected - scores[-1]), 0.1 if device == "cuda" else 1e-3
    return [
        row(f"ranking {len(names)} names, {size.rank_shots} shots, ms", 1000 * seconds),
        row("tokens that are run for it", len(Trie.of(names).inner)),
        at_most("score of a name and of the whole text apart", apart, limit),
    ]


def evaluation_step(size: Size, device: str) -> list[dict[str, Any]]:
    """Time a few-shot evaluation from images to answers."""
    own = argparse.Namespace(shots=size.eval_shots)
    figures = evaluation.questions(_frozen(size, device), size, own)
    once = figures["encoded"] == figures["distinct"]
    return [
        row(f"{size.eval_queries} questions, {size.eval_shots} shots, s", figures["seconds"][0]),
        row("images encoded / distinct", f"{figures['encoded']} / {figures['distinct']}", "equal", once),
        row("again at half the shots, s", figures["again_s"]),
    ]


STEPS: dict[str, Callable[[Size, str], list[dict[str, Any]]]] = {
    "device": device_step,
    "attention": attention_step,
    "collectives": collectives_step,
    "train": train_step,
    "memory": memory_step,
    "checkpoint": checkpoint_step,
    "decode": decode_step,
    "ranking": ranking_step,
    "evaluation": evaluation_step,
}


def main() -> int:
    """Run one step and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    print(json.dumps(STEPS[options.step](SIZES[options.size], options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
