"""docs/shards.md names everything that is in an index and in a catalogue, in its order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import xxhash

from data.__main__ import main
from data.shard_store import CATALOGUE
from data.shards.index import COLUMNS, KINDS, MAGIC, SUM, index_path
from tests.data.helpers import write_documents

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "shards.md").read_text()
INDEX, CATALOGUES = (DOCS.split(f"## The {name}\n")[1].split("\n## ")[0] for name in ("index", "catalogue"))


def names(table: str) -> list[str]:
    """What stands in the first column of a table of Markdown."""
    cells = [line.split("|")[1] for line in table.split("\n") if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_index_is_as_the_docs_say(tmp_path: Path) -> None:
    shard = write_documents(tmp_path, count=3) / "documents-000000.tar"
    raw = index_path(shard).read_bytes()
    assert raw[:8] == MAGIC == b"TARIDX01"
    end = 16 + int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16:end])
    assert end % 8 == 0
    assert end < 4096
    assert names(INDEX) == [*header, *COLUMNS]
    assert list(header["lengths"]) == list(COLUMNS)
    assert raw[end : end + SUM] == xxhash.xxh3_128_digest(raw[:end])
    assert header["columns"] == xxhash.xxh3_128_hexdigest(raw[end + SUM :])
    assert header["digest"] == xxhash.xxh3_128_hexdigest(shard.read_bytes())
    assert len(raw) == end + SUM + sum(COLUMNS[name].itemsize * number for name, number in header["lengths"].items())
    assert set(header["usable"]) == set(KINDS)
    assert all(f'"{kind}": n' in INDEX for kind in KINDS)


def test_the_catalogue_is_as_the_docs_say(tmp_path: Path) -> None:
    folder = write_documents(tmp_path)
    assert main(["index", str(folder)]) == 0
    text = (folder / CATALOGUE).read_text()
    body = json.loads(text)
    assert '{"v":4,"checksum":"...","shards":[[name, tar_size, digest, sampled, usable], ...]}' in CATALOGUES
    assert list(body) == ["v", "checksum", "shards"]
    assert body["checksum"] == xxhash.xxh3_128_hexdigest(text.partition('"shards":')[2].encode())
    first = body["shards"][0]
    raw = index_path(folder / first[0]).read_bytes()
    header = json.loads(raw[16 : 16 + int.from_bytes(raw[8:16], "little")])
    assert first[1:] == [header["tar_size"], header["digest"], header["sampled"], header["usable"]]
    assert [row[0] for row in body["shards"]] == sorted(row[0] for row in body["shards"])
    assert f"`{CATALOGUE}`" in DOCS
