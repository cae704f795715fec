"""Items that name media which are not read: dropped and counted, never learnt as text."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from data.prepare.media_fields import names_media
from tests.data.sources import jpeg, jsonl, prepare

TALK = [{"from": "human", "value": "What happens?"}, {"from": "gpt", "value": "A dog jumps."}]


@pytest.mark.parametrize(
    "more",
    [
        {"video": "v.mp4"},
        {"videos": ["v.mp4"]},
        {"image_path": "a.jpg"},
        {"imagePath": "a.jpg"},
        {"img": "a.jpg"},
        {"audio": "a.wav"},
        {"video_path": "x", "image": ""},
        {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A dog."}]},
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]},
        {"image": "missing.jpg"},
        {"image": {"bytes": "x"}},
        {"images": ["a.jpg", None]},
    ],
)
def test_llava_with_media_under_another_key(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    good = {"images": ["a.jpg"], "conversations": TALK, "video_id": "7", "image_width": 3}
    path = jsonl(tmp_path / "a.jsonl", good, {"conversations": TALK} | more)
    done = prepare(tmp_path / "out", "llava", path, "--images", tmp_path)
    assert [len(document.images) for document in done.documents] == [1]
    assert sum(done.dropped.values()) == 1


@pytest.mark.parametrize("field", ["img_str", "video_str", "image_base64", "image_str", "images"])
def test_m3it_with_media_in_another_field(tmp_path: Path, field: str) -> None:
    image = base64.b64encode(jpeg(1)).decode()
    row = {"instruction": "Look.", "inputs": "", "outputs": "A cat."}
    path = jsonl(tmp_path / "a.jsonl", row | {field: image}, row | {"image_base64_str": [image]})
    done = prepare(tmp_path / "out", "m3it", path)
    assert done.dropped == {f"media under {field!r} are not read": 1}
    if field != "images":
        renamed = prepare(tmp_path / "out2", "m3it", path, "--field", f"image_base64_str={field}")
        assert [len(document.images) for document in renamed.documents] == [1]


def test_facts_about_media_are_not_media() -> None:
    assert not any(map(names_media, ("id", "image_id", "video_width", "imageCount", "imagination", "text", "source")))
    assert all(map(names_media, ("image", "imgUrl", "video_file", "media", "frames", "Photo")))
