"""`chat: true`: prompts and candidates are those of training rows, and answers end as the template ends them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from data.batches.collate import FlamingoCollate
from data.batches.tokenize import IGNORED
from data.dataset import DatasetSpec
from data.shards.document import Image, conversation_nodes
from data.shards.reader import RawSample
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.model import FlamingoResponder
from eval.prompting.prompts import PromptBuilder
from eval.runner import run_cell
from eval.samples import Cell
from eval.spec import TaskSpec
from eval.task import Episode
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from flamingo.processing.chat import CHAT_TEMPLATES
from flamingo.processing.conversation import Conversation, Medium, Message
from tests.eval.worlds import Letters, colour_examples
from tests.fixtures import png
from tests.model import tiny
from tests.model.test_conversations import CHATML, LLAMA2, make

TEMPLATES = {**CHAT_TEMPLATES, "chatml": CHATML, "llama2": LLAMA2}


def task(**options: Any) -> ExampleTask:
    values: dict[str, Any] = {"queries": 4, "lead": " ", "chat": True, "max_new_tokens": 4}
    return ExampleTask("colours", TaskSpec(**(values | options)), colour_examples(24))


def training_ids(processor: Any, shown: Episode, answer: str) -> tuple[list[int], list[int]]:
    """The row of the same turns out of a shard: its ids, and the learnt ones of the last turn."""
    messages = []
    for turn in [*shown.demos, replace(shown.query, answer=answer)]:
        messages += [Message("user", (Medium("image"), turn.question)), Message("assistant", (turn.text.strip(),))]
    conversation = Conversation(tuple(messages))
    images = [Image((k,)) for k in range(len(messages) // 2)]
    sample = RawSample("k", "h", conversation_nodes(conversation, images), {}, range(9), lambda k: png(k, noise=k))
    spec = DatasetSpec(name="d", batch_size=1, max_tokens=999, max_images=9)
    row, _ = FlamingoCollate(processor).sample(spec, sample, np.random.default_rng(0))
    last = len(row.ids) - next(k for k, label in enumerate(row.labels[::-1].tolist()) if label == IGNORED)
    return row.ids.tolist(), row.ids[last:].tolist()


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_candidates_are_those_of_training(name: str, shots: int) -> None:
    processor, colours = make(TEMPLATES[name]), task(output="rank")
    builder = PromptBuilder(processor, start=processor.start_ids, turns=processor.turns)
    shown = colours.episode(colours.query_ids()[0], shots, seed=0)
    prompt = builder.build(shown, 4)
    assert len(prompt.candidates) == len(shown.candidates) == 2
    for candidate, ids in zip(shown.candidates, prompt.candidates, strict=True):
        row, learnt = training_ids(processor, shown, candidate)
        assert [*prompt.ids, *ids] == row
        assert row[len(row) - len(learnt) :] == learnt
    free = builder.build(replace(shown, candidates=()), 4)
    assert list(free.ids) == row[: len(row) - len(learnt)]
    assert free.ids[: free.shared[0]] == builder.build(replace(shown, candidates=(), query=replace(
        shown.query, question="another?")), 4).ids[: free.shared[0]]  # fmt: skip
    assert (free.shared[0] > 0) == (shots > 0)
    assert free.shared[1] == shots
    reasoned = builder.build(replace(shown, candidates=(), query=replace(shown.query, lead=" Let's see.")), 4)
    more = reasoned.ids[len(free.ids) :]
    assert processor.tokenizer.decode(more).strip() == "Let's see."


def test_demonstrations_go_whole_and_the_query_stays() -> None:
    processor, colours = make("otter"), task()
    shown = colours.episode(colours.query_ids()[0], 4, seed=0)
    whole = PromptBuilder(processor, start=processor.start_ids, turns=processor.turns).build(shown, 8)
    room = len(whole.ids) + 7
    cut = PromptBuilder(processor, start=processor.start_ids, turns=processor.turns, context=room).build(shown, 8)
    assert (whole.shots_kept, cut.shots_kept) == (4, 3)
    assert len(cut.images) == 4
    with pytest.raises(UserError, match=r"needs \d+ tokens without any demonstration"):
        PromptBuilder(processor, turns=processor.turns, context=9).build(shown, 8)
    with pytest.raises(UserError, match="needs a model with a chat template"):
        PromptBuilder(Letters()).build(shown, 8)


@pytest.mark.parametrize("output", ["rank", "generate"])
def test_a_model_answers_in_its_template(output: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model, processor = tiny.flamingo("llama", tokenizer=tokenizer, vocab=tiny.TOKENS + 2)
    processor.chat_template = CHATML
    responder, colours = FlamingoResponder(model, processor), task(output=output)
    engine = Engine(responder, FeatureCache(responder), 3)
    found = run_cell(colours, Cell("colours", 1, 0, "real"), engine, colours.query_ids())
    assert len(found) == 4
    shown = colours.episode(colours.query_ids()[0], 1, 0)
    prompt = responder.builder.build(replace(shown, candidates=()), 4)
    images = [PILImage.open(io.BytesIO(image.frames[0])) for image in prompt.images]
    messages = []
    for turn, image in zip([*shown.demos, shown.query], images, strict=True):
        messages += [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": turn.question}]},
            {"role": "assistant", "content": turn.text.strip()},
        ]
    assert processor(text=messages[:-1])["input_ids"][0].tolist() == list(prompt.ids)


def test_what_has_no_effect_is_refused() -> None:
    assert list(TaskSpec(chat=True).conflicts()) == []
    for options in ({"separator": "\n"}, {"before": "x"}, {"end_of_chunk": False}, {"kind": "binding"}):
        (said,) = TaskSpec(chat=True, **options).conflicts()
        assert "before, separator and end_of_chunk have no effect" in said
