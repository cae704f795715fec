"""Folders in the layouts of Otter and IDEFICS through `python -m flamingo convert`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, UserError
from flamingo.__main__ import main
from flamingo.convert import from_idefics, read_checkpoint
from flamingo.convert.idefics import clip_config, llama_config
from flamingo.convert.otter import backbones_of
from flamingo.vision.encoder import patch_tokens
from tests.model import otter, peers, tiny
from tests.model import test_parity_idefics as idefics
from tests.model.test_parity_openflamingo import IMAGES, ROWS, padded


def shards(state: dict[str, Tensor], folder: Path, number: int = 3) -> None:
    """Write torch shards and their index, as transformers 4 did."""
    names = list(state)
    where = {
        name: f"pytorch_model-{i * number // len(names) + 1:05d}-of-{number:05d}.bin" for i, name in enumerate(names)
    }
    for file in set(where.values()):
        torch.save({name: state[name] for name in names if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def convert(family: str, folder: Path, *more: str) -> int:
    return main(["convert", family, "--checkpoint", str(folder), "--out", str(folder / "out"), *more])


def loaded(folder: Path) -> tuple[Any, Any]:
    model = FlamingoForConditionalGeneration.from_pretrained(folder / "out").eval()
    return model, FlamingoProcessor.from_pretrained(folder / "out")


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_otter(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs: Any = otter.Otter(family, 2, 3)
    shards(theirs.released(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(otter.config(theirs, 2)))
    assert convert("otter", tmp_path) == 2
    assert "holds no tokenizer; give --tokenizer" in capsys.readouterr().err
    otter.tokenizer().save_pretrained(tmp_path)
    assert convert("otter", tmp_path) == 0
    ours, processor = loaded(tmp_path)
    assert processor.max_frames == 3
    images = [[[tiny.picture(10 * r + j)] for j in range(n)] for r, n in enumerate(IMAGES)]
    batch = processor(images=images, text=ROWS)
    mean, std = (getattr(ours.vision_encoder, name).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (batch["pixel_values"].float() / 255 - mean) / std
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a = ours(**batch).logits[real]
        b = theirs(padded(IMAGES, pixels), batch["input_ids"], batch["attention_mask"])[real]
    assert a.shape[1] == len(otter.tokenizer())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_otters_config(tmp_path: Path) -> None:
    source = otter.config(otter.Otter("mpt", 2, None), 2)
    assert backbones_of({**source, "model_type": "flamingo"})["extra_tokens"] == ()
    source["text_config"]["attn_config"] = {"qk_ln": True}
    with pytest.raises(UserError, match="qk_ln=True; transformers' MPT has only False"):
        backbones_of(source)
    with pytest.raises(UserError, match="language model is 'gadget'"):
        backbones_of({**source, "text_config": {"model_type": "gadget"}})
    with pytest.raises(UserError, match="not Otter's: its model_type is 'idefics'"):
        backbones_of({"model_type": "idefics"})
    with pytest.raises(UserError, match="encoder is 'siglip'"):
        backbones_of({**source, "vision_config": {"model_type": "siglip"}})


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """IDEFICS as its authors saved it: sharded safetensors, its config of 2023, its tokenizer."""
    folder = tmp_path_factory.mktemp("idefics")
    theirs = idefics.idefics(2)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    config = json.loads((folder / "config.json").read_text())
    old = {"cross_layer_activation_function": "swiglu", "max_sequence_length": 2048, "transformers_version": "4.28.0"}
    (folder / "config.json").write_text(json.dumps({**config, **old}))
    idefics.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, folder


def test_idefics(release: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = release
    out = ["--out", str(tmp_path / "out")]
    assert convert("idefics", folder, *out) == 0
    ours, processor = loaded(tmp_path)
    batch, other = idefics.inputs_for(processor, ours)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = ours(**batch).logits[real], theirs(**other).logits[real]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    config = ours.config
    assert (config.cross_attn_layers, config.media_reset_token_id, config.vision.class_token) == ([0, 2], 2, True)
    assert (processor.image_transform.mode, config.vision.resize_mode) == ("squash", "squash")
    # Only the two additional tokens are new; the table of the language model is as it was.
    assert config.new_token_ids == [tiny.TOKENS, tiny.TOKENS + 1]
    assert ours.generation_config.eos_token_id == [2]
    assert set(config.new_token_ids) <= set(ours.generation_config.suppress_tokens)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("gates", ["float", "vector"])
def test_idefics_without_its_config(norms: bool, gates: str) -> None:
    """From the shapes, and the configs of both backbones, as for the other families."""
    head_dim = 12 if norms else 96
    theirs = idefics.idefics(2, alpha_type=gates, qk_layer_norms=norms, perceiver_norms=norms, head_dim=head_dim)
    ours, processor = from_idefics(
        theirs.state_dict(),
        vision=clip_config(theirs.config),
        language=llama_config(theirs.config),
        tokenizer=idefics.tokenizer(),
        cross_attn_every_n_layers=2,
        image_size=peers.SIZE,
    )
    batch, other = idefics.inputs_for(processor, ours)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits[real], theirs(**other).logits[real], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"needs config=\.\.\., or vision= and language="):
        from_idefics(theirs.state_dict(), tokenizer=idefics.tokenizer())


def test_images_stand_between_fake_tokens(release: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = release
    _, processor = from_idefics(theirs.state_dict(), config=theirs.config, tokenizer=str(folder))
    processor.save_pretrained(tmp_path)
    for one in (processor, FlamingoProcessor.from_pretrained(tmp_path)):
        images = [tiny.picture(i) for i in range(3)]
        ids = one(images=[images], text=["a<image><image>b<image></s>"])["input_ids"][0]
        fake = "<fake_token_around_image>"
        text = f"<s>a{fake}<image>{fake}<image>{fake}b{fake}<image>{fake}</s>"
        assert one.tokenizer.decode(ids) == text
        written = one(images=[images], text=[text.removeprefix("<s>")])["input_ids"][0]
        assert torch.equal(written, ids)


def test_idefics_that_cannot_be(release: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, folder = release
    state, config = dict(theirs.state_dict()), theirs.config.to_dict()
    tokens = idefics.tokenizer()

    def refused(words: str, state: dict[str, Tensor] = state, tokenizer: Any = tokens, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            from_idefics(state, config={**config, **changes}, tokenizer=tokenizer)

    refused("use_resampler=False cannot be converted", use_resampler=False)
    refused("tie_word_embeddings=True cannot", tie_word_embeddings=True)
    refused("not one of IDEFICS", model_type="llama")
    refused(r"blocks before layers \[0, 4\], but cross_layer_interval=4 .* \[0\]", cross_layer_interval=4)
    refused("not a multiple of cross_layer_interval", cross_layer_interval=3)
    refused("the tokenizer has no <image> below id 261", tokenizer=tiny.tokenizer())
    refused(r"unknown keys: model\.gadget \(and 0 more\)", state | {"model.gadget": torch.zeros(1)})
    refused(r"lacks new_tokens\.output_rows", {n: t for n, t in state.items() if "additional_fc" not in n})
    refused(r"attn\.k_norm\.weight .*which this model lacks", qk_layer_norms=False)
    assert convert("idefics", folder, "--preset", "idefics-9b", "--out", str(tmp_path / "x")) == 2
    assert "config.json has vocab_size=259, but the preset idefics-9b has 32000" in capsys.readouterr().err


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((2,), float(i)) for i in range(6)}
    shards(state, tmp_path)
    assert read_checkpoint(tmp_path).keys() == state.keys()
    second = tmp_path / "pytorch_model-00002-of-00003.bin"
    torch.save({"t2": state["t2"]}, second)
    with pytest.raises(UserError, match=r"00002-of-00003\.bin and .* disagree about t3"):
        read_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"which pytorch_model\.bin\.index\.json names, is missing"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert main(["convert", "otter", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "o")]) == 2


def test_encoders_class_token_and_final_norm() -> None:
    """The two switches on both libraries' encoders."""
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    visual, clip = peers.clip().visual, tiny.vision()
    with torch.no_grad():
        raw = visual.transformer(visual._embeds(pixels))
        torch.testing.assert_close(patch_tokens(visual, pixels, class_token=True), raw)
        torch.testing.assert_close(patch_tokens(visual, pixels, final_norm=True), visual.ln_post(raw)[:, 1:])
        hidden = clip(pixels).last_hidden_state
        torch.testing.assert_close(patch_tokens(clip, pixels, class_token=True), hidden)
        normed = clip.post_layernorm(hidden)[:, 1:]
        torch.testing.assert_close(patch_tokens(clip, pixels, final_norm=True), normed)
        with pytest.raises(UserError, match="final_norm is for open_clip's encoders and CLIP"):
            patch_tokens(torch.nn.Flatten(2), pixels, final_norm=True)
