"""The config of MosaicGPT (`flamingo.mosaic_gpt.modeling`); reading it does not import the model.

Importing this file registers the model type `mosaic_gpt`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from flamingo.errors import UserError

RELEASED = {"alibi": True, "no_bias": True, "prefix_lm": False, "attn_uses_sequence_id": False, "logit_scale": None}
"""Switches of the sources that every released checkpoint has set the same way; no other value is implemented."""


class MosaicGPTConfig(PreTrainedConfig):
    """Configuration of `MosaicGPTForCausalLM`, with the released files' names.

    Args:
        d_model: width D.
        n_heads: attention heads H.
        n_layers: decoder layers.
        mlp_ratio: width of the feed-forward as a multiple of D.
        max_seq_len: the longest text it was trained on, in tokens; no limit here.
        vocab_size: rows of the embedding, V.
        attn_pdrop: dropout rate of the attention weights.
        resid_pdrop: dropout rate of what is added to the residual stream.
        emb_pdrop: dropout rate of the embeddings.
        attn_qk_ln: LayerNorm over the whole width on queries and keys, before they are split into heads.
        attn_clip_qkv: bound of the absolute value of queries, keys and values; None: no bound.
        softmax_scale: of the scores; None: 1 / sqrt(D / H).
        alibi_bias_max: the largest exponent: slopes are 2 ** -(alibi_bias_max * h / H), h = 1 ... H.
        use_cache: the releases have it off, which would make every decode step compute the whole text again.
        tie_word_embeddings: the head is the embedding, as in all releases.
        kwargs: further released keys, and those of any transformers config.

    Raises:
        UserError: one of the `RELEASED` switches is set otherwise.
    """

    model_type = "mosaic_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        *,
        d_model: int = 2048,
        n_heads: int = 16,
        n_layers: int = 24,
        mlp_ratio: int = 4,
        max_seq_len: int = 2048,
        vocab_size: int = 50368,
        attn_pdrop: float | int = 0.0,
        resid_pdrop: float | int = 0.0,
        emb_pdrop: float | int = 0.0,
        attn_qk_ln: bool = True,
        attn_clip_qkv: float | int | None = None,
        softmax_scale: float | int | None = None,
        alibi_bias_max: float | int = 8,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, wanted in RELEASED.items():
            if (value := kwargs.get(name, wanted)) != wanted:
                raise UserError(
                    f"MosaicGPT with {name}={value!r} is not supported; every released checkpoint has {wanted!r}"
                )
        self.d_model, self.n_heads, self.n_layers, self.mlp_ratio = d_model, n_heads, n_layers, mlp_ratio
        self.max_seq_len, self.vocab_size = max_seq_len, vocab_size
        self.attn_pdrop, self.resid_pdrop, self.emb_pdrop = attn_pdrop, resid_pdrop, emb_pdrop
        self.attn_qk_ln, self.attn_clip_qkv, self.softmax_scale = attn_qk_ln, attn_clip_qkv, softmax_scale
        self.alibi_bias_max, self.use_cache = alibi_bias_max, use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})


AutoConfig.register(MosaicGPTConfig.model_type, MosaicGPTConfig, exist_ok=True)
