"""Objective `preference`: DPO's loss, pairs out of shards, and a preference that is learnt."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches.collate import PreferenceCollate
from data.dataset import DatasetSpec
from data.errors import ContentError
from data.shards.document import Document, Image, Text
from data.shards.reader import RawSample, raw_sample
from data.shards.writer import ShardWriter
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.model_config import FreezePolicy, ModelConfig
from flamingo.training.objectives import lora, preference
from flamingo.training.objectives.preference import PreferenceObjective
from tests.fixtures import png
from tests.model import tiny
from tests.training.commands import losses, on_one_and_two_processes
from tests.training.world import COLOURS, config, write_world
from train import train

SPEC = DatasetSpec(name="pairs", batch_size=4, max_tokens=64, max_images=2)


def pair(chosen: str, rejected: Any, question: str = "What?", images: int = 1) -> Document:
    rng = np.random.default_rng(len(chosen))
    nodes: list[Any] = [Image((number,)) for number in range(images)]
    nodes += [Text(question), Text(chosen)]
    meta = {} if rejected is None else {"rejected": rejected}
    return Document("k", nodes, [png(COLOURS["red"], rng, 16) for _ in range(images)], meta)


def sample(collate: PreferenceCollate, document: Document, spec: DatasetSpec = SPEC) -> Any:
    return collate.sample(spec, raw_sample(document, document.key), np.random.default_rng(0))


def test_a_batch_holds_both_answers_and_each_image_once() -> None:
    _, processor = tiny.flamingo("llama")
    collate = PreferenceCollate(processor)
    documents = [pair(" red", " a blue one"), pair(" one", " no", images=2), pair(" x", " yes", images=0)]
    batch = collate.batch(SPEC, [sample(collate, document) for document in documents])
    assert batch["image_counts"].tolist() == [1, 2, 0, 1, 2, 0]
    assert len(batch["pixel_values"]) == 3
    end = [processor.eoc_token_id, processor.eos_token_id]
    for row, answer in enumerate((" red", " one", " x", " a blue one", " no", " yes")):
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == processor.encode_text(answer) + end
        prompt = [1, *[processor.image_token_id] * int(batch["image_counts"][row]), *processor.encode_text("What?")]
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert [token for token in ids if token != end[0]] == [*prompt, *processor.encode_text(answer), end[1]]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (pair(" same", " same"), "equal preference"),
        (pair(" a", None), "not a preference"),
        (pair(" a", ""), "not a preference"),
        (pair(" a", ["b"]), "not a preference"),
        (Document("k", [Text("Q"), Image((0,))], [b""], {"rejected": "b"}), "not a preference"),
        (Document("k", [], [], {"rejected": "b"}), "not a preference"),
        (pair(" a", " b" * 64), "too long"),
        (pair(" a", " b", images=3), "too long"),
    ],
)
def test_what_is_not_a_pair_is_named(document: Document, reason: str) -> None:
    _, processor = tiny.flamingo("llama")
    with pytest.raises(ContentError) as caught:
        sample(PreferenceCollate(processor), document)
    assert caught.value.reason == reason


@pytest.mark.parametrize("question", [[], [Text("What?", role="user")]])
def test_a_conversation_is_refused_by_its_roles(question: list[Text]) -> None:
    _, processor = tiny.flamingo("llama")
    document = Document("k", [*question, Text("a", role="assistant")], [], {"rejected": "b"})
    with pytest.raises(UserError, match="only objective=flamingo keeps apart who says what"):
        sample(PreferenceCollate(processor), document)


def adapted(family: str = "llama") -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A model with adapters that are not nothing, beside the processor."""
    model, processor = tiny.flamingo(family)
    model.freeze({"resampler": "frozen", "cross_attention": "frozen", "new_tokens": "frozen"})
    lora.add_adapters(model.language_model, rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.train(), processor


def slow_log_prob(model: Any, batch: dict[str, Tensor], row: int, images: Tensor) -> Tensor:
    """Sum of the log-probabilities of a row's labels, one token after the other."""
    length = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row : row + 1, :length]
    logits = model(input_ids=ids, pixel_values=images, image_counts=batch["image_counts"][row : row + 1]).logits[0]
    total = torch.zeros(())
    for position in range(1, length):
        if (label := int(batch["labels"][row, position])) != -100:
            total = total + logits[position - 1].double().log_softmax(-1)[label].float()
    return total


@pytest.mark.parametrize("family", ["llama", "gemma2", "mosaic_gpt"])
def test_the_loss_and_its_gradient_are_those_of_the_formula(family: str) -> None:
    model, processor = adapted(family)
    reference, _ = tiny.flamingo(family)
    collate = PreferenceCollate(processor)
    documents = [pair(" red", " a blue one"), pair(" one", " no", images=2), pair(" x", " yes", images=0)]
    batch = collate.batch(SPEC, [sample(collate, document) for document in documents])
    objective = PreferenceObjective(beta=0.3)
    assert objective.counts(batch) == {"preference": 3}
    loss = objective.sums(model, batch)["preference"]
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert found
    assert all("lora_" in name for name in found)
    model.zero_grad()
    pixels, starts = batch["pixel_values"], (0, 1, 3)
    total: Any = 0.0
    for index in range(3):
        images = pixels[starts[index] : starts[index] + int(batch["image_counts"][index])]
        ratios = []
        for row in (index, index + 3):
            with torch.no_grad():
                before = slow_log_prob(reference, batch, row, images)
            ratios.append(slow_log_prob(model, batch, row, images) - before)
        total = total - F.logsigmoid(0.3 * (ratios[0] - ratios[1]))
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    total.backward()
    for name, weight in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["opt", "mosaic_gpt"])
def test_an_lm_that_drops_out_answers_both_times_alike(family: str, recompute: bool, tmp_path: Path) -> None:
    """OPT and MosaicGPT drop out by rates that are not modules'; with fresh adapters both passes are of one network."""
    model, processor = tiny.flamingo(family)
    for name in ("dropout", "attn_pdrop"):
        if hasattr(model.config.text_config, name):
            setattr(model.config.text_config, name, 0.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    frozen: Any = "frozen"
    only_lora = FreezePolicy(language="lora", resampler=frozen, cross_attention=frozen, new_tokens=frozen)
    alone = Processes(0, 1, torch.device("cpu"))
    setup = preference.build(ModelConfig(init=str(tmp_path), freeze=only_lora), tmp_path, alone, list)
    if recompute:
        setup.model.activation_checkpointing_enable()  # type: ignore[operator]
    setup.model.train()
    collate = PreferenceCollate(processor)
    batch = collate.batch(SPEC, [sample(collate, pair(" red", " a blue one")), sample(collate, pair(" one", " no"))])
    loss = setup.objective.sums(setup.model, batch)["preference"]
    assert float(loss.detach()) == pytest.approx(2 * float(torch.tensor(2.0).log()), abs=1e-6)
    loss.backward()
    assert any(w.grad is not None and bool(w.grad.any()) for n, w in setup.model.named_parameters() if "lora_B" in n)


def test_without_its_adapters_a_model_is_what_it_was_and_they_still_train() -> None:
    model, processor = adapted()
    plain, _ = tiny.flamingo("llama")
    inputs = tiny.batch(processor)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with lora.without_adapters(model):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    assert not torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "a red square", and pairs that prefer "a red ring"; some are none."""
    root = write_world(tmp_path_factory.mktemp("world"))
    settings = config(root, root / "start", "flamingo", steps=60)
    settings.model.freeze.language = "train"
    del settings.data.datasets["pages"]
    train(settings)
    rng = np.random.default_rng(5)
    for name, number in (("train", 96), ("held", 12)):
        with ShardWriter(root / name, name, 16) as writer:
            for index in range(number):
                colour = list(COLOURS)[index % 4]
                chosen, rejected = f" {colour} ring", f" {colour} square"
                if name == "train" and index == 50:
                    rejected = chosen
                nodes: list[Any] = [Image((0,)), Text("a"), Text(chosen)]
                writer.write(Document("", nodes, [png(COLOURS[colour], rng, 16)], {"rejected": rejected}))
    return root


def run_of(world: Path, run_dir: Path, **run: Any) -> TrainConfig:
    settings = config(world, run_dir, "flamingo", **run)
    settings.objective = "preference"
    settings.model.init = str(world / "start" / "model")
    settings.model.vision.config = settings.model.language.config = settings.model.language.tokenizer = None
    frozen: Any = "frozen"
    settings.model.freeze = FreezePolicy(language="lora", resampler=frozen, cross_attention=frozen, new_tokens=frozen)
    settings.data.datasets = {"pairs": {"shards": [str(world / "train")], "batch_size": 8, "max_tokens": 32}}
    settings.optim.lr = 1e-2
    return settings


def win_rate(folder: Path, shards: Path) -> float:
    """Share of held-out pairs of which the model thinks the chosen answer likelier."""
    from data.dataset import open_store

    model = FlamingoForConditionalGeneration.from_pretrained(folder)
    processor = FlamingoProcessor.from_pretrained(folder)
    store = open_store(DatasetSpec(name="held", shards=[str(shards)], batch_size=1))
    wins = []
    for part, length in enumerate(store.lengths()):
        for row in range(length):
            raw: RawSample = store.read(part, row)
            answers = [raw.nodes[-1].text, raw.meta["rejected"]]  # type: ignore[union-attr]
            inputs = processor(images=[[raw.image(0)]], text="<image>a")
            scores = model.score_candidates(inputs, [processor.encode_text(text) for text in answers])[0]
            wins.append(float(scores[0] > scores[1]))
    return sum(wins) / len(wins)


def test_planted_preferences_turn_the_win_rate_and_equal_pairs_are_counted(world: Path, tmp_path: Path) -> None:
    assert win_rate(world / "start" / "model", world / "held") < 0.1
    train(run_of(world, tmp_path / "run", steps=30))
    assert win_rate(tmp_path / "run" / "model", world / "held") > 0.9
    seen = losses(tmp_path / "run")
    assert seen[0] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-5)  # the adapters begin as nothing
    assert seen[-1] < 0.2
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in bad} == {"equal preference"}


def test_a_run_resumes_bit_for_bit_and_is_validated(world: Path, tmp_path: Path) -> None:
    for name, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            settings = run_of(world, tmp_path / name, steps=steps)
            settings.run.validation.every = 2
            settings.run.validation.datasets = {"held": {"shards": [str(world / "held")], "batch_size": 4}}
            train(settings)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert any("held" in key for key in last)


def test_what_the_objective_asks_of_a_config_is_said(world: Path, tmp_path: Path) -> None:
    settings = run_of(world, tmp_path)
    assert settings.problems() == []
    settings.model.freeze.resampler = "train"
    assert any("so only these train: set model.freeze.language=lora" in problem for problem in settings.problems())
    settings = run_of(world, tmp_path)
    settings.model.init = None
    assert any(problem.startswith("model.init is missing") for problem in settings.problems())
    settings = copy.deepcopy(run_of(world, tmp_path))
    settings.model.preference.beta = 0.0
    assert any("model.preference.beta" in problem for problem in settings.problems())


def test_its_memory_is_planned(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = run_of(world, tmp_path / "run")
    settings.plan = True
    train(settings)
    assert "activations" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(world: Path, tmp_path: Path) -> None:
    one, two = on_one_and_two_processes(lambda folder: run_of(world, folder, steps=3), tmp_path)
    assert two == pytest.approx(one, abs=1e-5)
