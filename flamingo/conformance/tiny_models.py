"""What the checks run on: tiny random LMs of every verified family, a model around one, a batch.

Nothing is downloaded, and the same name gives the same weights every time. Sliding and local windows are set
shorter than the texts of the batch, so that they act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.hub import from_hub
from flamingo.language.hooks import embedding_table, output_head, table_shape
from flamingo.modeling import FlamingoForConditionalGeneration

MakeLM = Callable[[], PreTrainedModel]
"""Returns an LM, with the same weights every time."""

VOCABULARY, WIDTH, LAYERS, HEADS = 97, 32, 4, 2

_PLAIN: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
}
_GATED: dict[str, Any] = {**_PLAIN, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
_GPT: dict[str, Any] = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MPT: dict[str, Any] = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 128}
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "opt": ("opt", {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.1}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "window_size": 6,
            "max_position_embeddings": 128,
        },
    ),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**_PLAIN, "intermediate_size": 64}),
    "bloom": ("bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": ("falcon", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}),
    "phi": ("phi", {**_PLAIN, "intermediate_size": 64}),
    "mpt": ("mpt", _MPT),
    "mosaic_gpt": ("mosaic_gpt", _MPT),
    "llama": ("llama", {**_GATED}),
    "mistral": ("mistral", {**_GATED, "sliding_window": 6}),
    "qwen2": ("qwen2", {name: value for name, value in _GATED.items() if name != "head_dim"}),
    "qwen3": ("qwen3", _GATED),
    "gemma2": ("gemma2", {**_GATED, "sliding_window": 6, "layer_types": _MIXED, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**_GATED, "sliding_window": 6, "layer_types": _MIXED, "query_pre_attn_scalar": 16}),
}
"""Family -> (transformers' model type, what makes it tiny)."""


def tiny_lm(family: str, **options: Any) -> PreTrainedModel:
    """Return a tiny random LM of a family, in eval mode; `options` are further settings of its config.

    Its matrices are larger than usual (standard deviation 0.2), so that its predictions are not all alike.
    """
    model_type, tiny = FAMILIES[family]
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**ids, **tiny, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
    return lm.eval()


def loaded_lm(name: str) -> PreTrainedModel:
    """Return a tiny LM of a family by its name here, or a whole one from a folder or the hub.

    Raises:
        UserError: the name is neither a family nor a model that can be had.
    """
    if name in FAMILIES:
        return tiny_lm(name)
    if "/" not in name and not Path(name).is_dir():
        raise UserError(f"{name!r} is neither a folder nor a known family; families are {', '.join(FAMILIES)}")
    return from_hub(AutoModelForCausalLM, name, "language model").eval()


SIZE = 28
_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "image_size": SIZE,
    "patch_size": 14,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# Rows of a batch: 0 an image, 1 the end of a chunk, 2 a word. Two images, one after some text, and none.
_ROWS = ([0, 2, 2, 2, 1, 0, 2, 2, 2, 2, 2], [2, 2, 0, 2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2])


def subject(make: MakeLM, *, gates: float = 0.7) -> FlamingoForConditionalGeneration:
    """Return a model around the LM with a tiny encoder, blocks before every second layer, and its gates open."""
    lm = make()
    rows = table_shape(output_head(lm))[0]
    layers = int(lm.config.get_text_config(decoder=True).num_hidden_layers)
    config = FlamingoConfig(
        vision_config={"kind": "transformers", "name": "tiny", "arch": _VISION, "width": 16, "image_size": SIZE},
        text_config=lm.config,
        resampler_config={"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
        cross_attention_config={"heads": 2, "head_dim": 8},
        cross_attn_every_n_layers=min(2, layers),
        image_token_id=rows,
        eoc_token_id=rows + 1,
        language_kind="transformers" if type(lm.config) in AutoModelForCausalLM._model_mapping else "module",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = FlamingoForConditionalGeneration(config, causal_lm=lm)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if model.part_of(name) != "language" and parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
                if name.endswith("_gate"):
                    parameter.fill_(gates)
    model.new_tokens.init_from(lm, seed=0)
    return model.eval()


def document(
    model: FlamingoForConditionalGeneration, rows: Iterable[int] = (0, 1, 2), *, side: str = "left"
) -> dict[str, Tensor]:
    """Return rows with two, one and no image as the model takes them, padded on one side."""
    vocabulary = table_shape(embedding_table(model.language_model))[0]
    named = [model.config.image_token_id, model.config.eoc_token_id]
    chosen = list(rows)
    width = max(len(_ROWS[row]) for row in chosen)
    ids, mask, images = [], [], []
    for row in chosen:
        generator = torch.Generator().manual_seed(row)
        words = torch.randint(3, min(vocabulary, 1000), (len(_ROWS[row]),), generator=generator).tolist()
        text = [word if kind == 2 else named[kind] for word, kind in zip(words, _ROWS[row], strict=True)]
        padding, real = [0] * (width - len(text)), [1] * len(text)
        ids.append(padding + text if side == "left" else text + padding)
        mask.append(padding + real if side == "left" else real + padding)
        pixels = (_ROWS[row].count(0), 1, 3, SIZE, SIZE)
        images.append(torch.randint(0, 256, pixels, dtype=torch.uint8, generator=generator))
    counts = torch.tensor([len(some) for some in images])
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    inputs |= {"pixel_values": torch.cat(images), "image_counts": counts}
    return {name: value.to(model.device) for name, value in inputs.items()}
