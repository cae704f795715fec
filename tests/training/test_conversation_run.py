"""A run on conversations: the template is tried at the start, trained by, and saved with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.chat import ChatSession
from flamingo.processing.chat import CHAT_TEMPLATES
from flamingo.training.config import TrainConfig
from tests.fixtures import png
from tests.training.world import COLOURS, config, write_world
from train import train


def settings(root: Path, template: str | None, steps: int = 4) -> TrainConfig:
    world = write_world(root / "world")
    rng = np.random.default_rng(0)
    with ShardWriter(root / "talk", "talk", 16) as writer:
        for number in range(16):
            one, two = (list(COLOURS)[(number + k) % 4] for k in (0, 1))
            nodes: list[Node] = [
                Image((0,), role="user"),
                Text("what colour", False, "user"),
                Text(f"a {one} square", True, "assistant"),
                Text("and now", False, "user"),
                Image((1,), role="user"),
                Text(f"a {two} square", True, "assistant"),
            ]
            writer.write(Document("", nodes, [png(COLOURS[name], rng, 16) for name in (one, two)]))
    made = config(world, root / "run", "flamingo", steps=steps)
    made.data.datasets = {"talk": {"shards": [str(root / "talk")], "batch_size": 8, "max_tokens": 64}}
    made.model.chat_template = template
    return made


def test_a_run_on_conversations_saves_its_template_and_converses(tmp_path: Path) -> None:
    train(settings(tmp_path, "otter"))
    folder = tmp_path / "run" / "model"
    processor = FlamingoProcessor.from_pretrained(folder)
    assert processor.chat_template == CHAT_TEMPLATES["otter"]
    model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
    ends = model.generation_config.eos_token_id
    assert processor.turns().end_id in (ends if isinstance(ends, list) else [ends])
    session = ChatSession(model, processor)
    for _ in range(2):
        session.say("what colour", [png(COLOURS["red"], 1, 16)], max_new_tokens=4, do_sample=False)
    assert len(session.messages) == 4


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("oter", "chat_template='oter' is neither"),
        ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "drops the roles"),
        (None, "a document is a conversation, which cannot be written: the processor: the messages have roles"),
    ],
)
def test_a_template_that_cannot_is_refused_before_an_update(tmp_path: Path, template: str | None, said: str) -> None:
    with pytest.raises(UserError) as refused:
        train(settings(tmp_path, template))
    assert said in str(refused.value)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_template_is_for_the_flamingo_objective(tmp_path: Path) -> None:
    made = config(tmp_path, tmp_path / "run", "language")
    made.model.chat_template = "otter"
    assert any("model.chat_template is for objective flamingo" in problem for problem in made.problems())
