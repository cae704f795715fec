"""Sampling and log-probabilities of a real, tiny model: the same whatever shares the batch, and from the right law."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache, ImageStore
from eval.inference.model import FlamingoResponder, GreedyOrSampled, top_p
from eval.prompting.prompts import Completion, Decoding, Request
from eval.prompting.strategies import STRATEGIES, PromptingSettings
from eval.runner import run_cell
from eval.samples import Cell
from eval.spec import TaskSpec
from eval.tasks.examples import ExampleTask
from tests.eval.test_strategies import with_rationales
from tests.eval.worlds import colour_examples
from tests.model import tiny


@pytest.fixture(scope="module")
def responder() -> FlamingoResponder:
    return FlamingoResponder(*tiny.flamingo("llama"))


def colours(output: Any = "generate") -> ExampleTask:
    spec = TaskSpec(queries=5, lead=" ", output=output, max_new_tokens=4)
    return ExampleTask("colours", spec, with_rationales(colour_examples(24)))


def test_samples_follow_the_probabilities_and_not_the_batch() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    decoding = Decoding(1, temperature=1.0)
    streams = [f"stream {i}" for i in range(4000)]
    chosen = GreedyOrSampled(decoding, streams)(torch.zeros(4000, 1), scores.expand(4000, -1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(shares, scores.exp(), atol=0.03)
    alone = [GreedyOrSampled(decoding, [name])(torch.zeros(1, 1), scores[None]).argmax(-1) for name in streams[:50]]
    assert torch.equal(torch.cat(alone), chosen[:50])
    sharp = GreedyOrSampled(Decoding(1, temperature=0.1), streams)(torch.zeros(4000, 1), scores.expand(4000, -1))
    assert float((sharp.argmax(-1) == 0).float().mean()) > 0.99


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share() -> None:
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()
    assert (top_p(scores, 0.75) > -torch.inf).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert (top_p(scores, 0.81) > -torch.inf).tolist()[0] == [True, True, False, True]
    assert torch.equal(top_p(scores, 1.0), scores)


def test_a_completion_knows_its_log_probability(responder: FlamingoResponder) -> None:
    task = colours()
    prompt = responder.builder.build(task.episode(task.query_ids()[0], 2, 0), 4)
    features = FeatureCache(responder).features(prompt.images)
    greedy = responder.generate([prompt], features, 4)[0]
    beams = responder.sample([prompt], features, Decoding(4, num_beams=3, length_penalty=0.0), [""])[0]
    assert greedy.log_prob is not None
    assert beams.log_prob is not None
    tokens = responder.builder.encode(greedy.text)
    if not greedy.ended and len(tokens) == 4:  # the text gives back the very tokens
        whole = type(prompt)(prompt.ids, prompt.images, (tokens,), prompt.turns, prompt.shots_kept)
        assert responder.rank([whole], features)[0][0] / 4 == pytest.approx(greedy.log_prob, abs=1e-4)
    assert beams.log_prob >= greedy.log_prob - 1e-4 or beams.ended != greedy.ended


@pytest.mark.parametrize(
    ("strategy", "output"),
    [("sc", "generate"), ("sc_cot", "rank"), ("orders", "rank"), ("two_stage", "generate"), ("calibrated", "rank")],
)
def test_no_strategy_depends_on_the_batch(responder: FlamingoResponder, strategy: str, output: str) -> None:
    task = colours(output)
    settings = PromptingSettings(samples=3, rationale_tokens=3, orders=2)
    cell = Cell("colours", 1, 0, "real", strategy)
    runs = [
        run_cell(task, cell, Engine(responder, FeatureCache(responder), size), queries, settings)
        for queries, size in ((task.query_ids(), 1), (list(task.query_ids())[::-1], 4))
    ]
    for one, other in zip(runs[0], runs[1][::-1], strict=True):
        assert (one.answer, one.rationale, one.prompt) == (other.answer, other.rationale, other.prompt)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-3)
        assert len(one.votes) == len(other.votes)
    assert strategy in STRATEGIES


def test_draws_differ_and_the_same_draw_is_the_same_text(responder: FlamingoResponder) -> None:
    task = colours()
    prompt = responder.builder.build(task.episode(task.query_ids()[0], 1, 0), 8)
    requests = [Request(prompt, Decoding(8, temperature=1.0, draw=draw)) for draw in range(6)]
    engine = Engine(responder, FeatureCache(responder), 4)
    first = engine.ask(requests)
    again = Engine(responder, FeatureCache(responder), 6).ask(requests[::-1])[::-1]
    said = [one.text for one in first if isinstance(one, Completion)]
    assert said == [one.text for one in again if isinstance(one, Completion)]
    assert len(set(said)) > 1


def test_the_image_key_tells_what_features_depend_on(
    responder: FlamingoResponder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, processor = tiny.flamingo("llama")
    assert FlamingoResponder(model, processor).image_key == responder.image_key
    with torch.no_grad():
        next(model.language_model.parameters()).add_(1)  # images do not depend on the language model
    assert FlamingoResponder(model, processor).image_key == responder.image_key
    with torch.no_grad():
        next(model.resampler.parameters()).add_(1e-3)
    other = FlamingoResponder(model, processor)
    assert other.image_key != responder.image_key
    folder = tmp_path_factory.mktemp("store")
    task = colours()
    images = [p for q in task.query_ids() if (p := task.episode(q, 0, 0).query.image) is not None]
    cache = FeatureCache(responder, store=ImageStore(folder, responder.image_key, 1 << 24))
    direct = responder.encode(images)
    assert torch.equal(cache.features(images), direct)
    second = FeatureCache(responder, store=ImageStore(folder, responder.image_key, 1 << 24))
    assert torch.equal(second.features(images), direct)
    assert second.encoded == 0
    assert torch.allclose(second.embeddings(images).norm(dim=1), torch.ones(len(images)), atol=1e-5)
