"""Objective `align` against a slow formula, on toy pairs, beside itself on two processes, and before `flamingo`."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import data.batches.collate as collate_classes
from data.batches.collate import AlignCollate
from data.dataset import DatasetSpec
from data.errors import ContentError
from data.shards.document import Document, Image, Text
from data.shards.reader import RawSample, raw_sample
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.model_config import AlignOptions
from flamingo.training.objectives import align
from flamingo.training.objectives.align import Aligned, AlignObjective, info_nce
from tests.fixtures import png
from tests.model import tiny
from tests.training.commands import lines
from tests.training.world import COLOURS, config, write_world
from train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_the_loss_is_the_slow_formula() -> None:
    torch.manual_seed(0)
    seen, said, names = torch.randn(5, 6), torch.randn(5, 6), [3, 7, 3, 1, 7]

    def cosine(i: int, j: int) -> float:
        return float(seen[i] @ said[j] / seen[i].norm() / said[j].norm())

    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or names[j] != names[i]]
        by_image, by_text = (
            sum(math.exp((cosine(*pair) - cosine(i, i)) / 0.1) for pair in pairs)
            for pairs in ([(i, j) for j in others], [(j, i) for j in others])
        )
        total += (math.log(by_image) + math.log(by_text)) / 2
    assert info_nce(seen, said, torch.tensor(names), 0.1).item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("pairs", [1, 3])
def test_texts_that_are_all_alike_teach_nothing(pairs: int) -> None:
    """Three equal vectors differ from their mean by rounding: divided by that, the distance was 1e17."""
    flamingo, _ = tiny.flamingo("llama")
    aligned = Aligned(flamingo, AlignOptions())
    batch = {
        "image": torch.stack([tiny.picture(seed) for seed in range(pairs)]),
        "text": torch.full((pairs, 2), 5),
        "share": torch.full((pairs, 2), 0.5),
        "name": torch.zeros(pairs, dtype=torch.long),
    }
    terms = AlignObjective(0.07).sums(aligned, batch)
    assert {name: float(term.detach()) for name, term in terms.items()} == {"pairs": 0.0, "distance": 0.0}
    torch.stack(list(terms.values())).sum().backward()
    gradients = [weight.grad for weight in aligned.parameters() if weight.grad is not None]
    assert gradients
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in gradients)


def test_texts_are_name_and_keywords(world: Path, tmp_path: Path) -> None:
    """A name and its keywords count by their shares; equal names have one number, whatever the keywords are."""
    collate = collate_of(config(world, tmp_path / "run", "align"))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    texts = ["red square, big, green star", "blue", "Red square, small"]
    batch = collate.batch(
        DatasetSpec(name="x", batch_size=1, shards=["x"], max_tokens=8), [(image, text) for text in texts]
    )
    name = collate.encode(" red square")
    assert batch["text"][0, : len(name)].tolist() == name
    torch.testing.assert_close(batch["share"].sum(1), torch.ones(3))
    torch.testing.assert_close(batch["share"][0, : len(name)].sum(), torch.tensor(0.7))
    assert batch["name"][0] == batch["name"][2] != batch["name"][1]
    long = collate.batch(DatasetSpec(name="x", batch_size=1, shards=["x"], max_tokens=2), [(image, ", ".join(texts))])
    assert long["text"].shape == (1, 2)
    torch.testing.assert_close(long["share"].sum(1), torch.ones(1))


def test_a_text_that_begins_with_no_name_is_passed_over(world: Path, tmp_path: Path) -> None:
    collate, random = collate_of(config(world, tmp_path / "run", "align")), np.random.default_rng(0)
    spec = DatasetSpec(name="x", batch_size=1, shards=["x"])
    with pytest.raises(ContentError, match="before the first comma of ', big'"):
        collate.sample(spec, sample_of(" , big"), random)
    assert collate.sample(spec, sample_of("red, big"), random)[1] == "red, big"


def sample_of(text: str) -> RawSample:
    document = Document("k", [Image((0,)), Text(text)], [png(COLOURS["red"], np.random.default_rng(0), 16)], {})
    return raw_sample(document, "k")


def collate_of(settings: TrainConfig) -> AlignCollate:
    setup = align.build(settings.model, Path(settings.run.dir), Processes(0, 1, torch.device("cpu")), lambda: [])
    made: AlignCollate = setup.collate(collate_classes)
    return made


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    settings = config(world, tmp_path_factory.mktemp("trained") / "run", "align", steps=60, checkpoint_every=60)
    settings.model.vision.cache = "memory"
    train(settings)
    return settings


def test_images_come_to_look_like_their_names(world: Path, trained: TrainConfig) -> None:
    """The loss falls, and images that were not trained on are nearest to their own of four names."""
    run = Path(trained.run.dir)
    log = lines(run)
    assert sum(line["loss"] for line in log[-5:]) < 0.5 * sum(line["loss"] for line in log[:5])
    rng, names = np.random.default_rng(99), list(COLOURS)
    collate = collate_of(trained)
    asked = [name for name in names for _ in range(4)]
    pixels = (np.asarray(PIL.Image.open(io.BytesIO(png(COLOURS[name], rng, 16)))) for name in asked)
    images = [collate.transform(torch.from_numpy(each.copy()).permute(2, 0, 1)) for each in pixels]
    samples = list(zip(images, (f"a {name} square" for name in asked), strict=True))
    batch = collate.batch(DatasetSpec(name="x", batch_size=1, shards=["x"]), samples)
    flamingo = FlamingoForConditionalGeneration.from_pretrained(str(run / "model"))
    with torch.no_grad():
        seen, said = Aligned(flamingo, trained.model.align)(batch["image"], batch["text"], batch["share"])
    said = said - said.mean(0)
    nearest = (torch.nn.functional.normalize(seen) @ torch.nn.functional.normalize(said[::4]).T).argmax(1)
    assert (nearest == torch.arange(4).repeat_interleave(4)).float().mean() >= 0.75  # a guess: 0.25


def test_all_but_resampler_and_first_attention_stay(world: Path, trained: TrainConfig, tmp_path: Path) -> None:
    short = config(world, tmp_path / "run", "align", steps=1)
    short.optim.lr = 1e-12
    train(short)
    before, after = (load_file(Path(run.run.dir) / "model" / "model.safetensors") for run in (short, trained))
    moved = {name for name, value in before.items() if not torch.allclose(value, after[name], atol=1e-6)}
    assert moved
    assert all(name.startswith(("resampler.", "cross_attn_blocks.0.attn.")) for name in moved)
    assert after["cross_attn_blocks.0.attn_gate"].item() == pytest.approx(trained.model.align.gate)
    assert after["cross_attn_blocks.1.attn_gate"].item() == 0


def test_flamingo_goes_on_from_it(world: Path, tmp_path: Path) -> None:
    """As two stages of one run, of which the second computes in bf16; and it is planned."""
    settings = config(world, tmp_path / "run", "flamingo", steps=2)
    pairs = config(world, tmp_path / "run", "align").data.datasets
    settings.model.vision.cache = "memory"
    settings.data.datasets, own = {}, settings.data.datasets
    settings.stages = {
        "align": {"objective": "align", "data": {"datasets": pairs}},
        "flamingo": {"data": {"datasets": own}, "run": {"precision": "bf16"}},
    }
    plan = copy.deepcopy(settings)
    plan.plan = True
    train(plan)
    assert train(settings) == tmp_path / "run" / "flamingo" / "model"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_it_is_the_same(world: Path, tmp_path: Path, precision: str) -> None:
    train(config(world, tmp_path / "plain", "align"))
    train(config(world, tmp_path / "sharded", "align", parallel="fsdp", precision=precision))
    plain, sharded = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "sharded"))
    assert sharded == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 0.05)


def test_what_it_cannot_do_is_refused(world: Path, tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        settings = config(world, tmp_path / "run", "align", micro_batches=changes.pop("micro_batches", 1))
        for part, value in changes.items():
            setattr(settings.model.freeze, part, value)
        return " ".join(settings.problems())

    assert said() == ""
    assert "run.micro_batches must be 1 for objective align" in said(micro_batches=2)
    assert "model.freeze.language=lora is not for objective align" in said(language="lora")
    assert "model.freeze.resampler=frozen leaves objective align nothing to learn with" in said(resampler="frozen")
    settings = config(world, tmp_path / "run", "align")
    (name,) = settings.data.datasets
    settings.data.datasets[name]["batch_size"] = 1
    assert f"data.datasets.{name}.batch_size=1 gives objective align nothing to compare" in " ".join(
        settings.problems()
    )
