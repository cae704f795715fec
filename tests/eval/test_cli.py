"""The command line: every YAML loads, and every mistake is one sentence that names what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.compose import load_config
from eval.config import EvalConfig
from eval.tasks.build import check_spec
from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError

TASKS = sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml"))


def test_defaults_are_those_of_the_classes_and_interpolations_hold() -> None:
    config = load_config(["model=m", "data=elsewhere"])
    assert isinstance(config, EvalConfig)
    assert list(config.task) == ["toy_caption", "toy_vqa", "toy_binding", "digits_binding"]
    assert config.task["toy_vqa"].source.path == "elsewhere/toy/heldout/scene_pairs"
    assert (config.model, config.shots, config.seed, config.images) == ("m", [0, 1, 2, 4, 8], [0], ["real"])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_file_loads_and_its_first_line_uses_it(name: str) -> None:
    path = f"task.{name}.source.path=x" if name in ("csv", "jsonl") else ""
    config = load_config(["model=m", f"task={name}", *filter(None, [path])])
    assert list(config.task) == [name]
    check_spec(name, config.task[name])
    first = (CONFIGS / "task" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# python -m eval task={name} ")
    again = load_config(first.removeprefix("# python -m eval ").split())
    assert list(again.task) == [name]


def test_settings_of_tasks_and_lists() -> None:
    changes = ["task=[toy_vqa,toy_caption]", "task.toy_vqa.output=rank", "task.toy_vqa.source.fields.label=kind"]
    config = load_config(["model=m", *changes, "shots=4", "images=blank", "seed=[1,2]", "limit=null", "+gallery=1"])
    assert list(config.task) == ["toy_vqa", "toy_caption"]
    assert config.task["toy_vqa"].output == "rank"
    assert config.task["toy_vqa"].source.fields["label"] == "kind"
    assert (config.shots, config.images, config.seed, config.gallery) == ([4], ["blank"], [1, 2], 1)


def test_a_table_that_a_task_leaves_out_is_made_by_its_first_key() -> None:
    changes = ["task.csv.source.path=a.csv", "task.csv.support.path=b.csv", "task.csv.support.format=csv"]
    task = load_config(["model=m", "task=csv", *changes]).task["csv"]
    assert task.support is not None
    assert (task.support.path, task.support.format) == ("b.csv", "csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing"),
        (["model=m", "task.toy_vqa.suport.path=1"], "task.toy_vqa.suport"),
        (["model=m", "task.toy_vqa.support.pathh=1"], "pathh"),
        (["model=m", "task.toy_vqa.queries.x=1"], "task.toy_vqa.queries"),
        (["model=m", "task=nope"], "task=nope is not one of coco, coco_retrieval, conversations, csv, digits_binding"),
        (["model=m", "task=[toy_vqa,nope]"], "task=nope is not one of coco"),
        (["model=m", "tassk=1"], "tassk"),
        (["model=m", "+shot=1"], "shot"),
        (["model=m", "task.toy_vqa.quest=1"], "task.toy_vqa.quest"),
        (["model=m", "task.nope.queries=1"], "task.nope"),
        (["model=m", "shots=[a]"], "shots[0]=a must be a whole number"),
        (["model=m", "shots=[]"], "shots is empty"),
        (["model=m", "shots=[1,-1]"], "shots[1]=-1 must be at least 0"),
        (["model=m", "shots=0,4"], "lists in brackets"),
        (["model=m", "shots=[0,"], "cannot be read"),
        (["model=m", "~seed"], "~seed"),
        (["model=m", "seed=a"], "seed[0]=a must be a whole number"),
        (["model=m", "batch_size=0"], "batch_size=0"),
        (["model=m", "images=[gone]"], "real, shuffled, blank, text_only, unordered"),
        (["model=m", "dtype=int8"], "dtype=int8"),
        (["model=m", "device=tpu"], "device=tpu"),
        (["model=m", "task.toy_vqa.queries=many"], "task.toy_vqa.queries"),
        (["model=m", "data=${nothing}"], "nothing"),
    ],
)
def test_mistakes_name_their_key(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval", "model=m", "shotss=[0]"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "shotss" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_tells_the_settings_and_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "batch_size: 32" in said
    assert "toy_binding" in said
