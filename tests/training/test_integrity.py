"""Checkpoints whose bytes are not what was written are found before anything is loaded, and run no code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import pickletools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo.errors import UserError
from flamingo.training.checkpoints import integrity, store
from flamingo.training.checkpoints.integrity import CHECKSUMS, MARKER
from tests.training.world import save_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two whole checkpoints."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, model, optimizer, {"step": step}, keep_last=2)
    return tmp_path / "checkpoints"


def test_every_file_has_a_checksum(root: Path) -> None:
    folder = root / "step-00000002"
    described = json.loads((folder / CHECKSUMS).read_text())
    assert set(described["files"]) == {path.name for path in folder.iterdir()} - {CHECKSUMS}
    assert MARKER in described["files"]
    assert store.damage(folder) == ""
    assert store.choose(root).passed_over == {}


@pytest.mark.parametrize("pattern", ["*.distcp", MARKER, CHECKSUMS])
def test_any_flipped_bit_and_any_cut_falls_back_and_is_named(root: Path, pattern: str) -> None:
    (file,) = (root / "step-00000002").glob(pattern)
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(60):
        flipped, cut = bytearray(whole), rng.randrange(len(whole))
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for content in (bytes(flipped), whole[:cut], bytes(len(whole))):
            file.write_bytes(content)
            choice = store.choose(root)
            if choice.path == root / "step-00000002":  # a name or a blank of the list itself cannot be told apart
                assert pattern == CHECKSUMS
                assert json.loads(content) == json.loads(whole)
            else:
                assert choice.path == root / "step-00000001"
                assert list(choice.passed_over) == [root / "step-00000002"]


def test_bytes_behind_the_end_swapped_and_extra_names_are_damage(root: Path) -> None:
    (file,) = (root / "step-00000002").glob("*.distcp")
    with file.open("ab") as more:
        more.write(b"x")
    assert "bytes" in store.damage(root / "step-00000002")
    shutil.copy(root / "step-00000001" / file.name, file)
    assert "other bytes than were written" in store.damage(root / "step-00000002")
    shutil.copy(root / "step-00000001" / CHECKSUMS, root / "step-00000002")
    assert MARKER in store.damage(root / "step-00000002")  # the marker of one, the files of another


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def rewritten(folder: Path, raw: bytes) -> None:
    """Put other metadata into a checkpoint, with the checksum of it: somebody means it."""
    (folder / MARKER).write_bytes(raw)
    described = json.loads((folder / CHECKSUMS).read_text())
    described["files"][MARKER] = [len(raw), integrity._hash(folder / MARKER)]
    (folder / CHECKSUMS).write_text(json.dumps(described))


def test_metadata_runs_no_code(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = root / "step-00000002"
    metadata = integrity.Reader(str(folder)).read_metadata()
    metadata.planner_data = Harm()
    for evil in (Harm(), metadata, {"a": print}, [torch.nn.Linear]):
        rewritten(folder, pickle.dumps(evil))
        assert "is not a checkpoint's" in store.damage(folder)
        with pytest.raises(UserError, match="cannot be read"):
            integrity.Reader(str(folder)).read_metadata()
    for dotted in (b"cos\nsystem\n(S'touch harmed'\ntR.", b"ctorch\nserialization.os.system\n(S'touch harmed'\ntR."):
        with pytest.raises(ValueError, match="not part of a checkpoint's metadata"):
            integrity.unpickle_metadata(dotted)
    assert not (tmp_path / "harmed").exists()


def test_metadata_that_points_outside_is_damage(root: Path) -> None:
    folder = root / "step-00000002"
    metadata = integrity.Reader(str(folder)).read_metadata()
    part = next(iter(metadata.storage_data.values()))
    part.relative_path = "../../elsewhere"
    rewritten(folder, pickle.dumps(metadata))
    assert "points to byte" in store.damage(folder)


def test_the_list_of_classes_is_what_metadata_needs(root: Path) -> None:
    """Every name that the pickle asks for is allowed; none of them is a module's function that does something."""
    raw = (root / "step-00000002" / MARKER).read_bytes()
    strings: list[str] = []
    asked = set()
    for code, argument, _ in pickletools.genops(raw):
        if isinstance(argument, str):
            strings.append(argument)
        if code.name == "STACK_GLOBAL":
            asked.add(strings[-1])
    assert asked
    assert isinstance(integrity.unpickle_metadata(raw), torch.distributed.checkpoint.Metadata)


def failing(number: int, code: int) -> Any:
    """A read that fails so often."""
    left = iter(range(number))

    def read() -> str:
        for _ in left:
            raise OSError(code, os.strerror(code))
        return "content"

    return read


def test_a_read_error_is_repeated_and_never_taken_for_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "WAITS", (0.0, 0.0, 0.0))
    assert integrity.read_patiently(failing(3, errno.EIO), root) == "content"
    with pytest.raises(UserError, match="is not taken for damage"):
        integrity.read_patiently(failing(4, errno.ESTALE), root)
    with pytest.raises(FileNotFoundError):
        integrity.read_patiently(failing(1, errno.ENOENT), root)
    plain, times = integrity._hash, iter(range(10**6))

    def once_broken(file: Path) -> str:
        if next(times) == 0:
            raise OSError(errno.EIO, "Input/output error")
        return plain(file)

    monkeypatch.setattr(integrity, "_hash", once_broken)
    assert store.newest(root) == root / "step-00000002"
    always = OSError(errno.EIO, "Input/output error")

    def broken(file: Path) -> str:
        raise always

    monkeypatch.setattr(integrity, "_hash", broken)
    with pytest.raises(UserError, match="repair the storage and give the same command again"):
        store.choose(root)


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "WAITS", (0.0,))
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(UserError, match="cannot be read"):
        store.choose(tmp_path / "checkpoints")
    assert store.choose(tmp_path / "none") == store.Choice(None, {})


def test_pruning_counts_whole_checkpoints_only(root: Path) -> None:
    (file,) = (root / "step-00000002").glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)
    store.prune(root, keep_last=1)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_that_was_complete_and_lost_its_marker_is_named(root: Path) -> None:
    (root / "step-00000002" / MARKER).unlink()
    choice = store.choose(root)
    assert choice.path == root / "step-00000001"
    assert "hidden files" in choice.passed_over[root / "step-00000002"]
    shutil.rmtree(root / "step-00000002")
    assert store.choose(root).passed_over == {root / "step-00000002": "it was complete and is gone"}
    (root / "step-00000003").mkdir()  # an interrupted save was never complete
    assert root / "step-00000003" not in store.choose(root).passed_over
