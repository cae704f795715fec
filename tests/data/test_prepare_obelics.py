"""OBELICS in: alternating images and texts, by URL or with their bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.prepare.lookup import Lookup, build_url_lookup
from data.prepare.sources import obelics
from data.prepare.sources.obelics import END
from tests.data.sources import flat, jpeg, jsonl, prepare, refusal
from tests.data.test_index import make_tar


def row(*parts: tuple[str | None, str | None], url: str = "http://document") -> dict[str, Any]:
    """(image, text) parts as OBELICS has them."""
    images = [image for image, _ in parts]
    metadata = [None if image is None else {"src": image, "document_url": url} for image in images]
    return {
        "images": images,
        "texts": [text for _, text in parts],
        "metadata": json.dumps(metadata),
        "general_metadata": json.dumps({"url": url, "warc_filename": "x"}),
    }


def image(number: int) -> tuple[str, None]:
    return f"http://x/{number}.jpg?a=1", None


def text(value: str) -> tuple[None, str]:
    return None, value


def write(path: Path, *rows: dict[str, Any], groups: int = 1000) -> Path:
    strings = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema(
        {"images": strings, "texts": strings, "metadata": pyarrow.string(), "general_metadata": pyarrow.string()}
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), path, row_group_size=groups)
    return path


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """Images 0 to 3 as img2dataset leaves them: keys are positions, the URL is in the JSON."""
    (tmp_path / "images").mkdir()
    for tar in (0, 1):
        members = []
        for number in (tar * 2, tar * 2 + 1):
            key, url = f"{tar:05d}{number:04d}", f"http://x/{number}.jpg?a=1"
            members += [(f"{key}.jpg", jpeg(number)), (f"{key}.json", json.dumps({"url": url}).encode())]
        members += [("9.json", b"{"), ("8.jpg", jpeg(8)), ("8.json", b"{}")]
        make_tar(tmp_path / "images" / f"{tar:05d}.tar", members)
    return tmp_path / "images"


@pytest.mark.parametrize("rows", [1, 1000])
def test_images_by_their_address(tmp_path: Path, downloaded: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(obelics, "ROWS", rows)
    path = write(
        tmp_path / "train-00000-of-00001.parquet",
        row(text("First."), image(2), text("Second."), image(0)),
        row(text("Before."), image(7), text("After."), image(1), url="http://missing"),
        row(text(f"One.\n\n{END}\n\nTwo."), image(3), text(f"{END}Three."), image(0), text(f"Four. {END}")),
        row(image(7), text("Alone.")),
        row(image(1)),
        row((None, None), text("x")),
        row(("http://x", "both")),
        {"images": ["http://x/0.jpg?a=1"], "texts": [], "metadata": "", "general_metadata": "["},
        groups=2,
    )
    done = prepare(tmp_path / "out", "obelics", path, "--images", downloaded)
    assert [flat(document) for document in done.documents] == [
        ["First.", jpeg(2), "Second.", jpeg(0)],
        ["Before.\n\nAfter.", jpeg(1)],
        ["Two.", jpeg(3)],
        ["Three.", jpeg(0), "Four."],
    ]
    assert [document.meta["url"] for document in done.documents] == [
        "http://document",
        "http://missing",
        "http://document",
        "http://document",
    ]
    assert not any(END in str(flat(document)) for document in done.documents)
    assert done.dropped == {
        "fewer than 1 images left": 4,  # "One.", what follows the last mark, and "Alone."
        "no text": 1,
        "an entry is neither an image nor a text, or both": 1,
        "'images' and 'texts' are not lists of the same length": 1,
    }
    assert done.dropped_images == {"image is missing": 2, "entry with neither image nor text": 1}


def test_images_by_a_map(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(0))
    path = write(tmp_path / "a.parquet", row(image(0), text("One."), image(1), text("Two.")))
    entries = [("http://x/0.jpg?a=1", "a.jpg"), ("http://x/1.jpg?a=1", "../a.parquet")]
    jsonl(tmp_path / "files" / "map.jsonl", *({"url": url, "path": name} for url, name in entries))
    lines = ["url,path", *(",".join(entry) for entry in entries)]
    (tmp_path / "files" / "map.csv").write_text("\n".join(lines))
    for name in ("map.jsonl", "map.csv"):
        done = prepare(tmp_path / f"out-{name}", "obelics", path, "--images", tmp_path / "files" / name)
        assert [flat(document) for document in done.documents] == [[jpeg(0), "One.\n\nTwo."]]
        assert done.dropped_images == {"image's name leads out of its folder": 1}
    (tmp_path / "files" / "map.tsv").write_text("link\tpath\nx\ty\n")
    assert "has no column 'url'; its columns are link, path" in refusal(
        tmp_path / "o", "obelics", path, "--images", tmp_path / "files" / "map.tsv"
    )


def test_other_images_after_a_stop_are_looked_up_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", row(image(0), text("One.")))
    facts = json.dumps({"url": "http://x/0.jpg?a=1"}).encode()
    for number in (0, 1):
        make_tar(tmp_path / f"{number}.tar", [("k.jpg", jpeg(number) + bytes(number)), ("k.json", facts)])
    for number in (0, 0, 1):
        build_url_lookup(tmp_path / "l.sqlite", [str(tmp_path / f"{number}.tar")])
        with contextlib.closing(Lookup(tmp_path / "l.sqlite")) as lookup:
            assert lookup.read("http://x/0.jpg?a=1") == jpeg(number) + bytes(number)
            assert "http://x/1.jpg" not in lookup
    done = prepare(tmp_path / "out", "obelics", path, "--images", tmp_path / "1.tar")
    assert flat(done.documents[0]) == [jpeg(1) + b"\0", "One."]


def test_images_inside_the_parquet(tmp_path: Path) -> None:
    rows = [
        {
            "images": [
                {"bytes": jpeg(0), "path": "0.jpg"},
                None,
                {"bytes": None, "path": "x"},
                {"bytes": b"<p>", "path": ""},
            ],
            "texts": [None, "One.", None, None],
        }
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    done = prepare(tmp_path / "out", "obelics", path)
    assert [flat(document) for document in done.documents] == [[jpeg(0), "One."]]
    assert done.documents[0].meta == {}
    assert done.dropped_images == {"image is missing": 1, "HTML saved as an image": 1}


def test_scores_that_the_source_brings_along(tmp_path: Path, downloaded: Path) -> None:
    rows = [
        row(image(0), text("Good.")) | {"perplexity": 300.0},
        row(image(1), text("Gibberish.")) | {"perplexity": 3000.0},
        row(image(2), text("Unknown.")) | {"perplexity": None},
        row(image(0), text("Partly."), image(1), image(2)) | {"perplexity": 1.0},
        row(image(3), text("Young.")) | {"perplexity": 1.0},
    ]
    rows[3]["metadata"] = json.dumps([{"porn": 0.1}, None, {"porn": 0.9}, {"src": "x"}])
    for number in (0, 4):
        rows[number]["metadata"] = json.dumps([{"porn": 0.0}, None])
    rows[4]["general_metadata"] = json.dumps({"url": "http://document", "year": 2024})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    asked = ["--images", downloaded, "--where", "perplexity<=1500", "--where-image", "porn<=0.85"]
    done = prepare(tmp_path / "out", "obelics", path, *asked)
    assert [flat(document) for document in done.documents] == [
        [jpeg(0), "Good."],
        [jpeg(0), "Partly."],
        [jpeg(3), "Young."],
    ]
    assert done.dropped == {"not perplexity<=1500": 1, "no 'perplexity'": 1}
    assert done.dropped_images == {"not porn<=0.85": 1, "no 'porn'": 1}
    asked = ["--images", downloaded, "--where", "general_metadata.year>=2020"]
    assert [flat(document) for document in prepare(tmp_path / "b", "obelics", path, *asked).documents] == [
        [jpeg(3), "Young."]
    ]
    asked = ["--images", downloaded, "--where", "nsfw<1"]
    assert "has no column 'nsfw'" in refusal(tmp_path / "o", "obelics", path, *asked)


def test_mistakes(tmp_path: Path, downloaded: Path) -> None:
    path = write(tmp_path / "a.parquet", row(image(0), text("One.")))
    out = tmp_path / "out"
    assert "the parquet holds URLs, not images" in refusal(out, "obelics", path)
    other = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), other)
    assert "b.parquet has no column 'images'; it has url" in refusal(out, "obelics", other)
    other.write_bytes(path.read_bytes()[:-20])
    assert "b.parquet is not a parquet file, or truncated" in refusal(out, "obelics", other)
    raw = bytearray(path.read_bytes())
    raw[4:40] = bytes(36)  # a document header in the middle
    other.write_bytes(raw)
    assert "b.parquet is damaged" in refusal(tmp_path / "o", "obelics", other, "--images", downloaded)
    assert "none does not exist" in refusal(tmp_path / "p", "obelics", path, "--images", tmp_path / "none")
