"""What prompts begin with in common is run once, and nobody can tell from the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from eval.inference.engine import SHARED_FROM, Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.model import FlamingoResponder
from eval.prompting.prompts import SHORTEST_START, Completion, Decoding, EncodedPrompt, Request, Response
from eval.spec import TaskSpec
from eval.task import Example
from eval.tasks.examples import ExampleTask
from tests.eval.worlds import colour_examples
from tests.model import tiny


def examples(count: int) -> list[Example]:
    """Questions of different lengths, so that rows of a batch are padded; every fourth has no image."""
    found = []
    for place, one in enumerate(colour_examples(count)):
        question = "what" + " so" * (place % 4) + "?"
        found.append(replace(one, turn=replace(one.turn, question=question)))
    return found


def prompts(responder: FlamingoResponder, output: Any, shots: int = 2, demos: str = "fixed") -> list[EncodedPrompt]:
    spec = TaskSpec(queries=9, lead=" ", output=output, demos=demos, max_new_tokens=6)
    task = ExampleTask("colours", spec, examples(24))
    episodes = [task.episode(query, shots, 0) for query in task.query_ids()]
    bare = replace(episodes[4], query=replace(episodes[4].query, image=None))
    return [responder.builder.build(one, 6) for one in [*episodes[:4], bare, *episodes[5:]]]


def both(family: str) -> tuple[FlamingoResponder, FlamingoResponder]:
    model, processor = tiny.flamingo(family)
    return FlamingoResponder(model, processor), FlamingoResponder(model, processor, share_prefix=False)


def encoded(responder: FlamingoResponder, some: list[EncodedPrompt]) -> torch.Tensor:
    return FeatureCache(responder).features([image for prompt in some for image in prompt.images])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ranking_behind_a_shared_beginning_is_that_of_whole_prompts(family: str) -> None:
    shared, whole = both(family)
    some = prompts(shared, "rank")
    assert len({len(prompt.ids) for prompt in some}) > 2
    features = encoded(shared, some)
    torch.testing.assert_close(shared.rank(some, features), whole.rank(some, features), atol=1e-5, rtol=1e-5)
    assert shared.prefix is not None
    assert shared.prefix.runs == 1
    shared.rank(some[:3], encoded(shared, some[:3]))
    assert shared.prefix.runs == 1  # remembered from batch to batch
    shared.rank(others := prompts(shared, "rank", shots=3), encoded(shared, others))
    assert shared.prefix.runs == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_text_behind_a_shared_beginning_is_the_same(family: str, beams: int) -> None:
    shared, whole = both(family)
    some = prompts(shared, "generate")
    features = encoded(shared, some)
    found = [one.sample(some, features, Decoding(6, num_beams=beams), [""] * len(some)) for one in (shared, whole)]
    assert [one.text for one in found[0]] == [one.text for one in found[1]]
    assert [one.ended for one in found[0]] == [one.ended for one in found[1]]
    means = [[one.log_prob for one in several] for several in found]
    torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=1e-5)
    assert shared.prefix is not None
    assert shared.prefix.runs == 1


@pytest.mark.parametrize("every", [True, False])
def test_seeing_every_image_before_and_no_image_at_all(every: bool) -> None:
    shared, whole = both("llama")
    shared.model.config.attend_all_previous = every  # of both: they share it
    some = prompts(shared, "rank")
    some = some if every else [tiny_words(prompt, shared) for prompt in some]
    features = encoded(shared, some)
    torch.testing.assert_close(shared.rank(some, features), whole.rank(some, features), atol=1e-5, rtol=1e-5)
    assert shared.prefix is not None
    assert shared.prefix.runs == 1


def tiny_words(prompt: EncodedPrompt, responder: FlamingoResponder) -> EncodedPrompt:
    image = responder.processor.image_token_id
    tokens = sum(token != image for token in prompt.ids[: prompt.shared[0]])
    return replace(prompt, ids=tuple(i for i in prompt.ids if i != image), images=(), shared=(tokens, 0))


def test_a_query_much_shorter_than_another_moves_out_the_whole_beginning() -> None:
    """The padding of the shorter row is then longer than what is shared."""
    shared, whole = both("llama")
    some = prompts(shared, "rank")
    long = replace(some[0], ids=(*some[0].ids, *(shared.builder.encode(" and so on, and so on, and so on?"))))
    tokens = SHORTEST_START
    some = [replace(one, ids=one.ids[-tokens - 5 :], images=(), shared=(tokens, 0)) for one in (some[1], long)]
    image = shared.processor.image_token_id
    some = [replace(one, ids=tuple(7 if i == image else i for i in one.ids)) for one in some]
    start = some[0].ids[:tokens]
    some = [replace(one, ids=start + one.ids[tokens:]) for one in some]
    some[1] = replace(some[1], ids=some[1].ids + (9,) * 30)
    features = encoded(shared, some)
    torch.testing.assert_close(shared.rank(some, features), whole.rank(some, features), atol=1e-5, rtol=1e-5)


class Batches(FlamingoResponder):
    """Notes what it is asked together."""

    def __init__(self) -> None:
        super().__init__(*tiny.flamingo("llama"))
        self.asked: list[list[tuple[int, int]]] = []

    def rank(self, prompts: list[EncodedPrompt], features: torch.Tensor) -> list[list[float]]:  # type: ignore[override]
        self.asked.append([prompt.shared for prompt in prompts])
        return super().rank(prompts, features)


def asked(model: FlamingoResponder, some: list[EncodedPrompt], size: int) -> list[Response]:
    return Engine(model, FeatureCache(model), size).ask([Request(prompt) for prompt in some])


def test_the_engine_puts_together_what_begins_alike_where_there_is_enough_of_it() -> None:
    model, whole = Batches(), FlamingoResponder(*tiny.flamingo("llama"), share_prefix=False)
    alike, others = prompts(model, "rank"), prompts(model, "rank", demos="random")
    assert len(alike) >= SHARED_FROM
    mixed = [one for pair in zip(alike, others, strict=True) for one in pair]
    found = asked(model, mixed, 4)
    kinds = [{shared != (0, 0) for shared in batch} for batch in model.asked]
    assert all(len(kind) == 1 for kind in kinds)
    assert sum(map(len, model.asked)) == len(mixed)
    assert model.prefix is not None
    assert model.prefix.runs == 1
    torch.testing.assert_close(found, asked(whole, mixed, 32), atol=1e-4, rtol=1e-4)
    few = Batches()
    asked(few, alike[: SHARED_FROM - 1], 32)
    assert {shared for batch in few.asked for shared in batch} == {(0, 0)}


def test_samples_of_one_query_share_its_demonstrations() -> None:
    shared, whole = both("llama")
    prompt = prompts(shared, "generate")[0]
    requests = [Request(prompt, Decoding(5, temperature=0.8, draw=draw)) for draw in range(11)]
    found = [Engine(one, FeatureCache(one), 4).ask(requests) for one in (shared, whole)]
    texts = [[one.text for one in several if isinstance(one, Completion)] for several in found]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 11
    assert len(set(texts[0])) > 1
    assert shared.prefix is not None
    assert shared.prefix.runs == 1
