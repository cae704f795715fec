"""A language model out of a GGUF file: the same logits, tokens and chat template, and an ordinary model afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError, gguf_files
from flamingo.backbones import load_language
from tests.model import tiny

CHAT = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys as llama.cpp lays them out: rotary pairs side by side."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, architecture: str = "llama", without: str = "", bos: bool = False) -> LlamaForCausalLM:
    """A tiny Llama, its bytes as tokens and a chat template, as llama.cpp's converter writes them."""
    torch.manual_seed(0)
    lm: Any = tiny.lm("llama", vocab=260, tied=False)
    config, made = lm.config, tiny.tokenizer(bos=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(made.get_vocab().items(), key=lambda item: item[1])
    # transformers' GPT-2 tokenizer adds this one where it is missing.
    tokens = ["<|endoftext|>", *(token for token, _ in vocabulary[1:]), "th"]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in lm.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            value = permuted(value, heads) if part in key else value
        if not without or without not in key:
            writer.add_tensor(str(name), value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm


@pytest.mark.parametrize("folder", [True, False])
def test_a_model_around_a_gguf_file(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "lm").mkdir()
    file = tmp_path / "lm" / "tiny.gguf"
    source = write_gguf(file)
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        tiny.vision(), str(file.parent if folder else file), image_size=tiny.SIZE, cross_attn_every_n_layers=2
    )
    ids = torch.tensor([[5, 80, 99, 200]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :260], source(input_ids=ids).logits)
    assert processor.tokenizer.chat_template == CHAT
    assert processor.start_ids == []  # the file says that none is put in front, though there is one
    assert processor.tokenizer.bos_token == "<s>"
    assert processor.tokenizer.decode(processor.encode_text("the cat")) == "the cat"
    inputs = processor(images=[[tiny.picture(0)]], text=["<image>a"])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    file.unlink()  # what is saved needs it no more
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    model.language_model.save_pretrained(tmp_path / "lm alone")
    alone, _ = load_language(tmp_path / "lm alone", processor.tokenizer)
    assert {p.dtype for p in alone.parameters()} == {torch.float32}
    model.freeze({"language": "train"})
    assert all(p.requires_grad for p in model.language_model.parameters())


def test_a_begin_token_that_the_file_asks_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", bos=True)
    _, processor = FlamingoForConditionalGeneration.from_backbones(
        tiny.vision(), tmp_path / "tiny.gguf", image_size=tiny.SIZE
    )
    assert processor.start_ids == [1]


def test_a_begin_token_that_the_caller_asks_for_or_forbids(tmp_path: Path) -> None:
    """Beside any LM, and saved; the given tokenizer stays as it is, and one without a BOS is refused."""
    for bos in (True, False):
        write_gguf(tmp_path / "tiny.gguf", bos=not bos)
        _, processor = FlamingoForConditionalGeneration.from_backbones(
            tiny.vision(), tmp_path / "tiny.gguf", image_size=tiny.SIZE, add_bos_token=bos
        )
        processor.save_pretrained(tmp_path / f"saved {bos}")
        again = FlamingoProcessor.from_pretrained(tmp_path / f"saved {bos}")
        row = again(images=[[tiny.picture(0)]], text=["<image>a"])["input_ids"][0].tolist()
        assert row == [1] * bos + [again.image_token_id, *again.encode_text("a")]
    silent = tiny.tokenizer(bos=False)
    options: dict[str, Any] = {"tokenizer": silent, "image_size": tiny.SIZE, "add_bos_token": True}
    with pytest.raises(UserError, match="has no BOS: set its bos_token"):
        FlamingoForConditionalGeneration.from_backbones(tiny.vision(), tiny.lm("llama"), **options)
    silent.bos_token = "<s>"
    _, processor = FlamingoForConditionalGeneration.from_backbones(tiny.vision(), tiny.lm("llama"), **options)
    assert processor.start_ids == [silent.bos_token_id]
    assert silent("a")["input_ids"] == silent.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.99])
def test_a_torn_file_is_one_sentence(tmp_path: Path, share: float) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"tiny.gguf does not hold a \w+ ?\w* that transformers can read: .*whole"):
        load_language(tmp_path / "tiny.gguf")


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    write_gguf(tmp_path / "other.gguf", architecture="command-r")
    with pytest.raises(UserError, match=r"that transformers can read: .*command-r"):
        load_language(tmp_path / "other.gguf")
    write_gguf(tmp_path / "lacks.gguf", without="layers.1.mlp.down_proj")
    with pytest.raises(UserError, match=r"lacks 1 weights of a LlamaForCausalLM, the first is model.layers.1.mlp.down"):
        load_language(tmp_path / "lacks.gguf")
    with pytest.raises(UserError, match=r"the folder .* has 2 GGUF files \(lacks.gguf, other.gguf\); give the path"):
        load_language(tmp_path)
    with pytest.raises(UserError, match=r"none.gguf does not exist"):
        load_language(tmp_path / "none.gguf")
    (tmp_path / "lacks.gguf").rename(tmp_path / "big-00001-of-00002.gguf")
    with pytest.raises(UserError, match=r"is one part of a model; join the parts"):
        load_language(tmp_path / "big-00001-of-00002.gguf")
    with pytest.raises(UserError, match=r"quantization_config= does not go with .*other.gguf"):
        load_language(tmp_path / "other.gguf", quantization_config={})
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf; install it with: pip install 'flamingo-vlm.gguf.'"):
        load_language(tmp_path / "other.gguf")
