"""JSON lines and tables of other people: one rule of what a line and a row is, every fault with its file and line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import json_objects, read_json, table_rows
from eval.reports.saved_run import read_run
from flamingo.errors import UserError
from tests.data.sources import flat, jpeg, prepare

SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e \r"


def file(folder: Path, body: str | bytes, name: str = "t.jsonl") -> Path:
    path = folder / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def objects(path: Path) -> list[dict[str, object]]:
    return [row for _, row in json_objects(path)]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_only_line_feeds_end_a_line(tmp_path: Path, ascii_only: bool) -> None:
    rows = [{"q": f"{k}{SEPARATORS}more"} for k in range(3)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    assert objects(file(tmp_path, "\n".join(lines))) == rows
    assert objects(file(tmp_path, "\r\n".join(lines) + "\r\n\r\n")) == rows


def test_an_array_is_read_whatever_its_name_and_lines_too(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    for body in (json.dumps(rows), json.dumps(rows, indent=2), "\ufeff \n" + json.dumps(rows)):
        assert objects(file(tmp_path, body)) == rows
    assert objects(file(tmp_path, json.dumps(rows).encode("utf-16"))) == rows
    assert read_json(file(tmp_path, '{"a": 1}\n{"a": 2}\n', "t.json")) == rows


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ('{"a": 1}\n3\n', "line 2 is not a JSON object but a int"),
        ('{"a": 1}\nnull\n', "line 2 is not a JSON object but a NoneType"),
        ('[{"a": 1}, 2]', "item 2 is not a JSON object but a int"),
        ('[{"a": 1}', "is not JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deep"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_faults_of_json_lines(tmp_path: Path, body: str | bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        objects(file(tmp_path, body))


def test_half_a_character_becomes_a_question_mark(tmp_path: Path) -> None:
    assert objects(file(tmp_path, '{"a\\udc00": ["\\ud83d", "\\ud83d\\ude00"]}')) == [{"a?": ["?", "\U0001f600"]}]


def test_cells_of_any_length_and_with_any_separator(tmp_path: Path) -> None:
    rows = [["a", "x " * 100_000], ["b", f"two\nlines {SEPARATORS}"], ["c", 'a "quote", and a comma']]
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows([["name", "text"], *rows])
    table = file(tmp_path, "\ufeff" + out.getvalue() + "\n\n", "t.csv")
    assert [list(row.values()) for row in table_rows(table, ["text"])] == rows


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("a,b\n1,2\n3,4, and more\n", r"line 3 has 3 cells and the header 2; put a cell that has a comma in quotes"),
        ('a,b\n"1\n1",2\n3\n', "line 4 has 1 cells and the header 2"),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', "the row of line 3 cannot be read.*is a quote not closed"),
        ('a,b\n"1" x,2\n', "the row of line 2 cannot be read"),
        ("a,a\n1,2\n", "has two columns 'a'"),
        ("a,c\n1,2\n", "has no column 'b'; its columns are a, c"),
    ],
)
def test_faults_of_tables(tmp_path: Path, body: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(table_rows(file(tmp_path, body, "t.csv"), ["b"] if "has no" in sentence else []))


def test_prepare_reads_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a{SEPARATORS[:-2]}cat"}]
    items = [{"id": str(k), "image": "a.jpg", "conversations": talk} for k in range(2)]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    for k, (name, body) in enumerate(
        {"a.jsonl": json.dumps(items), "b.json": lines, "c.json": json.dumps(items), "d.jsonl": lines}.items()
    ):
        done = prepare(tmp_path / f"out{k}", "llava", file(tmp_path, body, name), "--images", tmp_path)
        assert len(done.documents) == 2, name
        assert not done.dropped
    table = file(tmp_path, f'image,caption\na.jpg,"{"x " * 70_000}{SEPARATORS}y"\n', "t.csv")
    (document,) = prepare(tmp_path / "out", "pairs", table).documents
    assert str(flat(document)[1]).startswith("x x")


def test_our_own_samples_read_back_whatever_they_hold(tmp_path: Path) -> None:
    file(tmp_path, '{"rows": []}', "results.json")
    file(tmp_path, json.dumps({"question": SEPARATORS}, ensure_ascii=False) + "\n", "samples.jsonl")
    with pytest.raises(UserError, match=r"samples\.jsonl: line 1 is not a sample \(KeyError|TypeError"):
        read_run(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inside: st.lists(inside, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=4), st.booleans())
def test_what_json_writes_is_read_back(rows: list[dict[str, object]], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        body = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        assert objects(file(Path(folder), body)) == rows


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:\\\n\r\t01a.\u2028', max_size=40).map(str.encode))
def test_no_bytes_end_in_a_traceback(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, read in (("t.jsonl", json_objects), ("t.json", read_json), ("t.csv", table_rows)):
            with contextlib.suppress(UserError):
                found = read(file(Path(folder), body, name))
                if name != "t.json":
                    list(found)
