"""`python -m eval judge RUN [RUN] url=URL model=NAME out=FOLDER`: a judge's scores, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from data.instruct.settings import settings_of
from eval.judging.judge import JudgeConfig, judge
from eval.judging.summary import summary_of, tables_of
from eval.reports.answers import CHOICES, answers_of, system_names
from eval.reports.commands import split_settings
from eval.reports.saved_run import read_run
from eval.reports.tables_page import tables_html
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.folder_lock import lock_folder
from flamingo.terminal import printable

GOLD = "gold answers"


def judge_runs(arguments: Sequence[str]) -> int:
    """Run the command: of two runs the second is judged beside the first, of one its answers beside the gold ones."""
    names = [field.name for field in fields(JudgeConfig)]
    folders, settings = split_settings(arguments, [*names, *CHOICES])
    if len(folders) not in (1, 2):
        raise UserError(f"judge needs one or two folders that `python -m eval` wrote, got {len(folders)}")
    config = settings_of(JudgeConfig, {key: value for key, value in settings.items() if key not in CHOICES})
    runs = [read_run(folder) for folder in folders]
    pairs = answers_of(runs, settings)
    systems = system_names(runs)
    out = Path(config.out)
    with lock_folder(out, "a judge", "wait for its end, stop it, or give another out="):
        judged = judge(pairs, config)
        systems = systems if len(systems) == 2 else [GOLD, *systems]
        summary = {"model": config.model, "prompt": config.prompt} | summary_of(judged, systems)
        tables = tables_of(summary)
        lines = "".join(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in judged)
        sentences = [f"Judged by {config.model} with the prompt {config.prompt}, {summary['questions']} questions."]
        write_atomically(out / "judged.jsonl", lines)
        write_atomically(out / "judge.html", tables_html("Judged", sentences, summary["notes"], [], tables))
        write_atomically(out / "judge.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(printable("\n\n".join(table.text() for table in tables)))
    print(printable("\n".join(["", *summary["notes"], f"look at {out}/judge.html"])))
    return 0
