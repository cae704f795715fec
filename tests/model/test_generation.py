from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.inference.prompts import left_padded
from tests.model import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
ways = pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beam", "two of three"],
)


def new_of(out: torch.Tensor, inputs: Any) -> torch.Tensor:
    """What follows the prompts; the prompts must be those given."""
    prompts = inputs["input_ids"]
    assert torch.equal(out[:, : prompts.shape[1]], prompts.repeat_interleave(len(out) // len(prompts), 0))
    return out[:, prompts.shape[1] :]


def trimmed(ids: torch.Tensor, model: FlamingoForConditionalGeneration) -> list[int]:
    """New tokens up to and with the first that ends the text."""
    stops = set(model.generation_config.eos_token_id)
    out: list[int] = []
    for token in ids.tolist():
        out.append(token)
        if token in stops:
            break
    return out


@families
@ways
def test_left_padded_batch_is_one_by_one(family: str, options: dict[str, Any]) -> None:
    model, processor = tiny.flamingo(family)
    together = model.generate(**tiny.batch(processor), max_new_tokens=8, **options)
    each = options.get("num_return_sequences", 1)
    together = new_of(together, tiny.batch(processor))
    assert together.shape == (3 * each, 8)
    for row in range(3):
        inputs = tiny.batch(processor, [row])
        alone = new_of(model.generate(**inputs, max_new_tokens=8, **options), inputs)
        for ours, theirs in zip(together[row * each : (row + 1) * each], alone, strict=True):
            assert trimmed(ours, model) == trimmed(theirs, model)


@families
def test_with_cache_is_without(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    for options in ways:
        with_cache = model.generate(**inputs, max_new_tokens=8, **options)
        assert torch.equal(with_cache, model.generate(**inputs, max_new_tokens=8, use_cache=False, **options))


def test_greedy_by_hand_and_beam_of_one() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor, [0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    fixed = {"pixel_values": inputs["pixel_values"], "image_counts": inputs["image_counts"], "use_cache": False}
    by_hand = []
    banned = model.generation_config.suppress_tokens
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids, attention_mask=mask, **fixed).logits[0, -1]
            logits[banned] = float("-inf")
            by_hand.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[by_hand[-1]]])], 1)
            mask = torch.ones_like(ids)
    new = new_of(model.generate(**inputs, max_new_tokens=6), inputs)[0]
    assert trimmed(new, model) == trimmed(torch.tensor(by_hand), model)
    beam = model.generate(**inputs, max_new_tokens=6, num_beams=1)
    assert torch.equal(beam, model.generate(**inputs, max_new_tokens=6))


def test_the_images_matter() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor, [0])
    before = model.generate(**inputs, max_new_tokens=8)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    assert not torch.equal(before, model.generate(**inputs, max_new_tokens=8))


def test_sampling_follows_the_seed() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor)

    def sample(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=2)
        return new_of(out, inputs)

    assert sample(0).shape == (6, 8)
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def favour(model: FlamingoForConditionalGeneration, token: int) -> None:
    """Make the model want one token above all, through the new tokens' table."""
    index = model.config.new_token_ids.index(token)
    rows = model.new_tokens.output_rows
    assert rows is not None
    with torch.no_grad():
        rows.zero_()
        torch.nn.init.constant_(model.language_model.lm_head.weight, 0.0)
        probe: Any = {}
        hook = model.language_model.lm_head.register_forward_pre_hook(lambda _, args: probe.update(x=args[0]))
        model(input_ids=torch.tensor([[1, 40, 41]]))
        hook.remove()
        rows[index] = probe["x"][0, -1]


def test_stops_at_end_of_chunk_and_returns_prompt_and_continuation() -> None:
    model, processor = tiny.flamingo("llama", tied=False)
    favour(model, processor.eoc_token_id)
    inputs = processor(text=["()"[:2]])
    inputs["input_ids"] = torch.tensor([[1, 40, 41]])
    inputs["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    out = model.generate(**inputs, max_new_tokens=8)
    assert out.tolist() == [[1, 40, 41, processor.eoc_token_id]]
    assert processor.batch_decode(out[:, 3:]) == [""]
    details = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    assert details.sequences.tolist() == out.tolist()
    assert len(details.scores) == 1


def test_image_is_never_generated() -> None:
    model, processor = tiny.flamingo("llama", tied=False)
    favour(model, processor.image_token_id)
    out = model.generate(input_ids=torch.tensor([[1, 40, 41]]), max_new_tokens=4)
    assert processor.image_token_id not in out


def test_two_threads_do_not_disturb_each_other() -> None:
    """Interleaved calls with different images; a barrier in the encoder makes sure that they overlap."""
    model, processor = tiny.flamingo()
    jobs = [tiny.batch(processor, [0]), tiny.batch(processor, [1]), tiny.batch(processor, [2])]
    alone = [model.generate(**job, max_new_tokens=12) for job in jobs]
    start = threading.Barrier(len(jobs))
    wrong: list[int] = []

    def work(index: int) -> None:
        start.wait()
        for _ in range(4):
            if not torch.equal(model.generate(**jobs[index], max_new_tokens=12), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_each_image_is_encoded_once_and_projected_once() -> None:
    """Whatever the number of beams and of new tokens."""
    model, processor = tiny.flamingo()
    counts = {"images": 0, "projections": 0}
    model.vision_encoder.register_forward_pre_hook(
        lambda _, args: counts.update(images=counts["images"] + len(args[0]))
    )
    block: Any = model.cross_attn_blocks["1"]
    block.attn.k_proj.register_forward_pre_hook(lambda *_: counts.update(projections=counts["projections"] + 1))
    model.generate(**tiny.batch(processor), max_new_tokens=6, num_beams=4, min_new_tokens=6)
    assert counts == {"images": 3, "projections": 1}


def test_right_padded_prompts_are_padded_left_first() -> None:
    model, processor = tiny.flamingo("gpt2")
    left, right = (tiny.batch(processor, padding_side=side) for side in ("left", "right"))
    moved = left_padded(right["input_ids"], right["attention_mask"])
    assert torch.equal(moved[0], left["input_ids"])
    assert torch.equal(moved[1], left["attention_mask"])
    ours = model.generate(**right, max_new_tokens=6)
    assert torch.equal(new_of(ours, right), new_of(model.generate(**left, max_new_tokens=6), left))


def test_explicit_phi_is_continued() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor, [0])
    counted = (inputs["input_ids"] == model.config.image_token_id).cumsum(1)
    ours = model.generate(**inputs, phi=counted, max_new_tokens=6)
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=6))
    blind = model.generate(**inputs, phi=torch.zeros_like(counted), max_new_tokens=6)
    assert not torch.equal(ours, blind)


@families
def test_scores_are_log_softmax_by_hand(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    candidates = [[40], [41, 42, 43], [44, model.config.eoc_token_id]]
    scores = model.score_candidates(inputs, candidates, batch_size=4)
    assert scores.shape == (3, 3)
    for row in range(3):
        alone = tiny.batch(processor, [row])
        for column, option in enumerate(candidates):
            ids = torch.cat([alone["input_ids"], torch.tensor([option])], 1)
            with torch.no_grad():
                fixed = {key: alone[key] for key in ("pixel_values", "image_counts")}
                logits = model(input_ids=ids, **fixed).logits[0].log_softmax(-1)
            start = alone["input_ids"].shape[1] - 1
            by_hand = sum(float(logits[start + i, token]) for i, token in enumerate(option))
            assert float(scores[row, column]) == pytest.approx(by_hand, abs=1e-4)


def test_candidates_per_row_and_their_mistakes() -> None:
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor, [0, 1])
    own = [[[40], [41, 42]], [[43], [44]]]
    scores = model.score_candidates(inputs, own)
    for row in range(2):
        shared = model.score_candidates(inputs, own[row])[row]
        torch.testing.assert_close(scores[row], shared)
    features = model.encode_media(inputs["pixel_values"])
    again = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    again |= {"media_features": features, "image_counts": inputs["image_counts"]}
    torch.testing.assert_close(model.score_candidates(again, own), scores)
    with pytest.raises(UserError, match="at least one"):
        model.score_candidates(inputs, [])
    with pytest.raises(UserError, match="candidate 1 of row 0 has no tokens"):
        model.score_candidates(inputs, [[40], []])
    with pytest.raises(UserError, match="2 lists"):
        model.score_candidates(inputs, [[[40]]])
