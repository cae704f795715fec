"""Ranking in a trie against its slow twin, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo import FlamingoForConditionalGeneration
from flamingo.inference.scoring import Trie, score_candidates_slow, takes_tree
from tests.model import tiny

CANDIDATES = [[40], [41, 42, 43], [41, 42, 44, 45], [41, 50], [60, 61], [41, 42], [40]]
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def test_the_worked_trie() -> None:
    trie = Trie.of([[5], [5, 6], [5, 7, 8]])
    assert (trie.tokens, trie.parents, trie.depths) == ([5, 6, 7, 8], [-1, 0, 0, 2], [0, 1, 1, 2])
    assert (trie.inner, trie.ends) == ([0, 2], [0, 1, 3])
    assert trie.path(3) == [3, 2, 0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_trie_holds_every_beginning_once(options: list[list[int]]) -> None:
    trie = Trie.of(options)
    words = [[trie.tokens[node] for node in reversed(trie.path(end))] for end in trie.ends]
    assert words == options
    beginnings = {tuple(option[:n]) for option in options for n in range(1, len(option) + 1)}
    assert len(trie.tokens) == len(beginnings)
    longer = {tuple(option[:n]) for option in options for n in range(1, len(option))}
    assert len(trie.inner) == len(longer)
    assert all(parent < node for node, parent in enumerate(trie.parents))


@families
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_fast_scores_are_the_slow_ones(family: str, batch_size: int) -> None:
    """Left-padded rows with two, one and no image; candidates shared and per row, one given twice."""
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    fast = model.score_candidates(inputs, CANDIDATES, batch_size=batch_size)
    torch.testing.assert_close(fast, score_candidates_slow(model, inputs, CANDIDATES), rtol=0, atol=1e-4)
    assert torch.equal(fast[:, 0], fast[:, -1])
    own = [CANDIDATES, [[50, 51]] * len(CANDIDATES), CANDIDATES[::-1]]
    each = model.score_candidates(inputs, own, batch_size=batch_size)
    torch.testing.assert_close(each, score_candidates_slow(model, inputs, own), rtol=0, atol=1e-4)
    assert torch.equal(
        model.score_candidates(inputs, [[40], [70]]), model.score_candidates(inputs, [[70], [40]])[:, [1, 0]]
    )


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bloom", {"n_layer": 4, "n_head": 2}),
        ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 128}),
        ("gpt_neo", {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 8}),
        ("mistral", {"intermediate_size": 64, "num_key_value_heads": 1, "sliding_window": 8}),
    ],
    ids=["bloom", "mpt", "gpt_neo", "mistral"],
)
def test_lms_that_take_no_tree_go_by_levels(family: str, options: dict[str, Any]) -> None:
    """ALiBi, local and sliding attention: the same scores, one level after the other."""
    base: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 259}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**base, **options}))
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        tiny.vision(),
        lm.eval(),
        image_size=tiny.SIZE,
        tokenizer=tiny.tokenizer(),
        cross_attention={"gate_init": 0.7, "heads": 2, "head_dim": 8},
        resampler={"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
    )
    inputs = tiny.batch(processor)
    with torch.no_grad():
        assert not takes_tree(model, model(**inputs, use_cache=True).past_key_values)
    fast = model.score_candidates(inputs, CANDIDATES, batch_size=4)
    torch.testing.assert_close(fast, score_candidates_slow(model, inputs, CANDIDATES), rtol=0, atol=1e-4)


def test_eager_attention_takes_the_tree_too() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor)
    sdpa = model.score_candidates(inputs, CANDIDATES)
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        assert takes_tree(model, model(**inputs, use_cache=True).past_key_values)
    torch.testing.assert_close(model.score_candidates(inputs, CANDIDATES), sdpa, rtol=0, atol=1e-4)


def test_what_is_run() -> None:
    """The encoder once an image; the LM over the prompt and over the inner nodes, which one-token answers lack."""
    model, processor = tiny.flamingo()
    inputs = tiny.batch(processor)
    frames: list[int] = []
    tokens: list[int] = []
    projected: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: frames.append(len(args[0])))
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    block: Any = model.cross_attn_blocks["1"]
    block.attn.k_proj.register_forward_pre_hook(lambda _, args: projected.append(len(args[0])))
    prompt = inputs["input_ids"].numel()
    model.score_candidates(inputs, CANDIDATES)
    assert (frames, projected) == ([3], [3])
    assert tokens == [prompt, 3 * 4]  # [41] [41 42] [41 42 44] [60], for three rows
    tokens.clear()
    model.score_candidates(inputs, [[40], [41], [42]])
    assert tokens == [prompt]


@families
def test_a_given_cache_is_continued_and_left_as_it_is(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    cut = inputs["input_ids"].shape[1] - 3
    head = {name: inputs[name] for name in ("pixel_values", "image_counts")}
    with torch.no_grad():
        cache = model(
            input_ids=inputs["input_ids"][:, :cut],
            attention_mask=inputs["attention_mask"][:, :cut],
            **head,
            use_cache=True,
        ).past_key_values
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    media, seen = cache.media, cache.media.seen.clone()
    kept = {key: tuple(map(id, pair)) for key, pair in media.keys_values.items()}
    rest = {"input_ids": inputs["input_ids"][:, cut:], "attention_mask": inputs["attention_mask"]}
    expected = score_candidates_slow(model, inputs, CANDIDATES)
    for _ in range(2):
        scores = model.score_candidates({**rest, "past_key_values": cache}, CANDIDATES)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert cache.media is media
    assert torch.equal(media.seen, seen)
    assert {key: tuple(map(id, pair)) for key, pair in media.keys_values.items()} == kept
