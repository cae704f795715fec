"""Small random models of the families that the library is verified on, made in the test."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor

SIZE = 28
TOKENS = 259
FAMILIES = ["gpt2", "opt", "llama", "gpt_neox"]


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, made without the network; with `bos` it puts `<s>` in front (Llama)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 1)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def lm_config(family: str, vocab: int = TOKENS, tied: bool | None = None) -> PreTrainedConfig:
    ids: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if tied is not None:
        ids["tie_word_embeddings"] = tied
    base: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    if family == "gpt2":
        none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=128, **none, **ids)
    if family == "opt":
        return OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, **base, **ids)
    if family == "llama":
        return LlamaConfig(intermediate_size=64, num_key_value_heads=1, **base, **ids)
    return GPTNeoXConfig(intermediate_size=64, **base, **ids)


def lm(family: str, vocab: int = TOKENS, tied: bool | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(lm_config(family, vocab, tied))
    with torch.no_grad():  # less degenerate than the usual small weights
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def vision() -> CLIPVisionModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPVisionModel(CLIPVisionConfig(image_size=SIZE, patch_size=14, **sizes)).eval()


def flamingo(
    family: str = "llama", *, gates: float = 0.7, vocab: int = TOKENS, tied: bool | None = None, **options: Any
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A model around tiny backbones with its gates open (tanh 0.7), so that the images matter."""
    options = {
        "resampler": {"depth": 2, "heads": 2, "head_dim": 8, "latents": 4, "max_frames": 3},
        "cross_attention": {"heads": 2, "head_dim": 8},
        "cross_attn_every_n_layers": 2,
        "tokenizer": tokenizer(),
        **options,
    }
    model, processor = FlamingoForConditionalGeneration.from_backbones(
        vision(), lm(family, vocab, tied), image_size=SIZE, **options
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.part_of(name) in ("resampler", "cross_attention") and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name.endswith("_gate"):
                parameter.fill_(gates)
    return model, processor


def picture(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


TEXTS = ["<image>A cat.<|endofchunk|><image>A dog", "hm <image>A cow is", "no image at all"]
COUNTS = [2, 1, 0]


def batch(processor: FlamingoProcessor, rows: list[int] | None = None, **options: Any) -> Any:
    """Rows with two, one and no image; `rows` picks some of them."""
    rows = [0, 1, 2] if rows is None else rows
    images = [[picture(10 * row + j) for j in range(COUNTS[row])] for row in rows]
    return processor(images=images, text=[TEXTS[row] for row in rows], **options)


def labels_of(inputs: dict[str, torch.Tensor], image: int) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == image, -100)
