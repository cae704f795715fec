"""What can be wrong with a released checkpoint: one line on stderr, status 2, and nothing left at `--out`."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.__main__ import main
from flamingo.convert.cli import check_out, write_whole
from tests.model import otter, peers, tiny
from tests.model import test_parity_idefics as idefics
from tests.model.test_convert_folders import shards
from tests.model.test_convert_openflamingo import write_backbones

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of each family in the layout of its authors, and OpenFlamingo's backbones."""
    root = tmp_path_factory.mktemp("releases")
    theirs, _ = peers.flamingo("gpt_neox", 2)
    (root / "openflamingo").mkdir()
    write_backbones(root / "openflamingo", "gpt_neox")
    torch.save(peers.trained_only(theirs), root / "openflamingo" / "checkpoint.pt")
    model: Any = otter.Otter("llama", 2, None)
    (root / "otter").mkdir()
    shards(model.released(), root / "otter")
    (root / "otter" / "config.json").write_text(json.dumps(otter.config(model, 2)))
    otter.tokenizer().save_pretrained(root / "otter")
    (root / "idefics").mkdir()
    idefics.idefics(2).save_pretrained(root / "idefics", max_shard_size="100KB")
    idefics.tokenizer().save_pretrained(root / "idefics")
    return root


@pytest.fixture
def release(releases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(releases, tmp_path / "releases"))


def command(family: str, root: Path, *more: str) -> list[str]:
    folder = root / family
    backbones = ["--vision", str(folder / "clip"), "--language", str(folder / "lm")]
    return [
        "convert", family, "--checkpoint", str(folder / "checkpoint.pt" if family == "openflamingo" else folder),
        "--out", str(root / "out"), *(backbones if family == "openflamingo" else []), *more,
    ]  # fmt: skip


def refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert not (root / "out").exists()
    assert not (root / "out.partial").exists()
    return captured.err


def cut(name: str, share: float = 0.5) -> Spoil:
    def spoil(folder: Path) -> None:
        file = sorted(folder.glob(name))[0]
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return spoil


def gone(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        sorted(folder.glob(name))[0].unlink()

    return spoil


def text(name: str, words: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(words)

    return spoil


def changed(name: str, **values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, **values}))

    return spoil


def left_over(folder: Path) -> None:
    """A key more, in the first shard and in the index."""
    for index in folder.glob("*.index.json"):
        document = json.loads(index.read_text())
        file = sorted(set(document["weight_map"].values()))[0]
        document["weight_map"]["model.gadget"] = file
        index.write_text(json.dumps(document))
        path = folder / file
        if path.suffix == ".safetensors":
            save_file({**load_file(path), "model.gadget": torch.zeros(2)}, path)
        else:
            torch.save({**torch.load(path, weights_only=True), "model.gadget": torch.zeros(2)}, path)


class RunsCode:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def code(name: str) -> Spoil:
    """A pickle that would run a command, as torch's files of any age are pickles."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps({"perceiver.latents": RunsCode()}))

    return spoil


def code_in_zip(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        torch.save({"perceiver.latents": RunsCode()}, folder / name)

    return spoil


BIN, SAFE = "pytorch_model-*.bin", "model-*.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MISTAKES: list[tuple[str, Spoil, str]] = [
    ("openflamingo", cut("checkpoint.pt"), "checkpoint.pt cannot be read"),
    ("openflamingo", cut("checkpoint.pt", 0), "checkpoint.pt cannot be read"),
    ("openflamingo", code("checkpoint.pt"), "cannot be read: it is not a torch file"),
    ("openflamingo", code_in_zip("checkpoint.pt"), "cannot be read: it holds posix.system beside tensors"),
    ("openflamingo", text("checkpoint.pt", LFS), "is a pointer of git-lfs and not the weights"),
    ("openflamingo", text("checkpoint.pt", "<!DOCTYPE html>"), "cannot be read: it is not a torch file"),
    ("openflamingo", gone("lm/config.json"), "does not hold a usable language model"),
    ("openflamingo", gone("lm/*.safetensors"), "does not hold a usable language model"),
    ("openflamingo", cut("clip/*.safetensors"), "open_clip_model.safetensors cannot be read"),
    ("otter", gone(BIN), "which pytorch_model.bin.index.json names, is missing"),
    ("otter", cut(BIN), "-of-00003.bin cannot be read"),
    ("otter", left_over, "unknown keys: model.gadget (and 0 more)"),
    ("otter", text("config.json", "{"), "config.json is not JSON"),
    ("otter", text("config.json", "[1]"), "config.json is a JSON list, not an object"),
    ("otter", changed("config.json", text_config="llama"), "config.json is not Otter's"),
    ("otter", changed("config.json", cross_attn_every_n_layers=4), "cross_attn_every_n_layers=4"),
    ("otter", changed("config.json", cross_attn_every_n_layers=0), "must lie between 1 and the LM's 4 layers"),
    ("otter", gone("config.json"), "has no config.json, which says what Otter's language model is"),
    ("idefics", gone(SAFE), "which model.safetensors.index.json names, is missing"),
    ("idefics", cut(SAFE), ".safetensors cannot be read"),
    ("idefics", left_over, "unknown keys: model.gadget (and 0 more)"),
    ("idefics", text("model.safetensors.index.json", "{"), "index.json is not JSON"),
    ("idefics", text("model.safetensors.index.json", "{}"), "has no weight_map of keys to files"),
    ("idefics", changed("model.safetensors.index.json", weight_map={"a": "../x"}), "names ../x, which is not"),
    ("idefics", changed("config.json", hidden_size="wide"), "config.json does not make a IdeficsConfig"),
    ("idefics", changed("config.json", hidden_size=64), "in the checkpoint but"),
    ("idefics", changed("config.json", vision_config=3), "config.json does not make a IdeficsConfig"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "spoil", "sentence"), MISTAKES)
def test_one_line_and_no_folder(
    family: str, spoil: Spoil, sentence: str, release: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(release)
    spoil(release / family)
    assert sentence in refused(command(family, release), release, capsys)
    assert not (release / "ran").exists()


def test_backbones_and_options_that_do_not_fit(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(words: str, arguments: list[str]) -> None:
        assert words in refused(arguments, release, capsys)

    own = release / "openflamingo"
    peers.language("opt").save_pretrained(release / "opt")
    tiny.tokenizer().save_pretrained(release / "opt")
    says("another language model", [*command("openflamingo", release), "--language", str(release / "opt")])
    document = json.loads((own / "clip" / "open_clip_config.json").read_text())
    document["model_cfg"]["vision_cfg"]["width"] = 64
    (own / "clip" / "open_clip_config.json").write_text(json.dumps(document))
    says("does not fit open_clip_config.json", command("openflamingo", release))
    says("dtype 'int8' is not one of", command("idefics", release, "--dtype", "int8"))
    says("is not one of", command("otter", release, "--dtype", "half precision"))
    says("cross_attn_every_n_layers=1", command("otter", release, "--every", "1"))
    says(
        "preset=otter-7b is unknown; the presets of otter are otter-llama7b",
        command("otter", release, "--preset", "otter-7b"),
    )


def test_where_it_is_written(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is read; a killed or failed run leaves nothing that looks whole."""
    out = release / "out"
    arguments = command("idefics", release)
    out.write_text("")
    assert main(arguments) == 2
    assert f"{out} is a file; give another --out" in capsys.readouterr().err
    out.unlink()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(arguments) == 2
    assert f"{out} is not empty; give another --out" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    (release / "out.partial").mkdir()
    (release / "out.partial" / "config.json").write_text("of a run that was killed")
    assert main(arguments) == 0  # an empty folder is as good as none
    assert not (release / "out.partial").exists()
    FlamingoForConditionalGeneration.from_pretrained(out)
    with pytest.raises(UserError, match=r"is not a writable folder"):
        check_out(release / "idefics" / "config.json" / "deep")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"out could not be written: .*No space left on device"):
        write_whole(tmp_path / "out", half)
    assert list(tmp_path.iterdir()) == []
