"""Small random models of the families that the library is verified on, made in the test."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.conformance.tiny_models import FAMILIES as SIZES
from tests.fixtures import byte_tokenizer

SIZE = 28
TOKENS = 259
FAMILIES = ["gpt2", "opt", "llama", "gpt_neox"]


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of a Llama before them; with `bos` it puts `<s>` in front."""
    first = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names = {role: token for role, token in first.items() if bos or role != "bos_token"}
    made = byte_tokenizer(list(first.values()), **names)
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $0", special_tokens=[("<s>", 1)]
        )
    return made


def lm_config(family: str, vocab: int = TOKENS, tied: bool | None = None) -> PreTrainedConfig:
    ids: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if tied is not None:
        ids["tie_word_embeddings"] = tied
    model_type, sizes = SIZES[family]
    if family == "opt":
        sizes = {**sizes, "word_embed_proj_dim": sizes["hidden_size"]}
    return AutoConfig.for_model(model_type, **{**ids, **sizes})


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


def visibility(phi: Int[Tensor, "B T"], num_images: int, *, all_previous: bool = False) -> Bool[Tensor, "B T M"]:
    """Return the mask of which token sees which of its row's first `num_images` images.

    One token sees one image or none; with `all_previous` (an option of OpenFlamingo's block) those before it too:

        phi        0 1 1 2        all_previous   0 1 1 2
        image 1  . x x .                       . x x x
        image 2  . . . x                       . . . x
    """
    index = torch.arange(1, num_images + 1, device=phi.device)
    return index <= phi[..., None] if all_previous else phi[..., None] == index
