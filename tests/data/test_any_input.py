"""Whatever a file holds: `prepare` ends in no traceback, and every item of the input is kept or counted as dropped."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from data.__main__ import parser
from data.prepare.engine import load_source
from data.prepare.units import Tally
from data.prepare.web.dom import WebImage, read_dom
from data.shards.document import Document
from data.shards.writer import ShardWriter, read_documents
from flamingo.errors import UserError
from tests.data.sources import jpeg, mmc4_document

IMAGE = jpeg(1)
BASE64 = base64.b64encode(IMAGE).decode()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "a.jpg", "../a.jpg", "\udc00", "", "\0", BASE64, "data:image/jpeg;base64,"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "url", "value"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def prepared(source: str, folder: Path, *arguments: object) -> tuple[list[Document], Tally]:
    """The documents and the counts of a source, as its shards have them. Raises UserError."""
    argv = ["prepare", source, "--out", str(folder / "out"), *map(str, arguments)]
    args = parser(source).parse_args(argv)
    args.work = str(folder)
    module, tally = load_source(source), Tally()
    units = module.units(args)
    if hasattr(module, "begin"):
        module.begin(args, folder)
    with ShardWriter(folder / "shards", source, layout=module.LAYOUT) as writer:
        for unit in units:
            for document in module.documents(unit, args, tally):
                writer.write(document)
    documents = [document for shard in sorted((folder / "shards").glob("*.tar")) for document in read_documents(shard)]
    return documents, tally


@contextlib.contextmanager
def folder_with_image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "images").mkdir()
        (Path(name) / "images" / "a.jpg").write_bytes(IMAGE)
        yield Path(name)


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ROWS: dict[str, dict[str, Any]] = {
    "llava": {"id": "1", "image": "a.jpg", "conversations": [turn("human", "<image>\nwhat?"), turn("gpt", "that")]},
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "<image>that"},
        ],
        "images": ["a.jpg", {"bytes": BASE64}],
        "system": "x",
    },
    "m3it": {"instruction": "look", "inputs": "what?", "image_base64_str": [BASE64], "outputs": "that"},
    "mmc4": mmc4_document(["one", "two"], ("a.jpg", 1, 0.5)),
}
INSTRUCTION = {"instruction": "what?", "answer": "that", "image_ids": ["I"], "rel_ins_ids": ["good"]}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in [(*path, key), *places(part, (*path, key))]]


def changed(row: dict[str, Any], changes: list[tuple[int, Any]], delete: bool) -> dict[str, Any]:
    """A row with some of its values, at any depth, replaced or deleted."""
    row = copy.deepcopy(row)
    for number, value in changes:
        *way, last = places(row)[number % len(places(row))] if places(row) else ("x",)
        inside: Any = row
        for key in way:
            inside = inside[key]
        if delete and value is None:
            del inside[last]
        else:
            inside[last] = value
    return row


@pytest.mark.parametrize("source", ROWS)
@settings(max_examples=80)
@given(changes=st.lists(st.tuples(st.integers(0, 99), VALUES), min_size=1, max_size=2), delete=st.booleans())
def test_rows_of_any_shape(source: str, changes: list[tuple[int, Any]], delete: bool) -> None:
    rows = [changed(ROWS[source], changes, delete), ROWS[source]]
    with folder_with_image() as folder:
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = [] if source == "m3it" else ["--images", folder / "images"]
        documents, tally = prepared(source, folder, folder / "in.jsonl", *more)
        assert len(documents) + tally.dropped_documents.total() == 2
        assert len(documents) >= 1  # the good one
        assert all(tally.first[f"document: {reason}"] for reason in tally.dropped_documents)


@settings(max_examples=60)
@given(changes=st.lists(st.tuples(st.integers(0, 99), VALUES), min_size=1, max_size=2), delete=st.booleans())
def test_instructions_of_any_shape(changes: list[tuple[int, Any]], delete: bool) -> None:
    rows = {"odd": changed(INSTRUCTION, changes, delete), "tab": {"instruction": "a\tb"}, "good": INSTRUCTION}
    with folder_with_image() as folder:
        text = json.dumps({"meta": {}, "data": rows}).replace("a\\tb", "a\tb")  # a bare tab in a string
        (folder / "X_instructions.json").write_text(text)
        (folder / "X.json").write_text(json.dumps({"I": BASE64}))
        documents, tally = prepared("mimicit", folder, folder / "X_instructions.json", "--images", folder / "X.json")
        assert len(documents) + tally.dropped_documents.total() == 3
        assert documents
        assert tally.dropped_documents["JSON cannot be read"] == 1


@pytest.mark.parametrize("source", ROWS)
@settings(max_examples=60)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=4)), max_size=3),
    cut=st.integers(0, 60),
)
def test_lines_with_any_damage(source: str, edits: list[tuple[int, bytes]], cut: int) -> None:
    raw = bytearray(json.dumps(ROWS[source]).encode() + b"\n")
    for at, new in edits:
        raw[at % len(raw) : at % len(raw) + len(new)] = new
    raw = raw[: len(raw) - cut] if cut < 30 else raw
    with folder_with_image() as folder:
        (folder / "in.jsonl").write_bytes(bytes(raw) + b"\n" + json.dumps(ROWS[source]).encode())
        more = [] if source == "m3it" else ["--images", folder / "images"]
        try:
            documents, tally = prepared(source, folder, folder / "in.jsonl", *more)
        except UserError:
            assert raw.lstrip()[:1] == b"["  # taken for an array
            return
        lines = sum(bool(line.strip()) for line in bytes(raw).split(b"\n")) + 1
        assert len(documents) + tally.dropped_documents.total() == lines


CELLS = st.lists(
    st.sampled_from(['"', ",", "\n", "\r\n", "\r", "a.jpg", "x", '""', "\u2028", "\x0b", "\0", " ", "../a.jpg"])
)


@settings(max_examples=120)
@given(CELLS.map("".join))
def test_tables_of_any_text(body: str) -> None:
    with folder_with_image() as folder:
        path = folder / "images" / "t.csv"
        path.write_text(f"image,caption\na.jpg,first\n{body}", newline="")
        with contextlib.suppress(UserError):
            documents, tally = prepared("pairs", folder, path)
            assert len(documents) >= 1
            rows = sum(bool(line.strip("\r")) for line in body.split("\n")) if '"' not in body else 0
            if "\r" not in body:
                assert len(documents) + tally.dropped_documents.total() >= (rows > 0) + 1


COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "large strings": lambda values: pyarrow.array(values, pyarrow.large_list(pyarrow.large_string())),
    "dictionaries": lambda values: pyarrow.array(
        values, pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    ),
    "strings": lambda values: pyarrow.array(values, pyarrow.list_(pyarrow.string())),
    "views": lambda values: pyarrow.array(values, pyarrow.list_(pyarrow.string_view())),
}
PARTS = st.lists(
    st.tuples(st.sampled_from([None, "", "http://x/a.jpg", "http://x/none.jpg"]), st.none() | st.text(max_size=5))
)


@pytest.mark.parametrize("kind", COLUMNS)
@settings(max_examples=25)
@given(rows=st.lists(PARTS, max_size=3), facts=VALUES)
def test_obelics_of_any_columns(kind: str, rows: list[list[tuple[str | None, str | None]]], facts: Any) -> None:
    rows = [*rows, [("http://x/a.jpg", None), (None, "good")]]
    images = [[image for image, _ in row] for row in rows]
    texts = [[None if text is None else text.encode("utf-8", "replace").decode() for _, text in row] for row in rows]
    columns = {"images": COLUMNS[kind](images), "texts": COLUMNS[kind](texts)}
    with contextlib.suppress(pyarrow.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        columns["general_metadata"] = pyarrow.array([facts] * len(rows))
    with contextlib.suppress(pyarrow.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        columns["metadata"] = pyarrow.array([[facts]] * len(rows))
    with folder_with_image() as folder:
        try:
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / "in.parquet")
        except pyarrow.ArrowNotImplementedError:
            reject()  # a struct without fields
        (folder / "images" / "map.csv").write_text("url,path\nhttp://x/a.jpg,a.jpg\n")
        documents, tally = prepared("obelics", folder, folder / "in.parquet", "--images", folder / "images" / "map.csv")
        assert len(documents) + tally.dropped_documents.total() == len(rows)
        kept = sum(len(document.images) for document in documents)
        lost = sum("http://x/none.jpg" in row for row in images)
        assert kept >= 1
        assert tally.dropped_images.total() + tally.dropped_documents.total() >= min(lost, 1)


TAGS = [
    *("<p>", "</p>", "text ", "<br>", "<div hidden>", "<table><tr>", "<svg>", "<template>", "<!--", "-->", "&#xd800;"),
    *(
        "<img src=a.jpg>",
        "<img",
        " src='",
        "'",
        ">",
        "<img data-src='data:,'>",
        "<img srcset=', , 1x'>",
        "\0",
        "\udc00",
    ),
    *(
        "<noscript>",
        "</noscript>",
        "<picture>",
        "<source srcset='a 1x,b 2x'>",
        "<base href='//'>",
        "<base href='http://['>",
    ),
]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(TAGS), max_size=16).map("".join), st.sampled_from(["", "http://x/", "http://[", "x:y"]))
def test_pages_of_any_tags(html: str, url: str) -> None:
    for part in read_dom(html, url):
        assert (part.url if isinstance(part, WebImage) else part).strip()


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["jpg", "txt", "json", "0.jpg", "png", "mp4", ""]), st.binary(max_size=12)),
        max_size=5,
    )
)
def test_pairs_of_any_members(members: list[tuple[str, bytes]]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for suffix, body in [*members, ("b.jpg", IMAGE), ("b.txt", b"good")]:
            info = tarfile.TarInfo(suffix if suffix.startswith("b.") else f"a.{suffix}" if suffix else "a")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    with folder_with_image() as folder:
        (folder / "in.tar").write_bytes(file.getvalue())
        documents, tally = prepared("pairs", folder, folder / "in.tar")
        samples = 1 + any(suffix for suffix, _ in members)
        names = sum(not suffix for suffix, _ in members)
        assert len(documents) + tally.dropped_documents.total() == samples + names
