"""One page on one or several runs that needs nothing but itself: tables, curves, and what would make scores mislead."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.reports.results import setting
from eval.reports.saved_run import SavedRun, problems

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem .7rem; text-align: right; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr:nth-child(even) { background: #f6f6f6; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem; } img { max-width: 100%; }
.bad { color: #b03020; } summary { cursor: pointer; } small { color: #666; }
"""
COLUMNS = (
    ("score", "score"),
    ("interval", "95 % interval"),
    ("interval_these_seeds", "of these demonstrations"),
    ("chance", "chance"),
    ("constant", "constant"),
    ("n", "n"),
    ("n_images", "images"),
    ("parse_fail_rate", "unparsed"),
    ("unended_rate", "cut off"),
    ("copy_rate", "copied"),
    ("copy_last_rate", "copied the last"),
    ("prompts_cut", "prompts cut"),
    ("leaks_refused", "leaks refused"),
)
SELECTIVE = (("0.9", "score at 90 %"), ("0.8", "80 %"), ("0.55", "55 %"), ("0.5", "50 %"))


def report_html(runs: Sequence[SavedRun], curve: bytes, risk: bytes | None) -> str:
    """The page. `curve` and `risk` are PNGs."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style>"]
    parts.append(f"<h1>Few-shot evaluation</h1>{_image(curve, 'score against shots, with 95 % bands')}")
    if risk is not None:
        parts.append(f"<h2>Where it may decline to answer</h2>{_image(risk, 'risk against coverage')}")
    for run in runs:
        parts.append(_run(run))
    return "".join(parts) + "</html>\n"


def _run(run: SavedRun) -> str:
    results = run.results
    model = results.get("model", {})
    said = [f"<h2>{_text(run.folder)}</h2><p>Model <code>{_text(model.get('name', '?'))}</code> "]
    said.append(f"<small>{_text(str(model.get('sha256', ''))[:16])}</small>, {_text(results.get('date', ''))}, ")
    said.append(f"code {_text(results.get('code', '?'))}, {_text(results.get('device', '?'))}.</p>")
    wrong = problems(run)
    if wrong:
        said.append("<ul class=bad>" + "".join(f"<li>{_text(sentence)}" for sentence in wrong) + "</ul>")
    said.append(_table(results["rows"]))
    sure = [row for row in results["rows"] if row.get("selective")]
    if sure:
        said.append(_selective(sure))
    said.append("".join(_kinds(row) for row in results["rows"] if len(row["score_by_kind"]) > 1))
    for name, task in results.get("tasks", {}).items():
        said.append(f"<details><summary>{_text(name)}: definition and longest prompt</summary>")
        said.append(f"<pre>{_text(json.dumps(task, indent=1, ensure_ascii=False))}</pre></details>")
    return "".join(said)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "<tr><th>task<th>setting<th>shots" + "".join(f"<th>{title}" for _, title in COLUMNS)
    lines = []
    for row in rows:
        cells = [row["task"], setting(row), row["shots"], *(_cell(key, row.get(key)) for key, _ in COLUMNS)]
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}" for cell in cells))
    return f"<table>{head}{''.join(lines)}</table>"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key.startswith("interval"):
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    return f"{100 * value:.1f} %" if key in ("score", "chance", "constant") or key.endswith("_rate") else str(value)


def _selective(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "<tr><th>task<th>setting<th>shots" + "".join(f"<th>{title}" for _, title in SELECTIVE)
    head += "<th>AURC<th>E-AURC<th>ECE<th>Brier"
    lines = []
    for row in rows:
        own = row["selective"]
        cells = [
            row["task"],
            setting(row),
            row["shots"],
            *(f"{100 * own['score_at'][at]:.1f} %" for at, _ in SELECTIVE),
        ]
        cells += [f"{own[key]:.4f}" for key in ("aurc", "e_aurc", "ece", "brier")]
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}" for cell in cells))
    return f"<h3>Selective prediction</h3><table>{head}{''.join(lines)}</table>"


def _kinds(row: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{_text(kind or '(none)')}<td><td>{100 * own['score']:.1f} %<td>{own['n']}"
        for kind, own in row["score_by_kind"].items()
    ]
    title = f"{row['task']}, {setting(row)}, {row['shots']} shots: by kind"
    return f"<details><summary>{_text(title)}</summary><table>{''.join(lines)}</table></details>"


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{_text(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
