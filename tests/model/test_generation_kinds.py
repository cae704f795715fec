"""Whatever transformers' generate() takes is right, equal to a slow loop without caches, or refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.inference.prompts import mask_from_padding
from tests.model import tiny
from tests.model.test_generation import new_of

families = pytest.mark.parametrize("family", tiny.FAMILIES)
NEW = 6


def slow(model: Any, inputs: Any, new: int = NEW) -> Tensor:
    """New tokens (B, new) of a greedy loop that runs whole rows, one by one, without caches."""
    ends, banned = set(model.generation_config.eos_token_id), model.generation_config.suppress_tokens
    counts, pixels, start = inputs["image_counts"].tolist(), inputs["pixel_values"], 0
    rows = []
    for row, count in enumerate(counts):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        images = {"pixel_values": pixels[start : start + count], "image_counts": torch.tensor([count])}
        start += count
        tokens: list[int] = []
        while len(tokens) < new:
            if tokens and tokens[-1] in ends:
                tokens += [model.generation_config.pad_token_id] * (new - len(tokens))
                break
            with torch.no_grad():
                logits = model(input_ids=ids, **images, use_cache=False).logits[0, -1]
            logits[banned] = -torch.inf
            tokens.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], 1)
        rows.append(tokens)
    return torch.tensor(rows)


def without_mask(inputs: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "dynamic": {"cache_implementation": "dynamic"},
    "without a cache": {"use_cache": False},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 5": {"prefill_chunk_size": 5},
    "chunks of 99": {"prefill_chunk_size": 99},
    "static in chunks": {"prefill_chunk_size": 4, "cache_implementation": "static", "disable_compile": True},
    "return_dict": {"return_dict": False},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=NEW)},
    "another list of tokens": {"suppress_tokens": [258]},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_greedy_is_the_slow_loop(options: dict[str, Any], side: str) -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, padding_side=side)
    wanted = slow(model, inputs)
    for given in (inputs, without_mask(inputs)):
        out = model.generate(**given, **{"max_new_tokens": NEW, **options})
        found = new_of(out, inputs)
        assert torch.equal(found, wanted[:, : found.shape[1]])


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mistral", "gemma2", "mpt", "gptj", "bloom"])
def test_ways_in_other_families(family: str) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    wanted = slow(model, inputs)
    for name in ("static", "chunks of 5", "static in chunks"):
        found = new_of(model.generate(**inputs, max_new_tokens=NEW, **WAYS[name]), inputs)
        assert torch.equal(found, wanted[:, : found.shape[1]]), name
    one = tiny.batch(processor, [0])
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": copy.deepcopy(model)}):
        found = new_of(model.generate(**one, max_new_tokens=NEW, **options), one)
        assert torch.equal(found, wanted[:1, : found.shape[1]]), options


@pytest.mark.parametrize("name", ["static", "chunks of 5", "without a cache", "dynamic"])
def test_beams_and_samples_in_every_way(name: str) -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor)
    asked: list[dict[str, Any]] = [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ]
    for options in asked:
        found = []
        for way in ({}, WAYS[name]):
            torch.manual_seed(0)
            found.append(model.generate(**inputs, max_new_tokens=NEW, **options, **way))
        assert torch.equal(*found), options


@families
def test_a_mask_is_found_by_its_padding(family: str) -> None:
    """The same for all ways, the ranking and the forward pass, and for both sides."""
    model, processor = tiny.flamingo(family)
    for side in ("left", "right"):
        inputs = tiny.batch(processor, padding_side=side)
        bare = without_mask(inputs)
        for options in ({"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}):
            found = []
            for given in (inputs, bare):
                torch.manual_seed(0)
                found.append(model.generate(**given, max_new_tokens=NEW, **options))
            assert torch.equal(*found)
        answers = [[40], [41, 42]]
        torch.testing.assert_close(model.score_candidates(bare, answers), model.score_candidates(inputs, answers))
        with torch.no_grad():
            ours, theirs = (model(**x).logits[inputs["attention_mask"].bool()] for x in (bare, inputs))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_padding_that_is_also_an_end() -> None:
    ids = torch.tensor([[0, 5, 6], [0, 7, 8]])
    padded = torch.tensor([[0, 0, 5], [0, 6, 7]])
    assert mask_from_padding(ids, 0, {0}) is None
    assert mask_from_padding(ids, None, {0}) is None
    assert mask_from_padding(ids[:, 1:], 0, {0}) is None
    found = mask_from_padding(padded, 0, {2})
    assert found is not None
    assert found.tolist() == [[0, 0, 1], [0, 1, 1]]
    for rows in (padded, padded.flip(1), torch.tensor([[0, 5], [6, 7]])):
        with pytest.raises(UserError, match="give attention_mask"):
            mask_from_padding(rows, 0, {0})
    assert mask_from_padding(padded.flip(1), 0, {0}, trailing=False) is None
    model, processor = tiny.flamingo("gpt2")
    model.generation_config.pad_token_id = processor.bos_token_id
    inputs = {**tiny.batch(processor)}
    mask = inputs["attention_mask"].bool()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, processor.bos_token_id)
    for call in (
        lambda: model(**without_mask(inputs)),
        lambda: model.generate(**without_mask(inputs), num_beams=2),
        lambda: model.score_candidates(without_mask(inputs), [[40]]),
    ):
        with pytest.raises(UserError, match="give attention_mask"):
            call()
    one = without_mask(tiny.batch(processor, [0]))
    assert torch.equal(
        model.generate(**one, max_new_tokens=3), model.generate(**tiny.batch(processor, [0]), max_new_tokens=3)
    )


ASSISTED: dict[str, Any] = {
    "text LM": lambda model: tiny.lm("llama"),
    "its own LM": lambda model: model.language_model,
    "another family": lambda model: tiny.lm("gpt2"),
    "a longer table": lambda model: longer(),
    "itself": lambda model: model,
    "a copy": copy.deepcopy,
    "a smaller Flamingo": lambda model: smaller(),
}


def longer() -> Any:
    """A text LM that gives more logits than the Flamingo, by a padded table that its config does not know of."""
    lm: Any = tiny.lm("llama", 300)
    lm.config.vocab_size = tiny.TOKENS
    return lm


def smaller() -> FlamingoForConditionalGeneration:
    resampler = {"depth": 1, "heads": 1, "head_dim": 8, "latents": 2, "max_frames": 3}
    return tiny.flamingo("gpt2", resampler=resampler, cross_attn_every_n_layers=1)[0]


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("make", ASSISTED.values(), ids=ASSISTED.keys())
def test_assisted_is_greedy(make: Any, row: int) -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [row])
    assistant = make(model)
    kind, before = type(assistant), set(vars(assistant))
    wanted = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    for options in ({}, {"max_length": wanted.shape[1], "max_new_tokens": None}):
        found = model.generate(
            **inputs, **{"max_new_tokens": 10, **options}, do_sample=False, assistant_model=assistant
        )
        assert torch.equal(found, wanted)
    assert type(assistant) is kind
    assert set(vars(assistant)) == before


def test_a_flamingo_assistant_sees_the_images() -> None:
    """A copy of the model drafts what the model says, so that nearly every draft is taken: few passes."""
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [0])
    passes = []
    model.language_model.register_forward_hook(lambda *_: passes.append(1))
    assistant = copy.deepcopy(model)
    wanted = model.generate(**inputs, min_new_tokens=16, max_new_tokens=16)
    passes.clear()
    assistant.generation_config.num_assistant_tokens = 8
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = model.generate(**inputs, min_new_tokens=16, max_new_tokens=16, assistant_model=assistant)
    assert torch.equal(found, wanted)
    assert len([1 for _ in passes]) <= 16


def test_assisted_samples_and_text_looked_up() -> None:
    model, processor = tiny.flamingo("llama")
    prompt = processor(
        images=[tiny.picture(0)] * 2, text="<image>ab ab ab<|endofchunk|><image>ab ab ab<|endofchunk|>ab"
    )
    wanted = model.generate(**prompt, max_new_tokens=12)
    for size in (1, 3, 10):
        assert torch.equal(model.generate(**prompt, max_new_tokens=12, prompt_lookup_num_tokens=size), wanted)
    for assistant in (tiny.lm("llama"), copy.deepcopy(model)):
        drawn = model.generate(**prompt, max_new_tokens=6, do_sample=True, assistant_model=assistant)
        assert not set(drawn[0, prompt["input_ids"].shape[1] :].tolist()) & set(model.generation_config.suppress_tokens)


def test_assistants_that_cannot() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [0])
    short = tiny.lm("gpt2")
    features = {**inputs, "media_features": model.encode_media(inputs["pixel_values"])}
    del features["pixel_values"]
    other = copy.deepcopy(model)
    other.config.image_token_id = 7
    refused: list[tuple[str, dict[str, Any]]] = [
        ("assistant_model has 128 positions", {**inputs, "assistant_model": short, "max_new_tokens": 130}),
        ("give pixel_values, not features", {**features, "assistant_model": copy.deepcopy(model)}),
        ("build both with one tokenizer", {**inputs, "assistant_model": other}),
        ("leave cache_implementation out", {**inputs, "assistant_model": short, "cache_implementation": "static"}),
        ("leave past_key_values out", {**inputs, "assistant_model": short, "past_key_values": static(model)}),
        ("takes no assistant", {**inputs, "assistant_model": short, "use_cache": False}),
        ("one row at a time", {**tiny.batch(processor), "assistant_model": short}),
    ]
    for words, call in refused:
        with pytest.raises(UserError, match=words):
            model.generate(**call)


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config.text_config, max_cache_len=64)


REFUSED: dict[str, dict[str, Any]] = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "high"},
    "group beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beam search": {"num_beams": 2, "force_words_ids": [[40]]},
    "early exit": {"assistant_early_exit": 2},
    "token healing": {"token_healing": True},
    "paged": {"cache_implementation": "paged"},
    "one entry a token": {"output_cross_attentions": True, "prefill_chunk_size": 2},
}


@pytest.mark.parametrize(("words", "options"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_show_images_is_refused(words: str, options: dict[str, Any]) -> None:
    model, processor = tiny.flamingo("llama")
    with pytest.raises(UserError, match=words):
        model.generate(**tiny.batch(processor), max_new_tokens=3, **options)
    with pytest.raises(UserError, match=words):
        model.generate(**tiny.batch(processor), generation_config=GenerationConfig(**own(options)), **rest(options))


def own(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "output_cross_attentions"}


def rest(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name == "output_cross_attentions"}


def test_a_static_cache_of_local_attention_is_refused() -> None:
    """Transformers' GPT-Neo alone gives other tokens with one."""
    model, processor = tiny.flamingo("gpt_neo")
    with pytest.raises(UserError, match="gpt_neo is wrong with a static cache"):
        model.generate(**tiny.batch(processor), cache_implementation="static")
    with pytest.raises(UserError, match="gpt_neo is wrong with a static cache"):
        model.generate(**tiny.batch(processor), past_key_values=static(model))
    with pytest.raises(UserError, match="twice"):
        model.generate(tiny.batch(processor)["input_ids"], **tiny.batch(processor))


def test_continuous_batching_is_refused() -> None:
    model, processor = tiny.flamingo("llama")
    with pytest.raises(UserError, match="continuous batching"):
        model.generate_batch(inputs=tiny.batch(processor)["input_ids"].tolist())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_positions(family: str) -> None:
    """Exactly as many as there are is right; one more is refused, with both numbers, wherever it comes from."""
    model, processor = tiny.flamingo(family)
    limit = model.config.text_config.max_position_embeddings
    assert limit == 128

    def prompt(tokens: int) -> Any:
        return processor(text="a" * (tokens - 1))

    fits = model.generate(**prompt(110), max_new_tokens=19, min_new_tokens=19)
    assert fits.shape == (1, 129)
    assert torch.equal(fits, model.generate(**prompt(110), max_new_tokens=19, min_new_tokens=19, use_cache=False))
    for tokens, new in ((110, 20), (128, 2)):
        asked: list[Any] = [{"max_new_tokens": new}, {"max_length": tokens + new}]
        for options in (*asked, {"max_new_tokens": new, "num_beams": 2}):
            with pytest.raises(UserError, match=f"{tokens} tokens and max_.*need {tokens + new - 1} positions.* 128"):
                model.generate(**prompt(tokens), **options)
    with pytest.raises(UserError, match="at most 4"):
        model.generate(**prompt(125), max_new_tokens=20)
    with pytest.raises(UserError, match="200 tokens, but the language model has 128 positions"):
        model.generate(**prompt(200), max_new_tokens=1)
    with pytest.raises(UserError, match="200 tokens, but the language model has 128 positions"):
        model(**prompt(200))
    model.score_candidates(prompt(126), [[40, 41, 42]])
    with pytest.raises(UserError, match="126 tokens and tokens of a candidate=4 need 129 positions"):
        model.score_candidates(prompt(126), [[40, 41, 42, 43]])
    cache = model(**prompt(128), use_cache=True).past_key_values
    with pytest.raises(UserError, match="129 tokens, but the language model has 128"):
        model(input_ids=torch.tensor([[40]]), past_key_values=cache)


def test_positions_are_those_of_the_text_and_not_of_its_padding() -> None:
    model, processor = tiny.flamingo("gpt2")
    row = processor(text="a" * 99)
    wide = torch.nn.functional.pad(row["input_ids"], (40, 0), value=processor.pad_token_id)
    mask = torch.nn.functional.pad(row["attention_mask"], (40, 0))
    found = model.generate(input_ids=wide, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(found[:, 140:], model.generate(**row, max_new_tokens=4)[:, 100:])
    rotary, processor = tiny.flamingo("llama")
    assert rotary.generate(**processor(text="a" * 299), max_new_tokens=2).shape == (1, 302)


def test_prompts_without_a_token() -> None:
    model, processor = tiny.flamingo("llama")
    begun = model.generate(max_new_tokens=4)
    assert torch.equal(begun, model.generate(**processor(text=""), max_new_tokens=4))
    bare, plain = tiny.flamingo("llama", tokenizer=tiny.tokenizer(bos=False))
    nothing = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
    for call in (lambda given: bare.generate(**given), lambda given: bare.score_candidates(given, [[40]])):
        with pytest.raises(UserError, match="row 0 has no tokens"):
            call(nothing)
    padding = {"input_ids": torch.tensor([[40, 41], [3, 3]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with pytest.raises(UserError, match="row 1 has no tokens"):
        bare.generate(**padding, max_new_tokens=2)
    for text in ("", ["ab", ""]):
        with pytest.raises(UserError, match="is empty, and the tokenizer has no token to begin with"):
            plain(text=text)
    bare.generation_config.bos_token_id = None
    with pytest.raises(UserError, match="needs input_ids"):
        bare.generate(max_new_tokens=2)


def test_strings_that_stop_and_lengths() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [0])
    whole = model.generate(**inputs, max_new_tokens=8)
    width = inputs["input_ids"].shape[1]
    third = processor.tokenizer.decode(whole[0, width + 2 : width + 3])
    stopped = model.generate(**inputs, max_new_tokens=8, stop_strings=[third], tokenizer=processor.tokenizer)
    assert torch.equal(stopped, whole[:, : stopped.shape[1]])
    assert stopped.shape[1] <= width + 3
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, max_new_tokens=8, stop_strings=[third])
    assert torch.equal(model.generate(**inputs, max_length=width + 8), whole)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs, max_length=width)
    batch = tiny.batch(processor)
    assert model.generate(**batch, min_new_tokens=7, max_new_tokens=7).shape == (3, batch["input_ids"].shape[1] + 7)


def greedy_loop(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Tensor:
    """A user's own loop, as transformers' documentation of `custom_generate` has it."""
    done = False
    while not done:
        cached = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if cached else None, is_first_iteration=not cached, **kwargs
        )
        outputs = model(**inputs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        done = bool(stopping_criteria(input_ids, None).all())
    return input_ids


def test_a_loop_of_ones_own() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [0])
    found = model.generate(**inputs, max_new_tokens=NEW, custom_generate=greedy_loop)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=NEW))


def test_guidance_by_a_prompt_without_images() -> None:
    """The other prompt is run beside the first, with images of neither."""
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, [0])
    plain = model.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, guidance_scale=1.0), plain)
    negative = processor(text="ab")
    options = {"negative_prompt_ids": negative["input_ids"], "guidance_scale": 1.5}
    ways = [model.generate(**inputs, max_new_tokens=NEW, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ways)


def turn(model: Any, inputs: Any, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, **options)


@families
@pytest.mark.parametrize("new_images", ["none", "the new one", "all"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "bare"])
def test_a_conversation_goes_on_from_its_cache(family: str, new_images: str, masked: bool) -> None:
    """Whole rows, padded, the second turn with a new image or without: as one prompt without a cache."""
    model, processor = tiny.flamingo(family)
    model.generation_config.eos_token_id = [258]
    first = tiny.batch(processor, [0, 1])
    out = turn(model, first)
    tail = [model.config.image_token_id, 60, 61] if new_images != "none" else [60, 61]
    ids = torch.cat([out.sequences, torch.tensor([tail, tail])], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4 + len(tail), dtype=torch.long)], 1)
    old, fresh = list(first["pixel_values"]), [tiny.picture(71)[None], tiny.picture(72)[None]]
    everything = [old[0], old[1], fresh[0], old[2], fresh[1]] if new_images != "none" else old
    counts = torch.tensor([3, 2]) if new_images != "none" else torch.tensor([2, 1])
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack(everything), "image_counts": counts}
    more: dict[str, Any] = {"attention_mask": mask} if masked else {}
    if new_images == "all":
        more |= {"pixel_values": whole["pixel_values"], "image_counts": counts}
    if new_images == "the new one":
        more |= {"pixel_values": torch.stack(fresh), "image_counts": torch.tensor([1, 1])}
    wanted = slow(model, whole, 5)
    found = model.generate(input_ids=ids, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=5, **more)
    assert torch.equal(new_of(found, whole)[:, : wanted.shape[1]], wanted[:, : found.shape[1] - ids.shape[1]])
    beams = model.generate(
        input_ids=ids, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=5, num_beams=3, **more
    )
    assert torch.equal(beams, model.generate(**whole, max_new_tokens=5, num_beams=3))
    past = out.past_key_values.get_seq_length()
    more["attention_mask"] = mask
    if new_images == "all":
        more |= {"pixel_values": torch.stack(fresh), "image_counts": torch.tensor([1, 1])}
    rest = model.generate(input_ids=ids[:, past:], past_key_values=out.past_key_values, max_new_tokens=5, **more)
    assert torch.equal(rest, found[:, past:])


def test_cuts_and_mistakes_of_a_conversation() -> None:
    model, processor = tiny.flamingo("llama")
    first = tiny.batch(processor, [0, 1])
    out = turn(model, first)
    cache = out.past_key_values
    ids = torch.cat([out.sequences, torch.full((2, 2), 60)], 1)
    swapped = ids.flip(0)
    with pytest.raises(UserError, match="row 0 of the cache has seen 2 images in its"):
        model.generate(input_ids=swapped, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(UserError, match="1 rows continue a cache of 2 rows"):
        model.generate(input_ids=ids[:1], past_key_values=cache, max_new_tokens=2)
    more: Any = {"pixel_values": torch.stack([tiny.picture(1)] * 2)[:, None], "image_counts": torch.tensor([1, 1])}
    with pytest.raises(UserError, match="row 0 has 2 <image> tags but 3 images"):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2, **more)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(UserError, match="padded on the right"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2, use_cache=False)
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(UserError, match="not which images they saw"):
        model.generate(input_ids=ids, past_key_values=rebuilt, max_new_tokens=2)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat([first["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    found = model.generate(input_ids=swapped, attention_mask=mask.flip(0), past_key_values=cache, max_new_tokens=3)
    images = {name: first[name] for name in ("pixel_values", "image_counts")}
    wanted = model.generate(input_ids=ids, attention_mask=mask, **images, max_new_tokens=3)
    assert torch.equal(found.flip(0), wanted)


def test_settings_are_saved_and_loaded(tmp_path: Any) -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor)
    model.generation_config.max_new_tokens = 3
    model.generation_config.num_beams = 2
    model.generation_config.length_penalty = 0.5
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert torch.equal(loaded.generate(**inputs), model.generate(**inputs))
    assert new_of(model.generate(**inputs), inputs).shape[1] == 3
    one = GenerationConfig.from_pretrained(tmp_path)
    assert torch.equal(model.generate(**inputs, generation_config=one), model.generate(**inputs))


def test_transition_scores_are_of_the_new_tokens() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = tiny.batch(processor, padding_side="right")
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    chosen = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert chosen.shape == (3, 4)
    new = new_of(out.sequences, inputs)
    for step, scores in enumerate(out.scores):
        by_hand = scores.log_softmax(-1).gather(1, new[:, step : step + 1])[:, 0]
        torch.testing.assert_close(chosen[:, step], by_hand)


@pytest.mark.parametrize("pad", ["pad", "end"])
def test_padding_behind_an_end_has_no_score(pad: str) -> None:
    model, processor = tiny.flamingo("llama")
    own = model.generation_config
    assert isinstance(own.eos_token_id, list)
    if pad == "end":
        own.pad_token_id = own.eos_token_id[0]
    inputs = processor(images=[tiny.picture(0)], text="<image>A")
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "num_return_sequences": 64, "max_new_tokens": 16}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    chosen = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    early = 0
    for row, scores in zip(new.tolist(), chosen, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in own.eos_token_id), len(row))
        early += length < len(row)
        assert bool((scores[:length] < 0).all())
        assert scores[length:].tolist() == [0.0] * (len(row) - length)
    assert early > 3
