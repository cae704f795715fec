"""Where shards are written: what a folder on a disk and one of a store have in common (here fsspec's in memory)."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import StorageError
from data.shards.places import RemotePath, fetched, is_store, move, place, put, remove_folder, send, sizes_in
from flamingo.errors import UserError


@pytest.mark.parametrize("store", [False, True])
def test_both_kinds_of_place_do_the_same(tmp_path: Path, store: bool) -> None:
    folder = place("memory://places/out" if store else tmp_path / "out")
    assert sizes_in(folder) == {}
    assert not (folder / "a").exists()
    put(folder / "a", b"one")
    put(folder / "a", b"other")
    (tmp_path / "made").write_bytes(b"made")
    send(tmp_path / "made", folder / "b")
    move(tmp_path / "made", folder / "c")
    assert not (tmp_path / "made").exists()
    assert sizes_in(folder) == {"a": 5, "b": 4, "c": 4}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c"]
    assert ((folder / "a").read_bytes(), (folder / "a").stat().st_size) == (b"other", 5)
    assert (folder / "a").with_name("b") == folder / "b"
    with fetched(folder / "b") as copy:
        assert (copy.name, copy.read_bytes()) == ("b", b"made")
    (folder / "b").unlink()
    (folder / "b").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "b").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "b").unlink()
    put(folder / ".state" / "x", b"") if store else None
    assert sizes_in(folder) == {"a": 5, "c": 4}  # not what is in its folders
    remove_folder(folder)
    remove_folder(folder)
    assert sizes_in(folder) == {}


def test_stores_are_told_from_paths_and_addresses() -> None:
    stores = ("s3://bucket/a", "gs://b", "memory://x")
    others = ("a/b", "/s3/b", "http://h/a", "https://h/a", "file:///a", "pipe:cat s3://b", "s3:/bucket")
    assert all(is_store(name) for name in stores)
    assert not any(is_store(name) for name in others)
    assert str(place("s3://bucket/a/")) == "s3://bucket/a"
    assert place("s3://bucket/a/") / "x" == RemotePath("s3://bucket/a/x")


def test_a_store_that_nobody_knows_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"nosuchstore://b/x cannot be opened: .*nosuchstore"):
        place("nosuchstore://b/x").exists()


class Away:
    """A file system that does not answer at first."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    def pipe_file(self, url: str, body: bytes) -> None:
        self.asked += 1
        if self.asked <= self.failures:
            raise ConnectionResetError("gone")


def test_a_store_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.places.FIRST_WAIT", 0.001)
    system = Away(failures=2)
    monkeypatch.setattr("data.shards.places.file_system", lambda url: system)
    put(place("s3://bucket/a"), b"x")
    assert system.asked == 3
    monkeypatch.setattr("data.shards.places.PATIENCE", 0.0)
    system = Away(failures=1)
    with pytest.raises(StorageError, match=r"s3://bucket/a could not be reached in 1 attempts .*: gone; run the same"):
        put(place("s3://bucket/a"), b"x")
