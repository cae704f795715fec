"""docs/rating.md: its commands are run in their order, against an endpoint on loopback."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.__main__ import main as data_main
from data.instruct.endpoint import EndpointConfig
from eval.__main__ import main as eval_main
from eval.rating.axes import axes_of
from eval.rating.command import KEYS
from eval.rating.plan import read_key
from flamingo.configs.compose import CONFIGS
from tests.data.chat_server import chatting, last
from tests.eval.finished import write_answers
from tests.eval.test_rating import export
from tests.fixtures import png

PAGE = (CONFIGS.parent / "docs" / "rating.md").read_text()


def answer(body: dict[str, Any], number: int) -> str:
    if "[Assistant 1]" in last(body):
        return "7 8\nBoth are short."
    return "User: What is shown?\nAssistant: A small square is shown."


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"q{number}" for number in range(12)]
    for run in ("first", "second"):
        write_answers(tmp_path / "runs" / run, {name: f"{run} of {name}" for name in names})
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(png((9, 9, 200), len(name), side=32))
    lines = [{"id": name, "caption": f"About {name}.", "context": f"About {name}."} for name in names]
    for file in ("captions.jsonl", "figures.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands = re.findall(r"^    python -m (eval|data) (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 6
    with chatting(answer) as server:
        for program, line in commands:
            if "--read" in line:
                fill(tmp_path)
            words = shlex.split(line.replace("http://localhost:8000/v1", server.url))
            assert {"eval": eval_main, "data": data_main}[program](words) == 0, line
    assert {path.name for path in (tmp_path / "rated").iterdir()} == set(
        re.findall(r"`(rating\.html|rating\.png|ratings\.json|ratings\.jsonl)`", PAGE)
    )
    assert (tmp_path / "judged_gold" / "judge.html").exists()
    assert list((tmp_path / "shards").glob("*.tar"))


def fill(folder: Path) -> None:
    plan = read_key(folder / "sheets" / "key.json")
    (folder / "filled").mkdir()
    for rater in plan.sheets:
        (folder / "filled" / f"{rater}.json").write_text(json.dumps(export(plan, rater, lambda *_: 0)))


def test_settings_and_axes_of_the_page_exist() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert list(axes_of(yaml.safe_load(block), "page")) == ["helpful", "tone"]
    table = PAGE[PAGE.index("| setting | meaning") : PAGE.index("Axes of your own")]
    assert {*re.findall(r"`(\w+)=", table), "out", "seed"} == set(KEYS)
    endpoint = PAGE[PAGE.index("## The endpoint") : PAGE.index("Every reply goes")]
    cells = re.findall(r"^\| (`.*?) \|", endpoint, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(EndpointConfig.__dataclass_fields__)
