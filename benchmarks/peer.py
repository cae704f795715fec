"""open_flamingo 2.0.1, as `measure.py` drives it, through its public classes.

It was written for transformers 4.28 and open_clip 2.20. Only what it needs to run with transformers 5 and open_clip 3
is changed:
- transformers 5 passes no attention mask where there is no padding, but its LM requires one: it gets a default;
- open_clip 3 returns the encoder's tokens after the final norm, but the released models were trained on those before;
- every call changes a cache now, so ranking with one cache for all names, as its evaluation does, would be wrong from
  the second name on: the prompt is run with each name ("fp32"), or each name gets a copy ("copied_cache").
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from benchmarks.sizes import Size
from benchmarks.weights import backbones, peer_state, seeded
from benchmarks.work import Row, image_id
from flamingo.config import OPENAI_MEAN, OPENAI_STD
from flamingo.vision.encoder import patch_tokens

MOST_IMAGES = 5
"""Images of a training document; open_flamingo's loader pads every document to this number."""


class TokensBeforeNorm(nn.Module):
    """An open_clip encoder that returns (nothing, patch tokens), as `output_tokens` did up to open_clip 2.22."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, patch_tokens(self.encoder, pixels)


class NeedsNoMask:
    """A mixin for its LM class that makes the attention mask optional."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        return super().forward(input_ids, attention_mask, **options)  # type: ignore[misc]


class Vision(nn.Module):
    """A stand-in for an open_clip model, of which `Flamingo` only reads `visual`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.visual = TokensBeforeNorm(encoder)


def build(size: Size) -> Any:
    """Return its model with our weights, frozen as its factory freezes it."""
    flamingo = import_module("open_flamingo").Flamingo
    mixin = import_module("open_flamingo.src.flamingo_lm").FlamingoLMMixin
    extend = import_module("open_flamingo.src.utils").extend_instance
    encoder, lm = backbones(size)
    extend(lm, mixin)
    extend(lm, NeedsNoMask)
    lm.set_decoder_layers_attr_name("model.decoder.layers")  # type: ignore[operator]
    lm.resize_token_embeddings(size.vocab + 2, mean_resizing=False)
    media, end = image_id(size), image_id(size) + 1
    model = flamingo(Vision(encoder), lm, end, media, vis_dim=size.vision_width).eval()
    shapes = _own_shapes(size)
    own = {name: seeded(name, shape) for name, shape in shapes.items()}
    rows = own.pop("new_tokens.input_rows")
    missing, unexpected = model.load_state_dict(peer_state(own), strict=False)
    trained = [name for name in missing if "perceiver" in name or "lang_encoder.gated_cross_attn_layers" in name]
    assert not trained, trained
    assert not unexpected, unexpected
    with torch.no_grad():
        model.lang_encoder.get_input_embeddings().weight[-2:] = rows
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model


def _own_shapes(size: Size) -> dict[str, torch.Size]:
    """Return the names and shapes of our trained parameters, without allocating them."""
    from benchmarks.ours import Ours

    with torch.device("meta"):
        model = Ours(size).model
    return {n: p.shape for n, p in model.named_parameters() if model.part_of(n) not in ("vision", "language")}


class Peer:
    """Its model, used through its public methods only; variants as in the module's docstring."""

    def __init__(self, size: Size, variant: str = "fp32") -> None:
        self.size, self.copies = size, variant == "copied_cache"
        self.model = build(size)
        self.optimizer: torch.optim.Optimizer | None = None

    def _vision_x(self, rows: list[Row], most: int | None = None) -> Tensor:
        """Return normalised images (B, T_img, 1, 3, S, S), padded with zeros to `most` images."""
        most = max(len(row.images) for row in rows) if most is None else most
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(values).view(shape) for values in (OPENAI_MEAN, OPENAI_STD))
        out = torch.zeros(len(rows), most, 1, 3, self.size.image_size, self.size.image_size)
        for padded, row in zip(out, rows, strict=True):
            padded[: len(row.images), 0] = (row.images.float() / 255 - mean) / std
        return out

    def generate(self, row: Row, new_tokens: int, beams: int, stamp: Any) -> list[int]:
        options = {"min_new_tokens": new_tokens, "logits_processor": LogitsProcessorList([stamp])}
        return self._generate([row], new_tokens, num_beams=beams, **options)[0]

    def _generate(self, rows: list[Row], new_tokens: int, **options: Any) -> list[list[int]]:
        """Return the new tokens of a batch of prompts of equal length."""
        ids = torch.stack([row.ids for row in rows])
        options |= {"do_sample": False, "pad_token_id": 1, "suppress_tokens": [image_id(self.size)]}
        with torch.no_grad():
            out = self.model.generate(
                self._vision_x(rows), ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
            )
        return out[:, ids.shape[1] :].tolist()

    def answers(self, rows: list[Row], new_tokens: int) -> list[int]:
        """Return greedy answers to a batch of prompts of equal length, as its evaluation generates them."""
        ends = (image_id(self.size) + 1, 2)
        answers: list[int] = []
        for new in self._generate(rows, new_tokens, num_beams=1):
            end = next((index for index, token in enumerate(new) if token in ends), len(new))
            answers += new[:end]
        return answers

    def rank(self, row: Row, names: list[list[int]]) -> list[float]:
        with torch.no_grad():
            self.model.cache_media(row.ids[None], self._vision_x([row]))
            scores = self._rank_with_copies(row, names) if self.copies else [self._rank_one(row, n) for n in names]
            self.model.uncache_media()
        return scores

    def _forward(self, ids: Tensor, length: int, **options: Any) -> Any:
        mask = torch.ones(1, length, dtype=torch.long)
        return self.model(
            vision_x=None, lang_x=ids[None], attention_mask=mask, clear_conditioned_layers=False, **options
        )

    def _rank_one(self, row: Row, name: list[int]) -> float:
        ids = torch.cat([row.ids, torch.tensor(name)])
        log_probs = self._forward(ids, len(ids)).logits[0, -len(name) - 1 : -1].log_softmax(-1)
        return float(log_probs.gather(1, ids[-len(name) :, None]).sum())

    def _rank_with_copies(self, row: Row, names: list[list[int]]) -> list[float]:
        prompt = self._forward(row.ids, len(row.ids), use_cache=True)
        first = prompt.logits[0, -1:]
        scores = []
        for name in names:
            logits = first
            if len(name) > 1:
                past = copy.deepcopy(prompt.past_key_values)
                out = self._forward(
                    torch.tensor(name[:-1]), len(row.ids) + len(name) - 1, past_key_values=past, use_cache=True
                )
                logits = torch.cat([first, out.logits[0]])
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(name)[:, None]).sum()))
        return scores

    def forward(self, row: Row) -> Tensor:
        with torch.no_grad():
            mask = torch.ones(1, len(row.ids), dtype=torch.long)
            return self.model(self._vision_x([row]), row.ids[None], attention_mask=mask).logits[0, -1]

    def train_step(self, rows: list[Row]) -> float:
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1)
        ids, labels = (torch.stack([getattr(row, name) for row in rows]) for name in ("ids", "labels"))
        loss = self.model(
            self._vision_x(rows, MOST_IMAGES), ids, attention_mask=torch.ones_like(ids), labels=labels
        ).loss
        loss.backward()
        # As its training does: only the rows of the new tokens move.
        table = self.model.lang_encoder.get_input_embeddings().weight
        mask = torch.zeros_like(table.grad)
        mask[-2:] = 1
        table.grad = table.grad * mask
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
