"""This model inside lmms-eval (the extra `lmms`), on a tiny task of our own; few-shot images reach it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.inference.model import FlamingoResponder
from eval.plugins.harness_prompts import HarnessPromptBuilder, shown
from flamingo.errors import UserError
from tests.eval.test_plugins import NAMES, TASK, harness, image_of, lm_eval_folder, rows
from tests.model import tiny


@pytest.fixture(scope="module")
def responder() -> FlamingoResponder:
    return FlamingoResponder(*tiny.flamingo("llama"))


@pytest.mark.slow
def test_lmms_eval_runs_a_task_with_few_shot_images(responder: FlamingoResponder, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lmms_eval.api.task", exc_type=ImportError)
        import datasets
        import lmms_eval.api.metrics  # noqa: F401  (registers them)
        from lmms_eval.api.task import ConfigurableTask

        from eval.plugins.lmms_eval_model import FlamingoLMMs, register

        splits = {"train": datasets.Dataset.from_list(rows(12, 100)), "test": datasets.Dataset.from_list(rows(6, 500))}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
        config = {
            "task": "tiny",
            "dataset_path": str(tmp_path / "data"),
            "dataset_kwargs": {"load_from_disk": True},
            "fewshot_split": "train",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda doc, *more: doc["question"],
            "doc_to_target": "name",
            "doc_to_visual": image_of,
            "generation_kwargs": {"until": ["\n"], "max_new_tokens": 4},
            "metric_list": [{"metric": "exact_match"}],
        }
        task = ConfigurableTask(config=config)
        more = {"output_type": "multiple_choice", "doc_to_choice": NAMES, "doc_to_target": "label"}
        choices = ConfigurableTask(config={**config, **more, "metric_list": [{"metric": "acc"}]})
        lm = FlamingoLMMs(responder=responder, shots=2)
        lm.task_dict["tiny"] = task.dataset
        facts = [{"task": "tiny", "doc_id": i, "repeats": 1, "split": "test"} for i in range(6)]
        requests = [task.construct_requests(i, f"q{i}?", metadata=own) for i, own in enumerate(facts)]
        said = lm.generate_until(requests)
        from lmms_eval.api.instance import Instance

        ranked = [
            Instance("loglikelihood", ("q0?", f" {name}", task.doc_to_visual, 0, "tiny", "test"), 0, facts[0])
            for name in NAMES
        ]
        losses = [loss for loss, _ in lm.loglikelihood(ranked)]
        register()
        from lmms_eval.models import get_model

        assert get_model("flamingo") is FlamingoLMMs
    assert len(said) == 6
    assert lm._engine.cache.shown == 18 + 3
    query = shown("q0?", image_of(rows(1, 500)[0]))
    demos = lm._supports["tiny"].demos(query, "test 0", 2)
    prompt = HarnessPromptBuilder(responder).build(demos, query, 0, [f" {name}" for name in NAMES])
    ranks = responder.rank([prompt], responder.encode(prompt.images))[0]
    assert losses == pytest.approx([-score for score in ranks], abs=1e-3)
    answer = [{"acc": float(NAMES[i] == NAMES[int(np.argmax(ranks))])} for i in range(4)]
    assert [choices.process_results({"label": i}, [(loss, False) for loss in losses]) for i in range(4)] == answer
    assert all(one.answer.strip() in NAMES and len(one.images) == 1 for one in demos)
    without = FlamingoLMMs(responder=responder)
    without.task_dict["tiny"] = task.dataset
    without.generate_until(requests)
    assert without._engine.cache.shown == 6


@pytest.mark.slow
def test_demonstrations_come_from_a_split_that_is_not_asked(responder: FlamingoResponder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lmms_eval.api.task", exc_type=ImportError)
        from eval.plugins.lmms_eval_model import FlamingoLMMs

    class Task:
        """What the plugin reads of a task whose data has two splits and whose definition names the one it asks."""

        class config:  # noqa: N801
            fewshot_split, training_split, validation_split = None, None, "val"
            doc_to_choice, target_delimiter = None, " "

        dataset: dict[str, Any] = {"val": rows(6, 500), "train": rows(12, 100)}  # noqa: RUF012

        def doc_to_visual(self, doc: dict[str, Any]) -> Any:
            return image_of(doc)

        def doc_to_text(self, doc: dict[str, Any]) -> str:
            return str(doc["question"])

        def doc_to_target(self, doc: dict[str, Any]) -> str:
            return str(doc["name"])

    def drawn(**options: Any) -> list[Any]:
        lm = FlamingoLMMs(responder=responder, shots=2, **options)
        lm.task_dict["t"] = Task.dataset
        return lm._demos_and_query("q0?", Task().doc_to_visual, "t", "val", 0)[0]

    with pytest.raises(UserError, match=r"names no split to draw from; give support_split=NAME .* its data has: train"):
        drawn()
    with pytest.raises(UserError, match=r"task t has no split trian; .* its data has: train"):
        drawn(support_split="trian")
    images = {shown("", image_of(doc)).images for doc in Task.dataset["train"]}
    assert {one.images for one in drawn(support_split="train")} < images
    with pytest.raises(UserError, match="unknown key 'shot'; the keys are pretrained, device"):
        drawn(shot=2)


@pytest.mark.slow
def test_lmms_eval_is_run_by_its_own_command_line(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    lm_eval_folder(tmp_path)
    task = TASK.replace("doc_to_image", "doc_to_visual").format(folder=tmp_path / "tasks", names=", ".join(NAMES))
    (tmp_path / "tasks" / "tiny_images.yaml").write_text(task)
    done = harness("eval.plugins.lmms_eval_model", tmp_path, f"pretrained={tmp_path / 'model'},shots=2")
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("*results.json")
    (samples,) = (tmp_path / "out").rglob("*samples_tiny_images.jsonl")
    said = [json.loads(line) for line in samples.read_text().splitlines()]
    losses = [[float(one[0]) for one in sample["filtered_resps"]] for sample in said]
    assert len(said) == 6
    assert all(loss > 0 for one in losses for loss in one)
    right = [int(np.argmin(one)) == sample["doc_id"] % 4 for one, sample in zip(losses, said, strict=True)]
    assert json.loads(found.read_text())["results"]["tiny_images"]["acc,none"] == pytest.approx(np.mean(right))
    wrong = harness("eval.plugins.lmms_eval_model", tmp_path, "pretrained=/nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: pretrained=/nowhere is not the folder of a saved")
