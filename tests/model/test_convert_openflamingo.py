"""Files in open_flamingo's layouts through `python -m flamingo convert`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.__main__ import main
from flamingo.convert import from_openflamingo
from tests.model import peers, tiny
from tests.model.test_parity_openflamingo import inputs_for

BLOCK = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer.attn.to_q.weight"


def write_backbones(folder: Path, family: str, vocab: int = tiny.TOKENS) -> None:
    """The encoder as open_clip lays it out, and the language model as the hub has it."""
    (folder / "clip").mkdir(parents=True)
    document = {"model_cfg": {**peers.ARCH, "text_cfg": peers.TEXT_CFG}, "preprocess_cfg": {}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(document))
    weights = {name: value.contiguous() for name, value in peers.clip().state_dict().items()}
    save_file(weights, folder / "clip" / "open_clip_model.safetensors")
    peers.language(family, vocab).save_pretrained(folder / "lm")
    tiny.tokenizer().save_pretrained(folder / "lm")


def command(folder: Path, checkpoint: str, *more: str) -> list[str]:
    return [
        "convert", "openflamingo", "--checkpoint", str(folder / checkpoint), "--vision", str(folder / "clip"),
        "--language", str(folder / "lm"), "--out", str(folder / "out"), *more,
    ]  # fmt: skip


def loaded(folder: Path) -> tuple[Any, Any]:
    model = FlamingoForConditionalGeneration.from_pretrained(folder / "out").eval()
    return model, FlamingoProcessor.from_pretrained(folder / "out")


def logits(theirs: Any, ours: Any, processor: Any) -> tuple[Tensor, Tensor]:
    batch, vision_x, _ = inputs_for(processor, ours, "left")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        b = theirs(vision_x, batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
        return ours(**batch).logits[real], b


def trained(theirs: Any) -> dict[str, Tensor]:
    return peers.trained_only(theirs)


def distributed(theirs: Any) -> dict[str, Any]:
    state = {f"module.{name}": value for name, value in trained(theirs).items()}
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "lr_scheduler_state_dict": {}}


def full(theirs: Any) -> dict[str, Tensor]:
    """Everything, with the second names of the layers, as version 1 saved it."""
    state = dict(theirs.state_dict())
    assert any("old_decoder_blocks" in name for name in state)
    assert any(name.startswith("lang_encoder.gated_cross_attn_layers") for name in state)
    assert "vision_encoder.conv1.weight" in state
    return state


@pytest.mark.parametrize("layout", [trained, distributed, full])
@pytest.mark.parametrize(("family", "vocab"), [("mpt", tiny.TOKENS), ("mpt", 288), ("gpt_neox", 288), ("opt", 259)])
def test_command(layout: Any, family: str, vocab: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An LM of 288 rows has some to spare, as the real ones have: open_flamingo cuts its table to the tokenizer."""
    theirs, tokens = peers.flamingo(family, 2, vocab=vocab)
    write_backbones(tmp_path, family, vocab)
    if layout is full:  # then the backbones' weights are not needed at all
        for file in (*tmp_path.glob("lm/*.safetensors"),):
            file.unlink()
    torch.save(layout(theirs), tmp_path / "checkpoint.pt")
    assert main(command(tmp_path, "checkpoint.pt", "--every", "2")) == 0
    assert "gated blocks before layers 1, 3" in capsys.readouterr().out
    ours, processor = loaded(tmp_path)
    assert processor.tokenizer.get_vocab() == tokens.get_vocab()
    a, b = logits(theirs, ours, processor)
    assert a.shape == b.shape
    assert a.shape[1] == len(tokens)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert main(command(tmp_path, "checkpoint.pt")) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_the_encoders_traps_matter(tmp_path: Path) -> None:
    """Tokens after the final norm, or plain GELU, would be another model: the test above could not pass with them."""
    theirs, _ = peers.flamingo("mpt", 2)
    options: dict[str, Any] = {"language": peers.language("mpt"), "tokenizer": tiny.tokenizer(), "image_size": 28}
    right, processor = from_openflamingo(trained(theirs), vision=peers.clip().visual, **options)
    a, b = logits(theirs, right, processor)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    normed, _ = from_openflamingo(trained(theirs), vision=peers.clip().visual, final_norm=True, **options)
    plain = peers.plain_gelu(peers.clip().visual)
    gelu, _ = from_openflamingo(trained(theirs), vision=plain, **options)
    for wrong in (normed, gelu):
        assert float((logits(theirs, wrong, processor)[0] - b).abs().max()) > 1e-3


def test_what_older_transformers_saved_beside_the_weights_is_left_out() -> None:
    theirs, _ = peers.flamingo("gpt_neox", 2)
    layer = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention."
    constants = {
        layer + "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        layer + "masked_bias": torch.tensor(-1e9),
        layer + "rotary_emb.inv_freq": torch.ones(4),
    }
    ours, processor = convert(trained(theirs) | constants)
    torch.testing.assert_close(*logits(theirs, ours, processor), rtol=0, atol=1e-5)


def test_the_callers_modules_are_not_changed() -> None:
    theirs, _ = peers.flamingo("gpt_neox", 2)
    lm, tokenizer = peers.language("gpt_neox"), tiny.tokenizer()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    convert(trained(theirs), language=lm, tokenizer=tokenizer)
    assert len(tokenizer) == tiny.TOKENS
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


def convert(state: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    given = {"vision": peers.clip().visual, "language": peers.language("gpt_neox"), "tokenizer": tiny.tokenizer()}
    return from_openflamingo(state, **{**given, "image_size": peers.SIZE, **options})


@pytest.fixture
def state() -> dict[str, Tensor]:
    return trained(peers.flamingo("gpt_neox", 2)[0])


def test_every_key_is_accounted_for(state: dict[str, Tensor]) -> None:
    some = torch.zeros(2, 2)
    with pytest.raises(
        UserError, match=r"has unknown keys: perceiver\.gadget \(and 0 more\); is it a model of another family\?"
    ):
        convert(state | {"perceiver.gadget": some})
    with pytest.raises(UserError, match=r"language_model\.gpt_neox\.gadget .* which this model lacks"):
        convert(state | {"lang_encoder.gpt_neox.gadget": some})
    with pytest.raises(UserError, match="LoRA weights; merge them"):
        convert(state | {"lang_encoder.gpt_neox.layers.0.lora_A.weight": some})
    with pytest.raises(UserError, match="has embeddings for the position of an image"):
        convert(state | {"perceiver.media_time_embs": some})
    alias = "lang_encoder.gated_cross_attn_layers.1.attn.to_q.weight"
    with pytest.raises(UserError, match=r"are one weight, but their values differ"):
        convert(state | {alias: state[BLOCK] + 1})
    with pytest.raises(UserError, match=r"cross_attn_blocks\.1\.attn\.q_proj\.weight \(and 0 more\)"):
        convert({name: value for name, value in state.items() if name != BLOCK})
    with pytest.raises(UserError, match=r"q_proj\.weight has shape \(4, 32\) in the checkpoint but \(512, 32\)"):
        convert(state | {BLOCK: state[BLOCK][:4]})
    with pytest.raises(UserError, match="has no gated blocks"):
        convert({name: value for name, value in state.items() if "gated" not in name})
    with pytest.raises(UserError, match=r"lacks lang_encoder\.gpt_neox\.embed_in\.weight"):
        convert({name: value for name, value in state.items() if "embed_in" not in name})


def test_backbones_that_do_not_belong_to_it(state: dict[str, Tensor]) -> None:
    with pytest.raises(
        UserError, match=r"blocks before layers \[1, 3\], but cross_attn_every_n_layers=1 .* \[0, 1, 2, 3\]"
    ):
        convert(state, cross_attn_every_n_layers=1)
    with pytest.raises(UserError, match=r"is for another language model|lacks lang_encoder"):
        convert(state, language=peers.language("opt"))
    sibling = peers.language("gpt_neox")  # instructed on: its rows have moved by 2 %
    with torch.no_grad():
        for table in (sibling.get_input_embeddings().weight, sibling.get_output_embeddings().weight):
            table.add_(0.02 * table.std() * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match=r"another language model: the rows of old tokens are 2\.0% from"):
        convert(state, language=sibling)
    convert(state, language=sibling, allow_changed_embeddings=True)
    longer = tiny.tokenizer()
    longer.add_tokens(["one", "two"])
    with pytest.raises(UserError, match=r"embedding has 262 rows, but the tokenizer has 264 tokens"):
        convert(state, tokenizer=longer)


def test_one_dtype_throughout(state: dict[str, Tensor]) -> None:
    """A built LM's, unless another is asked for; a checkpoint that was rounded to 16 bits is no other model's."""
    rounded = {name: value.bfloat16() for name, value in state.items()}
    lm, visual = peers.language("gpt_neox"), peers.clip().visual
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = convert(rounded, language=lm, vision=visual, dtype=None if dtype == torch.float32 else dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.vision_encoder.mean.dtype == torch.float32
        batch = processor(images=[[tiny.picture(0)]], text=["<image>a"])
        assert torch.isfinite(model(**batch).logits).all()
    assert {p.dtype for p in (*lm.parameters(), *visual.parameters())} == {torch.float32}


def test_files(state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_backbones(tmp_path, "gpt_neox")

    def refused(file: str, words: str) -> None:
        assert main(command(tmp_path, file)) == 2
        assert words in capsys.readouterr().err

    refused("none.pt", "does not exist")
    (tmp_path / "empty").mkdir()
    refused("empty", "holds no checkpoint")
    torch.save({"weights": [1, 2]}, tmp_path / "list.pt")
    refused("list.pt", "is not a dictionary of tensors")
    torch.save({"a": Path("x")}, tmp_path / "code.pt")  # would run code when unpickled
    refused("code.pt", "cannot be read")
    (tmp_path / "half.safetensors").write_bytes(b"12345678{")
    refused("half.safetensors", "cannot be read")
    save_file(state, tmp_path / "whole.safetensors")
    assert main([*command(tmp_path, "whole.safetensors"), "--dtype", "bfloat16"]) == 0
    assert loaded(tmp_path)[0].dtype == torch.bfloat16
    options = [
        "convert",
        "openflamingo",
        "--checkpoint",
        str(tmp_path / "whole.safetensors"),
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(options) == 2
    assert "give --preset, or --vision" in capsys.readouterr().err
    assert main([*options, "--preset", "idefics-9b"]) == 2
    assert "preset=idefics-9b is unknown; the presets of openflamingo are" in capsys.readouterr().err
    assert main([*options, "--preset", "openflamingo-9b"]) == 2  # tests have no network
    assert "network is not reachable" in capsys.readouterr().err
