"""Conversations in shards: roles are kept, old shards are read and written as ever, other objectives refuse them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from data.__main__ import main
from data.batches.collate import FlamingoCollate, LanguageCollate, PairCollate
from data.batches.tokenize import IGNORED
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.shards.document import Document, Image, Node, Text, nodes_to_json, parse_nodes
from data.shards.writer import ShardWriter, read_document, read_documents
from flamingo.errors import UserError
from tests.fixtures import byte_tokenizer, png
from tests.model import tiny
from tests.model.test_conversations import make

TALK: list[Node] = [
    Text("Be brief.", False, "system"),
    Image((0,), role="user"),
    Text("What?", False, "user"),
    Text("A cat.", True, "assistant"),
    Image((0, 1), 4.0, "user"),
    Text("And?", False, "user"),
    Text("Shown.", False, "assistant"),
    Text("So?", False, "user"),
    Text("Yes.", True, "assistant"),
]


def write(folder: Path, *documents: list[Node]) -> Path:
    with ShardWriter(folder, "s") as writer:
        for number, nodes in enumerate(documents):
            writer.write(Document(f"d{number}", list(nodes), [png(1, noise=1), png(2, noise=2)]))
    return folder / "s-000000.tar"


def test_roles_are_written_as_a_minor_version_and_read_back(tmp_path: Path) -> None:
    shard = write(tmp_path, TALK, [Image((0,)), Text("a cat")])
    assert read_document(shard, 0).nodes == TALK
    with tarfile.open(shard) as tar:
        bodies = [json.loads(tar.extractfile(f"d{k}.json").read()) for k in range(2)]  # type: ignore[union-attr]
    assert [body["v"] for body in bodies] == [1.1, 1]
    assert bodies[0]["nodes"][1:4] == [
        {"i": 0, "r": "user"}, {"t": "What?", "r": "user"}, {"t": "A cat.", "r": "assistant"}
    ]  # fmt: skip
    assert bodies[0]["nodes"][6] == {"t": "Shown.", "loss": False, "r": "assistant"}


def test_documents_without_roles_keep_their_bytes() -> None:
    nodes: list[Node] = [Text("q", False), Text("t"), Image((0,)), Image((1, 2), 1.0)]
    assert nodes_to_json(nodes, {"a": 1}) == (
        b'{"v":1,"nodes":[{"t":"q","loss":false},{"t":"t"},{"i":0},{"c":[1,2],"fps":1.0}],"meta":{"a":1}}'
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"v": 1.2, "nodes": []}, "format version 1.2, this program reads versions 1 and 1.1"),
        ({"v": 2, "nodes": []}, "format version 2"),
        ({"v": 1.1, "nodes": [{"t": "a", "r": "human"}]}, "node 0 has the role 'human'"),
        ({"v": 1.1, "nodes": [{"t": "a", "r": "user"}, {"t": "b"}]}, "node 1 has the role None"),
        ({"v": 1.1, "nodes": [{"t": "a"}, {"t": "b", "r": "user"}]}, "node 1 has the role 'user'"),
        ({"v": 1.1, "nodes": [{"t": "a", "r": ["user"]}]}, "node 0 has the role"),
    ],
)
def test_other_versions_and_half_a_conversation_are_refused(body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_nodes(body)


def batches(folder: Path, collate: Any, steps: int = 1, **options: Any) -> list[Any]:
    values: dict[str, Any] = {"name": "d", "shards": [str(folder)], "batch_size": 2, "max_frames": 2}
    loader = iter(MixLoader([DatasetSpec(**(values | options))], collate))
    return [next(loader).batches["d"][0] for _ in range(steps)]


def test_the_loader_gives_the_processors_rows(tmp_path: Path) -> None:
    processor = make("otter")
    write(tmp_path, TALK, [Image((0,)), Text("a cat")])
    (batch,) = batches(tmp_path, FlamingoCollate(processor))
    row = batch.keys.index("d0")
    labels, ids = batch.tensors["labels"][row], batch.tensors["input_ids"][row]
    learnt = processor.tokenizer.decode(labels[labels != IGNORED])
    assert learnt == " A cat.<|endofchunk|> Yes.<|endofchunk|>"
    image, clip = tiny.picture(0), [tiny.picture(0), tiny.picture(1)]
    prompt = processor(
        text=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "And?"}]},
        ]
    )["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)
    assert batch.tensors["pixel_values"].shape[:2] == (3, 2)  # the stills repeat themselves beside a clip


def test_conversations_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    write(tmp_path, TALK, [Text("Hi", False, "user")], [Text("Hi", True, "assistant")], *[TALK] * 5)
    found = batches(tmp_path, FlamingoCollate(make("otter")), steps=4)
    reasons = {bad.key: (bad.reason, bad.detail) for batch in found for bad in batch.bad}
    assert reasons["d1"][0] == "no answer"
    assert reasons["d2"][0] == "not a conversation for this template"
    assert "message 0 is the assistant's" in reasons["d2"][1]


def test_other_objectives_refuse_what_they_would_lose(tmp_path: Path) -> None:
    write(tmp_path, TALK)
    pairs = PairCollate(lambda texts: torch.zeros(len(texts), 4), make("otter").image_transform)
    for collate in (LanguageCollate(byte_tokenizer()), pairs):
        with pytest.raises(UserError, match="a document is a conversation, and only objective=flamingo"):
            batches(tmp_path, collate, batch_size=1)
    with pytest.raises(UserError, match="a document is a conversation, which cannot be written: "):
        batches(tmp_path, FlamingoCollate(make(None)), batch_size=1)


def test_inspect_shows_who_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = str(write(tmp_path / "s", TALK))
    assert main(["inspect", shard]) == 0
    shown = capsys.readouterr().out
    assert "? user: 'What?'" in shown
    assert "  assistant: 'A cat.'" in shown
    make("otter").save_pretrained(tmp_path / "p")
    assert main(["inspect", shard, "--sampled", "--tokenizer", str(tmp_path / "p")]) == 0
    assert "A cat.<EOC>" in capsys.readouterr().out
    assert main(["inspect", shard, "--sampled"]) == 2
    assert "give --tokenizer" in capsys.readouterr().err


def test_dedupe_leaves_conversations_whole(tmp_path: Path) -> None:
    write(tmp_path / "in", TALK, [Image((0,)), Text("a")], [Image((0,)), Text("b"), Image((1,)), Text("c")])
    options = ["--max-image-documents", "1", "--keep-same-images", "--min-images", "0"]
    assert main(["prepare", "deduplicate", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 0
    (shard,) = sorted((tmp_path / "out").glob("*.tar"))
    documents = list(read_documents(shard))
    assert documents[0].nodes == TALK
    assert [len(document.images) for document in documents[1:]] == [0, 0]
