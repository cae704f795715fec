"""generate() as people use it: streams, constraints, several sequences, scores, maps, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from flamingo import FlamingoForConditionalGeneration
from tests.model import tiny
from tests.model.test_generation import favour, new_of

families = pytest.mark.parametrize("family", tiny.FAMILIES)


class Waits(LogitsProcessor):
    """Waits for the other threads at every token, so that their steps interleave for sure."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.barrier.wait(timeout=60)
        return scores


class Bans(LogitsProcessor):
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.tokens] = float("-inf")
        return scores


@pytest.mark.parametrize("row", [0, 2], ids=["images", "text only"])
def test_a_stream_is_what_is_returned(row: int) -> None:
    """Read in this thread while another generates."""
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor, [row])
    expected = model.generate(**inputs, max_new_tokens=10)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    worker = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 10, "streamer": streamer})
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert "".join(pieces) == processor.batch_decode(new_of(expected, inputs))[0]
    assert len(pieces) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_constraints(beams: int) -> None:
    """A logits processor and a function of allowed tokens, both with the ids of the whole row so far."""
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams}
    free = new_of(model.generate(**inputs, **options), inputs)
    banned = sorted(set(free.flatten().tolist()))
    without = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([Bans(banned)]))
    assert not set(new_of(without, inputs).flatten().tolist()) & set(banned)
    lengths = []

    def allowed(_: int, ids: Tensor) -> list[int]:
        lengths.append(len(ids))
        return [50 + len(ids) % 2]

    prompt = inputs["input_ids"].shape[1]
    forced = model.generate(**inputs, **options, prefix_allowed_tokens_fn=allowed)
    assert forced[:, prompt:].tolist() == [[50 + (prompt + step) % 2 for step in range(6)]] * 3
    assert set(lengths) == set(range(prompt, prompt + 6))


@families
def test_several_sequences_without_beams_in_a_batch(family: str) -> None:
    """With one token to choose from every sequence is its row's greedy one; else they are drawn apart."""
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    greedy = model.generate(**inputs, max_new_tokens=6)
    drawn = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(drawn, greedy.repeat_interleave(3, dim=0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = model.generate(
            **inputs, max_new_tokens=6, do_sample=True, temperature=3.0, top_k=0, num_return_sequences=3
        )
    assert len({tuple(row) for row in drawn.tolist()}) == 9


@families
def test_scores_are_the_forward_passes(family: str) -> None:
    """Of a row of three sequences, each step's logits are those of a forward pass without a cache."""
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor, [0])
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert new_of(out.sequences, inputs).shape == (3, 4)
    assert len(out.scores) == len(out.logits) == 4
    ids = out.sequences
    with torch.no_grad():
        media = model.media_cache(1, pixel_values=inputs["pixel_values"], image_counts=inputs["image_counts"])
        logits = model(input_ids=ids, media_cache=media, use_cache=False).logits
    start = inputs["input_ids"].shape[1] - 1
    for step, found in enumerate(out.logits):
        torch.testing.assert_close(found, logits[:, start + step], rtol=0, atol=5e-5)
    chosen = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    by_hand = logits[:, start:-1].log_softmax(-1).gather(2, new_of(ids, inputs)[..., None])[..., 0]
    torch.testing.assert_close(chosen, by_hand, rtol=0, atol=1e-4)


def test_beam_scores() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor)
    out = model.generate(
        **inputs,
        max_new_tokens=5,
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert new_of(out.sequences, inputs).shape == (6, 5)
    assert out.sequences_scores.shape == (6,)
    best, second = out.sequences_scores.view(3, 2).T
    assert bool((best >= second).all())
    assert bool((best < 0).all())
    chosen = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    lengths = (out.beam_indices >= 0).sum(1)
    torch.testing.assert_close(chosen.sum(1) / lengths, out.sequences_scores)


@families
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=["3", "2 of 2"]
)
def test_beams_that_share_the_prompts_run_are_those_that_do_not(family: str, options: dict[str, Any]) -> None:
    """Asking for hidden states makes transformers run the prompt once for each beam."""
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    tokens: list[tuple[int, ...]] = []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = model.generate(**inputs, **options, max_new_tokens=6)
    prompt, beams = inputs["input_ids"].shape[1], options["num_beams"]
    assert tokens[:2] == [(3, prompt - 1), (3 * beams, 1)]
    assert max(rows * length for rows, length in tokens[1:]) == 3 * beams
    tokens.clear()
    apart = model.generate(**inputs, **options, max_new_tokens=6, output_hidden_states=True)
    assert tokens[0] == (3 * beams, prompt)
    assert torch.equal(shared, apart)


@pytest.mark.parametrize("beams", [1, 2])
def test_stops_at_end_of_chunk_by_default(beams: int) -> None:
    model, processor = tiny.flamingo("llama", tied=False)
    favour(model, processor.eoc_token_id)
    out = model.generate(input_ids=torch.tensor([[1, 40, 41]]), max_new_tokens=8, num_beams=beams)
    assert out[0, 3] == processor.eoc_token_id
    assert processor.batch_decode(out[:, 3:]) == [""]
    on = model.generate(input_ids=torch.tensor([[1, 40, 41]]), max_new_tokens=8, eos_token_id=5)
    assert on.shape == (1, 11)


@families
def test_a_text_only_prompt(family: str) -> None:
    """From the processor, from bare ids, and as one row of a batch with images."""
    model, processor = tiny.flamingo(family)
    inputs = processor(text=tiny.TEXTS[2])
    alone = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(input_ids=inputs["input_ids"], max_new_tokens=6), alone)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=6), alone)
    together = tiny.batch(processor)
    in_a_batch = new_of(model.generate(**together, max_new_tokens=6), together)[2:]
    assert torch.equal(in_a_batch, new_of(alone, inputs))


def maps_of(model: FlamingoForConditionalGeneration, **inputs: Any) -> Any:
    return model.generate(
        **inputs, min_new_tokens=4, max_new_tokens=4, return_dict_in_generate=True, output_cross_attentions=True
    )


@families
def test_maps_of_the_prompt_and_of_every_new_token(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    out = maps_of(model, **inputs)
    assert torch.equal(out.sequences, model.generate(**inputs, min_new_tokens=4, max_new_tokens=4))
    length = inputs["input_ids"].shape[1]
    assert [step[0].shape for step in out.cross_attentions] == [(3, 2, n, 4) for n in (length, 1, 1, 1)]
    assert all(len(step) == 2 for step in out.cross_attentions)  # blocks
    with torch.no_grad():
        ids = out.sequences[:, :-1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
        images = {name: inputs[name] for name in ("pixel_values", "image_counts")}
        whole = model(input_ids=ids, attention_mask=mask, **images, output_cross_attentions=True)
    for block, maps in enumerate(whole.cross_attentions):
        together = torch.cat([step[block] for step in out.cross_attentions], dim=2)
        torch.testing.assert_close(together, maps, rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.sum(-1), (whole.phi > 0)[:, None].expand(-1, 2, -1).float())
    assert whole.phi[0].max() == 2
    assert whole.phi[2].max() == 0
    assert model(**inputs).cross_attentions is None


def test_maps_of_a_text_only_prompt_are_zero() -> None:
    model, processor = tiny.flamingo()
    out = maps_of(model, **processor(text="abc"))
    assert all(bool((maps == 0).all()) for step in out.cross_attentions for maps in step)
    assert len(out.cross_attentions) == 4


def test_two_calls_that_interleave_token_by_token() -> None:
    """Greedy beside beams over other images, and a ranking beside both: every step waits for the other thread's."""
    model, processor = tiny.flamingo()
    jobs = [
        {**tiny.batch(processor, [0]), "max_new_tokens": 8, "min_new_tokens": 8},
        {**tiny.batch(processor, [1, 2]), "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 2},
    ]
    alone = [model.generate(**job) for job in jobs]
    scores = model.score_candidates(tiny.batch(processor), [[40, 41], [40, 42], [43]])
    barrier = threading.Barrier(2)
    found: dict[int, Tensor] = {}
    ranked: list[Tensor] = []

    def work(index: int) -> None:
        found[index] = model.generate(**jobs[index], logits_processor=LogitsProcessorList([Waits(barrier)]))

    def rank() -> None:
        ranked.extend(model.score_candidates(tiny.batch(processor), [[40, 41], [40, 42], [43]]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)] + [threading.Thread(target=rank)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert barrier.broken is False
    assert all(torch.equal(found[i], alone[i]) for i in range(2))
    assert len(ranked) == 5
    assert all(torch.equal(again, scores) for again in ranked)
