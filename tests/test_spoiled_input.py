"""Every command over every spoiled input: one sentence, exit status 2, no traceback, and nothing that looks whole."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data.__main__ import main as data_main
from eval.__main__ import main as eval_main
from eval.inference.response_log import ResponseLog
from eval.reports.saved_run import problems, read_run
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.__main__ import main as flamingo_main
from flamingo.errors import UserError
from flamingo.training.compose import compose
from flamingo.training.distributed.interruptions import exit_status
from tests.data.helpers import write_documents
from tests.fixtures import png
from tests.model import tiny
from train import train

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `shards`, `table.csv` with twelve images, and `run`, an evaluation of them."""
    root = tmp_path_factory.mktemp("world")
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    write_documents(root / "shards", count=8)
    for number in range(12):
        (root / f"{number}.png").write_bytes(png(20 * number))
    write_table(root / "table.csv")
    assert eval_main(evaluation(root, root / "run")) == 0
    return root


def write_table(path: Path, **images: str) -> None:
    """`images` replaces the names of the numbered rows' images: `row3="x.png"`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "answer"])
        writer.writerows([images.get(f"row{i}", f"{i}.png"), ["red", "blue"][i % 2]] for i in range(12))


def evaluation(world: Path, out: Path, *more: str) -> list[str]:
    own = [f"model={world / 'model'}", f"out={out}", "task=csv", f"task.csv.source.path={world / 'table.csv'}"]
    own += ["task.csv.max_new_tokens=2", "shots=[0]", "cache=null", "progress=false", "gallery=2", "device=cpu"]
    return [*own, *more]


def training(world: Path, run_dir: Path, *more: str) -> int:
    own = [f"model.init={world / 'model'}", f"run.dir={run_dir}", "run.steps=1", "run.device=cpu", "run.threads=1"]
    own += [f"data.datasets={{d: {{shards: [{world / 'shards'}], batch_size: 2, max_tokens: 32}}}}"]
    own += ["run.tensorboard=false", *more]
    return exit_status(lambda: train(compose(own)))


def generating(model: Path, *more: str) -> int:
    return flamingo_main(["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "2", *more])


def one_sentence(status: int, capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert status == 2, (said.out[-500:], said.err[-2000:])
    assert len(lines) == 1, said.err[-2000:]
    assert lines[0].startswith("error: ")
    return lines[0]


# A model's folder.


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def described(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        body = json.loads((folder / file).read_text())
        change(body)
        (folder / file).write_text(json.dumps(body))

    return spoil


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def first(weights: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(weights) if part in name)


def filled(part: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[first(weights, part)].view(-1)[0] = value

    return tensors(change)


def _flip_header(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[12] ^= 0x40
    (folder / "model.safetensors").write_bytes(raw)


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


def _shape(weights: dict[str, torch.Tensor]) -> None:
    weights[first(weights, "resampler")] = torch.zeros(2, 2)


def _renamed(weights: dict[str, torch.Tensor]) -> None:
    weights["resampler.typo"] = weights.pop(first(weights, "resampler"))


def _folder_instead_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _file_instead_of_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (_cut, "cannot be loaded"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "weights a pointer": (text("model.safetensors", LFS), "pointer of git-lfs"),
    "weights a folder": (_folder_instead_of_weights, "cannot be loaded"),
    "header flipped": (_flip_header, "cannot be loaded|lacks the weight"),
    "header of 100 GB": (
        lambda folder: (folder / "model.safetensors").write_bytes((10**11).to_bytes(8, "little") + b"{}"),
        "cannot be loaded",
    ),
    "weight missing": (tensors(lambda w: w.pop(first(w, "resampler"))), "lacks the weight resampler"),
    "layer missing": (
        tensors(lambda w: [w.pop(name) for name in list(w) if "layers.1." in name]),
        "lacks the weight .* and .* more",
    ),
    "weight renamed": (tensors(_renamed), "lacks the weight resampler.*it holds resampler.typo"),
    "weight of another shape": (tensors(_shape), "cannot be loaded"),
    "NaN in the resampler": (filled("resampler", float("nan")), "resampler.* not finite"),
    "NaN in the LM": (filled("language_model", float("nan")), "language_model.* not finite"),
    "infinite gate": (filled("attn_gate", float("inf")), "attn_gate is not finite"),
    "minus infinity in the encoder": (filled("vision_encoder", float("-inf")), "vision_encoder.* not finite"),
    "config broken": (text("config.json", "{"), "cannot be loaded|not JSON|valid JSON"),
    "config a list": (text("config.json", "[]"), "error: "),
    "config nested deep": (text("config.json", "[" * 100_000), "error: "),
    "config a pointer": (text("config.json", LFS), "pointer of git-lfs"),
    "config with latents of -4": (
        described("config.json", lambda c: c["resampler_config"].update(latents=-4)),
        "latents",
    ),
    "config with a layer outside": (described("config.json", lambda c: c.update(cross_attn_layers=[0, 99])), "99"),
    "config of an unknown LM": (described("config.json", lambda c: c["text_config"].update(model_type="no")), "no"),
    "processor broken": (text("processor_config.json", "{"), "cannot be loaded"),
    "processor a list": (text("processor_config.json", "[]"), "cannot be loaded"),
    "processor a pointer": (text("processor_config.json", LFS), "pointer of git-lfs"),
    "processor missing": (
        lambda folder: (folder / "processor_config.json").unlink(),
        "processor_config.json is missing",
    ),
    "tokenizer broken": (text("tokenizer.json", "{"), "cannot be loaded"),
    "tokenizer a pointer": (text("tokenizer.json", LFS), "pointer of git-lfs"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    "a file": (_file_instead_of_folder, "config.json is missing"),
}
"""What is done to a saved model's folder, and what the sentence says."""


@pytest.fixture
def spoiled(request: pytest.FixtureRequest, world: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the model's folder that is spoiled, and what the sentence says."""
    spoil, said = SPOILED[request.param]
    folder = shutil.copytree(world / "model", tmp_path / "model")
    spoil(folder)
    return folder, said


over_spoiled_models = pytest.mark.parametrize("spoiled", SPOILED, indirect=True)


@over_spoiled_models
def test_generate_with_a_spoiled_model(spoiled: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, said = spoiled
    assert_matches(said, one_sentence(generating(folder), capsys))


@over_spoiled_models
def test_eval_of_a_spoiled_model(
    spoiled: tuple[Path, str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = spoiled
    assert_matches(said, one_sentence(eval_main(evaluation(world, tmp_path / "out", f"model={folder}")), capsys))
    assert not (tmp_path / "out" / "results.json").exists()


@over_spoiled_models
def test_train_from_a_spoiled_model(
    spoiled: tuple[Path, str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = spoiled
    assert_matches(said, one_sentence(training(world, tmp_path / "run", f"model.init={folder}"), capsys))
    assert not (tmp_path / "run" / "model").exists()


@over_spoiled_models
def test_the_library_with_a_spoiled_model(spoiled: tuple[Path, str]) -> None:
    folder, said = spoiled
    for load in (FlamingoForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises((UserError, OSError, ValueError, RecursionError)) as caught:  # noqa: PT012
            load.from_pretrained(folder)
            FlamingoProcessor.from_pretrained(folder)
        if load is FlamingoForConditionalGeneration:
            assert isinstance(caught.value, UserError)
            assert_matches(said, f"error: {caught.value}")


def assert_matches(pattern: str, sentence: str) -> None:
    assert re.search(pattern, sentence), sentence


def test_the_good_model_passes_everywhere(world: Path, tmp_path: Path) -> None:
    assert generating(world / "model") == 0
    assert training(world, tmp_path / "run") == 0
    assert problems(read_run(world / "run")) == []


# A file where a folder is wanted, a folder where a file is, nothing at all, and names that are no paths.

MISTAKES: dict[str, Callable[[Path, Path], tuple[Callable[[list[str]], int], list[str]]]] = {
    "inspect a folder": lambda w, t: (data_main, ["inspect", str(w / "shards")]),
    "inspect nothing": lambda w, t: (data_main, ["inspect", str(t / "gone.tar")]),
    "inspect a table": lambda w, t: (data_main, ["inspect", str(w / "table.csv")]),
    "inspect to a folder": lambda w, t: (
        data_main,
        ["inspect", str(w / "shards" / "documents-000000.tar"), "--html", str(t)],
    ),
    "verify nothing": lambda w, t: (data_main, ["verify", str(t)]),
    "index a folder without shards": lambda w, t: (data_main, ["index", str(t)]),
    "index a table": lambda w, t: (data_main, ["index", str(w / "table.csv")]),
    "merge a file": lambda w, t: (data_main, ["merge", str(w / "table.csv")]),
    "prepare into a file": lambda w, t: (
        data_main,
        ["prepare", "folder", str(w / "shards"), "--out", str(w / "table.csv")],
    ),
    "prepare a file as a folder": lambda w, t: (
        data_main,
        ["prepare", "folder", str(w / "table.csv"), "--out", str(t / "o")],
    ),
    "eval into a file": lambda w, t: (eval_main, evaluation(w, w / "table.csv")),
    "eval below a file": lambda w, t: (eval_main, evaluation(w, w / "table.csv" / "out")),
    "eval into nothing": lambda w, t: (eval_main, [*evaluation(w, t)[:1], "out=", *evaluation(w, t)[2:]]),
    "eval with a file as cache": lambda w, t: (eval_main, evaluation(w, t / "out", f"cache={w / 'table.csv'}")),
    "eval of a folder as a table": lambda w, t: (eval_main, evaluation(w, t, f"task.csv.source.path={w}")),
    "eval of an image as a table": lambda w, t: (eval_main, evaluation(w, t, f"task.csv.source.path={w / '1.png'}")),
    "eval in a wrong precision": lambda w, t: (eval_main, evaluation(w, t, "dtype=float99")),
    "eval on a wrong device": lambda w, t: (eval_main, evaluation(w, t, "device=cuda:x")),
    "eval with a comma": lambda w, t: (eval_main, evaluation(w, t, "out=a,b")),
    "report of a file": lambda w, t: (eval_main, ["report", str(w / "table.csv")]),
    "report of a folder without a run": lambda w, t: (eval_main, ["report", str(w / "shards")]),
    "report into a file": lambda w, t: (eval_main, ["report", str(w / "run"), f"out={w / 'table.csv'}"]),
    "check a file": lambda w, t: (eval_main, ["check", str(w / "table.csv")]),
    "check a folder that is not there": lambda w, t: (eval_main, ["check", str(t / "lr=0.1")]),
    "compare with a file": lambda w, t: (eval_main, ["compare", str(w / "run"), str(w / "table.csv")]),
    "compare into a folder": lambda w, t: (eval_main, ["compare", str(w / "run"), str(w / "run"), f"out={t}"]),
    "export into a folder": lambda w, t: (eval_main, ["export", str(w / "run"), "format=vqa", f"to={t}"]),
    "export with a folder of ids": lambda w, t: (
        eval_main,
        ["export", str(w / "run"), "format=vqa", f"to={t / 'x'}", f"ids={t}"],
    ),
    "prepare from a file": lambda w, t: (eval_main, ["prepare", "coco", "--from", str(w / "table.csv")]),
    "generate with a folder as image": lambda w, t: (flamingo_main, generate(w, "--image", str(t))),
    "generate with a table as image": lambda w, t: (flamingo_main, generate(w, "--image", str(w / "table.csv"))),
    "generate with no image": lambda w, t: (flamingo_main, generate(w, "--image", str(t / "gone.png"))),
    "generate on a wrong device": lambda w, t: (flamingo_main, generate(w, "--device", "tpu9")),
    "generate less than nothing": lambda w, t: (flamingo_main, generate(w, "--max-new-tokens", "-1")),
    "generate with no beam": lambda w, t: (flamingo_main, generate(w, "--beams", "0")),
    "convert nothing": lambda w, t: (flamingo_main, convert(t / "gone.pt", t / "o")),
    "convert a folder without weights": lambda w, t: (flamingo_main, convert(w / "shards", t / "o")),
    "convert a table": lambda w, t: (flamingo_main, convert(w / "table.csv", t / "o")),
    "convert into a file": lambda w, t: (flamingo_main, convert(w / "model", w / "table.csv")),
    "convert in a wrong precision": lambda w, t: (
        flamingo_main,
        [*convert(w / "model", t / "o"), "--vision", "ViT-B-32", "--language", str(w / "model"), "--dtype", "float99"],
    ),
}


def generate(world: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(world / "model"), "--prompt", "a", *more]


def convert(checkpoint: Path, out: Path) -> list[str]:
    return ["convert", "openflamingo", "--checkpoint", str(checkpoint), "--out", str(out)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_folders_and_words(mistake: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, arguments = MISTAKES[mistake](world, tmp_path)
    if mistake == "verify nothing":
        assert command(arguments) == 2
    else:
        one_sentence(command(arguments), capsys)
    assert not (tmp_path / "o").exists()


TRAINING = {
    "run.dir=a,b": "in quotes",
    "run.dir={table}": "cannot be written|not a folder|holds",
    "run.dir={table}/run": "cannot be written",
    "run.precision=float99": "run.precision=float99 is not one of",
    "data.datasets.d.shards=[{table}]": "table.csv",
    "data.datasets.d.shards=[{tmp}]": "no shards",
    "model.init={table}": "config.json is missing",
    "model.init={tmp}/lr=0.1": "config.json is missing",
}


@pytest.mark.parametrize("argument", TRAINING)
def test_train(argument: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = argument.format(table=world / "table.csv", tmp=tmp_path)
    assert_matches(TRAINING[argument], one_sentence(training(world, tmp_path / "run", given), capsys))


def test_folders_with_equal_signs_and_commas_in_their_names(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(world / "model", tmp_path / "run.seed=1,optim.lr=1e-4" / "model")  # as a sweep names them
    out = tmp_path / "lr=0.1"
    assert eval_main(evaluation(world, out, f"model={model}")) == 0
    for command in (["check", str(out)], ["report", str(out)], ["compare", str(out), str(out)]):
        assert eval_main(command) == 0, capsys.readouterr().err
    assert eval_main(["export", str(out), "format=captions", f"to={tmp_path / 'a=b.json'}"]) == 0
    assert (tmp_path / "a=b.json").exists()
    monkeypatch.chdir(tmp_path)
    assert eval_main(["check", "lr=0.1"]) == 0
    capsys.readouterr()
    assert "unknown key 'lr'" in one_sentence(eval_main(["check", "lr=0.2"]), capsys)
    assert training(world, tmp_path / "seed=3", f"model.init={model}") == 0
    assert (tmp_path / "seed=3" / "model").is_dir()


# Images of a table.


def _zero(folder: Path) -> str:
    (folder / "x.png").write_bytes(b"")
    return "x.png"


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "x.png")
    return "x.png"


def _directory(folder: Path) -> str:
    (folder / "x.png").mkdir()
    return "x.png"


IMAGES: dict[str, Callable[[Path], str]] = {
    "empty": _zero,
    "a pipe": _fifo,
    "a folder": _directory,
    "a device": lambda folder: "/dev/zero",
    "missing": lambda folder: "gone.png",
    "text": lambda folder: "table.csv",
    "a pointer": lambda folder: str((folder / "x.png").write_text(LFS) and "x.png"),
    "PostScript": lambda folder: str((folder / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n") and "x.png"),
    "cut": lambda folder: str((folder / "x.png").write_bytes(png(3)[:40]) and "x.png"),
}


@pytest.mark.parametrize("image", IMAGES)
def test_a_table_that_names_a_spoiled_image(
    image: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    for file in world.glob("*.png"):
        shutil.copy(file, folder)
    write_table(folder / "table.csv", row3=IMAGES[image](folder))
    out = tmp_path / "out"
    one_sentence(eval_main(evaluation(world, out, f"task.csv.source.path={folder / 'table.csv'}")), capsys)
    assert not (out / "results.json").exists()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
        torch.zeros(3, 0, 10, dtype=torch.uint8),
        Image.new("RGB", (0, 0)),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf),
        b"",
        "",
        None,
        5,
    ],
    ids=["no rows", "no height", "no tensor rows", "no pixels", "nan", "inf", "no bytes", "no text", "none", "number"],
)
def test_an_image_that_is_none(image: Any, world: Path) -> None:
    processor = FlamingoProcessor.from_pretrained(world / "model")
    with pytest.raises(UserError):
        processor(images=[[image]], text=["<image>a"])


# Disks.


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 300, 3000])
def test_eval_on_a_full_disk_ends_and_goes_on(
    size: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with largest_file(size):
        status = eval_main(evaluation(world, out))
        line = one_sentence(status, capsys)
    assert "free space" in line
    assert str(out) in line
    assert eval_main(evaluation(world, out)) == 0
    assert problems(read_run(out)) == []
    assert (out / "samples.jsonl").read_bytes() == (world / "run" / "samples.jsonl").read_bytes()
    assert not list(out.glob(".*.partial"))


@pytest.mark.parametrize("command", ["report", "compare", "export", "inspect", "index"])
def test_commands_on_a_full_disk(command: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = str(world / "run"), tmp_path / "target"
    shard = shutil.copy(world / "shards" / "documents-000000.tar", tmp_path / "a.tar")
    commands: dict[str, Callable[[], int]] = {
        "report": lambda: eval_main(["report", run, f"out={target}"]),
        "compare": lambda: eval_main(["compare", run, run, f"out={target}"]),
        "export": lambda: eval_main(["export", run, "format=vqa", f"to={target}"]),
        "inspect": lambda: data_main(["inspect", str(shard), "--html", str(target)]),
        "index": lambda: data_main(["index", str(shard)]),
    }
    with largest_file(20):
        status = commands[command]()
    one_sentence(status, capsys)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.tar"]


# Numbers that are none.


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_never_answers(world: Path, options: dict[str, Any], value: float) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = FlamingoProcessor.from_pretrained(world / "model")
    inputs = processor(images=[[], [tiny.picture(0)]], text=["a", "<image>b"])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    inputs["pixel_values"][0] *= value
    with pytest.raises(UserError, match=r"logits of row \d are not finite"):
        model.generate(**inputs, max_new_tokens=3, **options)
    with pytest.raises(UserError, match="log-probability of candidate 0 in row 1 is not finite"):
        model.score_candidates(inputs, [[5], [6, 7]])


def test_minus_infinity_for_some_tokens_is_allowed(world: Path) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = FlamingoProcessor.from_pretrained(world / "model")
    inputs = processor(images=[[]], text=["a"])
    plain = model.generate(**inputs, max_new_tokens=3)
    last = int(plain[0, -1])
    assert last not in model.generate(**inputs, max_new_tokens=3, bad_words_ids=[[last]], num_beams=2)[0, -3:]


def test_answers_of_an_earlier_run_that_are_not_finite_are_asked_again(tmp_path: Path) -> None:
    lines = [
        '{"key": "a", "response": [NaN, -1.0]}',
        '{"key": "b", "response": {"text": "x", "ended": true, "log_prob": Infinity}}',
        '{"key": "c", "response": [-1.0, -2.0]}',
        '{"key": "d", "response": {"text": "x", "ended": true, "log_prob": null}}',
    ]
    (tmp_path / "responses.jsonl").write_text("\n".join(lines) + "\n")
    log = ResponseLog(tmp_path)
    assert sorted(log.known) == ["c", "d"]
    assert log.unreadable == 2
