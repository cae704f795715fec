"""The loss curve of a run as an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flamingo.files import write_atomically


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read `metrics.jsonl` into name -> [(step, value)]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        step = int(values.pop("step"))
        for name, value in values.items():
            curves.setdefault(name, []).append((step, float(value)))
    return curves


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return the running mean over about `share` of the points, over fewer at both ends."""
    half = max(1, int(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(0, middle - half), np.minimum(len(values), middle + half + 1)
    smoothed: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smoothed


def draw_losses(metrics: Path, image: Path, *, title: str) -> None:
    """Draw every `loss...` of a run, raw (pale) and smoothed, into a PNG, written whole or not at all."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    curves = {name: points for name, points in read_metrics(metrics).items() if name.startswith("loss")}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in sorted(curves.items()):
        if name == "loss" and len(curves) == 2:
            continue  # one dataset: its loss is the loss
        steps, values = np.array([s for s, _ in points]), np.array([v for _, v in points])
        (line,) = axes.plot(steps, smooth(values), label=name.removeprefix("loss/"))
        axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
    axes.set(title=title, xlabel="update", ylabel="loss (nats per label)")
    axes.set_yscale("log")  # an untrained model starts far above where it ends
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_atomically(image, lambda path: figure.savefig(path, dpi=120, format="png"))
    plt.close(figure)
