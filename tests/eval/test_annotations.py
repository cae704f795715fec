"""Every format's annotation files with any value replaced or removed: one sentence naming file and entry, or right."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.compose import load_config
from eval.metrics.wordnet import wordnet
from eval.spec import SourceSpec, TaskSpec
from eval.task import Example
from eval.tasks.build import build_task
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from tests.eval.published import WRITERS
from tests.eval.published.files import dump_csv, dump_lines, image
from tests.eval.test_metrics_table import small_wordnet

ENTRY = re.compile(
    r"\b(item|line|row|entry|images|annotations|questions?|data) \S+|the file (has|is)|, not a list|has no row"
)
"""What a sentence calls an entry; a fault of the whole file is said of the file."""
MARK = "zq"
REMOVED = object()
SCALARS = st.one_of(st.booleans(), st.integers(-3, 10**20), st.floats(), st.text("aA1 .|/\0é", max_size=6))
ODD = st.one_of(st.none(), st.booleans(), st.just([]), st.just({}), st.just([[MARK]]), st.just({MARK: MARK}))
VALUES = st.one_of(ODD, SCALARS, st.lists(SCALARS, max_size=3), st.just("x" * 300), st.just(REMOVED))


def own_table(root: Path, name: str) -> None:
    for number in range(6):
        image(root / f"{number}.png", number)
    rows = [{"image": f"{n}.png", "question": "what?", "answer": "ab"[n % 2], "hint": "h", "id": n} for n in range(6)]
    if name == "csv":
        dump_csv(root / "t.csv", rows)
    else:
        dump_lines(root / "t.jsonl", [row | {"answer": ["a", "b"], "choices": ["a", "b", "c"]} for row in rows])


@dataclass(repr=False)
class World:
    """A task whose files lie in a folder, and the content of those that can be damaged."""

    name: str
    spec: TaskSpec
    files: dict[Path, Any]


def content_of(file: Path) -> Any:
    if file.suffix == ".pkl":
        return pickle.loads(file.read_bytes())
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    text = file.read_text()
    if file.suffix == ".csv":
        return list(csv.reader(text.splitlines()))
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def write(file: Path, content: Any) -> None:
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(content), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows(row if isinstance(row, list) else [row] for row in content)
    elif file.suffix == ".jsonl" or (file.name in ("dev.json", "train.json") and "opa" in file.read_text()):
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(json.dumps(content))


@pytest.fixture(scope="module", autouse=True)
def a_wordnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The files that NExT-QA's metric needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WNHOME", str(small_wordnet(tmp_path_factory.mktemp("words") / "wordnet")))
        wordnet.cache_clear()
        yield
    wordnet.cache_clear()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Worlds by name, made when they are first asked for."""
    made: dict[str, World] = {}

    class Worlds(dict[str, World]):
        __repr__ = object.__repr__

        def __missing__(self, name: str) -> World:
            root = tmp_path_factory.mktemp(name)
            if name in WRITERS:
                WRITERS[name](root)
                spec = load_config(["model=m", f"task={name}", f"task.{name}.root={root}"]).task[name]
            else:
                own_table(root, name)
                source = SourceSpec(format=name, path=str(root / f"t.{name}"))
                spec = TaskSpec(source=source, queries=3, question="{question} {hint}", lead=" ")
            suffixes = (".json", ".jsonl", ".csv", ".pkl", ".parquet")
            files = {file: content_of(file) for file in sorted(root.rglob("*")) if file.suffix in suffixes}
            assert build_task(name, spec).query_ids()
            self[name] = World(name, spec, files)
            return self[name]

    return Worlds(made)


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of long lists the first and the last entry."""
    yield path
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys if isinstance(content, dict) else sorted({*keys[:2], *keys[-1:]}):
        yield from paths(content[key], (*path, key))


def damaged(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return the content with the value at a path replaced, or removed."""
    if not path:
        return [] if value is REMOVED else value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def texts(example: Example) -> str:
    turn = example.turn
    return repr((turn.question_text, turn.answer, example.golds, example.kind, example.candidates, turn.rationale))


def check(world: World, file: Path, content: Any, odd: bool) -> None:
    """Build the task from a damaged file."""
    try:
        write(file, content)
    except Exception:  # no such table can be written
        write(file, world.files[file])
        return
    try:
        for source in filter(None, (world.spec.source, world.spec.support)):
            for example in read_examples(world.name, world.spec, source):
                assert MARK not in texts(example)
                assert "None" not in texts(example)
                assert all(isinstance(gold, str) for gold in example.golds)
        task = build_task(world.name, world.spec)
        task.baselines(task.query_ids())
    except UserError as error:
        sentence = str(error)
        assert sentence.startswith(f"task {world.name}: ")
        assert "\n" not in sentence
        if odd and "change task.NAME.question" not in sentence:  # which says what the items have
            assert file.name in sentence, sentence
            assert ENTRY.search(sentence), sentence
    finally:
        write(file, world.files[file])


@pytest.mark.parametrize("name", [*(name for name in WRITERS if name != "imagenet"), "csv", "jsonl"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0, 10**6), value=VALUES)
def test_any_value_of_any_type_is_refused_by_name_or_right(
    name: str, worlds: dict[str, World], place: int, value: Any
) -> None:
    if name == "mmmu":
        pytest.importorskip("pyarrow")
    world = worlds[name]
    places = [(file, path) for file, content in world.files.items() for path in paths(content)]
    file, path = places[place % len(places)]
    content = world.files[file]
    if file.suffix == ".csv":  # a cell is text, whatever was meant
        value = value if value is REMOVED else re.sub(f"\0|None|{MARK}", "", str(value))
        value = [value] if len(path) == 1 and value is not REMOVED else [] if not path else value
        check(world, file, damaged(content, path, value), odd=False)
    elif file.suffix == ".parquet" and path:  # a column has one type
        for row in range(len(content)):
            if len(path) == 2 or (len(path) > 2 and content[row][path[1]] is not None):
                content = damaged(content, (row, *path[1:]), value)
        check(world, file, content, odd=False)
    else:
        odd = bool(path) and (value is None or isinstance(value, dict | list | bool))
        check(world, file, damaged(content, path, value), odd=odd)
