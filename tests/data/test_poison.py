"""What a server may say instead of a shard, and what a disk may do to a copy: nothing of it is kept or trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from data.dataset import DatasetSpec, open_store
from data.errors import StorageError
from data.remote import download as downloads
from data.remote.download import download
from data.remote.shard_cache import ShardCache
from data.shard_store import open_shards
from data.shards.index import index_path
from flamingo.errors import UserError
from tests.data.helpers import write_documents
from tests.data.server import Behaviour, Server, serving
from tests.data.test_checksums import content

LOGIN = b"<!doctype html><html>please log in</html>"
NAME = "documents-000000.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("shards"), count=24, per_shard=24)


def start(server: Server, folder: Path) -> list[object]:
    """What a run that starts now reads."""
    cache = ShardCache(folder, 10**9, first_wait=0.01, attempts=5)
    store = open_shards([f"{server.url}/{NAME}"], "interleaved", cache=cache)
    samples = [store.read(0, row) for row in range(24)]
    found: list[object] = [(s.key, s.nodes, [s.image(number) for number in s.numbers]) for s in samples]
    store.reader.close()
    return found


@pytest.mark.parametrize("suffix", [".idx", ".tar", (".idx", ".tar")])
@pytest.mark.parametrize("body", [LOGIN, b"", b"\0" * 5000], ids=["login page", "nothing", "zeros"])
def test_another_answer_is_asked_again(shards: Path, tmp_path: Path, suffix: str, body: bytes) -> None:
    with serving(shards, Behaviour(body=body, faults=1, suffix=suffix)) as server:
        assert start(server, tmp_path) == content(shards)


def test_a_login_page_for_ever_is_refused_and_heals(shards: Path, tmp_path: Path) -> None:
    with serving(shards, Behaviour(body=LOGIN, faults=10**6, suffix=(".idx", ".tar"))) as server:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"{NAME} is truncated.*what came begins with b'<!doctype html>"):
                start(server, tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
        server.behaviour.faults = 0
        assert start(server, tmp_path) == content(shards)


def test_an_index_that_is_none_is_made_from_the_shard(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(shards, Behaviour(body=LOGIN, faults=10**6, suffix=".idx")) as server:
        assert start(server, tmp_path) == content(shards)
        assert f"{server.url}/{NAME}.idx returns is not an index, begins with b'<!doctype" in capsys.readouterr().err
        before = server.requests.total()
        assert start(server, tmp_path) == content(shards)
        assert server.requests.total() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(bytes(2000))


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 4
    path.write_bytes(raw)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("kind", ["tar", "idx", "ok"])
@pytest.mark.parametrize("hurt", [cut, empty, zeros, flipped, gone])
def test_a_copy_that_is_damaged_on_the_disk_heals(
    shards: Path, tmp_path: Path, kind: str, hurt: Callable[[Path], None]
) -> None:
    with serving(shards) as server:
        expected = start(server, tmp_path)
        hurt(next(tmp_path.glob(f"*.{kind}")))
        assert start(server, tmp_path) == expected == content(shards)
        before = server.requests.total()
        assert start(server, tmp_path) == expected
        assert server.requests.total() == before  # nothing is fetched for ever


def test_a_copy_from_before_the_machine_started_is_read_whole_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(shards) as server:
        expected = start(server, tmp_path)
        whole = next(tmp_path.glob("*.ok"))
        known = whole.read_text()
        monkeypatch.setattr("data.remote.shard_cache._machine_start", lambda: "another")
        assert start(server, tmp_path) == expected
        assert whole.read_text() != known
        assert server.requests[f"/{NAME}"] == 1


def test_an_index_of_an_older_version_in_the_cache_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    with serving(shards) as server:
        expected = start(server, tmp_path)
        copy = next(tmp_path.glob("*.idx"))
        copy.write_bytes(copy.read_bytes().replace(b'"v": 4', b'"v": 3', 1))
        assert start(server, tmp_path) == expected


def test_new_shards_on_the_server_are_refused_once(shards: Path, tmp_path: Path) -> None:
    there = write_documents(tmp_path / "there", count=24, per_shard=24)
    with serving(there) as server:
        start(server, tmp_path / "c")
        next((tmp_path / "c").glob("*.tar")).unlink()
        raw = (there / NAME).read_bytes()
        (there / NAME).write_bytes(raw.replace(b'"t":"46', b'"t":"64'))
        index_path(there / NAME).unlink()
        open_store(DatasetSpec(name="d", shards=[str(there)], batch_size=1))  # which writes the new index
        with pytest.raises(UserError, match=r"changed after its index was built.*the next start will fetch its index"):
            start(server, tmp_path / "c")
        assert start(server, tmp_path / "c") == content(there) != content(shards)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_to_wait_is_left_alone(shards: Path, tmp_path: Path, status: int, form: str) -> None:
    value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    with serving(shards, Behaviour(status=status, faults=1, headers={"Retry-After": value})) as server:
        begun = time.monotonic()
        assert download(f"{server.url}/{NAME}", tmp_path / "x", first_wait=0.001) == 1
        assert time.monotonic() - begun >= (1.0 if form == "seconds" else 0.5)
        assert server.requests[f"/{NAME}"] == 2


def test_patience_is_a_time_not_a_number(shards: Path, tmp_path: Path) -> None:
    with serving(shards, Behaviour(status=503, faults=40)) as server:
        assert download(f"{server.url}/{NAME}", tmp_path / "x", first_wait=0.0) == 40
        server.behaviour.faults = 10**6
        with pytest.raises(StorageError, match=r"could not be fetched: \d+ attempts in a row over 0\.\d s .* 503"):
            download(f"{server.url}/{NAME}", tmp_path / "y", first_wait=0.01, patience=0.3)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_drips_is_cut_off(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    dripping = Behaviour(drip=0.01, faults=1, ranges=ranges)
    with serving(shards, dripping) as server:
        assert download(f"{server.url}/{NAME}", tmp_path / "x", first_wait=0.01) == 1
        assert (tmp_path / "x").read_bytes() == (shards / NAME).read_bytes()
        dripping.faults = 10**6
        with pytest.raises(StorageError, match=r"it only drips: \d+ bytes in \d+ s"):
            download(f"{server.url}/{NAME}", tmp_path / "y", first_wait=0.01, attempts=2)
