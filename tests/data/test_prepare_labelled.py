"""A collection of named images in: what is trained on, what is held out, and what is left out, counted by reason."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.prepare.labels import held_out
from data.shards.document import Document, Image, Text
from data.shards.writer import read_documents, read_manifest
from tests.data.sources import command
from tests.fixtures import png

THINGS = [f"thing {letter}{number}" for letter in "abcd" for number in range(5)]
SOURCES = ("noto", "fluent", "open")
COUNTS = ("--naming", 12, "--captions", 12, "--binding", 12)


def picture(thing: int, source: int) -> bytes:
    return png((12 * thing, 80 * source, 100), noise=100 * thing + source)


def write_table(folder: Path, extra: list[dict[str, Any]] | None = None) -> Path:
    """Three sources' images of twenty things, and what a user may have got wrong."""
    folder.mkdir(parents=True)
    rows = []
    for number, thing in enumerate(THINGS):
        for index, source in enumerate(SOURCES):
            file = f"{source}/{number}.png"
            (folder / source).mkdir(exist_ok=True)
            (folder / file).write_bytes(picture(number, index))
            rows.append(
                {"image": file, "name": thing, "keywords": f"{THINGS[0]};word {number};other", "source": source}
            )
    with (folder / "labels.csv").open("w", newline="") as file_object:
        writer = csv.DictWriter(file_object, ["image", "name", "keywords", "source"])
        writer.writeheader()
        writer.writerows([*rows, *(extra or [])])
    return folder / "labels.csv"


def prepared(out: Path, *arguments: object) -> tuple[dict[str, list[Document]], str]:
    status, report, err = command("prepare", "labelled", "--out", out, *arguments)
    assert status == 0, err
    folders = {}
    for manifest in sorted(out.rglob("_dataset.json")):
        parts = read_manifest(manifest.parent)["parts"].values()
        shards = [manifest.parent / entry["name"] for part in parts for entry in part["shards"]]
        name = manifest.parent.relative_to(out).as_posix()
        folders[name] = [document for shard in shards for document in read_documents(shard)]
    return folders, report


def refusal(*arguments: object) -> str:
    status, _, err = command("prepare", "labelled", *arguments)
    assert status == 2
    (line,) = err.strip().split("\n")
    return line


def test_what_is_held_out_is_nowhere_in_training(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "in")
    kept_out = held_out(THINGS, 0.25)
    assert len(kept_out) == 5
    folders, report = prepared(
        tmp_path / "out", labels, *COUNTS, "--heldout-share", 0.25, "--heldout-sources", "open", "--ways", 2, 3
    )
    assert "15 things to train on, 5 held out" in report
    allowed = {picture(i, s) for i, thing in enumerate(THINGS) for s in (0, 1) if thing not in kept_out}
    train = {name: documents for name, documents in folders.items() if name.startswith("train/")}
    assert set(train) == {"train/pairs", "train/naming", "train/captions", "train/binding"}
    shown = {image for documents in train.values() for document in documents for image in document.images}
    assert shown <= allowed
    assert {image for document in train["train/pairs"] for image in document.images} == allowed
    words = " ".join(n.text for documents in train.values() for d in documents for n in d.nodes if isinstance(n, Text))
    assert not [thing for thing in kept_out if thing in words]  # as a keyword neither
    things = folders["heldout/things"]
    assert {document.meta["class"] for document in things} == set(kept_out)
    assert {document.meta["kind"] for document in things} == set(SOURCES)
    assert {document.images[0] for document in things} == {
        picture(THINGS.index(thing), s) for thing in kept_out for s in range(3)
    }
    assert {document.images[0] for document in folders["heldout/sources"]} == {
        picture(i, 2) for i, thing in enumerate(THINGS) if thing not in kept_out
    }
    made_up = {name for document in things for name in document.meta["names"]}
    given = {name for document in train["train/binding"] for name in document.meta["names"]}
    assert made_up
    assert not made_up & given


def test_binding_documents(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "in")
    options = ("--heldout-share", 0, "--ways", 2, 5, "--shots", 1, 4, "--form", " This is a {name}.")
    folders, _ = prepared(tmp_path / "out", labels, "--naming", 0, "--captions", 0, "--binding", 40, *options)
    assert set(folders) == {"train/pairs", "train/binding"}
    pool = {picture(i, s): thing for i, thing in enumerate(THINGS) for s in range(3)}
    ways, shots = set(), set()
    for document in folders["train/binding"]:
        names, classes = document.meta["names"], document.meta["classes"]
        ways.add(len(names))
        shots.add(document.meta["shots"])
        nodes = document.nodes
        assert len(nodes) == 2 * (len(names) * document.meta["shots"] + 1)
        seen = set()
        for image, text in zip(nodes[::2], nodes[1::2], strict=True):
            assert isinstance(image, Image)
            assert isinstance(text, Text)
            way = classes.index(pool[document.images[image.frames[0]]])
            assert text.text == f" This is a {names[way]}."
            assert text.loss == (way in seen)  # the first mention cannot be known
            seen.add(way)
            last = names[way]
        assert document.meta["answer"] == last
    assert (ways, shots) == ({2, 5}, {1, 4})
    own, _ = prepared(tmp_path / "own", labels, *COUNTS, "--own-names", 1)
    for document in own["train/binding"]:
        assert document.meta["names"] == document.meta["classes"]
        assert all(node.loss for node in document.nodes if isinstance(node, Text))


def test_documents_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "in")
    first, _ = prepared(tmp_path / "a", labels, *COUNTS)
    with labels.open(newline="") as file:
        header, *rows = csv.reader(file)
    shuffled = [rows[int(i)] for i in np.random.Generator(np.random.Philox(key=0)).permutation(len(rows))]
    with (labels.parent / "again.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *shuffled])
    more, _ = prepared(tmp_path / "b", labels.parent / "again.csv", "--naming", 30, "--captions", 30, "--binding", 30)
    other, _ = prepared(tmp_path / "c", labels, *COUNTS, "--seed", 1)
    assert more.keys() == first.keys() == other.keys()
    for name, documents in first.items():
        assert [(d.nodes, d.images, d.meta) for d in more[name]][: len(documents)] == [
            (d.nodes, d.images, d.meta) for d in documents
        ]
    assert first["train/binding"] != other["train/binding"]
    assert [d.images for d in first["heldout/things"]] == [d.images for d in other["heldout/things"]]


def test_faults_are_counted_and_named(tmp_path: Path) -> None:
    labels = write_table(
        tmp_path / "in",
        [
            {"image": "noto/none.png", "name": "gone", "keywords": "", "source": ""},
            {"image": "noto/0.png", "name": "  ", "keywords": "", "source": ""},
            {"image": "", "name": "blank", "keywords": "", "source": ""},
            {"image": "noto/0.png", "name": "THING  A0", "keywords": "", "source": ""},
            {"image": "noto/1.png", "name": "another name", "keywords": "", "source": ""},
            {"image": "../secret.png", "name": "x", "keywords": "", "source": ""},
            {"image": "labels.csv", "name": "x", "keywords": "", "source": ""},
        ],
    )
    folders, report = prepared(tmp_path / "out", labels, *COUNTS)
    dropped = read_manifest(tmp_path / "out" / "train" / "pairs")["parts"]["pairs"]["meta"]["images"]["dropped"]
    assert dropped == {
        "image is missing": 1,
        "the image has no name": 1,
        "the row has no image": 1,
        "image listed before": 1,
        "the same image under several names": 2,
        "image's name leads out of its folder": 1,
        "not an image": 1,
    }
    assert "1  image is missing  (first: labels.csv row 62)" in report
    assert picture(1, 0) not in {image for documents in folders.values() for d in documents for image in d.images}


def test_a_folder_and_json_lines(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for index, source in enumerate(SOURCES[:2]):
        for number in range(8):
            (root / source / f"Thing_{number}").mkdir(parents=True)
            (root / source / f"Thing_{number}" / "1.png").write_bytes(picture(number, index))
    (root / "loose.png").write_bytes(picture(9, 0))
    folders, report = prepared(tmp_path / "out", root, *COUNTS, "--heldout-sources", "noto")
    assert {document.meta["kind"] for document in folders["heldout/sources"]} == {"noto"}
    assert "image outside NAME/ and SOURCE/NAME/  (first: loose.png)" in report
    rows = [
        {"file": f"fluent/Thing_{number}/1.png", "name": f"Thing {number}", "tags": ["one", "two"], "vendor": "v"}
        for number in range(8)
    ]
    (root / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders, _ = prepared(tmp_path / "lines", root / "labels.jsonl", *COUNTS, "--image-column", "file")
    texts = {node.text for document in folders["train/pairs"] for node in document.nodes if isinstance(node, Text)}
    assert texts <= {f"Thing {number}, one, two" for number in range(8)}
    assert len(texts) == 7  # a sixth is held out


def test_a_folder_that_is_prepared_again_keeps_nothing_old(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "in")
    prepared(tmp_path / "out", labels, *COUNTS)
    folders, _ = prepared(tmp_path / "out", labels, *COUNTS, "--heldout-share", 0)
    assert folders["heldout/things"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["IN/none.csv"], "does not exist; give a table"),
        (["IN/labels.csv", "--name-column", "title"], "has no column 'title'; its columns are image, name, keywords"),
        (
            ["IN/labels.csv", "--heldout-sources", "apple"],
            "--heldout-sources apple: the sources are fluent, noto, open",
        ),
        (["IN/labels.csv", "--ways", 1], "--ways must be between 2 and 12"),
        (["IN/labels.csv", "--ways", 12, "--heldout-share", 0.9], "need as many names to train on, but there are 2"),
        (["IN/labels.csv", "--form", "dax"], "must hold {name} once"),
        (["IN/labels.csv", "--shots", 0], "--shots and --documents-per-shard at least 1"),
        (["IN/noto/0.png"], "is not a table; its name ends with none of"),
        (["IN/labels.csv", "--images", "IN/noto"], "has no image that can be used (dropped images: 60"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[object], sentence: str) -> None:
    write_table(tmp_path / "in")
    given = [str(argument).replace("IN", str(tmp_path / "in")) for argument in arguments]
    assert sentence in refusal(*given, "--out", tmp_path / "out", *COUNTS)
    shutil.rmtree(tmp_path / "in")
    assert not list((tmp_path / "out").rglob("*.tar"))
