"""What `python -m eval` does with finished runs: report, compare, check, export. Settings are key=value."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from eval.reports.compare import compare, differing_definitions, lines
from eval.reports.results import table
from eval.reports.saved_run import problems, read_run
from eval.reports.submissions import KEYS, read_ids, submission
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.terminal import printable


def split_settings(arguments: Sequence[str], keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return (folders, settings). Raises UserError for a setting that is not among `keys`.

    A folder may have `=` in its name, as those of a sweep's jobs: it exists, or has a separator before the `=`.
    """
    settings, folders = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in keys or (equals and "/" not in key and not Path(argument).exists()):
            settings[key] = value
        else:
            folders.append(argument)
    unknown = sorted(settings.keys() - set(keys))
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}; the keys are {', '.join(keys) or 'none'}")
    return folders, settings


def report(arguments: Sequence[str]) -> int:
    """Run `report FOLDER [FOLDER ...] [out=FOLDER]`: tables, curves and risk-coverage of runs, as one page."""
    from eval.reports.plots import curve_png, named_results, risk_png
    from eval.reports.report_page import report_html

    folders, settings = split_settings(arguments, ["out"])
    if not folders:
        raise UserError("report needs a folder that `python -m eval` wrote")
    runs = [read_run(folder) for folder in folders]
    out = Path(settings.get("out", folders[0]))
    named = named_results(runs)
    curve, risk = curve_png(named), risk_png(named)
    write_atomically(out / "curve.png", curve)
    if risk is not None:
        write_atomically(out / "risk.png", risk)
    write_atomically(out / "report.html", report_html(runs, curve, risk))
    for run in runs:
        print(printable(f"{run.folder}\n{table(run.results)}\n"))
    print(printable(f"look at {out}/report.html"))
    return 0


def compare_runs(arguments: Sequence[str]) -> int:
    """Run `compare FIRST SECOND [out=FILE.json]`: paired differences, second minus first."""
    folders, settings = split_settings(arguments, ["out"])
    if len(folders) != 2:
        raise UserError(f"compare needs two folders, got {len(folders)}")
    first, second = (read_run(folder) for folder in folders)
    comparisons = compare(first, second)
    print(printable("\n".join(lines(comparisons))))
    for name, keys in differing_definitions(first, second).items():
        print(printable(f"{name} is defined differently: {', '.join(keys)}"))
    if "out" in settings:
        rows = [asdict(comparison) for comparison in comparisons]
        for row in rows:  # JSON has no nan
            row["interval"] = [None if math.isnan(end) else end for end in row["interval"]]
        write_atomically(Path(settings["out"]), json.dumps(rows, indent=1) + "\n")
    return 0


def check(arguments: Sequence[str]) -> int:
    """Run `check FOLDER ...`: return 1 unless the results are complete and follow from the samples."""
    folders, _ = split_settings(arguments, [])
    if not folders:
        raise UserError("check needs a folder that `python -m eval` wrote")
    bad = 0
    for folder in folders:
        run = read_run(folder)
        sentences = problems(run)
        bad += bool(sentences)
        found = "all follow" if not sentences else f"{len(sentences)} problems"
        print(printable(f"{folder}: {len(run.samples)} samples, {len(run.results['rows'])} rows, {found}"))
        for sentence in sentences:
            print(printable(f"  {sentence}"))
    return 1 if bad else 0


def export(arguments: Sequence[str]) -> int:
    """Run `export FOLDER format=vqa|vizwiz|captions to=FILE [task= shots= seed= strategy= ids=FILE pad=true]`."""
    keys = ["format", "to", "task", "shots", "seed", "strategy", "ids", "pad"]
    folders, settings = split_settings(arguments, keys)
    if len(folders) != 1 or not {"format", "to"} <= settings.keys():
        raise UserError(f"export needs a folder, format={'|'.join(KEYS)} and to=FILE")
    kind = settings["format"]
    if kind not in KEYS:
        raise UserError(f"format={kind}: use one of {', '.join(KEYS)}")
    samples = [sample for sample in read_run(folders[0]).samples if sample.cell.images == "real"]
    for key in ("task", "shots", "seed", "strategy"):
        if key in settings:
            samples = [sample for sample in samples if str(getattr(sample.cell, key)) == settings[key]]
    if not samples:
        raise UserError(f"{folders[0]} has no samples with these settings")
    ids = read_ids(settings["ids"], kind) if "ids" in settings else None
    content = submission(samples, kind, ids, pad=settings.get("pad", "false") == "true")
    write_atomically(Path(settings["to"]), json.dumps(content, ensure_ascii=False) + "\n")
    print(printable(f"{len(content)} answers written to {settings['to']}"))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "report": report,
    "compare": compare_runs,
    "check": check,
    "export": export,
}


def main(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS`."""
    return told(COMMANDS[arguments[0]], arguments[1:])


def told(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; a mistake ends as one sentence with exit status 2."""
    try:
        return command(arguments)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
