"""Shards: what is written is read back, by us and by webdataset, and nothing half-written looks whole."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image as PILImage

from data.shards.document import Document, Image, Node, Text
from data.shards.writer import MANIFEST, ShardWriter, read_document, read_documents, read_manifest
from flamingo.errors import UserError
from flamingo.vision.image_files import sniff
from tests.data.helpers import numbered_document, write_documents
from tests.data.test_index import make_tar
from tests.fixtures import encoded, png, random_image


def rich_document(key: str = "document-1") -> Document:
    nodes: list[Node] = [
        Text("Ünïcode <image> text\n"),
        Image((1,)),
        Text("what?", loss=False),
        Image((0, 2), fps=1.5),
        Image((1,)),
        Text(""),
    ]
    images = [png(1), encoded(random_image("RGB", (9, 7)), "JPEG"), encoded(random_image("RGB", (5, 5)), "WEBP")]
    return Document(key, nodes, images, {"source": "test", "n": 3})


def write_all(folder: Path, documents: list[Document], prefix: str = "s") -> None:
    with ShardWriter(folder, prefix) as writer:
        for document in documents:
            writer.write(document)


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    documents = [rich_document(), numbered_document(0, 3, "document-2"), Document("text-only", [Text("words")], [])]
    with ShardWriter(tmp_path, "s", 2) as writer:
        assert [writer.write(document) for document in documents] == ["document-1", "document-2", "text-only"]
    assert [*read_documents(tmp_path / "s-000000.tar"), *read_documents(tmp_path / "s-000001.tar")] == documents
    assert read_document(tmp_path / "s-000000.tar", 1) == documents[1]


def test_the_writer_makes_keys(tmp_path: Path) -> None:
    write_documents(tmp_path, "pre", count=5, per_shard=2)
    keys = [document.key for number in range(3) for document in read_documents(tmp_path / f"pre-00000{number}.tar")]
    assert keys[:3] == ["pre-000000-00000000", "pre-000000-00000001", "pre-000001-00000000"]


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_documents(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 11  # five tars, five indexes, the manifest
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "documents-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_manifest_counts_and_checksums(tmp_path: Path) -> None:
    write_documents(tmp_path, "one", count=5, per_shard=2, images=3)
    write_documents(tmp_path, "two", count=1)
    parts = read_manifest(tmp_path)["parts"]
    assert list(parts) == ["one", "two"]
    assert (parts["one"]["documents"], parts["one"]["images"]) == (5, 15)
    for entry in parts["one"]["shards"]:
        assert entry["sha256"] == hashlib.sha256((tmp_path / entry["name"]).read_bytes()).hexdigest()
    assert [entry["documents"] for entry in parts["one"]["shards"]] == [2, 2, 1]


def test_a_manifest_of_version_1_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path, count=1)
    body = json.loads((tmp_path / MANIFEST).read_text())
    assert body["v"] == 2
    (tmp_path / MANIFEST).write_text(json.dumps(body | {"v": 1}))
    old = r"manifest .*_dataset\.json has version 1, this program reads version 2; prepare the data again"
    with pytest.raises(UserError, match=old):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=old):
        ShardWriter(tmp_path, "new")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the collector
def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(rich_document())
    with ShardWriter(tmp_path, "p", layout="pairs") as writer:
        writer.write(Document("pair", [Image((0,)), Text("a cat")], [png(5)], {"url": "u"}))
    (document,) = webdataset.WebDataset(str(tmp_path / "s-000000.tar"), shardshuffle=False)
    assert document["__key__"] == "document-1"
    assert [document[name] for name in ("000.png", "001.jpg", "002.webp")] == rich_document().images
    assert json.loads(document["json"])["nodes"][1] == {"i": 1}
    (pair,) = webdataset.WebDataset(str(tmp_path / "p-000000.tar"), shardshuffle=False).decode("pil")
    assert (pair["txt"], pair["json"], pair["png"].size) == ("a cat", {"url": "u"}, (8, 8))


def test_pairs_of_img2dataset_are_documents(tmp_path: Path) -> None:
    jpeg = encoded(random_image("RGB", (20, 10)), "JPEG")
    facts = json.dumps({"caption": "a dog", "url": "u", "status": "success"}).encode()
    members = [("000000001.jpg", jpeg), ("000000001.txt", b"a dog"), ("000000001.json", facts)]
    members += [("000000000.txt", b"a cat\n"), ("000000000.jpg", png(3))]  # completion order; a png called jpg
    first, second = read_documents(make_tar(tmp_path / "00000.tar", members))
    assert first.nodes == [Image((0,)), Text("a dog")]
    assert first.images == [jpeg]
    assert first.meta["url"] == "u"
    assert (second.nodes, sniff(second.images[0])) == ([Image((0,)), Text("a cat")], "png")


def test_a_writer_that_fails_leaves_nothing_whole(tmp_path: Path) -> None:
    write_documents(tmp_path, "old", count=4)
    write_documents(tmp_path, "new", count=20, per_shard=4)
    with pytest.raises(UserError, match="key"):
        write_all(tmp_path, [numbered_document(0, 1), Document("bad.key", [], [])], "new")
    assert list(read_manifest(tmp_path)["parts"]) == ["old"]
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_writing_again_removes_shards_of_before(tmp_path: Path) -> None:
    write_documents(tmp_path, "s", count=20, per_shard=4)
    write_documents(tmp_path, "s", count=4, per_shard=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "s-000000.tar", "s-000000.tar.idx"]


def test_too_few_images_are_named_with_both_numbers(tmp_path: Path) -> None:
    body = json.dumps({"v": 1, "nodes": [{"i": 0}, {"t": "x"}, {"i": 2}]}).encode()
    good = json.dumps({"v": 1, "nodes": [{"t": "x"}]}).encode()
    members = [("a.json", good), ("bad.json", body), ("bad.000.png", png(0)), ("bad.001.png", png(0))]
    shard = make_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"x\.tar, row 1 \(key 'bad'\).*its nodes name image 2 but it has 2 images"):
        read_document(shard, 1)
    with (
        pytest.raises(UserError, match="name image 1 but it has 1 images"),
        ShardWriter(tmp_path, "s") as writer,
    ):
        writer.write(Document("", [Image((1,))], [png(0)]))


def test_a_hole_in_the_numbers_never_shifts_images(tmp_path: Path) -> None:
    body = json.dumps({"v": 1, "nodes": [{"i": 0}, {"i": 1}]}).encode()
    members = [("k.json", body), ("k.000.png", png(0)), ("k.002.png", png(2)), ("k.003.png", png(3))]
    with pytest.raises(UserError, match="its nodes name image 1 but it has 3 images"):
        read_document(make_tar(tmp_path / "x.tar", members), 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "JSON cannot be read"),
        (b"[]", "not an object"),
        (b'{"v":2,"nodes":[]}', "version 2"),
        (b'{"v":1,"nodes":{}}', "not a list"),
        (b'{"v":1,"nodes":[{"t":"x"},{"t":5}]}', "node 1 is neither"),
        (b'{"v":1,"nodes":[{"i":-1}]}', "node 0 is neither"),
        (b'{"v":1,"nodes":[{"c":[]}]}', "node 0 is neither"),
        (b'{"v":1,"nodes":["x"]}', "node 0 is not an object"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, body: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=rf"row 0 \(key 'k'\).*{reason}"):
        read_document(make_tar(tmp_path / "x.tar", [("k.json", body)]), 0)


@pytest.mark.parametrize("key", ["a.b", "a/b", "__a", "a b", "x" * 81, "a\n"])
def test_keys_that_webdataset_would_change_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="key"), ShardWriter(tmp_path, "s") as writer:
        writer.write(numbered_document(0, 1, key))


def test_other_mistakes_of_a_writer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already in s-000000"):
        write_all(tmp_path, [numbered_document(number, 1, "k") for number in range(2)])
    with pytest.raises(UserError, match="image 0 is not a PNG"), ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("", [Image((0,))], [b"<html>"]))
    with pytest.raises(UserError, match="not a pair"), ShardWriter(tmp_path, "s", layout="pairs") as writer:
        writer.write(numbered_document(0, 2))
    with pytest.raises(UserError, match="has 4 rows"):
        read_document(write_documents(tmp_path / "w", count=4) / "documents-000000.tar", 4)


def test_extension_is_what_the_bytes_are() -> None:
    image = PILImage.new("RGB", (3, 3))
    for form, kind in {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}.items():
        file = io.BytesIO()
        image.save(file, form)
        assert sniff(file.getvalue()) == kind
    assert sniff(b"<html></html>") is None
