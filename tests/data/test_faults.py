"""Every fault that a corpus can have: what the loader does about it, and what the reader of its words learns."""

from __future__ import annotations

import io
import itertools
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.errors import BadSample, BadSampleCounter
from data.loading.loader import MixLoader
from data.shards.document import Document, Image, Node, Text
from data.shards.index import index_path
from data.shards.writer import ShardWriter
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, numbered_document, write_documents
from tests.data.test_index import make_tar
from tests.fixtures import encoded, png, random_image

COLLATE = FlamingoCollate(byte_processor())
DOCUMENT = b'{"v":1,"nodes":[{"i":0},{"t":"x"}]}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def one(*shards: Path, **options: Any) -> DatasetSpec:
    values: dict[str, Any] = {"name": "d", "shards": [str(shard) for shard in shards], "batch_size": 4}
    return DatasetSpec(**(values | options))


def bomb() -> bytes:
    """A PNG of 67 million pixels in a few hundred bytes."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", 8_200, 8_200, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(900_000)))


JPEG = encoded(random_image("RGB", (64, 64)), "JPEG")
# Name -> (members of the sample "bad", the reason it is counted under, words of its detail).
CONTENT: dict[str, tuple[list[tuple[str, bytes]], str, str]] = {
    "html as jpg": (
        [("bad.json", DOCUMENT), ("bad.000.jpg", b"<html>gone")],
        "not an image",
        "begins with b'<html>gone'",
    ),
    "cut jpeg": ([("bad.json", DOCUMENT), ("bad.000.jpg", JPEG[: len(JPEG) // 2])], "undecodable", "jpg of"),
    "empty image": ([("bad.json", DOCUMENT), ("bad.000.jpg", b"")], "not an image", "begins with b''"),
    "bomb": (
        [("bad.json", DOCUMENT), ("bad.000.png", bomb())],
        "too large",
        "8200 x 8200 pixels, the limit is 64000000",
    ),
    "lfs image": ([("bad.json", DOCUMENT), ("bad.000.jpg", LFS)], "not an image", "it is a Git-LFS pointer"),
    "lfs json": ([("bad.json", LFS), ("bad.000.png", png(1))], "bad text or JSON", "it is a Git-LFS pointer"),
    "broken json": ([("bad.json", DOCUMENT[:-3]), ("bad.000.png", png(1))], "bad text or JSON", "JSON cannot be read"),
    "json is a list": ([("bad.json", b"[1]")], "bad text or JSON", "JSON is not an object"),
    "json too deep": ([("bad.json", b"[" * 100_000)], "bad text or JSON", "recursion"),
    "nodes are text": ([("bad.json", b'{"v":1,"nodes":"x"}')], "bad text or JSON", "'nodes' is not a list"),
    "image is text": ([("bad.json", b'{"v":1,"nodes":[{"i":"0"}]}')], "bad text or JSON", "node 0 is neither"),
    "text is number": ([("bad.json", b'{"v":1,"nodes":[{"t":5}]}')], "bad text or JSON", "node 0 is neither"),
    "other version": ([("bad.json", b'{"v":9,"nodes":[]}')], "bad text or JSON", "format version 9"),
    "true as a version": ([("bad.json", b'{"v":true,"nodes":[]}')], "bad text or JSON", "format version True"),
    "text without end": (
        [("bad.json", b'{"v":1,"nodes":[{"t":"%s"},{"t":"%s"}]}' % (b"a " * 2_500_001, b"b " * 2_500_000))],
        "text too long",
        "10,000,002 characters; at most 10,000,000",
    ),
    "half a letter": ([("bad.json", b'{"v":1,"nodes":[{"t":"\\ud800"}]}')], "bad text or JSON", "not Unicode"),
    "latin-1 caption": ([("bad.png", png(1)), ("bad.txt", b"caf\xe9")], "bad text or JSON", "not UTF-8"),
    "no text, no image": ([("bad.json", b'{"v":1,"nodes":[]}')], "empty", "no text or images"),
    "mmc4 with wrong types": (
        [("bad.json", b'{"text_list":[1],"image_info":[]}')],
        "bad text or JSON",
        "'text_list' is not a list of sentences",
    ),
    "mmc4 without images": (
        [("bad.json", b'{"text_list":["a"],"image_info":[{"matched_sim":0.3}],"similarity_matrix":[[0.3]]}')],
        "no image left",
        "1 images, none of them found",
    ),
}


@pytest.mark.parametrize("fault", CONTENT)
def test_bad_content_is_replaced_counted_and_written_down(tmp_path: Path, fault: str) -> None:
    members, reason, detail = CONTENT[fault]
    good = [(f"good{n}.{name}", body) for n in range(5) for name, body in (("json", DOCUMENT), ("000.png", png(n)))]
    shard = make_tar(tmp_path / "x.tar", [*good[:6], *members, *good[6:]])
    log = tmp_path / "run" / "bad_samples.jsonl"
    runs = []
    for _ in range(2):
        loader = MixLoader([one(shard, batch_size=6)], COLLATE, max_bad_rate=0.9, bad_samples=log)
        runs.append([step.batches["d"][0] for step in itertools.islice(loader, 2)])
        assert loader.bad.by_reason() == {("d", reason): loader.bad.total}
        assert loader.bad.total >= 2  # once in each of two epochs
    assert [batch.keys for batch in runs[0]] == [batch.keys for batch in runs[1]]  # the same stand-in
    assert all(len(batch.keys) == 6 and "bad" not in batch.keys for batch in runs[0])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == loader.bad.total  # the second run began at step 0 again and wrote its own
    for line in lines:
        assert {k: line[k] for k in ("dataset", "reason", "shard", "key")} == {
            "dataset": "d",
            "reason": reason,
            "shard": str(shard),
            "key": "bad",
        }
        assert detail in line["detail"], line
    assert {line["step"] for line in lines} == {0, 1}


def test_the_list_of_bad_samples_goes_on_where_the_run_does(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", "s") as writer:
        for number in range(12):
            document = numbered_document(number, 1)
            document.images[0] = document.images[0][: 45 if number % 4 == 0 else None]
            writer.write(document)
    specs, log = [one(tmp_path / "s", batch_size=6)], tmp_path / "bad.jsonl"
    options: dict[str, Any] = {"max_bad_rate": 0.9, "bad_samples": log}
    for _ in itertools.islice(MixLoader(specs, COLLATE, **options), 6):
        pass
    whole = log.read_text()
    log.write_text(whole + '{"step": 5, "da')  # a kill in the middle of a line
    resumed = MixLoader(specs, COLLATE, start_step=3, **options)
    for _ in itertools.islice(resumed, 3):
        pass
    assert log.read_text() == whole
    rank = MixLoader(specs, COLLATE, rank=1, world_size=2, **options)
    for _ in itertools.islice(rank, 4):
        pass
    assert (tmp_path / "bad-rank-00001.jsonl").exists()
    assert log.read_text() == whole


EXIF = PILImage.Exif()
EXIF[0x0112] = 6  # turned
SHAPE = (20, 10)
IMAGES = {
    "cmyk": encoded(PILImage.new("CMYK", SHAPE), "JPEG"),
    "16 bit": encoded(PILImage.new("I;16", SHAPE), "PNG"),
    "animated": encoded(PILImage.new("P", SHAPE), "GIF", save_all=True, append_images=[PILImage.new("P", SHAPE, 9)]),
    "alpha": encoded(PILImage.new("RGBA", SHAPE), "PNG"),
    "exif": encoded(PILImage.new("RGB", SHAPE), "JPEG", exif=EXIF),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_unusual_images_are_ordinary_samples(tmp_path: Path, kind: str) -> None:
    shard = make_tar(tmp_path / "x.tar", [("k.json", DOCUMENT), ("k.000.jpg", IMAGES[kind])])
    loader = MixLoader([one(shard, batch_size=1)], COLLATE)
    assert next(iter(loader)).batches["d"][0].tensors["pixel_values"].shape == (1, 1, 3, 8, 8)
    assert loader.bad.total == 0


def test_documents_without_text_without_images_and_with_five_hundred(tmp_path: Path) -> None:
    many: list[Node] = [node for n in range(500) for node in (Image((n,)), Text(" a"))]
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("text", [Text("only words")], []))
        writer.write(Document("image", [Image((0,))], [png(1)]))
        writer.write(Document("many", many, [png(n % 256) for n in range(500)]))
    loader = MixLoader([one(tmp_path, batch_size=3)], COLLATE)
    batch = next(iter(loader)).batches["d"][0]
    counts = dict(zip(batch.keys, batch.tensors["image_counts"].tolist(), strict=True))
    assert counts == {"text": 0, "image": 1, "many": 5}
    assert loader.bad.total == 0


def raw_tar(path: Path, name: str, size: int, body: bytes) -> Path:
    """A tar whose header says another size than the member has."""
    info = tarfile.TarInfo(name)
    info.size = size
    padded = body + bytes(-len(body) % 512)
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + padded + bytes(1024))
    return path


STRUCTURE = {
    "empty file": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "no samples": (lambda path: make_tar(path, []), "has no sample of kind 'interleaved' in its 1 shards"),
    "member too large": (lambda path: raw_tar(path, "k.txt", 9999, b"abc"), "is truncated: byte 10511 is needed"),
    "member too small": (lambda path: raw_tar(path, "k.txt", 3, bytes(range(1, 250)) * 4), "no header at byte 1024"),
    "duplicate keys": (
        lambda path: make_tar(path, [("k.txt", b"a"), ("l.txt", b"b"), ("k.txt", b"c")]),
        "key 'k' appears twice (rows 0 and 2)",
    ),
    "lfs pointer": (lambda path: path.write_bytes(LFS * 20), "is not a tar but a Git-LFS pointer"),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_broken_shards_stop_the_run_before_it_begins(tmp_path: Path, fault: str) -> None:
    make, words = STRUCTURE[fault]
    make(tmp_path / "x.tar")
    with pytest.raises(UserError) as caught:
        MixLoader([one(tmp_path / "x.tar")], COLLATE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fault == "no samples" or "x.tar" in str(caught.value)


def test_members_that_lead_out_of_the_folder_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not to be read")
    (tmp_path / "in").mkdir()
    shard = tmp_path / "in" / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name, kind, target in (
            ("link.txt", tarfile.SYMTYPE, str(secret)),
            ("hard.txt", tarfile.LNKTYPE, "../secret.txt"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("../../x.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"words"))
    before = sorted(path for path in tmp_path.rglob("*"))
    loader = MixLoader([one(shard, batch_size=2)], COLLATE)
    batch = next(iter(loader)).batches["d"][0]
    assert batch.keys == ["../../x", "../../x"]  # a key, and nothing but a key
    assert byte_processor().tokenizer.decode(batch.tensors["input_ids"][0][:5]) == "words"
    assert sorted(path for path in tmp_path.rglob("*")) == sorted([*before, index_path(shard)])


def test_a_shard_that_changed_behind_its_index(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=4)
    shard = folder / "documents-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[600] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"documents-000000\.tar changed after its index was built"):
        next(iter(MixLoader([one(folder)], COLLATE)))


def test_a_clean_past_does_not_hide_a_bad_present() -> None:
    counter = BadSampleCounter(max_rate=0.02, grace=8, window=1000)
    sample = BadSample("d", "undecodable", "s", "k", "")
    for _ in range(5000):
        counter.add(100, [])
    counter.add(100, [sample] * 28)
    with pytest.raises(UserError, match=r"29 of 1000 samples were bad \(limit 2% and 8\), the last one key 'k' of s"):
        counter.add(100, [sample])
    assert counter.by_reason() == {("d", "undecodable"): 29}
