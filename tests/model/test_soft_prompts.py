"""Soft prompts: vectors in front of a row, beside a written prompt, several of one model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.processing.chat import CHAT_TEMPLATES
from flamingo.soft_prompts import load_soft_prompt, new_soft_prompt, save_soft_prompt
from tests.model import tiny

TEXT = "Answer in one word."
PROMPTS = ["<image>A cat.<|endofchunk|><image>A", "<image>A dog"]
IMAGES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]


def randomise(model: FlamingoForConditionalGeneration, seed: int = 0) -> None:
    soft: Any = model.new_tokens.soft
    with torch.no_grad():
        soft.rows.copy_(torch.randn(soft.rows.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mosaic_gpt", "gemma3"])
def test_from_a_text_it_gives_the_logits_of_that_text(family: str) -> None:
    """Also where the LM scales its embeddings (Gemma) or learns its positions (GPT-2), and behind a BOS."""
    model, processor = tiny.flamingo(family)
    written = processor(images=IMAGES, text=[TEXT + prompt for prompt in PROMPTS])
    candidates = [[5, 6], [7]]
    with torch.no_grad():
        wanted = model(**written).logits
        ranked = model.score_candidates(written, candidates)
    said = model.generate(**written, max_new_tokens=6, num_beams=2)
    new_soft_prompt(model, processor, text=TEXT)
    soft = processor(images=IMAGES, text=PROMPTS)
    assert soft["input_ids"].shape == written["input_ids"].shape
    assert not torch.equal(soft["input_ids"], written["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**soft).logits, wanted)
        assert torch.equal(model.score_candidates(soft, candidates), ranked)
    assert torch.equal(model.generate(**soft, max_new_tokens=6, num_beams=2)[:, -6:], said[:, -6:])


def test_several_in_one_batch_are_each_what_they_are_alone() -> None:
    model, processor = tiny.flamingo("llama")
    plain = processor(images=IMAGES[1], text=PROMPTS[1])
    with torch.no_grad():
        without = model(**plain).logits[0, -1]
    for name, number in (("law", 3), ("medicine", 7)):
        new_soft_prompt(model, processor, name, tokens=number)
    randomise(model)
    names, alone = ["law", "medicine", ""], []
    batch = processor(images=[IMAGES[1]] * 3, text=[PROMPTS[1]] * 3, soft_prompt=names)
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for name in names:
            row = processor(images=IMAGES[1], text=PROMPTS[1], soft_prompt=name)
            alone.append(model(**row).logits[0, -1])
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[2], without, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
    said = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for index, name in enumerate(names):
        row = processor(images=IMAGES[1], text=PROMPTS[1], soft_prompt=name)
        assert torch.equal(model.generate(**row, max_new_tokens=6, do_sample=False)[0, -6:], said[index, -6:])


def test_a_file_of_kilobytes_is_the_prompt(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, tokens=20)
    randomise(model)
    before = model(**processor(images=IMAGES, text=PROMPTS)).logits
    save_soft_prompt(model, tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").stat().st_size < 4096
    other, other_processor = tiny.flamingo("llama")
    load_soft_prompt(other, other_processor, tmp_path / "mine.safetensors", "mine")
    inputs = other_processor(images=IMAGES, text=PROMPTS, soft_prompt="mine")
    assert torch.equal(other(**inputs).logits, before)
    randomise(other, seed=1)
    load_soft_prompt(other, other_processor, tmp_path / "mine.safetensors", "mine")  # again: in place of the one there
    assert torch.equal(other(**inputs).logits, before)


def test_what_is_not_a_prompt_of_this_model_is_refused(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, tokens=4)
    file = tmp_path / "mine.safetensors"
    save_soft_prompt(model, file)
    changed, other = tiny.flamingo("llama")
    with torch.no_grad():
        next(changed.cross_attn_blocks.parameters()).add_(1)
    with pytest.raises(UserError, match=r"trained in front of another model .* load the model that"):
        load_soft_prompt(changed, other, file)
    assert changed.new_tokens.soft is None
    assert other.soft_prompts == {}
    wide = tmp_path / "wide.safetensors"
    save_file({"rows": torch.zeros(4, 99)}, wide)
    with pytest.raises(UserError, match=r"shape \(4, 99\), and the language model is 32 wide"):
        load_soft_prompt(model, processor, wide)
    (tmp_path / "half").write_bytes(file.read_bytes()[:50])
    for name in ("half", "missing"):
        with pytest.raises(UserError, match=f"{name} is not a soft prompt"):
            load_soft_prompt(model, processor, tmp_path / name)
    save_file({"vectors": torch.zeros(4, 32)}, tmp_path / "other")
    with pytest.raises(UserError, match="other is not a soft prompt"):
        load_soft_prompt(model, processor, tmp_path / "other")
    with torch.no_grad():
        model.new_tokens.soft.rows[1, 1] = float("nan")  # type: ignore[union-attr]
    save_soft_prompt(model, file)
    with pytest.raises(UserError, match="not finite"):
        load_soft_prompt(model, processor, file)
    bare, _ = tiny.flamingo("llama")
    with pytest.raises(UserError, match=r"vector 0 of the soft prompts, and this model has 0"):
        bare(**processor(text="A"))


def test_mistakes_of_names_and_numbers_are_named() -> None:
    model, processor = tiny.flamingo("llama")
    with pytest.raises(UserError, match="0 vectors from a text of 0 tokens"):
        new_soft_prompt(model, processor)
    with pytest.raises(UserError, match="of -1 vectors"):
        new_soft_prompt(model, processor, tokens=-1)
    with pytest.raises(UserError, match="5 vectors from a text of 19 tokens"):
        new_soft_prompt(model, processor, tokens=5, text=TEXT)
    with pytest.raises(UserError, match="cannot be called"):
        new_soft_prompt(model, processor, "a.b", tokens=5)
    new_soft_prompt(model, processor, "law", tokens=5)
    with pytest.raises(UserError, match="has a soft prompt 'law' of 5 vectors already"):
        new_soft_prompt(model, processor, "law", tokens=5)
    with pytest.raises(UserError, match=r"row 1: the model has no soft prompt 'lore'; it has law"):
        processor(text=["A", "B"], soft_prompt=["law", "lore"])
    with pytest.raises(UserError, match="2 soft prompts for 1 rows"):
        processor(text=["A"], soft_prompt=["law", "law"])
    with pytest.raises(UserError, match="no soft prompt 'default'; it has law"):
        save_soft_prompt(model, "never.safetensors")


def test_a_saved_model_has_its_prompts(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, "law", tokens=2)
    new_soft_prompt(model, processor, tokens=3)
    randomise(model)
    model.freeze({"new_tokens": "frozen"})
    inputs = processor(images=IMAGES, text=PROMPTS, soft_prompt=["law", "default"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = (
        FlamingoForConditionalGeneration.from_pretrained(tmp_path),
        FlamingoProcessor.from_pretrained(tmp_path),
    )
    assert not any(parameter.requires_grad for parameter in again.new_tokens.parameters())
    assert again_processor.soft_prompts == processor.soft_prompts
    assert again_processor.start_ids == [1, *processor.soft_prompts["default"]]
    seen = again_processor(images=IMAGES, text=PROMPTS, soft_prompt=["law", "default"], padding_side="left")
    assert torch.equal(seen["input_ids"], inputs["input_ids"])
    assert torch.equal(again(**seen).logits, model(**inputs).logits)


def test_it_stands_behind_the_begin_and_stays_when_a_row_is_cut() -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, tokens=3)
    soft = processor.soft_prompts["default"]
    inputs = processor(images=IMAGES[0], text=PROMPTS[0], truncation=True, max_length=12)
    assert inputs["input_ids"][0, :5].tolist() == [1, *soft, processor.image_token_id]
    assert inputs["image_counts"].tolist() == [1]
    assert processor(text="<s>A")["input_ids"][0, :4].tolist() == [1, *soft]
    assert processor(text="A", add_special_tokens=False)["input_ids"][0, :3].tolist() == soft
    processor.chat_template = CHAT_TEMPLATES["plain"]
    chat = processor.apply_chat_template([{"role": "user", "content": "A"}], tokenize=True, return_dict=True)
    assert chat["input_ids"][0].tolist().count(soft[0]) == 1


def test_every_way_of_decoding_knows_it_or_says_no() -> None:
    """Penalties look up logits by the ids of the prompt, and a soft prompt's vectors have none."""
    model, processor = tiny.flamingo("llama")
    ways: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ]
    row: dict[str, Any] = {"images": IMAGES[1], "text": TEXT + PROMPTS[1]}
    wanted = [model.generate(**processor(**row), max_new_tokens=6, do_sample=False, **way) for way in ways]
    new_soft_prompt(model, processor, text=TEXT)
    inputs = processor(images=IMAGES[1], text=PROMPTS[1])
    for way, text in zip(ways[3:], wanted[3:], strict=True):  # penalties of a text's own words differ by meaning
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **way)[:, -6:], text[:, -6:])
    for way in ways[:3]:
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **way)
        assert (out[:, inputs["input_ids"].shape[1] :] < 300).all()
    assert processor.batch_decode_new(out, {**inputs})  # the last one has two sequences
    with pytest.raises(UserError, match="an assistant does not know"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, assistant_model=model.language_model)


def test_its_gradient_reaches_only_the_prompt_that_was_used() -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, "law", tokens=2)
    new_soft_prompt(model, processor, tokens=3)
    model.train()
    inputs: Any = processor(images=IMAGES, text=PROMPTS)
    labels = tiny.labels_of(inputs, processor.image_token_id)
    assert (labels >= 1 << 30).any()  # no token to be learnt, and left out by the model
    model(**inputs, labels=labels).loss.backward()
    soft: Any = model.new_tokens.soft
    gradient = soft.rows.grad
    assert not gradient[:2].any()
    assert gradient[2:].abs().sum(1).all()


def test_the_file_says_which_model(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    new_soft_prompt(model, processor, text=TEXT)
    save_soft_prompt(model, tmp_path / "a")
    assert load_file(tmp_path / "a")["rows"].shape == (len(TEXT), 32)
    table: Any = model.get_input_embeddings().weight
    ids = torch.tensor(processor.encode_text(TEXT))
    assert torch.equal(load_file(tmp_path / "a")["rows"], table[ids])
