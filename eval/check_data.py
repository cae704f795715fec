"""`python -m eval prepare TASK --from FOLDER`: are a data set's files complete, and are they the published ones?

Nothing is downloaded or written: the files are read as the evaluation reads them, missing ones are listed with their
publisher's page, and the number of questions is compared with that of the published split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flamingo.errors import UserError
from flamingo.terminal import printable

USAGE = "python -m eval prepare TASK --from FOLDER"


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the task can be run, 1 if something is missing, 2 for a mistake in the command."""
    try:
        if len(arguments) != 3 or arguments[1] != "--from":
            raise UserError(f"give a task and a folder: {USAGE}")
        lines, complete = check(arguments[0], Path(arguments[2]))
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(printable("\n".join(lines)))
    return 0 if complete else 1


def check(name: str, folder: Path) -> tuple[list[str], bool]:
    """Return (lines to print, whether the task can be run from `folder`).

    Raises:
        UserError: there is no such task or folder, or the task has no published files.
    """
    from eval.compose import load_config
    from eval.tasks.build import check_spec
    from eval.tasks.sources import chosen_support, read_examples

    # The data can be read without a model, but the config requires one.
    spec = load_config(["model=none", f"task={name}"]).task[name]
    if not spec.published:
        raise UserError(f"task {name} has no published files; `prepare` checks tasks of published data sets")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    spec.root = str(folder)
    check_spec(name, spec)
    missing = [file for file in spec.published if not (folder / file).exists()]
    if missing:
        lines = [f"{name}: {len(missing)} of {len(spec.published)} files are missing in {folder}:"]
        return [*lines, *(f"  {file}  published by {spec.published[file]}" for file in missing)], False
    try:
        queries = len(read_examples(name, spec, spec.source))
        shown = None if spec.support is None else read_examples(name, spec, spec.support)
    except UserError as error:
        return [str(error)], False
    support = "" if shown is None else f", {len(chosen_support(name, spec, shown))} to show as demonstrations"
    lines = [f"{name}: {queries} queries{support}"]
    if spec.expected is not None and queries != spec.expected:
        lines.append(f"  the published split has {spec.expected}: scores over different queries are not comparable")
    return [*lines, f"  run it with task={name} task.{name}.root={folder}"], True
