"""transformers' Idefics, as `measure.py` drives it, and this library with Idefics' own weights.

Its shape is another than open_flamingo's (a LLaMA with gated feed-forwards, RMSNorm), so this library is measured with
it a second time, as variant "idefics": converted from the same weights by `flamingo.convert.from_idefics`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LogitsProcessorList, PreTrainedTokenizerFast

from benchmarks.ours import Ours
from benchmarks.sizes import Size
from benchmarks.work import Row, image_id
from flamingo.config import OPENAI_MEAN, OPENAI_STD
from flamingo.convert import from_idefics
from flamingo.labels import IGNORED


def config(size: Size) -> IdeficsConfig:
    """Return Idefics at a size; backbones and head are frozen, as its training does."""
    perceiver = {
        "resampler_depth": size.depth,
        "resampler_head_dim": size.head_dim,
        "resampler_n_heads": size.heads,
        "resampler_n_latents": size.latents,
    }
    vision = {
        "embed_dim": size.vision_width,
        "image_size": size.image_size,
        "intermediate_size": 4 * size.vision_width,
        "patch_size": size.patch,
        "num_attention_heads": max(2, size.vision_width // 64),
        "num_hidden_layers": size.vision_layers,
    }
    return IdeficsConfig(
        vocab_size=size.vocab,
        additional_vocab_size=2,
        hidden_size=size.lm_width,
        intermediate_size=4 * size.lm_width,
        num_hidden_layers=size.lm_layers,
        num_attention_heads=size.lm_heads,
        max_position_embeddings=2048,
        use_resampler=True,
        freeze_lm_head=True,
        perceiver_config=perceiver,
        vision_config=vision,
    )


def build(size: Size) -> Any:
    """Return its model with open gates, frozen as its own factory freezes it."""
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config(size)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha_" in name:
                parameter.fill_(0.5)
    return model


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the ids of the work, which is all that a conversion asks of it."""
    words = {str(index): index for index in range(size.vocab)}
    tokens = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "0")), pad_token="1", eos_token="2")
    tokens.add_tokens(["<image>", "<end_of_utterance>"], special_tokens=True)
    return tokens


class OursAsIdefics(Ours):
    """This library with the weights of `build`."""

    def __init__(self, size: Size) -> None:
        theirs = build(size)
        self.model, _ = from_idefics(theirs.state_dict(), config=theirs.config.to_dict(), tokenizer=tokenizer(size))
        self.model.eval()
        self.bf16, self.state = False, ""
        self.device, self.optimizer = "cpu", None


class Idefics:
    """Its model, used through its public methods only."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.model = build(size)
        self.optimizer: torch.optim.Optimizer | None = None

    def _given(self, rows: list[Row]) -> dict[str, Tensor]:
        """Return ids, normalised images (B, I, 3, S, S), zeros where a row has fewer, and who sees which (B, T, I)."""
        most = max(len(row.images) for row in rows)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
        ids = torch.stack([row.ids for row in rows])
        pixels = torch.zeros(len(rows), most, 3, self.size.image_size, self.size.image_size)
        for padded, row in zip(pixels, rows, strict=True):
            padded[: len(row.images)] = (row.images.float() / 255 - mean) / std
        seen = (ids == image_id(self.size)).cumsum(1)
        mask = (seen[..., None] == torch.arange(1, most + 1)).long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
            "image_attention_mask": mask,
        }

    def generate(self, row: Row, new_tokens: int, beams: int, stamp: Any) -> list[int]:
        with torch.no_grad():
            out = self.model.generate(
                **self._given([row]),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                num_beams=beams,
                do_sample=False,
                suppress_tokens=[image_id(self.size)],  # as this library does
                logits_processor=LogitsProcessorList([stamp]),
            )
        return out[0, len(row.ids) :].tolist()

    def rank(self, row: Row, names: list[list[int]]) -> list[float]:
        return [self._rank_one(row, name) for name in names]

    def _rank_one(self, row: Row, name: list[int]) -> float:
        ids = torch.cat([row.ids, torch.tensor(name)])
        log_probs = self._logits(Row(ids, row.images, ids))[len(row.ids) - 1 : -1].log_softmax(-1)
        return float(log_probs.gather(1, torch.tensor(name)[:, None]).sum())

    def _logits(self, row: Row) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(**self._given([row]), use_cache=False).logits[0]
        return logits

    def forward(self, row: Row) -> Tensor:
        return self._logits(row)[-1]

    def train_step(self, rows: list[Row]) -> float:
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1)
        labels = torch.stack([row.labels for row in rows])
        # Its own loss reshapes the logits as if there were none of the additional tokens, and stops.
        logits = self.model(**self._given(rows), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
