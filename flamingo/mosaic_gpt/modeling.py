"""MosaicGPT, the language model of OpenFlamingo's 3B releases (`mpt-1b-redpajama-200b` and its `-dolly`).

Transformers' `MptForCausalLM` is the later MPT and has no LayerNorm on queries and keys, so it gives other
numbers from these weights; the hub has this family as remote code only, which no longer runs. Parameter names are the
released ones, so a released folder loads as it is: importing this file registers the model type `mosaic_gpt`.

What differs from the sources (MosaicML examples v0.0.4), without effect on the function:
- ALiBi is `slope * (key - query)` and not `slope * (key - last key)`: the softmax does not see the shift, but a long
  context loses no precision to it, and there is no longest context;
- the low-precision LayerNorm, which differs from the plain one under autocast only, is always off;
- `embedding_fraction` (scales a gradient), `init_*` and `attn_impl` are kept in the config and not used.

Letters: B batch, T text tokens, K keys (cached ones included), D width, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flamingo.mosaic_gpt.configuration import MosaicGPTConfig
from flamingo.transfer import sent


def alibi_slopes(heads: int, bias_max: float | int = 8) -> Float[Tensor, "H"]:
    """Return what a key loses per token of distance: 2 ** -(bias_max * h / H) for h = 1 ... H.

    For any number of heads, unlike the later MPT's, which interleaves two sets where H is not a power of two.
    """
    return 2.0 ** -(torch.arange(1, heads + 1, dtype=torch.float64) * (bias_max / heads))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def alibi_bias(
    slopes: Float[Tensor, "H"],
    queries: Int[Tensor, "T"],
    keys: Int[Tensor, "K"],
    attention_mask: Shaped[Tensor, "..."] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "A H T K"]:
    """Return what is added to the scores: ALiBi, and the dtype's least number where a key must not be seen.

    `queries` and `keys` are their positions in the row. `attention_mask` is (B, up to K), 0 for padding, or what
    transformers prepares for a static cache: (B, 1, T, K), boolean (true: may be seen) or additive. A is B, or 1 where
    no mask is given.
    """
    distance = keys - queries[:, None]
    bias = slopes[:, None, None] * distance
    unseen = (distance > 0)[None, None]
    if attention_mask is not None:
        if attention_mask.ndim == 2:
            real = F.pad(attention_mask.bool(), (0, len(keys) - attention_mask.shape[1]))
            unseen = unseen | ~real[:, None, None]
        elif attention_mask.dtype == torch.bool:
            unseen = unseen | ~attention_mask
        else:
            unseen = unseen | (attention_mask < 0)
    return bias.to(dtype).expand(len(unseen), -1, -1, -1).masked_fill(unseen, torch.finfo(dtype).min)


def eager_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T W"],
    key: Float[Tensor, "B H K W"],
    value: Float[Tensor, "B H K W"],
    attention_mask: Float[Tensor, "A H T K"],
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the mixed values (B, T, H, W) and the attention weights (B, H, T, K)."""
    scores = query @ key.transpose(-1, -2) * scaling + attention_mask
    weights = scores.softmax(-1, dtype=_precise(scores.dtype)).to(value.dtype)
    mixed = F.dropout(weights, p=dropout, training=module.training) @ value
    return mixed.transpose(1, 2), weights


class MosaicGPTAttention(nn.Module):
    """Causal self-attention with ALiBi and, where `attn_qk_ln`, normalised queries and keys."""

    def __init__(self, config: MosaicGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.heads = config.n_heads
        self.scaling = config.softmax_scale or (config.d_model / config.n_heads) ** -0.5
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        if config.attn_qk_ln:
            self.q_ln = nn.LayerNorm(config.d_model, bias=False)
            self.k_ln = nn.LayerNorm(config.d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], bias: Float[Tensor, "A H T K"], cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the update (B, T, D), and the attention weights where the implementation gives them."""
        qkv = self.Wqkv(x)
        if self.config.attn_clip_qkv:
            qkv = qkv.clamp(-self.config.attn_clip_qkv, self.config.attn_clip_qkv)
        query, key, value = qkv.chunk(3, dim=-1)
        if self.config.attn_qk_ln:
            query, key = self.q_ln(query), self.k_ln(key)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        mixed, weights = attend(self, query, key, value, bias, scaling=self.scaling, dropout=dropout)
        return self.out_proj(mixed.flatten(2)), weights


class MosaicGPTMLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the update."""
        return self.mlp_down(F.gelu(self.mlp_up(x)))


class MosaicGPTBlock(GradientCheckpointingLayer):
    """One decoder layer, norms first."""

    def __init__(self, config: MosaicGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = MosaicGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=False)
        self.mlp = MosaicGPTMLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Float[Tensor, "B T D"], bias: Float[Tensor, "A H T K"], past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens after the layer, and the attention weights."""
        update, weights = self.attn(self.ln_1(x), bias, past_key_values)
        x = x + self.resid_dropout(update)
        return x + self.resid_dropout(self.mlp(self.ln_2(x))), weights


class MosaicGPTPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the family."""

    config: MosaicGPTConfig
    config_class = MosaicGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MosaicGPTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True


class MosaicGPTModel(MosaicGPTPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList([MosaicGPTBlock(config, i) for i in range(config.n_layers)])
        self.ln_f = nn.LayerNorm(config.d_model, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.wte = value

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states and the cache; `attention_mask` as of `alibi_bias`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        bias = self._bias(x, attention_mask, past_key_values)
        x = self.emb_drop(x)
        states, weights = [], []
        for block in self.blocks:
            states.append(x)
            x, seen = block(x, bias, past_key_values=past_key_values)
            weights.append(seen)
        x = self.ln_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states or self.config.output_hidden_states else None,
            attentions=tuple(weights) if output_attentions or self.config.output_attentions else None,
        )

    def _bias(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the bias of every layer; the unfilled entries of a static cache count as keys."""
        past, (length, offset) = 0, (x.shape[1], 0)
        if cache is not None:
            past = cache.get_seq_length()
            length, offset = cache.get_mask_sizes(x.shape[1], 0)
        queries = torch.arange(x.shape[1], device=x.device) + past
        keys = torch.arange(length, device=x.device) + offset
        slopes = alibi_slopes(self.config.n_heads, self.config.alibi_bias_max).to(_precise(x.dtype))
        slopes = sent(slopes, x.device)
        return alibi_bias(slopes, queries, keys, attention_mask, x.dtype)


class MosaicGPTForCausalLM(MosaicGPTPreTrainedModel, GenerationMixin):
    """MosaicGPT with its head, which is its embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__(config)
        self.transformer = MosaicGPTModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V), or of the last `logits_to_keep` tokens; `labels` are shifted here."""
        out = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


AutoModelForCausalLM.register(MosaicGPTConfig, MosaicGPTForCausalLM, exist_ok=True)
