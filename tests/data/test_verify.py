"""`verify` finds every planted fault, once, and takes what is only unusual for what it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shards.index import build_index, index_path
from data.shards.writer import MANIFEST, read_manifest
from data.tools.verify import verify
from tests.data.helpers import numbered_document, write_documents
from tests.data.sources import add_link, command, jpeg
from tests.data.test_index import make_tar
from tests.fixtures import encoded, png, random_image

DOCUMENT = json.dumps({"v": 1, "nodes": [{"i": 0}, {"t": "x"}]}).encode()


def one(tmp_path: Path, *members: tuple[str, bytes]) -> Path:
    return make_tar(tmp_path / "a.tar", list(members))


def with_image(image: bytes, name: str = "k.000.jpg") -> Callable[[Path], Path]:
    return lambda tmp_path: one(tmp_path, ("k.json", DOCUMENT), (name, image))


def with_json(body: object) -> Callable[[Path], Path]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda tmp_path: one(tmp_path, ("k.json", raw), ("k.000.jpg", jpeg(0)))


def truncated(tmp_path: Path) -> Path:
    path = one(tmp_path, ("k.json", DOCUMENT), ("k.000.jpg", jpeg(0)))
    path.write_bytes(path.read_bytes()[:1400])
    return path


def wrong_size(tmp_path: Path) -> Path:
    """A member that says it is 700 bytes longer than it is, its header's sum corrected."""
    path = one(tmp_path, ("k.json", DOCUMENT), ("k.000.jpg", jpeg(0)))
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    raw[124:136] = b"%011o\0" % (member.size + 700)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    return path


def empty(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(b"")
    return tmp_path / "a.tar"


def pointer(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
    return path


def linked(tmp_path: Path) -> Path:
    path = one(tmp_path, ("k.json", DOCUMENT), ("k.000.jpg", jpeg(0)))
    add_link(path, "l.jpg", "../../../etc/passwd")
    return path


def stale(tmp_path: Path) -> Path:
    path = one(tmp_path, ("k.json", DOCUMENT), ("k.000.jpg", jpeg(0)))
    build_index(path).save(index_path(path))
    return one(tmp_path, ("k.json", DOCUMENT), ("k.000.jpg", jpeg(1)))


def missing_shard(tmp_path: Path) -> Path:
    (write_documents(tmp_path, count=8) / "documents-000001.tar").unlink()
    return tmp_path


def changed_shard(tmp_path: Path) -> Path:
    path = write_documents(tmp_path, count=4) / "documents-000000.tar"
    make_tar(path, [("k.json", DOCUMENT), ("k.000.jpg", jpeg(0))])
    build_index(path).save(index_path(path))
    return tmp_path


def unknown_shard(tmp_path: Path) -> Path:
    write_documents(tmp_path, count=4)
    make_tar(tmp_path / "more.tar", [("k.json", DOCUMENT), ("k.000.jpg", jpeg(0))])
    return tmp_path


def no_manifest(tmp_path: Path) -> Path:
    (write_documents(tmp_path, count=1) / MANIFEST).write_text('{"parts": []}')
    return tmp_path


def part_only(tmp_path: Path) -> Path:
    make_tar(tmp_path / "in.tar", [("k.jpg", jpeg(0)), ("k.txt", b"x")])
    out = tmp_path / "out"
    assert command("prepare", "pairs", "--out", out, tmp_path / "in.tar", "--part", "1/2")[0] == 0
    assert read_manifest(out)["parts"] == {}
    return out


def unfinished(tmp_path: Path) -> Path:
    write_documents(tmp_path, count=1)
    (tmp_path / ".prepare" / "all").mkdir(parents=True)
    return tmp_path


def bomb() -> bytes:
    return encoded(Image.new("1", (9_000, 9_000)), "PNG")


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated tar": (truncated, "a.tar is truncated"),
    "member of the wrong size": (wrong_size, "not a tar, or is damaged: no header at byte"),
    "empty shard": (empty, "a.tar is empty (0 bytes)"),
    "shard without samples": (one, "a.tar has no sample"),
    "missing shard": (missing_shard, "documents-000001.tar is in the folder's manifest but missing"),
    "changed shard": (changed_shard, "differs from the folder's manifest (another sha256)"),
    "unknown shard": (unknown_shard, "more.tar is not in the folder's manifest"),
    "no manifest": (no_manifest, "is not a manifest of this format"),
    "Git-LFS pointer": (pointer, "a.tar is a Git-LFS pointer"),
    "stale index": (stale, "changed after its index was built"),
    "duplicate keys": (lambda p: one(p, ("k.txt", b"x"), ("l.txt", b"x"), ("k.jpg", b"")), "key 'k' appears twice"),
    "duplicate members": (lambda p: one(p, ("k.txt", b"x"), ("k.TXT", b"x")), "appears twice in row 0"),
    "symbolic link": (linked, "has a link, 'l.jpg' to '../../../etc/passwd'"),
    "name that leads out": (
        lambda p: one(p, ("../../x.txt", b"x")),
        "a member whose name leads out of its folder, '../../x.txt'",
    ),
    "absolute name": (lambda p: one(p, ("/etc/x.txt", b"x")), "leads out of its folder, '/etc/x.txt'"),
    "HTML saved as an image": (with_image(b"<!doctype html>"), "image 0 is not an image: begins with b'<!doc"),
    "LFS pointer as an image": (with_image(b"version https://git-lfs"), "image 0 is not an image"),
    "truncated JPEG": (with_image(jpeg(0, (64, 64))[:-300]), "image 0 is undecodable"),
    "decompression bomb": (with_image(bomb(), "k.000.png"), "image 0 is too large: 9000 x 9000 pixels"),
    "missing image": (lambda p: one(p, ("k.json", DOCUMENT)), "name image 0 but it has 0 images"),
    "broken JSON": (with_json(b"{"), "bad text or JSON: JSON cannot be read"),
    "JSON of the wrong type": (with_json([1]), "JSON is not an object"),
    "node of the wrong type": (with_json({"v": 1, "nodes": [{"t": 5}]}), "node 0 is neither"),
    "unknown version": (with_json({"v": 9, "nodes": []}), "format version 9"),
    "no text": (with_json({"v": 1, "nodes": [{"i": 0}]}), "row 0 (key 'k'): has no text"),
    "empty document": (with_json({"v": 1, "nodes": []}), "has no text and no images"),
    "text that is not UTF-8": (lambda p: one(p, ("k.jpg", jpeg(0)), ("k.txt", b"\xff")), "caption is not UTF-8"),
    "parts not joined": (part_only, "holds parts that are not joined; join them: python -m data merge"),
    "unfinished preparation": (unfinished, "holds an unfinished preparation"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_once(tmp_path: Path, name: str) -> None:
    plant, sentence = FAULTS[name]
    faults = list(verify(plant(tmp_path)))
    found = [fault for fault in faults if sentence in fault]
    assert len(found) == 1, faults
    rest = [fault for fault in faults if sentence not in fault]
    assert all("manifest" in fault for fault in rest), rest
    assert len(found[0]) < 300


def animated() -> bytes:
    file = io.BytesIO()
    frames = [random_image("P", (9, 9), seed) for seed in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(random_image("RGB", (20, 10)), "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    values = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    return encoded(Image.fromarray(values), "PNG")


USUAL = {
    "CMYK": (encoded(random_image("CMYK", (9, 9)), "JPEG"), "jpg"),
    "16-bit": (sixteen_bit(), "png"),
    "animated": (animated(), "gif"),
    "alpha": (encoded(random_image("RGBA", (9, 9)), "PNG"), "png"),
    "EXIF-rotated": (turned(), "jpg"),
    "another extension than the bytes'": (png(1), "jpg"),
}


@pytest.mark.parametrize("name", USUAL)
def test_unusual_images_are_no_fault(tmp_path: Path, name: str) -> None:
    image, suffix = USUAL[name]
    assert list(verify(with_image(image, f"k.000.{suffix}")(tmp_path))) == []


def test_unusual_documents_are_no_fault(tmp_path: Path) -> None:
    many = numbered_document(0, 500, "many")
    words = {"v": 1, "nodes": [{"t": "no image"}], "meta": {}}
    members = [(f"many.{number:03d}.png", image) for number, image in enumerate(many.images)]
    nodes = [{"i": number // 2} if number % 2 == 0 else {"t": "x"} for number in range(1000)]
    path = one(
        tmp_path,
        ("many.json", json.dumps({"v": 1, "nodes": nodes}).encode()),
        *members,
        ("w.json", json.dumps(words).encode()),
    )
    assert list(verify(path)) == []
