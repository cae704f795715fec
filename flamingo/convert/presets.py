"""The released models' hyper-parameters, as data.

Nothing here is needed to read a checkpoint that brings its `config.json` (IDEFICS, Otter), and nothing here is
guessed for one that does not (OpenFlamingo): its weights are checked against these numbers. `parameters` are the
published ones. Sources: OpenFlamingo's README and paper (table 1), IDEFICS' configs, Otter's configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One released model."""

    family: str
    """Layout of its weights: "openflamingo", "otter", "idefics"."""
    repository: str
    """Where the weights are on the model hub."""
    parameters: float
    """Published number, in billions."""
    cross_attn_every_n_layers: int
    """Spacing of the blocks: before layers n-1, 2n-1, ...; in IDEFICS before 0, n, ..."""
    vision: str = "ViT-L-14-quickgelu"
    """The encoder, as `from_backbones` takes it; OpenAI's weights were trained with QuickGELU."""
    vision_pretrained: str | None = "openai"
    """open_clip's tag."""
    language: str | None = None
    """The base language model on the hub; None: its weights are in the checkpoint."""
    extra_tokens: tuple[str, ...] = ()
    """New tokens besides `<|endofchunk|>` and `<image>`."""
    text_config: Mapping[str, Any] = field(default_factory=dict)
    """Shape of the language model, in transformers' words."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole source config, where there is one (IDEFICS)."""


_MPT_1B = {"model_type": "mosaic_gpt", "d_model": 2048, "n_layers": 24, "n_heads": 16, "attn_qk_ln": True}
_MPT_1B = {**_MPT_1B, "vocab_size": 50432, "max_seq_len": 2048}
_MPT_7B = {"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}
_REDPAJAMA_3B = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 50432,
    "rotary_pct": 1.0,
    "use_parallel_residual": False,
}
_LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
_IDEFICS_9B = {
    "vocab_size": 32000,
    "additional_vocab_size": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "cross_layer_interval": 4,
    "qk_layer_norms": True,
    "alpha_type": "float",
    "alpha_initializer": "zeros",
    "use_resampler": True,
    "vision_config": {"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
    "perceiver_config": {
        "resampler_depth": 6,
        "resampler_head_dim": 96,
        "resampler_n_heads": 16,
        "resampler_n_latents": 64,
        "qk_layer_norms_perceiver": True,
    },
}
_IDEFICS_80B = _IDEFICS_9B | {"hidden_size": 8192, "intermediate_size": 22016}
_IDEFICS_80B |= {"num_hidden_layers": 80, "num_attention_heads": 64}
_REDPAJAMA = "togethercomputer/RedPajama-INCITE-{}-3B-v1"


def _openflamingo(name: str, parameters: float, every: int, language: str, text_config: Mapping[str, Any]) -> Preset:
    return Preset(
        family="openflamingo",
        repository=f"openflamingo/OpenFlamingo-{name}",
        parameters=parameters,
        cross_attn_every_n_layers=every,
        language=language,
        text_config=text_config,
    )


def _otter(name: str, text_config: Mapping[str, Any]) -> Preset:
    return Preset(
        family="otter",
        repository=f"luodian/OTTER-Image-{name}",
        parameters=9.0,
        cross_attn_every_n_layers=4,
        vision="openai/clip-vit-large-patch14",
        vision_pretrained=None,
        extra_tokens=("<answer>",),
        text_config=text_config,
    )


def _idefics(name: str, parameters: float, config: Mapping[str, Any]) -> Preset:
    return Preset(
        family="idefics",
        repository=f"HuggingFaceM4/{name}",
        parameters=parameters,
        cross_attn_every_n_layers=4,
        vision="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        vision_pretrained=None,
        config=config,
    )


PRESETS: dict[str, Preset] = {
    "openflamingo-3b": _openflamingo("3B-vitl-mpt1b", 3.0, 1, "anas-awadalla/mpt-1b-redpajama-200b", _MPT_1B),
    "openflamingo-3b-instruct": _openflamingo(
        "3B-vitl-mpt1b-langinstruct", 3.0, 1, "anas-awadalla/mpt-1b-redpajama-200b-dolly", _MPT_1B
    ),
    "openflamingo-4b": _openflamingo("4B-vitl-rpj3b", 4.0, 2, _REDPAJAMA.format("Base"), _REDPAJAMA_3B),
    "openflamingo-4b-instruct": _openflamingo(
        "4B-vitl-rpj3b-langinstruct", 4.0, 2, _REDPAJAMA.format("Instruct"), _REDPAJAMA_3B
    ),
    "openflamingo-9b": _openflamingo("9B-vitl-mpt7b", 9.0, 4, "anas-awadalla/mpt-7b", _MPT_7B),
    "otter-llama7b": _otter("LLaMA7B-LA-InContext", _LLAMA_7B),
    "otter-mpt7b": _otter("MPT7B", _MPT_7B),
    "idefics-9b": _idefics("idefics-9b", 9.0, _IDEFICS_9B),
    "idefics-80b": _idefics("idefics-80b", 80.0, _IDEFICS_80B),
}


def preset(name: str, family: str | None = None) -> Preset:
    """Return a preset by its name.

    Raises:
        UserError: there is none of this name, or it is of another family.
    """
    known = {key: value for key, value in PRESETS.items() if family in (None, value.family)}
    if name not in known:
        raise UserError(
            f"preset={name} is unknown; the presets{f' of {family}' if family else ''} are {', '.join(known)}"
        )
    return known[name]
