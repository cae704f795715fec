"""Protocols: the prompts, demonstrations, 0-shot rule, decoding and post-processing that a table was made with.

A protocol is a file under `hydra/protocol/`: settings by a task's `form`, then by its name. It overrides a task's
own YAML, and the command line overrides it. Mistakes of a published evaluation are not repeated; to reproduce
old figures, `bug_compatible=true` brings them back, from a part of the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flamingo.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "hydra" / "protocol"
KEYS = {"forms", "tasks", "bug_compatible"}
DEFAULT = "modern"


def names() -> list[str]:
    """Return the names of all protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def settings_of(protocol: str, task: str, form: str, bug_compatible: bool = False) -> dict[str, Any]:
    """Return what the protocol sets for a task; {} for a task without a form under the default protocol.

    Raises:
        UserError: there is no such protocol, or it has no prompt for tasks of this form.
    """
    if protocol not in names():
        raise UserError(f"protocol={protocol}; use one of {', '.join(names())}")
    content: Any = yaml.safe_load((FOLDER / f"{protocol}.yaml").read_text(encoding="utf-8"))
    assert content.keys() <= KEYS, f"{protocol}.yaml has {content.keys() - KEYS}"
    if not form:
        if protocol == DEFAULT:
            return {}
        raise UserError(f"task {task} has no form, so protocol={protocol} has no prompt for it; set task.{task}.form")
    layers = [content, content.get("bug_compatible", {})] if bug_compatible else [content]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings |= layer.get("forms", {}).get(form, {}) | layer.get("tasks", {}).get(task, {})
    if not settings:
        forms = sorted({*content["forms"], *content.get("tasks", {})})
        raise UserError(
            f"protocol={protocol} has no prompt for task {task} (form {form}), only for {', '.join(forms)}; use "
            f"protocol={DEFAULT}"
        )
    return settings
