"""Bits that flip, indexes that lie and catalogues that are stale: found, mended, or refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data.__main__ import main
from data.dataset import DatasetSpec, open_store
from data.shard_store import CATALOGUE, read_catalogue
from data.shards.document import Document, Text
from data.shards.index import COLUMNS, MAGIC, SUM, build_index, index_path, load_index, read_head
from data.shards.writer import MANIFEST, ShardWriter, read_manifest
from data.tools.verify import verify
from flamingo.errors import UserError
from tests.data.helpers import write_documents


def spec(folder: Path) -> DatasetSpec:
    return DatasetSpec(name="d", shards=[str(folder)], batch_size=4)


def content(folder: Path) -> list[Any]:
    """What a run reads of a folder, from its start on."""
    store = open_store(spec(folder))
    samples = [store.read(part, row) for part, length in enumerate(store.lengths()) for row in range(length)]
    found = [(s.key, s.nodes, [s.image(number) for number in s.numbers]) for s in samples]
    store.reader.close()
    return found


def test_a_bit_that_flips_anywhere_in_an_index_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_documents(tmp_path, count=3)
    path = index_path(folder / "documents-000000.tar")
    raw, expected = path.read_bytes(), content(folder)
    rng = np.random.default_rng(0)
    remade = 0
    for at in [*range(0, 16), *rng.choice(len(raw), 150, replace=False).tolist()]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert content(folder) == expected
        assert path.read_bytes() == raw
        remade += "is damaged" in capsys.readouterr().err
    assert remade == 166


def rewritten(raw: bytes, change: Callable[[dict[str, Any]], None], rows: bytes | None = None) -> bytes:
    """An index with another header, whose checksums are right."""
    end = 16 + int.from_bytes(raw[8:16], "little")
    header, rows = json.loads(raw[16:end]), raw[end + SUM :] if rows is None else rows
    header["columns"] = xxhash.xxh3_128_hexdigest(rows)
    change(header)
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    head = MAGIC + len(body).to_bytes(8, "little") + body
    return head + xxhash.xxh3_128_digest(head) + rows


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "more samples than there are": lambda header: header["usable"].update(interleaved=10**12),
    "fewer than none": lambda header: header["usable"].update(text=-5),
    "no number": lambda header: header["usable"].update(pairs=float("nan")),
    "no limit": lambda header: header["usable"].update(pairs=float("inf")),
    "a true number": lambda header: header["usable"].update(pairs=True),
    "columns longer than the file": lambda header: header["lengths"].update(keys=1 << 50),
    "columns of less than nothing": lambda header: header["lengths"].update(first=-1),
    "columns of parts": lambda header: header["lengths"].update(first=4.0),
    "columns of different samples": lambda header: header["lengths"].update(
        first=5, keys=header["lengths"]["keys"] - 8
    ),
    "another size": lambda header: header.update(tar_size="big"),
    "another version": lambda header: header.update(v=4.0),
    "nothing": lambda header: header.clear(),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_damage(tmp_path: Path, lie: str) -> None:
    folder = write_documents(tmp_path, count=3)
    shard = folder / "documents-000000.tar"
    expected = content(folder)
    index_path(shard).write_bytes(rewritten(index_path(shard).read_bytes(), LIES[lie]))
    for read in (read_head, load_index):
        with pytest.raises(UserError, match=r"index .*\.tar\.idx is damaged .*python -m data index"):
            read(shard)
    assert content(folder) == expected


@pytest.mark.parametrize("column", ["first", "offset", "size", "key_end"])
@pytest.mark.parametrize("value", [-7, 1 << 62, 1])
def test_columns_that_lie_are_damage(tmp_path: Path, column: str, value: int) -> None:
    folder = write_documents(tmp_path, count=3)
    shard = folder / "documents-000000.tar"
    expected, good = content(folder), build_index(shard)
    columns = {name: getattr(good, name).copy() for name in COLUMNS}
    columns[column][-1] = good.tar_size if value == 1 and column in ("offset", "size") else value
    rows = b"".join(values.tobytes() for values in columns.values())
    index_path(shard).write_bytes(rewritten(index_path(shard).read_bytes(), lambda header: None, rows))
    with pytest.raises(UserError, match="is damaged"):
        load_index(shard)
    assert content(folder) == expected


def test_headers_of_every_kind_end_in_a_sentence(tmp_path: Path) -> None:
    shard = write_documents(tmp_path, count=3) / "documents-000000.tar"
    raw = index_path(shard).read_bytes()
    deep = b"[" * 3000
    for body in (
        b"",
        b"x",
        MAGIC,
        raw[:8] + (1 << 63).to_bytes(8, "little") + raw[16:],
        MAGIC + len(deep).to_bytes(8, "little") + deep + raw,
        MAGIC + (3).to_bytes(8, "little") + b"[1]" + raw,
        b"<!doctype html><html>please log in</html>" * 200,
    ):
        index_path(shard).write_bytes(body)
        for read in (read_head, load_index):
            with pytest.raises(UserError, match="is damaged"):
                read(shard)


def test_a_version_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=3)
    shard = folder / "documents-000000.tar"
    raw = index_path(shard).read_bytes()
    index_path(shard).write_bytes(rewritten(raw, lambda header: header.update(v=5)))
    with pytest.raises(UserError, match="has version 5, this program reads version 4; build it again"):
        content(folder)
    index_path(shard).write_bytes(raw)
    body = json.loads((folder / MANIFEST).read_text())
    for version in (3, True, 2.0, "2"):
        (folder / MANIFEST).write_text(json.dumps(body | {"v": version}))
        with pytest.raises(UserError, match=f"has version {version}, this program reads version 2"):
            content(folder)
    wrong: list[Any] = [[], {"d": []}, {"d": {"shards": [{"name": "../o/x.tar"}]}}, {"d": {"shards": [{"name": 5}]}}]
    for parts in wrong:
        (folder / MANIFEST).write_text(json.dumps({"v": 2, "parts": parts}))
        with pytest.raises(UserError, match=r"is not a manifest of this format|which is not a file beside it"):
            read_manifest(folder)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_the_whole_shard_has_a_digest_and_moving_it_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    with ShardWriter(folder, "s") as writer:
        for number in range(40):
            writer.write(Document("", [Text(f"{number} " * 20_000)], []))
    shard, moved = folder / "s-000000.tar", tmp_path / "there"
    identity = open_store(spec(folder)).fingerprint()
    shutil.copytree(folder, moved)
    assert open_store(spec(moved)).fingerprint() == identity
    for path in moved.glob("*.idx"):
        path.unlink()
    assert open_store(spec(moved)).fingerprint() == identity
    assert list(verify(folder)) == []
    flip(shard, shard.stat().st_size * 3 // 10 + 5000)  # between the pieces that a start looks at
    assert len(content(folder)) == 40
    assert [fault for fault in verify(shard) if "changed after its index was built" in fault]
    assert main(["index", str(shard)]) == 0
    assert open_store(spec(folder)).fingerprint() != identity


def refill(folder: Path, words: str) -> Path:
    """Replace what the shard holds, as a copy over it does: the folder itself does not change."""
    aside = folder.parent / "aside"
    with ShardWriter(aside, "s") as writer:
        for number in range(20):
            writer.write(Document("", [Text(f"{words} {number:03d}")], []))
    shutil.copyfile(aside / "s-000000.tar", folder / "s-000000.tar")
    return folder / "s-000000.tar"


@pytest.mark.parametrize("words", ["other", "something longer, " * 400])
@pytest.mark.parametrize("ahead", [0.0, 86_400.0])
def test_what_a_stale_catalogue_advises_helps(tmp_path: Path, words: str, ahead: float) -> None:
    folder = tmp_path / "d"
    with ShardWriter(folder, "s") as writer:
        for number in range(20):
            writer.write(Document("", [Text(f"words {number:03d}")], []))
    (folder / MANIFEST).unlink()
    assert main(["index", str(folder)]) == 0
    shard = refill(folder, words)
    os.utime(folder / CATALOGUE, (time.time() + ahead,) * 2)
    with pytest.raises(UserError) as caught:
        content(folder)
    assert list(verify(folder))
    command = str(caught.value).split("python -m data ")[1]
    assert main(command.split()) == 0
    assert content(folder)[0][1] == [Text(f"{words} 000")]
    assert list(verify(folder)) == []
    assert command in (f"index {shard}", f"index {folder}")


def test_a_catalogue_is_checked_and_its_counts_are_bounded(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=8)
    assert main(["index", str(folder)]) == 0
    path = folder / CATALOGUE
    text = path.read_text()

    def written(shards: Any) -> None:
        listed = json.dumps(shards, separators=(",", ":")) + "}"
        path.write_text(f'{{"v":4,"checksum":"{xxhash.xxh3_128_hexdigest(listed.encode())}","shards":{listed}')
        os.utime(path)

    rows = json.loads(text)["shards"]
    written(rows)
    assert path.read_text() == text
    for shards in (
        5,
        [5],
        [row[:4] for row in rows],
        [[*row[:4], {"interleaved": 10**12, "pairs": 4, "text": 4}] for row in rows],
        [[*row[:4], {"interleaved": -1, "pairs": 4, "text": 4}] for row in rows],
        [[*row[:4], {"interleaved": 4.0, "pairs": 4, "text": 4}] for row in rows],
        [[*row[:4], {"interleaved": 10**30, "pairs": 4, "text": 4}] for row in rows],
        [[row[0], "1", *row[2:]] for row in rows],
        [[*row[:4], {"pairs": 4}] for row in rows],
    ):
        written(shards)
        with pytest.raises(UserError, match=r"_catalogue\.json is damaged .*; write it again: python -m data index"):
            read_catalogue(folder)
    head = read_head(folder / "documents-000001.tar")
    written([[*row[:2], head.digest, *row[3:]] for row in rows])
    assert [fault for fault in verify(folder) if "and the index of documents-000000.tar differ; write both" in fault]
    path.write_text(text.replace('"text":4', '"text":5', 1))
    os.utime(path)
    with pytest.raises(UserError, match=r"is damaged \(wrong checksum\)"):
        read_catalogue(folder)


def test_an_indexed_shard_of_a_stale_catalogue_does_not_revive_it(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=8)
    (folder / MANIFEST).unlink()
    assert main(["index", str(folder)]) == 0
    time.sleep(0.05)  # the clock of the file system is coarse
    shutil.copyfile(folder / "documents-000000.tar", folder / "more.tar")
    assert read_catalogue(folder) == {}
    assert main(["index", str(folder / "documents-000001.tar")]) == 0
    assert not (folder / CATALOGUE).exists()
    assert len(content(folder)) == 12
