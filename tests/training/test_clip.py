"""A CLIP that exists trains on, and what is written is one that open_clip reads, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from flamingo.errors import UserError
from flamingo.training.config import TrainConfig
from flamingo.training.model_config import LanguageSource, VisionSource
from flamingo.training.objectives import contrastive
from tests.training.commands import lines
from tests.training.world import CLIP, config, write_world
from train import checked, train

TEXTS = ["a red square", "two small green stars at the top left of a big white ring and a red circle", ""]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours, trained from nothing."""
    return train(config(world, tmp_path_factory.mktemp("first") / "run", "contrastive", steps=3))


def going_on(world: Path, run_dir: Path, name: str, pretrained: str | None = None, **run: Any) -> TrainConfig:
    settings = config(world, run_dir, "contrastive", **run)
    settings.model.vision = VisionSource(name=name, pretrained=pretrained)
    settings.model.language = LanguageSource()
    return settings


def test_open_clip_reads_what_is_written_with_its_tokenizer(world: Path, first: Path) -> None:
    model = open_clip.create_model(f"local-dir:{first}")
    theirs = open_clip.get_tokenizer(f"local-dir:{first}")
    settings = config(world, first.parent, "contrastive")
    ours = contrastive.new_clip(settings.model).texts
    assert theirs(TEXTS).tolist() == ours(TEXTS).tolist()
    with torch.no_grad():
        features = model.encode_text(theirs(TEXTS))
    assert not torch.allclose(features[0], features[1])


def test_it_goes_on_where_it_was(world: Path, first: Path, tmp_path: Path) -> None:
    settings = going_on(world, tmp_path / "run", str(first), steps=2)
    settings.optim.lr = 1e-12
    again = train(settings)
    before, after = (open_clip.create_model(f"local-dir:{folder}").state_dict() for folder in (first, again))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
    ids = [open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS).tolist() for folder in (first, again)]
    assert ids[0] == ids[1]
    described = [json.loads((folder / "open_clip_config.json").read_text()) for folder in (first, again)]
    assert described[0] == described[1]
    # The loss of its first update is that of the finished model on those pairs, far below that of a new one.
    new = config(world, tmp_path / "new", "contrastive", steps=1)
    train(new)
    assert lines(tmp_path / "run")[0]["loss"] < lines(tmp_path / "new")[0]["loss"]


def test_a_released_model_trains_on_with_its_own_text_and_images(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a name of open_clip's with a file of weights; its tokenizer is open_clip's own."""
    architecture = json.loads(json.dumps(CLIP))
    architecture["text_cfg"] |= {"context_length": 12, "vocab_size": 49408}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    weights = tmp_path / "weights.pt"
    torch.manual_seed(5)
    start = open_clip.create_model("tiny-clip", pretrained_text=False)
    torch.save(start.state_dict(), weights)
    settings = going_on(world, tmp_path / "run", "tiny-clip", str(weights), steps=1)
    settings.optim.lr = 1e-12
    settings.model.vision.image_size = 32
    made = train(settings)
    again = open_clip.create_model(f"local-dir:{made}")
    for name, value in start.state_dict().items():
        if name != "visual.positional_embedding":  # of 5 positions, and now 17
            torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)
    assert again.visual.image_size in (32, (32, 32))
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert list(again.visual.preprocess_cfg[key]) == list(start.visual.preprocess_cfg[key])
    tokenizer = open_clip.get_tokenizer(f"local-dir:{made}")
    assert tokenizer(TEXTS).tolist() == open_clip.get_tokenizer("tiny-clip")(TEXTS).tolist()
    used = config(world, tmp_path / "flamingo", "flamingo", steps=1)
    used.model.vision = VisionSource(name=str(made))
    train(used)


def test_it_is_planned_like_a_new_one(world: Path, first: Path, tmp_path: Path, capsys: Any) -> None:
    found = []
    for settings in (config(world, tmp_path / "a", "contrastive"), going_on(world, tmp_path / "b", str(first))):
        settings.plan = True
        train(settings)
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_what_cannot_go_on_is_refused(world: Path, first: Path, tmp_path: Path) -> None:
    both = going_on(world, tmp_path / "run", str(first))
    both.model.language.tokenizer = str(world / "tokenizer")
    assert any("model.language.tokenizer has no effect with model.vision.name" in each for each in checked(both)[1])
    for name, said in (
        (
            "nobody/knows",
            r"model\.vision\.name=nobody/knows is neither a name of open_clip nor a folder with open_clip",
        ),
        ("ViT-B-32", r"model\.vision\.pretrained is missing: name open_clip's weights of ViT-B-32, or their file"),
    ):
        with pytest.raises(UserError, match=said):
            train(going_on(world, tmp_path / "run", name))
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in first.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    (spoiled / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"spoiled cannot be loaded by open_clip: "):
        train(going_on(world, tmp_path / "run", str(spoiled)))
    for plan in (False, True):
        broken = going_on(world, tmp_path / "run", str(spoiled))
        broken.plan = plan
        (spoiled / "open_clip_config.json").write_text("{")
        with pytest.raises(UserError, match=r"open_clip_config\.json cannot be read: "):
            train(broken)
    described = json.loads((first / "open_clip_config.json").read_text())
    (spoiled / "open_clip_model.safetensors").write_bytes((first / "open_clip_model.safetensors").read_bytes())
    del described["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (spoiled / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"its tokenizer has 49408 tokens and its text encoder \d+"):
        train(going_on(world, tmp_path / "run", str(spoiled)))
