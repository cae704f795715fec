"""What makes a corpus of 20,000 shards possible: nothing is read before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.shard_store import CATALOGUE, open_shards, read_catalogue
from data.shards.index import index_path, load_index, read_head
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, shards_of, write_documents

ROOT = Path(__file__).resolve().parents[2]
COLLATE = FlamingoCollate(byte_processor())


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def test_only_what_is_read_is_mapped(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=80, per_shard=2)
    spec = DatasetSpec(name="d", shards=[str(folder)], batch_size=4, lanes=4, block=2)
    loader = MixLoader([spec], COLLATE, prefetch_factor=0)
    indexes = shards_of(loader).indexes
    assert len(indexes) == 40
    assert len(indexes._known) == 0
    next(iter(loader))
    assert 1 <= len(indexes._known) <= 4


def test_the_least_used_index_is_let_go_and_mapped_again(tmp_path: Path) -> None:
    indexes = open_shards(paths(write_documents(tmp_path, count=24)), "interleaved").indexes
    indexes.mapped = 2
    keys = [indexes[shard].key(0) for shard in (0, 1, 2, 0, 5)]
    assert keys == [
        "documents-000000-00000000",
        "documents-000001-00000000",
        "documents-000002-00000000",
        keys[0],
        keys[4],
    ]
    assert list(indexes._known) == [0, 5]
    assert [index.key(0) for index in indexes[1:3]] == keys[1:3]


def test_a_head_is_the_index_without_its_columns(tmp_path: Path) -> None:
    shard = paths(write_documents(tmp_path, count=4))[0]
    assert read_head(shard) == load_index(shard).head()
    assert read_head(shard).usable == {"interleaved": 4, "pairs": 4, "text": 4}
    raw = index_path(shard).read_bytes()
    size = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16 : 16 + size])
    body = json.dumps(header | {"v": 1}).encode().ljust(size)
    index_path(shard).write_bytes(raw[:16] + body + raw[16 + size :])
    old = r"index .*tar\.idx has version 1, this program reads version 4; build it again: python -m data index .*\.tar"
    for read in (read_head, load_index):
        with pytest.raises(UserError, match=old):
            read(shard)
    index_path(shard).write_bytes(b"TARIDX01" + bytes(8) + b"x")
    with pytest.raises(UserError, match="is damaged"):
        read_head(shard)


def test_a_catalogue_stands_for_the_sidecars_until_the_folder_changes(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=8)
    done = run("index", folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder / CATALOGUE}: 2 shards" in done.stdout
    assert len(read_catalogue(folder)) == 2
    aside = folder.parent / f"{tmp_path.name}-aside"
    aside.mkdir()
    for path in folder.glob("*.idx"):
        path.rename(aside / path.name)  # the corpus opens without them
    os.utime(folder / CATALOGUE)
    assert open_shards(paths(folder), "interleaved").lengths() == [4, 4]
    for path in aside.glob("*.idx"):
        path.rename(folder / path.name)
    write_documents(folder, count=12)
    assert read_catalogue(folder) == {}
    assert open_shards(paths(folder), "interleaved").lengths() == [4, 4, 4]
    (folder / CATALOGUE).write_text('{"v": 1, "shards": []}')
    os.utime(folder / CATALOGUE)
    with pytest.raises(UserError, match=r"_catalogue\.json has version 1, this program reads version 4; .* data index"):
        read_catalogue(folder)
    (folder / CATALOGUE).write_text("{")
    os.utime(folder / CATALOGUE)
    with pytest.raises(UserError, match=r"_catalogue\.json is damaged .*python -m data index"):
        read_catalogue(folder)


def test_ranks_share_the_checking_of_the_shards(tmp_path: Path) -> None:
    folder = write_documents(tmp_path, count=16)
    assert run("index", folder).returncode == 0
    cut = folder / "documents-000002.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    names = paths(folder)
    assert len(open_shards(names, "interleaved", share=(1, 4)).shards) == 4
    with pytest.raises(UserError, match=r"documents-000002\.tar has 1000 bytes but its index was built for"):
        open_shards(names, "interleaved", share=(2, 4))


def test_simulate_prints_what_a_large_corpus_costs() -> None:
    done = run("simulate", "--documents", "1000000", "--shards", "500", "--ranks", "32", "--batch", "256")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plan"]["to the first batch at step 1,000,000, s"] < 1
    assert found["plan"]["numbers permuted for it at step 1,000,000"] < 500 + 3 * 16 * 4000
    assert found["node"]["of them fetched a second time, share"] == 0
    assert found["node"]["lanes that a node reads"] == 16
    mistake = run("simulate", "--ranks", "3")
    assert mistake.returncode == 2
    assert "--batch 4096 must be a multiple of --ranks 3" in mistake.stderr
