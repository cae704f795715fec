"""Shards behind URLs: the same batches as from the disk, broken connections, and a cache that keeps its limit."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.remote.download import Trust, download, expand, is_remote
from data.remote.shard_cache import ShardCache
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, same, shards_of, write_documents
from tests.data.server import Behaviour, serving

COLLATE = FlamingoCollate(byte_processor())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("shards"), count=96, per_shard=8)


def spec_of(*urls: str, **options: Any) -> DatasetSpec:
    values: dict[str, Any] = {"name": "d", "shards": [*urls], "batch_size": 8, "lanes": 4, "block": 2}
    return DatasetSpec(**(values | options))


def batches(spec: DatasetSpec, steps: int = 6, **options: Any) -> list[Any]:
    loader = MixLoader([spec], COLLATE, **options)
    if (cache := shards_of(loader).cache) is not None:
        cache.first_wait, cache.attempts = 0.01, 5
    return [step.batches["d"][0] for step in itertools.islice(loader, steps)]


def equal(mine: list[Any], other: list[Any]) -> bool:
    pairs = zip(mine, other, strict=True)
    return all(a.keys == b.keys and same(a.tensors, b.tensors) for a, b in pairs)


NAMES = "documents-0000{00..11}.tar"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_http_gives_the_batches_of_the_disk(shards: Path, tmp_path: Path, workers: int) -> None:
    with serving(shards) as server:
        spec = spec_of(f"{server.url}/{NAMES}", cache=str(tmp_path / "cache"))
        found = batches(spec, 13, num_workers=workers)
        assert equal(found, batches(spec_of(str(shards)), 13))
        assert all(number == 1 for path, number in server.requests.items()), server.requests  # nothing fetched twice
        assert len([path for path in server.requests if path.endswith(".tar")]) == 12
        before = server.requests.total()
        assert equal(batches(spec, 3), found[:3])
        assert server.requests.total() == before  # all of it is still here


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(drop_after=3000, faults=2),
        Behaviour(drop_after=3000, faults=2, ranges=False),
        Behaviour(status=503, faults=3),
        Behaviour(seconds=0.05),
    ],
    ids=["drops", "drops and cannot resume", "503", "slow"],
)
def test_http_that_breaks_off_or_is_slow(shards: Path, tmp_path: Path, behaviour: Behaviour) -> None:
    with serving(shards, behaviour) as server:
        spec = spec_of(f"{server.url}/{NAMES}", cache=str(tmp_path))
        assert equal(batches(spec, 4), batches(spec_of(str(shards)), 4))
        if behaviour.drop_after and behaviour.ranges:
            whole = {f"/{path.name}": path.stat().st_size for path in shards.glob("*.tar")}
            gone_on = {path: size for path, size in whole.items() if server.requests[path] > 2}
            assert gone_on
            assert {path: server.sent[path] for path in gone_on} == gone_on  # no byte was asked for twice


def test_a_server_that_gives_nothing_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with serving(shards, Behaviour(status=503, faults=100)) as server:
        spec = spec_of(f"{server.url}/{NAMES}", cache=str(tmp_path))
        with pytest.raises(UserError, match=r"shard http.*\.tar could not be fetched: 5 attempts in a row .* 503"):
            batches(spec, 1)
    with serving(shards) as server:
        url = f"{server.url}/documents-000099.tar"
        with pytest.raises(UserError, match=r"documents-000099\.tar cannot be fetched: the server answers 404"):
            batches(spec_of(url, cache=str(tmp_path)), 1)
        assert server.requests["/documents-000099.tar"] == 1  # not five times
        with pytest.raises(UserError, match="is remote; set the dataset's cache to a folder"):
            batches(spec_of(url), 1)


def test_a_shard_that_was_replaced_on_the_server(shards: Path, tmp_path: Path) -> None:
    there = write_documents(tmp_path / "there", count=4)
    raw = bytearray((there / "documents-000000.tar").read_bytes())
    raw[700] ^= 1
    (there / "documents-000000.tar").write_bytes(raw)
    with (
        serving(there) as server,
        pytest.raises(UserError, match=r"changed after its index was built.*the next start will fetch its index again"),
    ):
        batches(spec_of(f"{server.url}/documents-000000.tar", cache=str(tmp_path / "c")), 1)


def test_commands_and_other_file_systems(shards: Path, tmp_path: Path) -> None:
    expected = batches(spec_of(str(shards)))
    pipe = spec_of(f"pipe:cat {shards}/{NAMES}", cache=str(tmp_path / "pipe"), allow_pipe=True)
    assert equal(batches(pipe), expected)  # no index beside it: made from the shard
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/there/{path.name}", path.read_bytes())
    assert equal(batches(spec_of(f"memory://there/{NAMES}", cache=str(tmp_path / "memory"))), expected)
    trusting = ShardCache(tmp_path / "x", 10**9, first_wait=0.001, attempts=5, trust=Trust(allow_pipe=True))
    with pytest.raises(UserError, match=r"pipe:exit 3 could not be fetched: 5 attempts in a row"):
        trusting.local("pipe:exit 3")
    with pytest.raises(UserError, match=r"needs a package that is not installed .*'flamingo-vlm\[s3\]'"):
        ShardCache(tmp_path / "x", 10**9, first_wait=0.001).local("abfs://bucket/x.tar")


def test_the_cache_keeps_its_limit_and_drops_what_was_not_used(shards: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    with serving(shards) as server:
        urls = [f"{server.url}/documents-{n:06d}.tar" for n in range(6)]
        cache = ShardCache(tmp_path, 3 * size)
        for url in (*urls[:3], urls[0], urls[3], urls[0], urls[4]):
            cache.local(url)
            assert cache.used() <= 3 * size
            time.sleep(0.01)  # the clock of the file system is coarse
        assert [cache.has(url) for url in urls] == [True, False, False, True, True, False]
        assert [server.requests[f"/documents-{n:06d}.tar"] for n in range(5)] == [1] * 5
        with pytest.raises(UserError, match=r"may hold 100 bytes but a shard has \d+; raise cache_gb"):
            ShardCache(tmp_path / "small", 100).local(urls[0])


def test_a_limited_cache_serves_whole_epochs_and_reads_ahead(shards: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in shards.glob("*.tar"))
    with serving(shards) as server:
        options: dict[str, Any] = {"lanes": 1, "block": 1, "cache": str(tmp_path)}
        spec = spec_of(f"{server.url}/{NAMES}", cache_gb=total * 0.4e-9, **options)
        found = batches(spec, 24)
        assert equal(found, batches(spec_of(str(shards), lanes=1, block=1), 24))
        assert ShardCache(tmp_path, 0).used() <= total * 0.4
        tars = {path: number for path, number in server.requests.items() if path.endswith(".tar")}
        assert len(tars) == 12
        assert sum(tars.values()) <= 2 * 12 + 2  # once an epoch, and what was ahead at the end
        with pytest.raises(UserError, match=r"draws from \d+ bytes of shards at a time and the cache"):
            batches(spec_of(f"{server.url}/{NAMES}", cache_gb=total * 0.4e-9, cache=str(tmp_path), block=12), 1)


def fetch(folder: str, url: str) -> None:
    ShardCache(folder, 10**9).local(url)


@pytest.mark.slow
def test_processes_do_not_fetch_the_same_shard_twice(shards: Path, tmp_path: Path) -> None:
    with serving(shards, Behaviour(seconds=0.1)) as server:
        url = f"{server.url}/documents-000000.tar"
        processes = [
            multiprocessing.get_context("forkserver").Process(target=fetch, args=(str(tmp_path), url)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 3
        assert dict(server.requests) == {"/documents-000000.tar.idx": 1, "/documents-000000.tar": 1}


@pytest.mark.parametrize("missing", [26_720, 1, 0])
def test_what_a_killed_download_left_is_used(shards: Path, tmp_path: Path, missing: int) -> None:
    there = (shards / "documents-000000.tar").read_bytes()
    with serving(shards) as server:
        url = f"{server.url}/documents-000000.tar"
        cache = ShardCache(tmp_path, 10**9)
        partial = cache._file(url, ".partial")
        partial.write_bytes(there[: len(there) - missing])
        assert Path(cache.local(url)).read_bytes() == there
        assert server.sent["/documents-000000.tar"] == missing


def test_urls_are_told_from_paths_and_expanded() -> None:
    assert [is_remote(name) for name in ("pipe:cat x", "s3://b/k", "/a/b.tar", "file:///a.tar", "a:b.tar")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert expand("http://h/{08..10}.tar::s3://b/x.tar") == [
        "http://h/08.tar", "http://h/09.tar", "http://h/10.tar", "s3://b/x.tar",
    ]  # fmt: skip
    assert expand("http://[::1]:80/a.tar") == ["http://[::1]:80/a.tar"]
    assert expand("file:///a/{0..1}.tar") == ["/a/0.tar", "/a/1.tar"]
    with pytest.raises(UserError, match="braces are not balanced"):
        expand("http://h/{00..")


def test_a_download_that_nobody_wants_any_more_ends(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.remote.download.CHUNK", 1000)
    with serving(shards) as server:
        url, partial = f"{server.url}/documents-000000.tar", tmp_path / "x"
        with pytest.raises(UserError, match="no longer wanted"):
            download(url, partial, wanted=lambda: False)
        assert partial.stat().st_size == 1000  # what came is kept
        monkeypatch.setattr("data.remote.download.CHUNK", 1 << 20)
        download(url, partial, wanted=lambda: False)  # nothing is left to break off
        assert partial.read_bytes() == (shards / "documents-000000.tar").read_bytes()
