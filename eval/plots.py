"""The curve of the score against the number of shots, with everything it must be compared with.

One panel a task: the line with real pictures and its 95 % intervals, one line for each ablation, chance and the best
constant answer as flat lines. The horizontal axis is categorical: 0, 1, 2, 4, 8 are equally far apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people with any colour vision.
COLOURS = {"real": "#0072B2", "shuffled": "#D55E00", "blank": "#999999", "text_only": "#009E73"}
MARKS = {"real": "o", "shuffled": "s", "blank": "^", "text_only": "D"}
LABELS = {"real": "pictures as they are", "shuffled": "pictures shuffled", "blank": "pictures blank"}
LABELS["text_only"] = "demonstrations without pictures"


def curve_png(results: Mapping[str, Any], title: str = "") -> bytes:
    """A PNG with one panel a task, at most three beside each other."""
    rows: list[dict[str, Any]] = results["rows"]
    names = list(dict.fromkeys(row["task"] for row in rows))
    wide = min(len(names), 4 if len(names) == 4 else 3)
    high = -(-len(names) // wide)
    figure = Figure(figsize=(3.6 * wide, 3.3 * high + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(high, wide, squeeze=False)
    for name, panel in zip(names, panels.flat, strict=False):
        _panel(panel, name, [row for row in rows if row["task"] == name])
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    legend.set_frame_on(False)
    if title:
        figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(panel: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    shots = sorted({row["shots"] for row in rows})
    place = {k: position for position, k in enumerate(shots)}
    for pictures in dict.fromkeys(row["pictures"] for row in rows):
        line = sorted((row for row in rows if row["pictures"] == pictures), key=lambda row: row["shots"])
        x = [place[row["shots"]] for row in line]
        y = [100 * row["score"] for row in line]
        below = [max(0.0, 100 * (row["score"] - row["interval"][0])) for row in line]
        above = [max(0.0, 100 * (row["interval"][1] - row["score"])) for row in line]
        panel.errorbar(
            x,
            y,
            yerr=[below, above],
            color=COLOURS.get(pictures),
            marker=MARKS.get(pictures),
            markersize=4,
            capsize=2.5,
            linewidth=1.8 if pictures == "real" else 1.1,
            label=LABELS.get(pictures, pictures),
            zorder=3 if pictures == "real" else 2,
        )
    for key, style in (("chance", ":"), ("constant", "--")):
        value = rows[0][key]
        if value is not None and (key == "chance" or value != rows[0]["chance"]):
            label = "chance" if key == "chance" else "best constant answer"
            panel.axhline(100 * value, linestyle=style, color="black", linewidth=0.9, label=label, zorder=1)
    panel.set_title(f"{name} (n = {rows[0]['n']})", fontsize=9)
    panel.set_xticks(range(len(shots)), [str(k) for k in shots])
    panel.set_xlabel("shots", fontsize=8)
    panel.set_ylabel("score, %", fontsize=8)
    panel.set_ylim(-3, 103)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", linewidth=0.4, alpha=0.5)
