"""docs/evaluation.md: its table is that of the YAMLs, its command lines are read, its five-line task is run."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from eval.compose import load_config
from eval.demonstrations.samplers import SAMPLERS
from eval.prompting.strategies import STRATEGIES
from eval.protocols import names, settings_of
from eval.reports.commands import COMMANDS
from eval.spec import VECTOR_KINDS
from flamingo.configs import compose
from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS
from tests.fixtures import png
from tests.model import tiny

PAGE = (CONFIGS.parent / "docs" / "evaluation.md").read_text()


def protocols_of(task: str, form: str) -> str:
    found = []
    for protocol in names():
        try:
            settings_of(protocol, task, form)
        except UserError:
            continue
        found.append(protocol)
    return "all" if found == names() else ", ".join(found)


def table() -> list[str]:
    lines = []
    for path in sorted((CONFIGS / "task").glob("*.yaml")):
        task: dict[str, Any] = yaml.safe_load(path.read_text())[path.stem]
        if "published" in task:
            what = path.read_text().splitlines()[1].removeprefix("# ")
            asked = re.split(r"[.;:(]", what)[0].strip()
            files = " ".join(f"`{file}`" for file in task["published"])
            score = ", ".join([task["metric"], *task.get("metrics", [])])
            output = {"rank": "ranked"}.get(task.get("output", ""), "generated")
            vectors = task.get("kind") in VECTOR_KINDS
            protocols = "no prompt" if vectors else protocols_of(path.stem, task.get("form", ""))
            lines.append(f"| `{path.stem}` | {asked} | {files} | {score} | {output} | {protocols} |")
    return lines


def test_the_table_is_that_of_the_task_files() -> None:
    assert [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \| .* (ranked|generated) \|", line)] == table()


def commands() -> list[list[str]]:
    return [shlex.split(line.strip()) for line in re.findall(r"^    ((?:python|torchrun) .*-m eval .*)$", PAGE, re.M)]


def test_every_command_of_the_page_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIGS, tmp_path / "hydra")
    (folder / "task" / "birds.yaml").write_text(five_lines())
    monkeypatch.setattr(compose, "CONFIGS", folder)
    found = commands()
    assert len(found) >= 8
    for words in found:
        arguments = words[words.index("eval") + 1 :]
        if arguments[0] not in (*COMMANDS, "prepare"):
            assert load_config(arguments).task
    for name in [*SAMPLERS, *STRATEGIES]:
        assert re.search(rf"`{name}\b", PAGE), name


def five_lines() -> str:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block.count("\n") == 5
    return block


def test_the_task_in_five_lines_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIGS, tmp_path / "hydra")
    (folder / "task" / "birds.yaml").write_text(five_lines().replace("queries: 100", "queries: 8"))
    monkeypatch.setattr(compose, "CONFIGS", folder)
    with (tmp_path / "birds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer"])
        writer.writeheader()
        for number in range(20):
            name = list(COLOURS)[number % 4]
            (tmp_path / f"{number}.png").write_bytes(png(COLOURS[name], number))
            writer.writerow({"image": f"{number}.png", "question": "Which?", "answer": f"{name}|{name} bird"})
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "model", built_modules=True)
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["task=birds", "shots=[0,2]", "model=model", "out=out", "cache=null", "progress=false"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["shots"], row["n"]) for row in results["rows"]] == [(0, 8), (2, 8)]
    prompt = results["tasks"]["birds"]["example_prompt"]
    assert re.fullmatch(
        r"(<image>Question: Which\? Answer: \w+<\|endofchunk\|>){2}<image>Question: Which\? Answer:", prompt
    )
