"""LLaVA, LLaVA-Med, MIMIC-IT and M3IT in: turns out of the loss and in it, and images in their positions."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.prepare import inputs
from data.prepare.sources import messages, mimicit
from data.shards.document import Document, Text
from flamingo.errors import UserError
from tests.data.sources import flat, jpeg, jsonl, prepare, refusal

AS_TEXT = ("--user", "User: ", "--assistant", "\nAssistant:")


def spoken(document: Document) -> list[tuple[str | None, str | bytes | tuple[bytes, ...]]]:
    """The nodes with their roles."""
    return [(node.role, value) for node, value in zip(document.nodes, flat(document), strict=True)]


def in_loss(document: Document) -> str:
    return "".join(node.text for node in document.nodes if isinstance(node, Text) and node.loss)


def turns(*values: str, human: str = "human", gpt: str = "gpt") -> list[dict[str, str]]:
    return [{"from": gpt if n % 2 else human, "value": value} for n, value in enumerate(values)]


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "images" / "coco" / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path / "images"


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_llava(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(messages, "IN_A_UNIT", chunk)
    items: list[Any] = [
        {"id": "1", "image": "coco/0.jpg", "conversations": turns("What?\n<image>", "A cät.", "And?", "A dog.")},
        {"id": "2", "conversations": turns("Hi", "Ho")},
        {"id": "3", "image": ["coco/1.jpg", "coco/2.jpg"], "conversations": turns("<image> or <image>?", "Both.")},
        {"id": "4", "image": "coco/1.jpg", "conversatons": turns("Look.", "Yes.")},  # LLaVA-Med's spelling
        {"id": "5", "image": "coco/9.jpg", "conversations": turns("<image>", "A.")},
        {"id": "6", "image": "../x.jpg", "conversations": turns("<image>", "A.")},
        {"id": "7", "image": "coco/1.jpg", "conversations": turns("<image><image>", "A.")},
        {"id": "8", "image": 5, "conversations": turns("<image>", "A.")},
        {"id": "9", "image": "coco/1.jpg", "conversations": []},
        {"id": "10", "image": "coco/1.jpg", "conversations": turns("<image>", "A.", gpt="robot")},
        {"id": "11", "image": "coco/1.jpg", "conversations": [{"from": "human"}]},
        {"id": "12", "image": "coco/1.jpg", "conversations": turns("<image>\nWhat?")},
        "text",
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(items, indent=1, ensure_ascii=False), encoding="utf-8")
    done = prepare(tmp_path / "out", "llava", path, "--images", images, *AS_TEXT)
    assert [flat(document) for document in done.documents] == [
        [jpeg(0), "User: What?\nAssistant:", " A cät.", "\nUser: And?\nAssistant:", " A dog."],
        ["User: Hi\nAssistant:", " Ho"],
        [jpeg(1), "User: or", jpeg(2), "?\nAssistant:", " Both."],
        [jpeg(1), "User: Look.\nAssistant:", " Yes."],
    ]
    assert [in_loss(document) for document in done.documents] == [" A cät. A dog.", " Ho", " Both.", " Yes."]
    assert [document.meta["id"] for document in done.documents] == ["1", "2", "3", "4"]
    assert done.dropped == {
        "image is missing": 1,
        "image's name leads out of its folder": 1,
        "the numbers of <image> tags and images differ": 1,
        "image of a type that is not read": 1,
        "no messages": 1,
        "a turn is neither the user's, the assistant's nor the system's": 1,
        "a turn's content is neither text nor a list of parts": 1,
        "no answer": 1,
        "line is not a JSON object": 1,
    }
    assert "(first: llava.json item 4)" in done.report
    roles = prepare(tmp_path / "roles", "llava", path, "--images", images)
    assert roles.dropped == done.dropped
    assert [spoken(document) for document in roles.documents] == [
        [("user", jpeg(0)), ("user", "What?"), ("assistant", "A cät."), ("user", "And?"), ("assistant", "A dog.")],
        [("user", "Hi"), ("assistant", "Ho")],
        [("user", jpeg(1)), ("user", " or "), ("user", jpeg(2)), ("user", "?"), ("assistant", "Both.")],
        [("user", jpeg(1)), ("user", "Look."), ("assistant", "Yes.")],
    ]
    assert [in_loss(document) for document in roles.documents] == ["A cät.A dog.", "Ho", "Both.", "Yes."]


def test_llava_as_lines_and_mistakes(tmp_path: Path, images: Path) -> None:
    item = {"id": 1, "image": "coco/0.jpg", "conversations": turns("<image>\nWhat?", "A cat.")}
    path = jsonl(tmp_path / "a.jsonl", item, {"id": 2, "conversations": turns("Hi", "Ho")}, b"{")
    options = ("--images", images, "--user", "Q: ", "--assistant", " A:", "--drop-text-only")
    done = prepare(tmp_path / "out", "llava", path, *options)
    assert [flat(document) for document in done.documents] == [[jpeg(0), "Q: What? A:", " A cat."]]
    assert done.dropped == {"no image": 1, "line is not a JSON object": 1}
    pointer = tmp_path / "p.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "p.json is a Git-LFS pointer" in refusal(tmp_path / "o", "llava", pointer, "--images", images)
    for text, told in (
        ('[{"id": 1}', "is truncated: its JSON does not end"),
        ('[{"id": 1} {"id": 2}]', "is not the expected JSON: '{' at byte 11"),
        ('[{"id": }]', "has broken JSON at byte 1"),
        ("", "is truncated"),
        ('"text"', "is not the expected JSON"),
    ):
        broken = tmp_path / "b.json"
        broken.write_text(text)
        assert told in refusal(tmp_path / "o", "llava", broken, "--images", images), text


def test_json_is_scanned_in_pieces(tmp_path: Path) -> None:
    rows = {f"ключ {n}": {"text": "ü" * n, "n": [n, -1.5e3, None, True]} for n in range(300)}
    big = {"big": "x" * 3_000_000, "number": 12345}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"meta": {"x": [1]}, "data": rows | big}, ensure_ascii=False), encoding="utf-8")
    raw = path.read_bytes()
    found = {key: json.loads(raw[offset : offset + size]) for key, offset, size in inputs.json_spans(path, "data")}
    assert found == rows | big
    with pytest.raises(UserError, match="has no member 'none'"):
        list(inputs.json_spans(path, "none"))


def write_mimicit(folder: Path, *, parquet: bool = False, train: bool = True) -> tuple[Path, Path]:
    """The three files of a task: a still image's instructions, a video's, and faulty ones."""
    folder.mkdir(exist_ok=True)

    def one(instruction: object, answer: object, ids: object, related: object = ()) -> dict[str, object]:
        return {"instruction": instruction, "answer": answer, "image_ids": ids, "rel_ins_ids": list(related)}  # type: ignore[call-overload]

    data = {
        "LA_1": one("What is it?", "A cat.", ["IMG_0"], ["LA_2", "LA_1", "LA_bad", "LA_none"]),
        "LA_2": one("And this?", "A dog.", ["IMG_1"]),
        "DC_1": one("What happens?", "It runs.", ["IMG_0", "IMG_1", "IMG_2"]),
        "LA_bad": one("?", "lost", ["IMG_9"]),
        "LA_type": one(5, "x", []),
        "LA_ids": one("x", "x", "IMG_0"),
    }
    instructions = folder / "T_instructions.json"
    instructions.write_text(json.dumps({"meta": {"version": "0"}, "data": data}))
    if train:
        (folder / "T_train.json").write_text(json.dumps({"LA_1": ["LA_2"], "DC_1": [], "LA_gone": []}))
    images = {f"IMG_{n}": base64.urlsafe_b64encode(jpeg(n)).decode() for n in range(3)}
    if not parquet:
        (folder / "T.json").write_text(json.dumps(images))
        return instructions, folder / "T.json"
    table = pyarrow.table({"base64": list(images.values()), "__index_level_0__": list(images)})
    pyarrow.parquet.write_table(table, folder / "T.parquet")
    return instructions, folder / "T.parquet"


@pytest.mark.parametrize("parquet", [False, True])
def test_mimicit_by_its_train_file(tmp_path: Path, parquet: bool) -> None:
    instructions, images = write_mimicit(tmp_path / "in", parquet=parquet)
    done = prepare(tmp_path / "out", "mimicit", instructions, "--images", images, *AS_TEXT)
    assert [flat(document) for document in done.documents] == [
        [jpeg(1), "User: And this?\nAssistant:", " A dog.", jpeg(0), "User: What is it?\nAssistant:", " A cat."],
        [(jpeg(0), jpeg(1), jpeg(2)), "User: What happens?\nAssistant:", " It runs."],
    ]
    assert done.documents[0].meta == {"id": "LA_1", "examples": ["LA_2"]}
    assert done.dropped == {"instruction is missing": 1}
    roles = prepare(tmp_path / "roles", "mimicit", instructions, "--images", images)
    assert spoken(roles.documents[0]) == [
        *(("user", jpeg(1)), ("user", "And this?"), ("assistant", "A dog.")),
        *(("user", jpeg(0)), ("user", "What is it?"), ("assistant", "A cat.")),
    ]
    assert spoken(roles.documents[1])[0] == ("user", (jpeg(0), jpeg(1), jpeg(2)))


def test_mimicit_by_its_own_relations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimicit, "IN_A_UNIT", 2)
    instructions, images = write_mimicit(tmp_path / "in", train=False)
    done = prepare(tmp_path / "out", "mimicit", instructions, "--images", images, "--clips", "never")
    assert [document.meta["id"] for document in done.documents] == ["LA_1", "LA_2", "DC_1"]
    assert flat(done.documents[2])[:3] == [jpeg(0), jpeg(1), jpeg(2)]
    assert done.dropped_images == {
        "example left out: image is missing": 1,
        "example left out: instruction is missing": 1,
    }
    assert done.dropped == {
        "image is missing": 1,
        "'instruction' or 'answer' is not text, or empty": 1,
        "'image_ids' is not a list of ids": 1,
    }
    fewer = prepare(tmp_path / "fewer", "mimicit", instructions, "--images", images, "--examples", "0")
    assert [len(document.images) for document in fewer.documents] == [1, 1, 3]
    assert "--examples -1" in refusal(tmp_path / "o", "mimicit", instructions, "--images", images, "--examples", "-1")
    other = tmp_path / "o.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x"]}), other)
    assert "'base64' and an index of ids are needed" in refusal(
        tmp_path / "o", "mimicit", instructions, "--images", other
    )


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_m3it(tmp_path: Path, form: str) -> None:
    three = [b64(jpeg(1)), None, b64(jpeg(2))]
    rows: list[dict[str, Any]] = [
        {"instruction": "Describe.", "inputs": "", "image_base64_str": [b64(jpeg(0))], "outputs": "A cat."},
        {
            "instruction": "Compare.",
            "inputs": "Which?",
            "image_base64_str": three,
            "outputs": "1",
        },
        {"instruction": "Think.", "inputs": "1+1", "image_base64_str": [None], "outputs": "2"},
        {"instruction": "Describe.", "inputs": "", "image_base64_str": ["broken!"], "outputs": "x"},
        {"instruction": "Describe.", "inputs": "", "image_base64_str": [b64(jpeg(0))], "outputs": " "},
    ]
    if form == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", *rows)
    else:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    done = prepare(tmp_path / "out", "m3it", path, *AS_TEXT)
    assert [flat(document) for document in done.documents] == [
        [jpeg(0), "User: Describe.\nAssistant:", " A cat."],
        [jpeg(1), jpeg(2), "User: Compare.\nWhich?\nAssistant:", " 1"],
        ["User: Think.\n1+1\nAssistant:", " 2"],
    ]
    assert done.dropped == {"no answer": 1, "image's base64 cannot be read": 1}
    clips = prepare(tmp_path / "clips", "m3it", path, "--clips")
    assert spoken(clips.documents[1]) == [
        ("user", (jpeg(1), jpeg(2))),
        ("user", "Compare.\nWhich?"),
        ("assistant", "1"),
    ]


def test_m3it_under_other_names(tmp_path: Path) -> None:
    row = {"instruction": "Q", "inputs": None, "img_str": b64(jpeg(0)), "answer": "A"}
    wrong = {"instruction": ["Q"], "img_str": b64(jpeg(0)), "answer": "A"}
    path = jsonl(tmp_path / "a.jsonl", row, wrong, row | {"img_str": 7}, b"x")
    fields = ("--field", "image_base64_str=img_str", "outputs=answer")
    done = prepare(tmp_path / "out", "m3it", path, *fields, *AS_TEXT)
    assert [flat(document) for document in done.documents] == [[jpeg(0), "User: Q\nAssistant:", " A"]]
    assert done.dropped == {
        "'instruction' is not text": 1,
        "'img_str' is neither a string nor a list": 1,
        "line is not a JSON object": 1,
    }
    assert "must be NAME=HERE" in refusal(tmp_path / "o", "m3it", path, "--field", "image=x")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), table)
    assert "has no column 'instruction'; it has x" in refusal(tmp_path / "o", "m3it", table)
