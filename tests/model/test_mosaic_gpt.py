"""MosaicGPT against a slow reading of its formulas, against transformers' MPT, and as a released folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MptConfig, MptForCausalLM

from flamingo import FlamingoConfig, UserError
from flamingo.mosaic_gpt.configuration import MosaicGPTConfig
from flamingo.mosaic_gpt.modeling import MosaicGPTForCausalLM, alibi_slopes

WIDTH, HEADS, LAYERS, ROWS = 32, 4, 3, 61
SIZES: dict[str, Any] = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": ROWS, "max_seq_len": 64}

# A released config.json as its keys are, remote code included.
RELEASED: dict[str, Any] = {
    **SIZES,
    "model_type": "mosaic_gpt",
    "architectures": ["MosaicGPT"],
    "auto_map": {
        "AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig",
        "AutoModelForCausalLM": "mosaic_gpt.MosaicGPT",
    },
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_device": "cpu",
    "logit_scale": None,
    "low_precision_layernorm": True,
    "mlp_ratio": 4,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "use_cache": False,
    "verbose": 0,
}


def lm(**options: Any) -> MosaicGPTForCausalLM:
    torch.manual_seed(0)
    model = MosaicGPTForCausalLM(MosaicGPTConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.eval()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def slow(w: dict[str, Tensor], ids: list[int], *, heads: int, clip: float | None, qk_ln: bool) -> Tensor:
    """Logits (T, V) of one text, token by token, head by head; ALiBi counted from the last key, as in the sources."""
    x = w["transformer.wte.weight"][ids]
    length, width = x.shape
    for i in range(LAYERS):
        own = {k.removeprefix(f"transformer.blocks.{i}."): v for k, v in w.items() if f"blocks.{i}." in k}
        qkv = norm(x, own["ln_1.weight"]) @ own["attn.Wqkv.weight"].T
        qkv = qkv if clip is None else qkv.clamp(-clip, clip)
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        if qk_ln:
            q, k = norm(q, own["attn.q_ln.weight"]), norm(k, own["attn.k_ln.weight"])
        mixed = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            slope = 1 / 2 ** (8 * (h + 1) / heads)
            for t in range(length):
                scores = torch.stack(
                    [
                        q[t, part] @ k[s, part] / math.sqrt(width / heads) - slope * (length - 1 - s)
                        for s in range(t + 1)
                    ]
                )
                mixed[t, part] = scores.softmax(0) @ v[: t + 1, part]
        x = x + mixed @ own["attn.out_proj.weight"].T
        up = norm(x, own["ln_2.weight"]) @ own["mlp.mlp_up.weight"].T
        x = x + (up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))) @ own["mlp.mlp_down.weight"].T
    return norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [{}, {"attn_qk_ln": False}, {"attn_clip_qkv": 0.7}, {"n_heads": 3, "d_model": 24}], ids=str
)
def test_the_formulas(options: dict[str, Any], implementation: str) -> None:
    model = lm(attn_implementation=implementation, **options).double()
    ids = torch.randint(0, ROWS, (2, 9), generator=torch.Generator().manual_seed(1))
    config = model.config
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        for row in range(2):
            theirs = slow(
                model.state_dict(),
                ids[row].tolist(),
                heads=config.n_heads,
                clip=config.attn_clip_qkv,
                qk_ln=config.attn_qk_ln,
            )
            torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-10)


def test_without_qk_norms_it_is_transformers_mpt() -> None:
    """The only family it can be compared with; both are left-padded, and cached in the second half."""
    ours = lm(attn_qk_ln=False)
    theirs = MptForCausalLM(MptConfig(**SIZES)).eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        for old, new in (("ln_f", "norm_f"), ("ln_", "norm_"), ("mlp.mlp_up", "ffn.up_proj")):
            name = name.replace(old, new)
        renamed[name.replace("mlp.mlp_down", "ffn.down_proj")] = value
    theirs.load_state_dict(renamed)
    ids = torch.randint(0, ROWS, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    real = mask.bool()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
        whole = ours(input_ids=ids, attention_mask=mask).logits
        first = ours(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = ours(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(whole[real], wanted[real], rtol=0, atol=2e-5)
    torch.testing.assert_close(second.logits, wanted[:, 6:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_generates_the_same(implementation: str) -> None:
    """Its mask comes prepared, boolean or additive, and its keys are longer than the text."""
    model: Any = lm(attn_implementation=implementation)
    ids = torch.randint(3, ROWS, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, model.generate(ids, use_cache=False, **options))
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(plain, static)


def test_a_released_folder_loads_as_it_is(tmp_path: Path) -> None:
    """Released keys and config, remote code named and not run; no head, since it is the embedding."""
    model = lm()
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    layer = {
        f"transformer.blocks.{i}.{name}.weight"
        for i in range(LAYERS)
        for name in (
            "ln_1",
            "ln_2",
            "attn.Wqkv",
            "attn.out_proj",
            "attn.q_ln",
            "attn.k_ln",
            "mlp.mlp_up",
            "mlp.mlp_down",
        )
    }
    assert set(weights) == {"transformer.wte.weight", "transformer.ln_f.weight", *layer}
    save_file({name: value.clone() for name, value in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, told = both
    assert isinstance(loaded, MosaicGPTForCausalLM)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(weights)
    assert AutoConfig.from_pretrained(tmp_path / "again").attn_qk_ln is True


def test_another_variant_is_refused() -> None:
    others: dict[str, Any] = {"alibi": False, "no_bias": False, "prefix_lm": True, "logit_scale": 0.5}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"{name}={value!r} is not supported"):
            MosaicGPTConfig(**{name: value})


def test_it_is_known_where_only_the_config_is_read() -> None:
    config = FlamingoConfig(text_config={"model_type": "mosaic_gpt", **SIZES})
    assert config.text_config.hidden_size == WIDTH
    assert alibi_slopes(16)[[0, 15]].tolist() == pytest.approx([2**-0.5, 2**-8])


def test_a_long_text_has_no_limit_and_gradients_reach_everything() -> None:
    model = lm(max_seq_len=8).train()
    ids = torch.randint(0, ROWS, (2, 20), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    logits = model(input_ids=ids).logits[:, :-1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
