"""This model inside lm-evaluation-harness, on a tiny task of our own; few-shot images reach it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.inference.model import FlamingoResponder
from eval.plugins.harness_prompts import HarnessPromptBuilder, HarnessSupport, shown
from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS
from tests.fixtures import png
from tests.model import tiny

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def responder() -> FlamingoResponder:
    return FlamingoResponder(*tiny.flamingo("llama"))


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"question": f"q{i}?", "label": i % 4, "png": png(COLOURS[NAMES[i % 4]], seed + i), "name": NAMES[i % 4]}
        for i in range(count)
    ]


def image_of(doc: dict[str, Any], *more: Any) -> list[Image.Image]:
    return [Image.open(io.BytesIO(doc["png"]))]


def test_tags_take_the_images_in_order_and_the_rest_stand_in_front(responder: FlamingoResponder) -> None:
    prompts, tag = HarnessPromptBuilder(responder), responder.processor.image_token_id
    images = [png(COLOURS["red"], seed) for seed in range(3)]
    demo = shown("a<image>b", images[:2], " c")
    prompt = prompts.build([demo], shown("d<image>e", images[2]), 4)
    encode, end = responder.builder.encode, responder.processor.eoc_token_id
    expected = [*responder.start, tag, *encode("a"), tag, *encode("b c"), end, *encode("d"), tag, *encode("e")]
    assert list(prompt.ids) == expected
    assert [image.frames[0] for image in prompt.images] == images
    ranked = prompts.build([demo], shown("d<image>e", images[2]), 0, [" yes", " yet"])
    assert ranked.ids == prompt.ids
    assert ranked.candidates == (encode(" yes"), encode(" yet"))
    with pytest.raises(UserError, match=r"2 <image> tags and 1 images.* give shots=N"):
        shown("<image>a<image>b", images[0])


def test_demonstrations_are_dropped_whole_and_never_the_query(responder: FlamingoResponder) -> None:
    prompts = HarnessPromptBuilder(responder)
    demos = [shown(f"demo {i} " + "x" * 20, png(COLOURS["blue"], i), " y") for i in range(8)]
    prompt = prompts.build(demos, shown("query", png(COLOURS["red"], 50)), 10)
    assert 0 < prompt.shots_kept < 8
    assert len(prompt.images) == prompt.shots_kept + 1
    text = responder.processor.decode(list(prompt.ids))
    assert "demo 7" in text
    assert "demo 0" not in text
    with pytest.raises(UserError, match="the model's context is 128"):
        prompts.build([], shown("z" * 200, None), 10)


def test_support_is_nested_and_refuses_the_query(responder: FlamingoResponder) -> None:
    examples = rows(12, 100)
    support = HarnessSupport("task", examples, lambda doc: shown(doc["question"], image_of(doc), f" {doc['name']}"), 0)
    query = shown(examples[3]["question"], image_of(examples[3]))
    longest = support.demos(query, "3", 8)
    assert support.demos(query, "3", 3) == longest[-3:]
    assert all(one.images != query.images for one in support.demos(query, "3", 11))
    with pytest.raises(UserError, match="use fewer shots"):
        support.demos(query, "3", 12)


def lm_eval_task(output: str) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    splits = {"train": datasets.Dataset.from_list(rows(12, 100)), "test": datasets.Dataset.from_list(rows(6, 500))}
    config: dict[str, Any] = {
        "task": f"tiny_{output}",
        "custom_dataset": lambda **options: splits,
        "fewshot_split": "train",
        "test_split": "test",
        "output_type": output,
        "doc_to_text": "<image>{{question}}",
        "doc_to_image": image_of,
    }
    if output == "multiple_choice":
        config |= {"doc_to_target": "label", "doc_to_choice": NAMES, "metric_list": [{"metric": "acc"}]}
    else:
        config |= {"doc_to_target": "name", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
        config |= {"metric_list": [{"metric": "exact_match"}]}
    return ConfigurableTask(config=config)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["multiple_choice", "generate_until"])
def test_lm_eval_runs_a_task_with_few_shot_images(responder: FlamingoResponder, output: str) -> None:
    pytest.importorskip("lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm_eval's own
        import lm_eval

        from eval.plugins.lm_eval_model import FlamingoLM

        task = lm_eval_task(output)
        lm = FlamingoLM(responder=responder, shots=2, tasks={f"tiny_{output}": task})
        found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    assert found is not None
    samples = found["samples"][f"tiny_{output}"]
    assert len(samples) == 6
    assert lm._engine.cache.shown == 6 * 3
    assert lm._engine.cache.encoded == len(lm._engine.cache.images) <= 18
    prompts = HarnessPromptBuilder(responder)
    support = lm._supports[f"tiny_{output}"]
    for sample in samples:
        doc = rows(6, 500)[sample["doc_id"]]  # what is logged has its bytes as text
        query = shown(f"<image>{doc['question']}", image_of(doc))
        demos = support.demos(query, str(sample["doc_id"]), 2)
        assert all(one.text.startswith("<image>q") and one.answer.strip() in NAMES for one in demos)
        if output == "generate_until":
            continue
        prompt = prompts.build(demos, query, 0, [f" {name}" for name in NAMES])
        features = responder.encode(prompt.images)
        scores = responder.rank([prompt], features)[0]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(scores, abs=1e-3)


@pytest.mark.slow
def test_lm_eval_text_requests(responder: FlamingoResponder) -> None:
    pytest.importorskip("lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance

        from eval.plugins.lm_eval_model import FlamingoLM

    lm = FlamingoLM(responder=responder)

    def asked(kind: Any, *arguments: Any, number: int = 0) -> Any:
        return Instance(kind, {}, arguments, 0, ("t", number, 1))

    (said,) = lm.generate_until([asked("generate_until", "once", {"until": [], "max_gen_toks": 3})])
    pair = [asked("loglikelihood", "once", said, number=1), asked("loglikelihood", "once", " upon", number=2)]
    if len(responder.builder.encode(said)) == 3:
        assert lm.loglikelihood(pair)[0][1] is True
    assert lm.loglikelihood(pair)[1][1] is False
    text = "a text of some length that is longer than one window " * 4
    (whole,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    ids = list(responder.builder.encode(text))
    assert len(ids) > 128
    context, total = 127, 0.0
    for start in range(0, len(ids), context):
        own = ids[start : start + context]
        before = ids[max(0, start + len(own) - context - 1) : start] or [lm._prompts.first_token]
        total += responder.rank([HarnessPromptBuilder.bare(before, own)], torch.zeros(0, 0, 0))[0][0]
    assert whole == pytest.approx(total, abs=0.05)


TASK = """task: tiny_images
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
fewshot_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "<image>{{{{question}}}}"
doc_to_image: !function shown.image
doc_to_target: label
doc_to_choice: [{names}]
metric_list: [{{metric: acc}}]
"""
SHOWN = """from PIL import Image


def image(doc):
    return [Image.open(doc["image"])]
"""


def lm_eval_folder(folder: Path) -> None:
    """A saved model, and a task of lm_eval's own kind on local files."""
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(folder / "model", built_modules=True)
    processor.save_pretrained(folder / "model")
    tasks = folder / "tasks"
    tasks.mkdir()
    for split, count, seed in (("train", 12, 100), ("test", 6, 500)):
        lines = []
        for number, row in enumerate(rows(count, seed)):
            image = folder / f"{split}{number}.png"
            image.write_bytes(row.pop("png"))
            lines.append(json.dumps(row | {"image": str(image)}))
        (tasks / f"{split}.jsonl").write_text("\n".join(lines))
    (tasks / "tiny_images.yaml").write_text(TASK.format(folder=tasks, names=", ".join(NAMES)))
    (tasks / "shown.py").write_text(SHOWN)


def harness(module: str, folder: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    """A harness's own command on the task of `lm_eval_folder`, with these `model_args`."""
    command = [sys.executable, "-m", module, "--model", "flamingo", "--tasks", "tiny_images"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--log_samples"]
    command += ["--model_args", arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_lm_eval_is_run_by_its_own_command_line(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    lm_eval_folder(tmp_path)
    done = harness(
        "eval.plugins.lm_eval_model",
        tmp_path,
        f"pretrained={tmp_path / 'model'},shots=2,include_path={tmp_path / 'tasks'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny_images" in done.stdout
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(found.read_text())["results"]["tiny_images"]["acc,none"] <= 1
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 6
    wrong = harness("eval.plugins.lm_eval_model", tmp_path, "pretrained=/nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: pretrained=/nowhere is not the folder of a saved")
