"""Pairs as the world has them: what `prepare` keeps and what training in place shows is the same, and never silence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.errors import ContentError
from data.loading.loader import MixLoader
from data.shards.document import Text
from data.shards.index import build_index
from data.shards.reader import ShardReader
from data.tools.verify import verify
from tests.data.helpers import byte_processor
from tests.data.sources import command, flat, jpeg, prepare
from tests.data.test_index import make_tar

FACTS = json.dumps({"caption": "a red card", "url": "u"}).encode()


def in_place(tar: Path) -> tuple[dict[str, tuple[list[bytes], str]], dict[str, str]]:
    """What training shows of each sample (its images, its text), and the reason for each that it replaces."""
    index = build_index(tar)
    reader, shown, bad = ShardReader([index]), {}, {}
    usable = index.usable("pairs")
    for row in range(len(index)) if usable is None else usable.tolist():
        try:
            sample = reader.sample(0, row)
        except ContentError as error:
            bad[index.key(row)] = error.reason
            continue
        text = "".join(node.text for node in sample.nodes if isinstance(node, Text))
        shown[sample.key] = [sample.image(number) for number in sample.numbers], text
    reader.close()
    return shown, bad


CAPTIONS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "only in the JSON": ([("k.json", FACTS)], "a red card"),
    "an empty text beside a JSON": ([("k.txt", b" \n"), ("k.json", FACTS)], "a red card"),
    "a text before a JSON": ([("k.txt", b"a dog"), ("k.json", FACTS)], "a dog"),
    "capital letters": ([("k.TXT", b"a dog")], "a dog"),
    "a JSON in capital letters": ([("k.JSON", FACTS)], "a red card"),
    "a byte-order mark": ([("k.txt", b"\xef\xbb\xbfa dog")], "a dog"),
    "a JSON with a byte-order mark": ([("k.json", b"\xef\xbb\xbf" + FACTS)], "a red card"),
    "UTF-16 of Windows": ([("k.txt", "a dog – über".encode("utf-16"))], "a dog – über"),
    "line ends around it": ([("k.txt", b"\r\na dog\r\n\n")], "a dog"),
    "line ends inside": ([("k.txt", b"two\r\nlines\n")], "two\r\nlines"),
    "blanks in the JSON": ([("k.json", json.dumps({"caption": "\ta dog \n"}).encode())], "a dog"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    members, caption = CAPTIONS[name]
    tar = make_tar(tmp_path / "a.tar", [("k.jpg", jpeg(1)), *members])
    assert in_place(tar) == ({"k": ([jpeg(1)], caption)}, {})
    (document,) = prepare(tmp_path / "out", "pairs", tar).documents
    assert flat(document) == [jpeg(1), caption]
    folder = tmp_path / "folder"
    folder.mkdir()
    for member, body in [("k.JPG", jpeg(1)), *members]:
        (folder / member).write_bytes(body)
    (document,) = prepare(tmp_path / "out2", "pairs", folder).documents
    assert flat(document) == [jpeg(1), caption]


SILENT: dict[str, list[tuple[str, bytes]]] = {
    "no text": [],
    "an empty text": [("k.txt", b"")],
    "a text of blanks": [("k.txt", b"\xef\xbb\xbf \r\n\t")],
    "a JSON without a caption": [("k.json", b'{"url": "u"}')],
    "a caption of null": [("k.json", b'{"caption": null}')],
    "an empty caption": [("k.json", b'{"caption": " "}')],
    "nothing that is seen": [("k.txt", "\ufeff\u200b \u200e\0\n".encode()), ("k.json", b'{"caption": "\\u200b"}')],
    "a caption that is a list": [("k.json", b'{"caption": ["a", "b"]}')],
    "a caption that is a number": [("k.json", b'{"caption": 3}')],
    "half a character": [("k.json", b'{"caption": "\\ud83d"}')],
    "bytes of Latin-1": [("k.txt", b"caf\xe9")],
    "a JSON that is a list": [("k.json", b"[]")],
    "a JSON nested too deep": [("k.json", b"[" * 100_000)],
}


@pytest.mark.parametrize("name", SILENT)
def test_a_pair_without_a_caption_is_a_counted_fault(tmp_path: Path, name: str) -> None:
    tar = make_tar(tmp_path / "a.tar", [("good.jpg", jpeg(0)), ("good.txt", b"x"), ("k.jpg", jpeg(1)), *SILENT[name]])
    shown, bad = in_place(tar)
    assert list(shown) == ["good"]
    assert list(bad) == ["k"]
    assert prepare(tmp_path / "out", "pairs", tar).meta["documents"]["dropped"].keys() != set()
    assert len([fault for fault in verify(tar) if "'k'" in fault]) == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    for member, body in [("good.jpg", jpeg(0)), ("good.txt", b"x"), ("k.jpg", jpeg(1)), *SILENT[name]]:
        (folder / member).write_bytes(body)
    assert sum(prepare(tmp_path / "out2", "pairs", folder).dropped.values()) == 1


def test_the_loader_counts_pairs_without_a_caption(tmp_path: Path) -> None:
    members = [
        (f"{k:03d}.{suffix}", body)
        for k in range(8)
        for suffix, body in (("jpg", jpeg(k)), ("json", FACTS if k % 2 else b"{}"))
    ]
    make_tar(tmp_path / "a.tar", members)
    spec = DatasetSpec(name="d", shards=[str(tmp_path)], batch_size=4, kind="pairs", lanes=1)
    loader = iter(MixLoader([spec], FlamingoCollate(byte_processor()), num_workers=0, prefetch_factor=0))
    batches = [next(loader).batches["d"][0] for _ in range(2)]
    assert {key for batch in batches for key in batch.keys} == {"001", "003", "005", "007"}
    assert {bad.reason for batch in batches for bad in batch.bad} == {"no caption"}
    assert "caption" not in batches[0].bad[0].detail  # the JSON's own keys: there are none


def test_several_images_of_a_pair_are_all_kept(tmp_path: Path) -> None:
    numbered = [("p.2.jpg", jpeg(2)), ("p.10.jpg", jpeg(3)), ("p.1.png", jpeg(1)), ("p.txt", b"three")]
    same = [("q.jpg", jpeg(4)), ("q.png", jpeg(5)), ("q.txt", b"two")]
    large = [("r.20240502.jpg", jpeg(7)), ("r.20240501.jpg", jpeg(6)), ("r.txt", b"dates")]
    tar = make_tar(tmp_path / "a.tar", [*numbered, *same, *large])
    expected = [[jpeg(1), jpeg(2), jpeg(3), "three"], [jpeg(4), jpeg(5), "two"], [jpeg(6), jpeg(7), "dates"]]
    done = prepare(tmp_path / "out", "pairs", tar)
    assert [flat(document) for document in done.documents] == expected
    shown, bad = in_place(tar)
    assert [[*images, text] for images, text in shown.values()] == expected
    assert not bad


def test_names_of_images_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.JPG", "b.jfif", "c.jpe", "d.Jpeg", "e.svg", "f.jxl", "g.tga"):
        (folder / name).write_bytes(jpeg(1) if name < "e" else b"<svg/>")
        (folder / name).with_suffix(".txt").write_text("x")
    done = prepare(tmp_path / "out", "pairs", folder)
    assert len(done.documents) == 4
    assert sum(done.dropped.values()) == 3
    files = sorted(folder.iterdir())
    tar = make_tar(tmp_path / "a.tar", [(file.name, file.read_bytes()) for file in files])
    done = prepare(tmp_path / "out2", "pairs", tar)
    assert len(done.documents) == 4
    assert sum(done.dropped.values()) == 3
    assert len(list(verify(tar))) == 3


def test_a_file_without_a_suffix_is_counted(tmp_path: Path) -> None:
    members = [("k.jpg", jpeg(1)), ("k.txt", b"x"), ("README", b"y"), (".DS_Store", b""), ("._k.jpg", b"")]
    done = prepare(tmp_path / "out", "pairs", make_tar(tmp_path / "a.tar", members))
    assert len(done.documents) == 1
    assert done.dropped == {"file without a suffix": 1}


@settings(max_examples=60, deadline=None)
@given(
    text=st.none() | st.binary(max_size=12) | st.text(max_size=8).map(lambda t: t.encode("utf-8", "replace")),
    facts=st.none()
    | st.binary(max_size=12)
    | st.fixed_dictionaries({"caption": st.none() | st.text() | st.integers()}),
)
def test_prepare_and_training_in_place_never_disagree(text: bytes | None, facts: object) -> None:
    members = [("k.jpg", jpeg(1)), ("z.jpg", jpeg(2)), ("z.txt", b"z")]
    if text is not None:
        members.insert(1, ("k.txt", text))
    if facts is not None:
        members.insert(1, ("k.json", facts if isinstance(facts, bytes) else json.dumps(facts).encode()))
    with tempfile.TemporaryDirectory() as folder:
        tar = make_tar(Path(folder) / "a.tar", members)
        shown, bad = in_place(tar)
        done = prepare(Path(folder) / "out", "pairs", tar)
        assert [flat(document)[1] for document in done.documents] == [caption for _, caption in shown.values()]
        assert sum(done.dropped.values()) == len(bad)


def test_the_command_says_what_a_shard_lacks(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("k.jpg", jpeg(1)), ("k.txt", b"x"), ("l.jpg", jpeg(1)), ("m.txt", b"x")])
    status, out, _ = command("index", tar)
    assert status == 0
    assert "3 samples, 4 members; 1 without an image, 1 without text or JSON" in out
