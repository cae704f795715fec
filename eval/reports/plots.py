"""Curves: the score against the number of shots, and the risk against the coverage, with what to compare them to.

One panel per task: a line and its 95 % band for each run, strategy and ablation; chance and the best constant answer as
flat lines; and, as hollow marks, what papers report for other models on their own splits. The axis of shots is
categorical: 0, 1, 2, 4, 8 are equally far apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.reports.saved_run import SavedRun

# Okabe and Ito's colours, distinct for any colour vision.
COLOURS = {"real": "#0072B2", "shuffled": "#D55E00", "blank": "#999999", "text_only": "#009E73"}
COLOURS["unordered"] = "#CC79A7"
MORE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = {"real": "o", "shuffled": "s", "blank": "^", "text_only": "D", "unordered": "v"}
LABELS = {"real": "images as they are", "shuffled": "images shuffled", "blank": "images blank"}
LABELS |= {"text_only": "demonstrations without images", "unordered": "frames in another order"}

Results = Mapping[str, Any]
ResultsRow = Mapping[str, Any]


def curve_png(named: Mapping[str, Results]) -> bytes:
    """Return a PNG of one or several runs by name, with one panel a task, at most three beside each other."""
    tasks = _tasks(named)
    series = list(dict.fromkeys(_series(name, row) for name, r in named.items() for row in r["rows"]))
    figure, panels = _panels(len(tasks))
    for task, panel in zip(tasks, panels, strict=False):
        rows = {name: [row for row in results["rows"] if row["task"] == task] for name, results in named.items()}
        _panel(panel, task, rows, series)
        for results in named.values():
            _reference(panel, results["tasks"].get(task, {}).get("definition", {}).get("reference"), rows)
    return _png(figure, panels)


def risk_png(named: Mapping[str, Results]) -> bytes | None:
    """Draw risk-coverage curves at the most shots, one panel per task; None if nothing has a confidence."""
    tasks = _tasks(named)
    lines = {task: _risks(named, task) for task in tasks}
    tasks = [task for task in tasks if lines[task]]
    if not tasks:
        return None
    figure, panels = _panels(len(tasks))
    for task, panel in zip(tasks, panels, strict=False):
        for index, (label, risk) in enumerate(lines[task].items()):
            coverage = [100 * (point + 1) / len(risk) for point in range(len(risk))]
            panel.plot(coverage, [100 * r for r in risk], color=MORE[index % len(MORE)], label=label, linewidth=1.6)
        _axes(panel, task, "answered, the surest first, %", "wrong, %")
    return _png(figure, panels)


def named_results(runs: Sequence[SavedRun]) -> dict[str, Results]:
    """Return results by the name in a legend: empty for a single run, else the folder's name, or its path if needed."""
    if len(runs) == 1:
        return {"": runs[0].results}
    names = [run.folder.name for run in runs]
    return {n if names.count(n) == 1 else str(run.folder): run.results for n, run in zip(names, runs, strict=True)}


def _tasks(named: Mapping[str, Results]) -> list[str]:
    return list(dict.fromkeys(row["task"] for results in named.values() for row in results["rows"]))


def _series(run: str, row: ResultsRow) -> tuple[str, str, str]:
    return run, row.get("strategy", "plain"), row["images"]


def _label(series: tuple[str, str, str]) -> str:
    run, strategy, images = series
    how = LABELS.get(images, images)
    parts = [run, strategy if strategy != "plain" else "", how if images != "real" or not (run or strategy) else ""]
    return ", ".join(part for part in parts if part) or how


def _colour(series: tuple[str, str, str], every: Sequence[tuple[str, str, str]]) -> str:
    """Return a line's colour: the ablation's own where nothing else varies."""
    if len({series_key[:2] for series_key in every}) == 1:
        return COLOURS.get(series[2], "#000000")
    return MORE[list(every).index(series) % len(MORE)]


def _panel(
    panel: Axes, task: str, rows: Mapping[str, Sequence[ResultsRow]], every: Sequence[tuple[str, str, str]]
) -> None:
    shots = sorted({row["shots"] for own in rows.values() for row in own})
    position = {k: index for index, k in enumerate(shots)}
    for series in every:
        own = [row for row in rows[series[0]] if _series(series[0], row) == series]
        if not own:
            continue
        line = sorted(own, key=lambda row: row["shots"])
        x = [position[row["shots"]] for row in line]
        ends = np.array([row["interval"] for row in line], dtype=np.float64)  # a row without an interval has nan
        low, high = 100 * ends[:, 0], 100 * ends[:, 1]
        colour, main = _colour(series, every), series[2] == "real"
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        y = [100 * row["score"] for row in line]
        # A percentile interval need not contain the mean, and matplotlib refuses negative error bars.
        below = [max(0.0, value - bottom) for value, bottom in zip(y, low, strict=True)]
        above = [max(0.0, top - value) for value, top in zip(y, high, strict=True)]
        panel.errorbar(
            x,
            y,
            yerr=[below, above],
            color=colour,
            marker=MARKS.get(series[2], "o"),
            markersize=4,
            capsize=2,
            elinewidth=0.7,
            linewidth=1.8 if main else 1.1,
            label=_label(series),
            zorder=3 if main else 2,
        )
    first = next(row for own in rows.values() for row in own)
    for key, style in (("chance", ":"), ("constant", "--")):
        value = first[key]
        if value is not None and (key == "chance" or value != first["chance"]):
            label = "chance" if key == "chance" else "best constant answer"
            panel.axhline(100 * value, linestyle=style, color="black", linewidth=0.9, label=label, zorder=1)
    panel.set_xticks(range(len(shots)), [str(k) for k in shots])
    _axes(panel, f"{task} (n = {first['n']})", "shots", "score, %")


def _reference(panel: Axes, reference: Any, rows: Mapping[str, Sequence[ResultsRow]]) -> None:
    """Draw what papers report at the shots that were run: `{paper, model, shots: {k: score in %}}`, or a list."""
    shots = sorted({row["shots"] for own in rows.values() for row in own})
    for entry in reference if isinstance(reference, list) else [reference] if reference else []:
        points = {int(k): float(score) for k, score in entry.get("shots", {}).items()}
        known = [k for k in shots if k in points]
        if known:
            label = " ".join(str(entry[key]) for key in ("model", "paper") if key in entry) + " (as published)"
            x, y = [shots.index(k) for k in known], [points[k] for k in known]
            panel.plot(x, y, linestyle="none", marker="o", fillstyle="none", color="#555555", label=label, zorder=1)


def _risks(named: Mapping[str, Results], task: str) -> dict[str, list[float]]:
    risks = {}
    for run, results in named.items():
        rows = [r for r in results["rows"] if r["task"] == task and r["images"] == "real" and r.get("selective")]
        most = max((row["shots"] for row in rows), default=0)
        for row in (row for row in rows if row["shots"] == most):
            label = ", ".join(filter(None, [run, row.get("strategy", "plain"), f"{most} shots"]))
            risks[label] = row["selective"]["risk"]
    return risks


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    wide = min(count, 4 if count == 4 else 3)
    high = -(-count // wide)
    figure = Figure(figsize=(3.6 * wide, 3.3 * high + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels


def _axes(panel: Axes, title: str, below: str, beside: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(below, fontsize=8)
    panel.set_ylabel(beside, fontsize=8)
    panel.set_ylim(-3, max(103, panel.get_ylim()[1]))  # CIDEr goes above 100
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", linewidth=0.4, alpha=0.5)


def _png(figure: Figure, panels: Sequence[Axes]) -> bytes:
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(3, round(figure.get_figwidth() / 3.6))  # a label is as wide as a panel, or it is cut off
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    legend.set_frame_on(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
