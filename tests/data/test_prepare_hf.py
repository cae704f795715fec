"""Data sets in the forms of the hub: on disk, as parquet, as a folder of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources import command, flat, jpeg, prepare, refusal
from tests.data.test_prepare_engine import ROOT

datasets = pytest.importorskip("datasets", reason="data sets of the hub need the extra hf")


def made(rows: list[dict[str, Any]], **features: Any) -> Any:
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string")} | features
    return datasets.Dataset.from_list(rows, features=datasets.Features({name: kinds[name] for name in rows[0]}))


def stored(number: int) -> dict[str, Any]:
    return {"bytes": jpeg(number), "path": f"{number}.jpg"}


def pairs(count: int) -> Any:
    return made([{"image": stored(number), "caption": f"image {number}"} for number in range(count)])


def write(data: Any, folder: Path, form: str) -> Path:
    """A data set as it is found: saved to disk (alone, or with its splits), or in parquet files."""
    if form == "disk":
        data.save_to_disk(folder)
    elif form == "splits":
        datasets.DatasetDict(train=data, test=data.select(range(1))).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        half = len(data) // 2
        for part, some in enumerate((data.select(range(half)), data.select(range(half, len(data))))):
            some.to_parquet(folder / "data" / f"train-{part:05d}-of-00002.parquet")
    return folder


@pytest.mark.parametrize("form", ["disk", "splits", "parquet"])
def test_rows_become_documents_in_their_order(tmp_path: Path, form: str) -> None:
    folder = write(pairs(7), tmp_path / "in", form)
    done = prepare(tmp_path / "out", "hf", folder)
    assert [flat(document) for document in done.documents] == [[jpeg(n), f"image {n}"] for n in range(7)]
    assert prepare(tmp_path / "again", "hf", folder).documents == done.documents
    if form == "splits":
        assert len(prepare(tmp_path / "test", "hf", folder, "--split", "test").documents) == 1


def test_parts_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.sources.hf.IN_A_UNIT", 2)
    folder = write(pairs(7), tmp_path / "in", "disk")
    whole = prepare(tmp_path / "out", "hf", folder).documents
    for part in (2, 1):
        status, _, err = command(
            "prepare", "hf", folder, "--out", tmp_path / "p", "--part", f"{part}/2", "--workers", 1
        )
        assert status == 0, err
    assert command("merge", tmp_path / "p")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()
    assert len(whole) == 7


def test_a_folder_of_images_with_its_table(tmp_path: Path) -> None:
    root = tmp_path / "in" / "train"
    root.mkdir(parents=True)
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(jpeg(number))
    lines = "".join(f"{number}.jpg,text {number}\n" for number in (0, 1, 2))
    (root / "metadata.csv").write_text(f"file_name,text\n{lines}")
    done = prepare(tmp_path / "out", "hf", tmp_path / "in")
    assert [flat(document) for document in done.documents] == [[jpeg(n), f"text {n}"] for n in range(3)]


def test_questions_classes_lists_and_templates(tmp_path: Path) -> None:
    vqa = made(
        [
            {"image": stored(0), "question": "is it?", "answer": "yes"},
            {"image": stored(1), "question": "", "answer": "x"},
        ],
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    folder = write(vqa, tmp_path / "vqa", "disk")
    done = prepare(tmp_path / "a", "hf", folder, "--question-column", "question", "--text-column", "answer")
    (document,) = done.documents
    assert flat(document) == [jpeg(0), "is it?", "yes"]
    assert [node.role for node in document.nodes] == ["user", "user", "assistant"]
    assert [getattr(node, "loss", None) for node in document.nodes] == [None, False, True]
    assert done.dropped == {"no question": 1}
    columns = ("--question-column", "question", "--text-column", "answer", "--assistant", " A:")
    (document,) = prepare(tmp_path / "text", "hf", folder, *columns).documents
    assert flat(document) == [jpeg(0), "User: is it? A:", " yes"]
    assert [getattr(node, "loss", None) for node in document.nodes] == [None, False, True]

    labels = datasets.ClassLabel(names=["cat", "dog"])
    classes = made([{"image": stored(n), "label": label} for n, label in enumerate((1, 0, -1))], label=labels)
    folder = write(classes, tmp_path / "classes", "disk")
    done = prepare(tmp_path / "b", "hf", folder, "--template", "a photo of a {label}")
    assert [flat(document)[1] for document in done.documents] == ["a photo of a dog", "a photo of a cat"]
    assert done.dropped == {"no text": 1}

    several = made(
        [{"image": [stored(0), stored(1)], "caption": ["one", "two", " "]}, {"image": [], "caption": ["none"]}],
        image=datasets.Sequence(datasets.Image()),
        caption=datasets.Sequence(datasets.Value("string")),
    )
    done = prepare(tmp_path / "c", "hf", write(several, tmp_path / "several", "disk"))
    assert [flat(document) for document in done.documents] == [[jpeg(0), jpeg(1), "one"], [jpeg(0), jpeg(1), "two"]]
    assert done.dropped == {"no text": 1, "image is missing": 1}


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    images: list[dict[str, Any] | None] = [
        stored(0),
        None,
        {"bytes": b"<html>", "path": None},
        {"bytes": None, "path": str(tmp_path / "secret.jpg")},
        {"bytes": None, "path": "../secret.jpg"},
        stored(5),
    ]
    captions = ["a", "b", "c", "d", "e", None]
    rows = [{"image": image, "caption": text} for image, text in zip(images, captions, strict=True)]
    (tmp_path / "in").mkdir()
    image = datasets.Image().pa_type
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"image": image, "caption": pyarrow.string()}).with_metadata(
        pairs(1).data.table.schema.metadata
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "in" / "train.parquet")
    done = prepare(tmp_path / "out", "hf", tmp_path / "in")
    assert [flat(document) for document in done.documents] == [[jpeg(0), "a"]]
    assert done.dropped == {
        "image is missing": 1,
        "HTML saved as an image": 1,
        "image's name leads out of its folder": 2,
        "no text": 1,
    }


def test_what_is_not_shown_is_not_decoded(tmp_path: Path) -> None:
    broken = {"bytes": b"no image", "path": None}
    rows = [{"image": stored(0), "depth": broken, "caption": "a"}]
    data = made(2 * rows, depth=datasets.Image())
    for form in ("disk", "parquet"):
        done = prepare(tmp_path / f"{form}-out", "hf", write(data, tmp_path / form, form), "--image-column", "image")
        assert [flat(document) for document in done.documents] == 2 * [[jpeg(0), "a"]]


def test_refusals_are_one_sentence(tmp_path: Path) -> None:
    folder = write(pairs(2), tmp_path / "in", "splits")
    out = tmp_path / "out"
    assert "its splits are train, test" in refusal(out, "hf", folder, "--split", "val")
    assert "has no column 'x'; its columns are image, caption" in refusal(out, "hf", folder, "--text-column", "x")
    assert "column 'caption' of data set" in refusal(out, "hf", folder, "--image-column", "caption")
    assert "give it without --text-column" in refusal(out, "hf", folder, "--template", "x", "--text-column", "caption")
    assert "say with --text-column" in refusal(out, "hf", folder, "--template", "x")
    assert "is not a folder" in refusal(out, "hf", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in refusal(out, "hf", tmp_path / "empty")
    (tmp_path / "empty" / "dataset_info.json").write_text("{}")
    (tmp_path / "empty" / "state.json").write_text("{}")  # something else's
    assert "split train cannot be opened: KeyError" in refusal(out, "hf", tmp_path / "empty")
    two = made([{"image": stored(0), "depth": stored(1), "caption": "a"}], depth=datasets.Image())
    path = write(two, tmp_path / "two", "disk")
    assert "several columns of images (image, depth)" in refusal(out, "hf", path)
    assert len(prepare(out, "hf", path, "--image-column", "depth", "image").documents[0].images) == 2
    assert "column 'depth' of data set" in refusal(tmp_path / "t", "hf", path, "--template", "{depth}")
    damaged = write(pairs(9), tmp_path / "damaged", "parquet")
    file = damaged / "data" / "train-00001-of-00002.parquet"
    raw = bytearray(file.read_bytes())
    raw[4:200] = b"\0" * 196
    file.write_bytes(raw)
    assert "cannot be read" in refusal(tmp_path / "d", "hf", damaged)


def test_a_name_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    argv = ["-m", "data", "prepare", "hf", "nobody/nothing", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: data set nobody/nothing, split train cannot be opened")
    assert "download it where there is a network and give its folder" in line


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "flamingo-vlm[hf]" in refusal(tmp_path / "out", "hf", tmp_path)
