"""A pickle that would leave a mark, in every place that loads a file: refused or never looked at, and no mark."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from data.prepare.web.duplicates import RepeatTable
from eval.spec import SourceSpec
from eval.tasks.formats.questions import pathvqa
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.backbones import load_language, load_vision
from flamingo.convert.files import read_checkpoint
from flamingo.errors import UserError
from tests.model import tiny


class Evil:
    """Unpickled, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Return a folder with evil files of each kind; `mark` in it would be made."""
    folder = tmp_path / "evil"
    folder.mkdir()
    bad = {"a": Evil(folder / "mark")}
    torch.save(bad, folder / "zip.pt")
    torch.save(bad, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pt").write_bytes(pickle.dumps(bad))
    np.save(folder / "array.npy", np.array([Evil(folder / "mark")], dtype=object), allow_pickle=True)
    np.savez(folder / "table.npz", images=np.array([Evil(folder / "mark")], dtype=object))
    return folder


def test_the_mark_is_made_where_a_pickle_is_trusted(evil: Path) -> None:
    pickle.loads((evil / "plain.pt").read_bytes())
    assert (evil / "mark").exists()


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.pt"])
@pytest.mark.parametrize(
    "load",
    [
        read_checkpoint,
        lambda file: load_vision("RN50", pretrained=str(file)),
        lambda file: load_vision("timm/resnet18", pretrained=str(file)),
        lambda file: list(pathvqa(file, SourceSpec())),
    ],
    ids=["convert", "open_clip", "timm", "pathvqa"],
)
def test_a_file(evil: Path, name: str, load: Callable[[Path], Any]) -> None:
    with pytest.raises(UserError):
        load(evil / name)
    assert not (evil / "mark").exists()


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.pt"])
@pytest.mark.parametrize(
    "load",
    [
        FlamingoForConditionalGeneration.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
        load_language,
        read_checkpoint,
    ],
    ids=["ours", "auto", "language", "convert"],
)
def test_a_folder_of_torch_weights(
    saved: Path, evil: Path, tmp_path: Path, name: str, load: Callable[[Path], Any]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    shutil.copy(evil / name, folder / "pytorch_model.bin")
    with pytest.raises((UserError, ValueError)):
        load(folder)
    assert not (evil / "mark").exists()


def test_a_pickle_beside_good_weights_is_not_looked_at(saved: Path, evil: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.copy(evil / "plain.pt", folder / "pytorch_model.bin")
    FlamingoForConditionalGeneration.from_pretrained(folder)
    assert not (evil / "mark").exists()


def test_an_index_that_names_a_file_elsewhere(evil: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "evil/zip.pt"}}))
    with pytest.raises(UserError, match="not a file beside it"):
        read_checkpoint(tmp_path)
    assert not (evil / "mark").exists()


@pytest.mark.parametrize("place", ["config.json", "text_config", "tokenizer_config.json", "processor_config.json"])
def test_code_beside_a_model_is_not_imported(saved: Path, tmp_path: Path, place: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass C: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoProcessor"), "evil.C")
    file = folder / ("config.json" if place == "text_config" else place)
    body = json.loads(file.read_text())
    inside = body["text_config"] if place == "text_config" else body
    inside |= {"auto_map": {**names, "AutoTokenizer": ["evil.C", "evil.C"]}, "trust_remote_code": True}
    file.write_text(json.dumps(body))
    for load in (
        FlamingoForConditionalGeneration.from_pretrained,
        FlamingoProcessor.from_pretrained,
        AutoTokenizer.from_pretrained,
    ):
        try:
            load(folder)
        except ValueError as error:  # it may be refused: what counts is that nothing runs
            assert "trust_remote_code" in str(error) or isinstance(error, UserError)  # noqa: PT017
    assert not (tmp_path / "mark").exists()


def test_arrays_of_objects(evil: Path) -> None:
    from argparse import Namespace

    from data.prepare.sources.video import _from_array
    from data.prepare.units import Dropped

    with pytest.raises(Dropped):
        _from_array((evil / "array.npy").read_bytes(), Namespace(max_frames=1, side=8))
    with pytest.raises((ValueError, KeyError)):
        RepeatTable.load(evil / "table.npz")
    with pytest.raises(ValueError, match="pickle"):
        np.load(io.BytesIO((evil / "array.npy").read_bytes()))
    assert not (evil / "mark").exists()
