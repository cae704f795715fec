"""The report of filled sheets: tables for the terminal and the page, and a figure of all shares."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.rating.axes import Axis
from eval.reports.plots import MORE
from eval.reports.results import interval_text, percent
from eval.reports.tables_page import Table, tables_html

OUTCOMES = ("first_wins", "ties", "second_wins")
Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def tables_of(summary: Summary) -> list[Table]:
    """Return shares, wins and agreement."""
    shares = [
        [row["axis"], row["system"], row["option"], *_share(row), str(row["n"]), row["note"]]
        for row in summary["shares"]
    ]
    wins = [
        [row["axis"], *("{} ({})".format(*_share(row[key])) for key in OUTCOMES), f"{row['p']:.4f}", str(row["n"])]
        for row in summary["wins"]
        if row["n"]
    ]
    agreement = [
        [row["axis"], row["level"], *_alpha(row), str(row["units"]), row["note"]] for row in summary["agreement"]
    ]
    better = [f"{name} is better (95 %)" for name in summary["systems"]] if wins else ["", ""]
    return [
        Table("Shares", ["axis", "system", "option", "share", "95 % interval", "ratings", ""], shares),
        Table("Wins", ["axis", better[0], "no difference (95 %)", better[-1], "p", "pairs"], wins),
        Table("Agreement (Krippendorff's alpha)", ["axis", "level", "alpha", "95 % interval", "units", ""], agreement),
    ]


def _share(row: Row) -> list[str]:
    return [percent(row["share"]), interval_text(row["interval"])]


def _alpha(row: Row) -> list[str]:
    if row["alpha"] is None:
        return ["–", "–"]
    low, high = row["interval"]
    return [f"{row['alpha']:.3f}", "–" if low is None else f"{low:.3f} to {high:.3f}"]


def report_html(summary: Summary, figure: bytes, axes: Mapping[str, Axis]) -> str:
    """Return the page."""
    raters = [f"{rater} {own['rated']} of {own['asked']}" for rater, own in summary["raters"].items()]
    sentences = [
        f"Answers of {' and '.join(summary['systems'])}, {summary['questions']} questions; rated: {', '.join(raters)}.",
        "Intervals resample questions and raters. Wins on an axis: one rater chose the better option for that system.",
    ]
    asked = Table("Axes", ["axis", "question"], [[key, axis.question] for key, axis in axes.items()])
    return tables_html("Rating", sentences, summary["notes"], [figure], [*tables_of(summary), asked])


def shares_png(summary: Summary, axes: Mapping[str, Axis]) -> bytes:
    """Return a PNG with a panel for each axis: the share of each option, of each system, with its interval."""
    panels = [(key, _bars(summary, key)) for key in axes]
    panels = [(key, bars) for key, bars in panels if bars]
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(4.2 * wide, 2.6 * high + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    places = list(figure.subplots(high, wide, squeeze=False).flat)
    for place in places[len(panels) :]:
        place.set_visible(False)
    for place, (key, bars) in zip(places, panels, strict=False):
        if axes[key].compares:  # grey: it is about both systems
            _panel(place, key, ["first", "no difference", "second"], bars, MORE[-1:])
        else:
            _panel(place, key, axes[key].choices, bars, MORE)
    handles = {label: handle for p in places for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bars(summary: Summary, key: str) -> dict[str, list[Row]]:
    """Return the rows of an axis by system, or of a comparison under the names of both."""
    bars: dict[str, list[Row]] = {}
    for row in summary["shares"]:
        if row["axis"] == key:
            bars.setdefault(row["system"], []).append(row)
    for row in summary["wins"] if not bars else ():
        if row["axis"] == key and row["n"]:
            bars[f"{row['first']} (first) or {row['second']} (second) is better"] = [
                row[outcome] for outcome in OUTCOMES
            ]
    return bars


def _panel(
    panel: Axes, title: str, options: Sequence[str], bars: Mapping[str, Sequence[Row]], colours: Sequence[str]
) -> None:
    height = 0.8 / len(bars)
    for number, (name, rows) in enumerate(bars.items()):
        y = np.arange(len(options)) + number * height
        values = np.array([100 * row["share"] for row in rows])
        ends = 100 * np.array([row["interval"] for row in rows], dtype=np.float64)  # none is nan
        errors = np.maximum(0, np.nan_to_num([values - ends[:, 0], ends[:, 1] - values]))
        panel.barh(
            y,
            values,
            height,
            xerr=errors,
            color=colours[number],
            label=name,
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
    labels = [textwrap.fill(option, 24, max_lines=2) for option in options]
    panel.set_yticks(np.arange(len(options)) + 0.4 - height / 2, labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("share, %", fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
