"""The evaluation of a real, tiny Flamingo on the CPU: batching changes nothing, images change something."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.__main__ import main
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.model import FlamingoResponder
from eval.runner import run_cell
from eval.samples import Cell
from eval.spec import TaskSpec
from eval.task import EncodedImage, Task
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import colour_examples, write_pool, write_scenes
from tests.model import tiny


@pytest.fixture(scope="module")
def responder() -> FlamingoResponder:
    return FlamingoResponder(*tiny.flamingo("llama"))


def colours(output: Any) -> Task:
    spec = TaskSpec(queries=6, lead=" ", output=output, max_new_tokens=5)
    return ExampleTask("colours", spec, colour_examples(24))


@pytest.mark.parametrize("output", ["rank", "generate"])
@pytest.mark.parametrize("shots", [0, 2])
def test_batches_of_one_and_of_four_agree(responder: FlamingoResponder, output: str, shots: int) -> None:
    task = colours(output)
    cell = Cell("colours", shots, 0, "real")
    engines = [Engine(responder, FeatureCache(responder), size) for size in (1, 4)]
    runs = [run_cell(task, cell, engine, task.query_ids()) for engine in engines]
    for one, four in zip(*runs, strict=True):
        assert replace(one, log_probs=()) == replace(four, log_probs=())
        assert one.log_probs == pytest.approx(four.log_probs, abs=1e-4)
        assert len(one.log_probs) == len(one.candidates)


def test_prompt_ids_are_those_of_the_processor(responder: FlamingoResponder) -> None:
    task = colours("generate")
    _, processor = tiny.flamingo("llama")
    episode = task.episode(task.query_ids()[0], 2, 0)
    prompt = responder.builder.build(episode, 5)
    demos = [(turn.image.frames[0], turn.question + turn.text) for turn in episode.demos if turn.image is not None]
    assert episode.query.image is not None
    images, text = processor.prompt(demos, (episode.query.image.frames[0], episode.query.question))
    whole = processor(images=[images], text=[text])
    assert whole["input_ids"][0].tolist() == list(prompt.ids)
    features = FeatureCache(responder).features(prompt.images)
    direct = tiny.flamingo("llama")[0].encode_media(whole["pixel_values"])
    assert torch.allclose(features, direct, atol=1e-5)


def test_another_query_image_changes_the_scores_and_a_text_only_one_does_not(responder: FlamingoResponder) -> None:
    task = colours("rank")
    first, second = (task.episode(query, 2, 0) for query in task.query_ids()[:2])

    def scores(episode: object, bare: bool = False) -> list[float]:
        assert isinstance(episode, type(first))
        if bare:
            episode = replace(episode, demos=tuple(replace(turn, image=None) for turn in episode.demos))
        prompt = responder.builder.build(episode, 5)
        return responder.rank([prompt], FeatureCache(responder).features(prompt.images))[0]

    swapped = replace(first, query=replace(first.query, image=second.query.image))
    assert scores(swapped) != pytest.approx(scores(first), abs=1e-4)
    moved = replace(first, demos=tuple(replace(turn, image=second.query.image) for turn in first.demos))
    assert scores(moved) != pytest.approx(scores(first), abs=1e-4)
    assert scores(moved, bare=True) == scores(first, bare=True)


def test_prompts_without_any_image_and_clips_are_answered(responder: FlamingoResponder) -> None:
    task = colours("rank")
    episode = task.episode(task.query_ids()[0], 0, 0)
    assert episode.query.image is not None
    bare = responder.builder.build(replace(episode, query=replace(episode.query, image=None)), 5)
    cache = FeatureCache(responder)
    assert len(responder.rank([bare], cache.features(bare.images))[0]) == len(episode.candidates)
    clip = EncodedImage(episode.query.image.frames * 2)
    both = cache.features([clip, episode.query.image])
    assert both.shape[0] == 2
    assert not torch.equal(both[0], both[1])


def test_a_image_that_cannot_be_decoded_is_named(responder: FlamingoResponder) -> None:
    broken = EncodedImage((b"no image",))
    with pytest.raises(UserError, match=broken.sha256[:12]):
        responder.encode([broken])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(folder / "model", built_modules=True)
    processor.save_pretrained(folder / "model")
    write_scenes(folder / "data" / "toy" / "heldout" / "scene_pairs", 24)
    write_pool(folder / "data" / "toy" / "heldout" / "glyph_pairs")
    write_pool(folder / "data" / "toy" / "heldout" / "binding")
    return folder


def run_main(saved: Path, out: Path, *more: str) -> int:
    both = not any(option.startswith("task=") for option in more)
    options = [f"model={saved / 'model'}", f"data={saved / 'data'}", f"out={out}", "progress=false", "cache=null"]
    options += ["task.toy_vqa.queries=8", "task.toy_vqa.max_new_tokens=4"]
    if both:
        options += ["task=[toy_vqa,toy_binding]", "task.toy_binding.min_images=3"]
    return main([*options, *more])


def test_the_command_writes_everything(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["shots=[0,2]", "images=[real,shuffled,blank]", "seed=[0,1]", "limit=3"]
    for name, size in (("a", 1), ("b", 5)):
        assert run_main(saved, tmp_path / name, *options, f"batch_size={size}") == 0
    assert "toy_binding" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"results.json", "samples.jsonl", "responses.jsonl", "curve.png", "gallery.html", "gallery.png"}
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert len(results[0]["rows"]) == 2 * (2 * 3 - 1)
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["images"] == results[1]["images"]
    for name in ("curve.png", "gallery.png"):
        Image.open(io.BytesIO((tmp_path / "a" / name).read_bytes())).verify()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["shots=[0,30]"], "shots=30 is more than the 16 that task toy_vqa allows"),
        (["shots=[8]", "task=toy_vqa"], "shots=8 does not fit the model's context for task toy_vqa"),
        (["shots=[1]", "model=/nowhere"], "model=/nowhere is not the folder of a saved model"),
        (["data=/nowhere"], "/nowhere/toy/heldout/scene_pairs does not exist"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run_main(saved, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
