"""The whole chain on S3 (moto's server on loopback): prepare, kill and resume, merge, inspect, verify, index, train."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec, resolve_shards
from data.loading.loader import MixLoader
from data.shards.places import place, put, sizes_in
from data.tools.verify import verify
from flamingo.errors import UserError
from tests.data.helpers import byte_processor, same
from tests.data.s3 import BUCKET, s3_server
from tests.data.sources import command, prepare
from tests.data.test_kill import kill_after, ledger, start
from tests.data.test_prepare_engine import ROOT, SMALL, files, write_tars

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("in"), tars=6, pairs=10)


@pytest.fixture(scope="module")
def whole(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    prepare(out, "pairs", tars, *SMALL)
    return out


@pytest.fixture(scope="module")
def remote(tars: Path, whole: Path) -> str:
    status, report, err = command("prepare", "pairs", tars, "--out", f"{BUCKET}/whole", *SMALL, "--workers", 2)
    assert status == 0, err
    assert f"{BUCKET}/whole: pairs: 48 of 60 documents kept" in report
    return f"{BUCKET}/whole"


def stored(url: str) -> dict[str, bytes]:
    """What a folder of the store holds, that of its folders included."""
    from data.shards.places import file_system

    system = file_system(url)
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def test_prepared_there_are_the_bytes_of_a_folder(tars: Path, whole: Path, remote: str) -> None:
    assert stored(remote) == files(whole)
    status, report, _ = command("prepare", "pairs", tars, "--out", remote, *SMALL)
    assert (status, "was already prepared" in report) == (0, True)
    status, _, err = command("prepare", "pairs", tars, "--out", f"{BUCKET}/none", "--min-words", 100)
    assert (status, "not one document was kept" in err) == (2, True)
    assert list(stored(f"{BUCKET}/none")) == ["_dataset.json"] or stored(f"{BUCKET}/none") == {}


def test_killed_and_resumed_is_the_uninterrupted_one(tars: Path, whole: Path, tmp_path: Path) -> None:
    out, killed = f"{BUCKET}/killed", 0
    line = [sys.executable, "-m", "data", "prepare", "pairs", str(tars), "--out", out, *SMALL, "--workers", "1"]
    for shards in (3, 8):
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
        deadline = time.monotonic() + 120
        while process.poll() is None and sum(name.endswith(".tar") for name in sizes_in(place(out))) < shards:
            assert time.monotonic() < deadline
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        with pytest.raises(UserError, match="no shards in"):
            resolve_shards([out])  # nobody trains on half of it
    assert killed == 2
    assert command("prepare", "pairs", tars, "--out", out, *SMALL, "--min-words", 2)[0] == 2
    assert subprocess.run(line, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, check=True).returncode == 0
    assert stored(out) == files(whole)
    assert list(tmp_path.iterdir()) == []  # nothing stays on the disk of the machine


def test_parts_on_the_store_and_on_disks_merge_to_the_same_bytes(tars: Path, whole: Path, tmp_path: Path) -> None:
    one, two, joined = f"{BUCKET}/one", tmp_path / "two", f"{BUCKET}/joined"
    for part, out in enumerate((one, two), 1):
        assert command("prepare", "pairs", tars, "--out", out, *SMALL, "--part", f"{part}/2", "--workers", 1)[0] == 0
    assert [fault for fault in verify(one) if "parts that are not joined" in fault]
    status, _, err = command("merge", one, two, "--out", joined)
    assert status == 0, err
    assert stored(joined) == files(whole)
    assert command("merge", one, two, "--out", tmp_path / "here")[0] == 0
    assert files(tmp_path / "here") == files(whole)


def test_inspect_verify_and_index(whole: Path, remote: str) -> None:
    name = "pairs-000001-000002.tar"
    status, here, _ = command("inspect", whole / name, "--row", 1)
    assert status == 0
    status, there, err = command("inspect", f"{remote}/{name}", "--row", 1)
    assert (status, there) == (0, here.replace(str(whole), remote)), err
    assert command("verify", remote)[0] == 0
    assert command("verify", f"{remote}/{name}", f"{remote}/pairs-{{000002..000003}}-000000.tar")[0] == 0

    copy = f"{BUCKET}/raw"
    for tar in sorted(whole.glob("pairs-00000[0-2]-*.tar")):
        put(place(f"{copy}/{tar.name}"), tar.read_bytes())
    status, report, err = command("index", copy)
    assert (status, report.count(".tar.idx: ")) == (0, len(list(whole.glob("pairs-00000[0-2]-*.tar")))), err
    kept = stored(copy)
    assert all(body == files(whole)[path] for path, body in kept.items())
    assert len([path for path in kept if path.endswith(".idx")]) == len(kept) / 2


def test_faults_there_are_named(whole: Path) -> None:
    broken = f"{BUCKET}/broken"
    for path, body in files(whole).items():
        if path.startswith(("_dataset", "pairs-000000")):
            changed = body[:1500] if path == "pairs-000000-000001.tar" else body
            put(place(f"{broken}/{path}"), changed)
    put(place(f"{broken}/more.tar"), b"x")
    faults = list(verify(broken))
    assert any(f"{broken}/pairs-000001-000000.tar is in the folder's manifest but missing" in fault for fault in faults)
    assert any(f"{broken}/more.tar is not in the folder's manifest" in fault for fault in faults)
    assert any(f"{broken}/pairs-000000-000001.tar differs from the folder's manifest" in fault for fault in faults)
    assert any(f"{broken}/pairs-000000-000001.tar is truncated" in fault for fault in faults)


def test_mistakes_are_one_sentence(tars: Path) -> None:
    def said(*arguments: object) -> str:
        status, _, err = command(*arguments)
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    assert "cannot write s3://no-such-bucket/x/" in said("prepare", "pairs", tars, "--out", "s3://no-such-bucket/x")
    assert "nothing to verify" in said("verify", f"{BUCKET}/nothing-here")
    assert "nothing.tar does not exist" in said("inspect", f"{BUCKET}/nothing.tar")
    assert "no shards in" in said("index", f"{BUCKET}/nothing-here")


def test_training_killed_and_resumed_is_that_of_the_disk(whole: Path, remote: str, tmp_path: Path) -> None:
    assert start(whole, tmp_path / "here", 1, 0).wait() == 0
    kill_after(start(remote, tmp_path / "there", 2, 1), tmp_path / "there", 20)
    state = json.loads((tmp_path / "there" / "state.json").read_text())["step"]
    done = [line for line in ledger(tmp_path / "there") if line[0] < state]
    (tmp_path / "there" / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done))
    assert start(remote, tmp_path / "there", 4, 0).wait() == 0
    assert ledger(tmp_path / "there") == ledger(tmp_path / "here")


def batches(*shards: str, cache: str = "") -> list[tuple[list[str], Any]]:
    spec = DatasetSpec(name="d", kind="pairs", shards=[*shards], batch_size=8, lanes=4, block=2, cache=cache)
    loader = MixLoader([spec], FlamingoCollate(byte_processor()), num_workers=1)
    return [(step.batches["d"][0].keys, step.batches["d"][0].tensors) for step in itertools.islice(loader, 30)]


@pytest.mark.parametrize("shards", ["", "/pairs-{000000..000005}-000000.tar"], ids=["folder", "braces"])
def test_training_reads_from_there(whole: Path, remote: str, tmp_path: Path, shards: str) -> None:
    here, there = batches(f"{whole}{shards}"), batches(f"{remote}{shards}", cache=str(tmp_path / "cache"))
    assert all(a[0] == b[0] and same(a[1], b[1]) for a, b in zip(here, there, strict=True))
