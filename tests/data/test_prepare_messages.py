"""Conversations in: every form that trainers have, images in their places, roles kept, nothing that is not there."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.shards.document import Document, Text, conversation_of
from tests.data.helpers import byte_processor
from tests.data.sources import flat, jpeg, jsonl, prepare, refusal
from tests.data.test_prepare_video import mp4
from tests.fixtures import png

Spoken = list[tuple[str | None, str | bytes | tuple[bytes, ...]]]
ASK, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}
SPOKEN: Spoken = [("user", jpeg(0)), ("user", "What?"), ("assistant", "A cat.")]


def spoken(document: Document) -> Spoken:
    """The nodes with their roles."""
    return [(node.role, value) for node, value in zip(document.nodes, flat(document), strict=True)]


def learnt(document: Document) -> list[str]:
    return [node.text for node in document.nodes if isinstance(node, Text) and node.loss]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


URI = f"data:image/jpeg;base64,{base64.b64encode(jpeg(0)).decode()}"
FORMS: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {"messages": [ASK | {"content": "<image>What?"}, ANSWER], "images": ["0.jpg"]},
    "ms-swift, without a tag": {"messages": [ASK, ANSWER], "images": ["0.jpg"]},
    "ms-swift, images as objects": {"messages": [ASK, ANSWER], "images": [{"path": "0.jpg", "bytes": None}]},
    "TRL": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, text("What?")]},
            {"role": "assistant", "content": [text("A cat.")]},
        ],
        "images": ["0.jpg"],
    },
    "TRL, by index": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}, text("What?")]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat.", "index": None}]},
        ],
        "images": ["0.jpg"],
    },
    "TRL, prompt and completion": {"prompt": [ASK], "completion": [ANSWER], "images": ["0.jpg"]},
    "OpenAI": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}, text("What?")]},
            ANSWER,
        ]
    },
    "transformers": {
        "messages": [{"role": "user", "content": [{"type": "image", "path": "0.jpg"}, text("What?")]}, ANSWER]
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        "image": "0.jpg",
    },
    "The Cauldron": {"texts": [{"user": "What?", "assistant": "A cat.", "source": "x"}], "images": ["0.jpg"]},
    "as JSON in a table": {"messages": json.dumps([ASK, ANSWER]), "images": ["0.jpg"]},
    "listed and named": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "gone.jpg"}, text("What?")]}, ANSWER],
        "images": [{"bytes": base64.b64encode(jpeg(0)).decode(), "path": "gone.jpg"}],
    },
    "base64": {"messages": [ASK, ANSWER], "images": [base64.b64encode(jpeg(0)).decode()]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(folder: Path, form: str) -> None:
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", FORMS[form] | {"id": 7}))
    (document,) = done.documents
    assert spoken(document) == SPOKEN
    assert learnt(document) == ["A cat."]
    assert document.meta == {"id": 7}
    assert [message.role for message in conversation_of(document.nodes).messages] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["base64", "bytes"])
def test_base64_of_a_part_is_not_a_path_however_short(folder: Path, name: str) -> None:
    small = png(9)
    encoded = base64.b64encode(small).decode()
    assert len(encoded) < 255
    row = {"messages": [ASK | {"content": [{"type": "image", name: encoded}, text("What?")]}, ANSWER]}
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", row))
    assert [document.images for document in done.documents] == [[small]]


def test_turns_a_system_message_and_images_anywhere(folder: Path) -> None:
    rows = [
        {
            "system": "Be short.",
            "messages": [
                *(ASK | {"content": "Is <image> like <image>?"}, ANSWER | {"content": "Yes."}),
                *(ASK | {"content": "And\n<image>"}, ANSWER | {"content": "No.", "loss": False}),
                *(ASK, ANSWER | {"loss": True}),
            ],
            "images": ["0.jpg", "1.jpg", "2.jpg"],
        },
        {"messages": [{"role": "system", "content": "Be long."}, ASK, ANSWER], "system": None},
    ]
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", *rows))
    assert spoken(done.documents[0]) == [
        ("system", "Be short."),
        *(("user", "Is "), ("user", jpeg(0)), ("user", " like "), ("user", jpeg(1)), ("user", "?")),
        *(("assistant", "Yes."), ("user", "And\n"), ("user", jpeg(2)), ("assistant", "No.")),
        *(("user", "What?"), ("assistant", "A cat.")),
    ]
    assert learnt(done.documents[0]) == ["Yes.", "A cat."]
    assert spoken(done.documents[1]) == [("system", "Be long."), ("user", "What?"), ("assistant", "A cat.")]
    as_text = prepare(folder / "text", "messages", folder / "a.jsonl", "--user", "Q: ", "--assistant", " A:")
    assert flat(as_text.documents[1]) == ["Be long.\n", "\nQ: What? A:", " A cat."]
    assert {node.role for document in as_text.documents for node in document.nodes} == {None}
    assert learnt(as_text.documents[0]) == [" Yes.", " A cat."]
    fewer = prepare(folder / "fewer", "messages", folder / "a.jsonl", "--drop-text-only")
    assert fewer.dropped == {"no image": 1}


BAD: dict[str, dict[str, Any]] = {
    "image is missing": {"messages": [ASK, ANSWER], "images": ["9.jpg"]},
    "image's name leads out of its folder": {"messages": [ASK, ANSWER], "images": ["../0.jpg"]},
    "image is a URL: download it, and give its path": {"messages": [ASK, ANSWER], "images": ["http://x/0.jpg"]},
    "not an image": {"messages": [ASK, ANSWER], "images": ["a.jsonl"]},
    "image of a type that is not read": {"messages": [ASK, ANSWER], "images": [5]},
    "the numbers of <image> tags and images differ": {"messages": [ASK | {"content": "<image>What?"}, ANSWER]},
    "the numbers of <video> tags and videos differ": {"messages": [ASK | {"content": "<video>What?"}, ANSWER]},
    "<audio> without its media": {"messages": [ASK | {"content": "<audio>What?"}, ANSWER]},
    "<bbox> without its media": {"messages": [ASK, ANSWER | {"content": "at <bbox>"}], "objects": {"bbox": [[1]]}},
    "media under 'audios' are not read": {"messages": [ASK, ANSWER], "audios": ["a.wav"]},
    "a pair of preference, not a conversation": {"messages": [ASK, ANSWER], "rejected_response": "A dog."},
    "tools are not read": {"messages": [ASK, ANSWER], "tools": "[{}]"},
    "a turn is neither the user's, the assistant's nor the system's": {
        "messages": [ASK, {"role": "tool", "content": ""}]
    },
    "no answer": {"messages": [ASK]},
    "an empty turn": {"messages": [ASK | {"content": " "}, ANSWER]},
    "a turn's content is neither text nor a list of parts": {"messages": [ASK | {"content": None}, ANSWER]},
    "a part that is neither text, an image nor a video": {"messages": [ASK | {"content": [{"type": "file"}]}, ANSWER]},
    "a part of text without text": {"messages": [ASK | {"content": [{"type": "text"}]}, ANSWER]},
    "not a list of turns": {"messages": "What? A cat."},
    "media under 'images' are not read": {"messages": [ASK | {"images": ["0.jpg"]}, ANSWER]},
    "'images' and 'image' differ": {"messages": [ASK, ANSWER], "images": ["0.jpg"], "image": "1.jpg"},
    "'tool_calls' of a turn is not read": {"messages": [ASK, ANSWER | {"tool_calls": [{}]}]},
    "no messages": {"text": "What? A cat."},
}
OUT_OF_ORDER = [[ASK, ASK, ANSWER], [ANSWER], [ASK, ANSWER, ANSWER], [ASK, ANSWER, {"role": "system", "content": "x"}]]


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_used_is_counted_by_reason(folder: Path, reason: str) -> None:
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", BAD[reason], FORMS["LLaMA-Factory"]))
    assert done.dropped == {reason: 1}
    assert [spoken(document) for document in done.documents] == [SPOKEN]


def test_more_or_fewer_images_than_tags_and_turns_out_of_order(folder: Path) -> None:
    one = ASK | {"content": "<image>What?"}
    rows = [
        {"messages": [one, ANSWER], "images": ["0.jpg", "1.jpg"]},
        {"messages": [ASK | {"content": "<image><image>What?"}, ANSWER], "images": ["0.jpg"]},
        {"messages": [one, ANSWER, {"role": "user", "content": [{"type": "image", "index": 5}]}], "images": ["0.jpg"]},
        *({"messages": turns} for turns in OUT_OF_ORDER),
        FORMS["TRL"],
    ]
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", *rows))
    assert done.dropped["the numbers of <image> tags and images differ"] == 3
    assert sum(done.dropped.values()) == 7
    assert max(done.dropped, key=lambda reason: done.dropped[reason] * reason.startswith("the turns")).startswith(
        "the turns are not in order"
    )
    assert len(done.documents) == 1


def test_parquet_and_what_save_to_disk_wrote(folder: Path) -> None:
    image = {"bytes": jpeg(0), "path": "x.jpg"}
    rows = [{"messages": [ASK, ANSWER], "images": [image]}, {"messages": [ASK, ANSWER], "images": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    done = prepare(folder / "parquet", "messages", folder / "a.parquet")
    assert [spoken(document) for document in done.documents] == [SPOKEN, SPOKEN[1:]]
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    turns = [{"user": "What?", "assistant": "A cat."}, {"user": "And?", "assistant": "A dog."}]
    made = datasets.Dataset.from_list([{"images": [image], "texts": turns}] * 3, features=features)
    made.save_to_disk(folder / "disk")
    done = prepare(folder / "out", "messages", folder / "disk")
    assert [spoken(document) for document in done.documents] == [
        [*SPOKEN, ("user", "And?"), ("assistant", "A dog.")]
    ] * 3
    assert done.documents[0].images == [jpeg(0)]


def test_videos_become_clips_beside_stills(folder: Path) -> None:
    (folder / "v.mp4").write_bytes(mp4(3))
    asked = ASK | {"content": "<video>Like <image>?"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, ANSWER], "videos": ["v.mp4"], "images": ["0.jpg"]},
        {"messages": [asked, ANSWER], "videos": [["1.jpg", "2.jpg"]], "images": ["0.jpg"]},
        {"messages": [asked, ANSWER], "videos": ["0.jpg"], "images": ["0.jpg"]},
    ]
    done = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", *rows))
    clip, _, still = done.documents[0].nodes[:3]
    assert (len(getattr(clip, "frames", ())), getattr(clip, "fps", None)) == (3, 1.0)
    assert getattr(still, "frames", None) == (3,)
    assert spoken(done.documents[1])[:3] == [("user", (jpeg(1), jpeg(2))), ("user", "Like "), ("user", jpeg(0))]
    assert len(done.documents) + sum(done.dropped.values()) == 3
    assert "--fps must be positive" in refusal(folder / "o", "messages", folder / "a.jsonl", "--fps", "0")


def test_images_from_another_folder(folder: Path) -> None:
    (folder / "rows").mkdir()
    path = jsonl(folder / "rows" / "a.jsonl", FORMS["LLaMA-Factory"])
    assert "image is missing" in refusal(folder / "o", "messages", path)
    assert len(prepare(folder / "out", "messages", path, "--images", folder).documents) == 1
    assert "image folder nowhere does not exist" in refusal(folder / "o", "messages", path, "--images", "nowhere")


def test_a_row_begins_with_what_the_processor_makes_of_the_same_messages(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image", "path": str(folder / "0.jpg")}, text("What?")]},
        ANSWER,
        {"role": "user", "content": [text("And "), {"type": "image", "path": str(folder / "1.jpg")}, text("?")]},
        ANSWER,
    ]
    (document,) = prepare(folder / "out", "messages", jsonl(folder / "a.jsonl", {"messages": turns})).documents
    processor = byte_processor()
    processor.chat_template = "plain"
    row = processor.turns()(conversation_of(document.nodes))
    for number in (2, 4):
        inputs = processor.apply_chat_template(
            turns[:number], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        prompt = inputs["input_ids"][0].tolist()
        assert row.ids[: len(prompt)] == prompt
        assert row.loss_mask[len(prompt)]
        assert not row.loss_mask[len(prompt) - 1]
