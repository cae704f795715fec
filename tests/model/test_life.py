"""New tokens, saving and loading, freezing, refusals, and shapes on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, UserError
from tests.model import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
text_rows = torch.tensor([[1, 40, 41, 42, 43], [1, 50, 51, 52, 53]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [tiny.TOKENS, tiny.TOKENS + 2, tiny.TOKENS + 20], ids=["beyond", "half", "inside"])
def test_new_tokens_inside_or_beyond_the_table(vocab: int, tied: bool) -> None:
    """Their rows are their own wherever their ids lie; training moves them and nothing of the LM."""
    model, processor = tiny.flamingo("llama", vocab=vocab, tied=tied)
    assert model.config.new_token_ids == [tiny.TOKENS, tiny.TOKENS + 1, tiny.TOKENS + 2]
    assert (model.new_tokens.output_rows is None) == tied
    inputs = dict(tiny.batch(processor, padding_side="right"))
    embedding: Any = model.language_model.get_input_embeddings()
    table = embedding.weight.detach().clone()
    out = model(**inputs, output_hidden_states=True)
    assert out.logits.shape[-1] == max(vocab, tiny.TOKENS + 3)
    rows = model.new_tokens.input_rows if tied else model.new_tokens.output_rows
    assert rows is not None
    torch.testing.assert_close(out.logits[..., tiny.TOKENS : tiny.TOKENS + 3], out.hidden_states[-1] @ rows.T)
    model.train()
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    before = [p.detach().clone() for p in model.new_tokens.parameters()]
    model(**inputs, labels=tiny.labels_of(inputs, model.config.image_token_id)).loss.backward()
    optimizer.step()
    assert all(bool((a != b).any(1).any()) for a, b in zip(before, model.new_tokens.parameters(), strict=True))
    assert torch.equal(embedding.weight, table)


def test_new_rows_start_at_the_tables_mean_and_are_seeded() -> None:
    model, _ = tiny.flamingo("llama", seed=3)
    again, _ = tiny.flamingo("llama", seed=3)
    other, _ = tiny.flamingo("llama", seed=4)
    rows = model.new_tokens.input_rows
    embedding: Any = model.language_model.get_input_embeddings()
    table = embedding.weight
    assert torch.equal(rows, again.new_tokens.input_rows)
    assert not torch.equal(rows, other.new_tokens.input_rows)
    assert float((rows - table.mean(0)).detach().std()) == pytest.approx(0.1 * float(table.detach().std()), rel=0.3)


@families
def test_save_then_load_is_the_same(family: str, tmp_path: Path) -> None:
    model, processor = tiny.flamingo(family)
    inputs = tiny.batch(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
        ours = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(ours, loaded.generate(**inputs, max_new_tokens=5))


def test_a_built_module_that_cannot_be_rebuilt(tmp_path: Path) -> None:
    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 24, 14, stride=14)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels)

    options: dict[str, Any] = {"image_size": tiny.SIZE, "tokenizer": tiny.tokenizer()}
    model, processor = FlamingoForConditionalGeneration.from_backbones(Patches(), tiny.lm("opt"), **options)
    with pytest.raises(UserError, match="vision module was built by you"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, built_modules=True)
    with pytest.raises(UserError, match="pass it as vision="):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path, vision=Patches())
    inputs = tiny.batch(processor)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)


def test_freezing_is_a_policy() -> None:
    model, _ = tiny.flamingo("opt")
    model.freeze({"language": "train", "resampler": "frozen"})
    parts = {model.part_of(name) for name, _ in model.trainable_parameters()}
    assert parts == {"language", "cross_attention", "new_tokens"}
    model.train()
    assert model.language_model.training
    assert not model.resampler.training
    with pytest.raises(UserError, match="vison="):
        model.freeze({"vison": "train"})
    with pytest.raises(UserError, match="'thaw'"):
        model.freeze({"vision": "thaw"})


def test_mistakes_are_one_sentence() -> None:
    model, processor = tiny.flamingo()
    inputs = dict(tiny.batch(processor))
    with pytest.raises(UserError, match="row 0 has 2 <image> tags but 1 images"):
        model(**{**inputs, "image_counts": torch.tensor([1, 2, 0])} | {"phi": None})
    with pytest.raises(UserError, match="sum to 4, but 3 images"):
        model(**{**inputs, "image_counts": torch.tensor([2, 2, 0])})
    with pytest.raises(UserError, match="3 images for 3 rows need image_counts"):
        model(**{**inputs, "image_counts": None})
    with pytest.raises(UserError, match="encoder takes 28 px"):
        model.encode_media(torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="layers 0 to 3"):
        tiny.flamingo(cross_attn_layers=[5])
    with pytest.raises(UserError, match=r"resampler_config\.dept is not an option"):
        FlamingoConfig(text_config=tiny.lm_config("opt"), resampler_config={"dept": 2})
    with pytest.raises(UserError, match="decoder_layers_path='nowhere'"):
        tiny.flamingo(decoder_layers_path="nowhere")


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mpt"])
def test_builds_on_the_meta_device_at_full_size(family: str) -> None:
    """The paper's and OpenFlamingo's shapes cost nothing to look at: CLIP ViT-L/14 and a 7B-shaped LM."""
    from transformers import AutoConfig

    shape: dict[str, Any] = {
        "hidden_size": 4096,
        "vocab_size": 50257,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 4096, "n_layer": 32, "n_head": 32},
        "mpt": {"d_model": 4096, "n_layers": 32, "n_heads": 32},
    }
    arch = {"embed_dim": 768, "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}}
    config = FlamingoConfig(
        vision_config={"arch": {**arch, "quick_gelu": True}},
        text_config=AutoConfig.for_model(family, **own.get(family, shape)),
        cross_attn_every_n_layers=4,
        image_token_id=50002,
        eoc_token_id=50001,
    )
    with torch.device("meta"):
        model = FlamingoForConditionalGeneration(config)
    assert sorted(map(int, model.cross_attn_blocks)) == list(range(3, 32, 4))
    assert sum(p.numel() for p in model.parameters()) > 4e9
    assert all(p.is_meta for p in model.parameters())
