"""One self-contained page on one or several runs: tables, curves, and whatever would make the scores misleading."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.tools.templates import render
from eval.reports.results import interval_text, notes_of, percent, setting
from eval.reports.saved_run import SavedRun, problems

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
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
    """Return the page. `curve` and `risk` are PNGs."""
    first = ["task", "setting", "shots"]
    return render(
        TEMPLATE,
        curve=png_uri(curve),
        risk=None if risk is None else png_uri(risk),
        head=[*first, *(title for _, title in COLUMNS)],
        selective_head=[*first, *(title for _, title in SELECTIVE), "AURC", "E-AURC", "ECE", "Brier"],
        runs=[_run(run) for run in runs],
    )


def _run(run: SavedRun) -> dict[str, Any]:
    results = run.results
    rows = results["rows"]
    tasks = results.get("tasks", {})
    return {
        "folder": run.folder,
        "model": {"name": "?", "sha256": ""} | results.get("model", {}),
        "date": results.get("date", ""),
        "code": results.get("code", "?"),
        "device": results.get("device", "?"),
        "problems": problems(run),
        "notes": notes_of(results),
        "rows": [[*_first(row), *(_cell(key, row.get(key)) for key, _ in COLUMNS)] for row in rows],
        "selective": [_selective(row) for row in rows if row.get("selective")],
        "kinds": [_kinds(row) for row in rows if len(row["score_by_kind"]) > 1],
        "tasks": [(name, json.dumps(task, indent=1, ensure_ascii=False)) for name, task in tasks.items()],
    }


def _first(row: Mapping[str, Any]) -> list[object]:
    return [row["task"], setting(row), row["shots"]]


def _cell(key: str, value: Any) -> str:
    if value is not None and key.startswith("interval"):
        return interval_text(value)
    is_share = key in ("score", "chance", "constant") or key.endswith("_rate")
    return percent(value) if value is None or is_share else str(value)


def _selective(row: Mapping[str, Any]) -> list[object]:
    own = row["selective"]
    scores = [percent(own["score_at"][coverage]) for coverage, _ in SELECTIVE]
    return [*_first(row), *scores, *(f"{own[key]:.4f}" for key in ("aurc", "e_aurc", "ece", "brier"))]


def _kinds(row: Mapping[str, Any]) -> tuple[str, list[list[object]]]:
    kinds = row["score_by_kind"].items()
    title = f"{row['task']}, {setting(row)}, {row['shots']} shots: by kind"
    return title, [[kind or "(none)", "", percent(own["score"]), own["n"]] for kind, own in kinds]


def png_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
