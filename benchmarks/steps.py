"""The cost of a training step against batch size, images and tokens of a row; this library alone.

    python -m benchmarks step_cost --size tiny

Operations are counted as a run counts them for `model_tflops_per_s`, while the step is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product
from statistics import median
from typing import Any

from benchmarks import arithmetic
from benchmarks.sizes import Size
from benchmarks.table import print_table
from benchmarks.work import row
from flamingo.training.metrics.throughput import Flops

BATCHES, IMAGES, TOKENS = (1, 2, 4), (1, 5, 32), (256, 1024, 2048)


def grid(options: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Yield the options of every step that is measured."""
    for batch, images, tokens in product(options.batches, options.images, options.tokens):
        yield {"batch": batch, "images": images, "tokens": tokens}


def step_cost(library: Any, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Measure forward, backward, clipping and AdamW; the first step is a warm-up."""
    rows = [row(size, options.images, options.tokens, seed=index) for index in range(options.batch)]
    losses = [library.train_step(rows)]
    seconds = []
    flops = Flops(library.model)
    for _ in range(options.repeats):
        start = time.perf_counter()
        losses.append(library.train_step(rows))
        seconds.append(time.perf_counter() - start)
    flop = flops.take() / options.repeats
    flops.close()
    return {"seconds": seconds, "flop": flop, "needed": arithmetic.update(size, rows), "values": losses}


WHAT = {"step_cost": step_cost}


def cells(result: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    seconds = median(result["seconds"])
    sizes = [str(result[key]) for key in ("batch", "images", "tokens")]
    text = result["batch"] * result["tokens"] / seconds
    added = (result["peak_bytes"] - result["built_bytes"]) / 2**30
    figures = [f"{1000 * seconds:,.0f}", f"{text:,.0f}", f"{result['flop'] / 2e9:.3g}"]
    return [*sizes, *figures, f"{result['peak_bytes'] / 2**30:.2f}", f"{added:.2f}"]


def print_steps(document: dict[str, Any]) -> None:
    """Print the table, if any of it was measured."""
    results = [result for result in document["results"] if result["name"] == "step_cost"]
    if not results:
        return
    head = ["batch", "images", "tokens", "ms", "tokens/s", "G multiply-adds", "peak GiB", "of it by the steps"]
    print()
    print_table([head, ["---:"] * len(head), *map(cells, results)])
