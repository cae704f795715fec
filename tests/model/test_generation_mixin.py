"""generate() by the names of transformers' generation tests, which its distribution lacks.

Each is written from what the name promises of any model there: prompt and continuation come back, and what is asked in
two ways gives the same. Rows with two, one and no image, padded.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from tests.model import tiny

NEW = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setup(request: pytest.FixtureRequest) -> Any:
    return tiny.flamingo(request.param)


@pytest.fixture
def model(setup: Any) -> Any:
    return setup[0]


@pytest.fixture
def inputs(setup: Any) -> Any:
    return tiny.batch(setup[1])


@pytest.fixture
def row(setup: Any) -> Any:
    return tiny.batch(setup[1], [0])


def seeded(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(**options)


def sequences(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


def test_greedy_generate(model: Any, inputs: Any) -> None:
    out = model.generate(**inputs, **GREEDY)
    width = inputs["input_ids"].shape[1]
    assert out.shape == (3, width + NEW)
    # Rows come back padded on the left, whatever side they were given with.
    for given, mask, found in zip(inputs["input_ids"], inputs["attention_mask"], out, strict=True):
        length = int(mask.sum())
        assert found[width - length : width].tolist() == given[mask.bool()].tolist()


def test_greedy_generate_is_argmax_without_a_cache(model: Any, row: Any) -> None:
    out = model.generate(**row, **GREEDY)
    ids = row["input_ids"]
    rest = {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
    for _ in range(NEW):
        logits = model(input_ids=ids, **rest).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, ids)


def test_greedy_generate_dict_outputs(model: Any, inputs: Any) -> None:
    asked: dict[str, Any] = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **GREEDY, **asked)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.scores is not None
    assert out.logits is not None
    assert len(out.scores) == len(out.logits) == NEW
    assert torch.equal(out.sequences, model.generate(**inputs, **GREEDY))
    chosen = out.sequences[:, -NEW:]
    assert torch.equal(torch.stack(out.scores, 1).argmax(-1), chosen)
    assert out.past_key_values is not None


def test_dict_outputs_have_hidden_states_and_attentions(row: Any) -> None:
    model, _ = tiny.flamingo("llama")
    model.set_attn_implementation("eager")
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    out: Any = model.generate(**row, **GREEDY, **asked)
    length = row["input_ids"].shape[1]
    assert len(out.hidden_states) == len(out.attentions) == NEW
    assert out.hidden_states[0][0].shape == (1, length, 32)
    assert [step[0].shape[-1] for step in out.attentions] == list(range(length, length + NEW))


def test_greedy_generate_dict_outputs_use_cache(model: Any, inputs: Any) -> None:
    with_cache = model.generate(**inputs, **GREEDY, use_cache=True)
    assert torch.equal(with_cache, model.generate(**inputs, **GREEDY, use_cache=False))


def test_sample_generate(model: Any, inputs: Any) -> None:
    options = {**inputs, **GREEDY, "do_sample": True}
    first, again = seeded(model, **options), seeded(model, **options)
    assert torch.equal(first, again)
    assert first.shape == (3, inputs["input_ids"].shape[1] + NEW)
    cold = seeded(model, **options, top_k=1)
    assert torch.equal(cold, model.generate(**inputs, **GREEDY))


def test_sample_generate_several_sequences(model: Any, inputs: Any) -> None:
    out = seeded(model, **{**inputs, **GREEDY, "do_sample": True}, num_return_sequences=2)
    assert out.shape[0] == 6
    prompts = out[:, : inputs["input_ids"].shape[1]]
    assert torch.equal(prompts[::2], prompts[1::2])


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_generate(model: Any, inputs: Any, use_cache: bool) -> None:
    out = model.generate(**inputs, **GREEDY, num_beams=3, use_cache=use_cache)
    assert out.shape == (3, inputs["input_ids"].shape[1] + NEW)
    one = model.generate(**inputs, **GREEDY, num_beams=1)
    assert torch.equal(one, model.generate(**inputs, **GREEDY))


def test_beam_search_generate_dict_output(model: Any, inputs: Any) -> None:
    out = model.generate(
        **inputs, **GREEDY, num_beams=3, num_return_sequences=2, output_scores=True, return_dict_in_generate=True
    )
    assert isinstance(out, GenerateBeamDecoderOnlyOutput)
    assert out.sequences_scores is not None
    assert out.sequences.shape[0] == out.sequences_scores.shape[0] == 6
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    length = (scores < 0).sum(1)
    torch.testing.assert_close(scores.sum(1) / length, out.sequences_scores, rtol=1e-3, atol=1e-3)


def test_beam_sample_generate(model: Any, inputs: Any) -> None:
    options = {**inputs, **GREEDY, "do_sample": True, "num_beams": 2}
    assert torch.equal(seeded(model, **options), seeded(model, **options))


def test_contrastive_generate_is_refused_or_done_by_transformers(model: Any, row: Any) -> None:
    # Transformers 5 moved it to code on the hub, which offline is one sentence of theirs.
    with pytest.raises((OSError, ValueError), match=r"contrastive|trust_remote_code|custom_generate|local_files_only"):
        model.generate(**row, max_new_tokens=2, penalty_alpha=0.6, top_k=4)


def test_group_beam_search_is_refused_or_done_by_transformers(model: Any, row: Any) -> None:
    with pytest.raises((OSError, ValueError), match=r"beam|trust_remote_code|custom_generate|local_files_only"):
        model.generate(**row, max_new_tokens=2, num_beams=4, num_beam_groups=2, diversity_penalty=1.0)


def test_assisted_decoding_matches_greedy_search(model: Any, row: Any) -> None:
    """A smaller model that sees the same images proposes; what comes out is what greedy search gives."""
    plain = model.generate(**row, **GREEDY)
    assistant = copy.deepcopy(model)
    assert torch.equal(model.generate(**row, **GREEDY, assistant_model=assistant), plain)


def test_assisted_decoding_with_a_text_model(row: Any) -> None:
    model, _ = tiny.flamingo("llama")
    plain = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, assistant_model=tiny.lm("llama")), plain)


def test_prompt_lookup_decoding_matches_greedy_search(model: Any, row: Any) -> None:
    plain = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, prompt_lookup_num_tokens=2), plain)


def test_assisted_decoding_sample(model: Any, row: Any) -> None:
    options = {**row, **GREEDY, "do_sample": True, "assistant_model": copy.deepcopy(model)}
    assert torch.equal(seeded(model, **options), seeded(model, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padding_compatibility(model: Any, setup: Any, options: dict[str, Any]) -> None:
    batch = model.generate(**tiny.batch(setup[1]), **GREEDY, **options)
    for index in range(3):
        alone = model.generate(**tiny.batch(setup[1], [index]), **GREEDY, **options)
        assert batch[index, -NEW:].tolist() == alone[0, -NEW:].tolist()


def test_right_padding_gives_the_same_as_left(model: Any, inputs: Any) -> None:
    mask = inputs["attention_mask"].bool()
    ids = inputs["input_ids"]
    left, right = torch.zeros_like(ids), torch.zeros_like(ids)
    to_left, to_right = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, kept in enumerate(mask):
        length = int(kept.sum())
        left[index, ids.shape[1] - length :] = right[index, :length] = ids[index][kept]
        to_left[index, ids.shape[1] - length :] = to_right[index, :length] = 1
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    found = [
        model.generate(input_ids=i, attention_mask=m, **rest, **GREEDY) for i, m in ((left, to_left), (right, to_right))
    ]
    assert torch.equal(found[0][:, -NEW:], found[1][:, -NEW:])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_inputs_embeds(model: Any, row: Any, num_beams: int) -> None:
    """Embeddings of a prompt in place of its ids; with the ids beside them, both come back."""
    ids = row["input_ids"]
    embeddings = model.get_input_embeddings()(ids.clamp(max=tiny.TOKENS - 1))
    rest = {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
    text = {"attention_mask": torch.ones_like(ids), **GREEDY, "num_beams": num_beams}
    # Without ids, nothing tells which position sees which image.
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, **rest, **text)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids[:, -3:]), max_new_tokens=NEW, do_sample=False)
    plain = model.generate(input_ids=ids[:, -3:], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, plain[:, 3:])


def test_generate_from_inputs_embeds_with_bos_only(model: Any) -> None:
    out = model.generate(input_ids=torch.tensor([[1]]), **GREEDY)
    assert out.shape == (1, 1 + NEW)


def test_generate_without_input_ids(model: Any) -> None:
    """Nothing at all is the token that the LM begins with, as for any causal LM."""
    out = model.generate(**GREEDY)
    assert out.shape == (1, 1 + NEW)
    assert int(out[0, 0]) == model.generation_config.bos_token_id


def test_generate_continue_from_past_key_values(model: Any, row: Any) -> None:
    """In two steps, the cache between them, as in one; the images are remembered."""
    asked: dict[str, Any] = {"return_dict_in_generate": True}
    whole = model.generate(**row, **{**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6})
    first = model.generate(**row, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}, **asked)
    sequence = first.sequences
    second = model.generate(
        input_ids=sequence,
        attention_mask=torch.ones_like(sequence),
        past_key_values=first.past_key_values,
        **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3},
    )
    assert torch.equal(second, whole)


def test_generate_continue_from_inputs_embeds_cache_is_not_shared(model: Any, row: Any) -> None:
    first = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY), first)


def test_generate_with_static_cache(row: Any) -> None:
    model, _ = tiny.flamingo("llama")
    plain = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, cache_implementation="static", disable_compile=True), plain)


def test_generate_with_dynamic_cache_given(model: Any, inputs: Any) -> None:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), model.generate(**inputs, **GREEDY))


def test_generate_with_quant_cache_is_refused_or_close(row: Any) -> None:
    model, _ = tiny.flamingo("llama")
    with pytest.raises((ImportError, ValueError)):
        model.generate(**row, **GREEDY, cache_implementation="quantized", cache_config={"backend": "none such"})


def test_prefill_chunking(model: Any, row: Any) -> None:
    plain = model.generate(**row, **GREEDY)
    assert torch.equal(model.generate(**row, **GREEDY, prefill_chunk_size=4), plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_without_attention_mask(model: Any, inputs: Any, options: dict[str, Any]) -> None:
    """Padding is found in the ids, as transformers does it for every decoder."""
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    masked = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(model.generate(**bare, **GREEDY, **options), masked)


def test_generate_compilation_all_outputs_is_off_on_cpu(model: Any, row: Any) -> None:
    out = model.generate(**row, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(step.isfinite().all() for step in out.logits)


def test_generate_methods_with_logits_to_keep(model: Any, inputs: Any) -> None:
    """Only the last position's logits are computed for a prompt."""
    out = model(**inputs, logits_to_keep=1)
    assert out.logits.shape[1] == 1


def test_generation_config_at_call(model: Any, row: Any) -> None:
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**row, generation_config=config), model.generate(**row, **GREEDY))


def test_generation_config_bare_at_call_never_writes_an_image(model: Any, row: Any) -> None:
    bare = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=2)
    out = model.generate(**row, generation_config=bare)
    assert int(out.max()) <= max(model.config.new_token_ids)


def test_logits_processors_and_stopping_criteria(model: Any, setup: Any, row: Any) -> None:
    end = model.generation_config.eos_token_id[0]
    longer = LogitsProcessorList([MinLengthLogitsProcessor(row["input_ids"].shape[1] + 3, end)])
    out = model.generate(**row, max_new_tokens=NEW, do_sample=False, logits_processor=longer)
    assert out.shape[1] >= row["input_ids"].shape[1] + 3
    text = setup[1].tokenizer.decode(model.generate(**row, **GREEDY)[0, -NEW:][:1])
    stop = StoppingCriteriaList([StopStringCriteria(setup[1].tokenizer, [text])])
    stopped = model.generate(**row, max_new_tokens=NEW, do_sample=False, stopping_criteria=stop)
    assert stopped.shape[1] <= row["input_ids"].shape[1] + NEW


def test_stop_strings(model: Any, setup: Any, row: Any) -> None:
    plain = model.generate(**row, **GREEDY)
    text = setup[1].tokenizer.decode(plain[0, -NEW:-1])
    out = model.generate(**row, max_new_tokens=NEW, do_sample=False, stop_strings=[text], tokenizer=setup[1].tokenizer)
    assert out.shape[1] <= plain.shape[1]


def test_max_length_counts_the_prompt(model: Any, row: Any) -> None:
    length = row["input_ids"].shape[1]
    out = model.generate(**row, max_length=length + 2, min_length=length + 2, do_sample=False)
    assert out.shape[1] == length + 2


def test_model_kwarg_that_does_not_exist_is_refused(model: Any, row: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="pixel_valuse"):
        model.generate(**row, max_new_tokens=1, pixel_valuse=row["pixel_values"])


def test_streamer_gets_the_prompt_and_what_is_new(model: Any, row: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    out = model.generate(**row, **GREEDY, streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), -1]


def test_output_is_in_the_device_and_dtype_of_the_prompt(model: Any, row: Any) -> None:
    out = model.generate(**row, **GREEDY)
    assert (out.dtype, out.device) == (row["input_ids"].dtype, row["input_ids"].device)
