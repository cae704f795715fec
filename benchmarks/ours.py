"""This library, as `measure.py` drives it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from benchmarks.sizes import Size
from benchmarks.weights import backbones, seeded, vision_arch
from benchmarks.work import Row, image_id
from flamingo import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo.training.optim import adamw


class Ours:
    """The model, used through its public methods only.

    Variant "bf16" stores the frozen weights in bfloat16; "fused" takes the optimizer of a run, "state_bf16" the same
    with moments in bf16, "bf16_state_8bit" is "bf16" with moments in 8 bits. On a GPU the weights are drawn there, so
    they are others than on a CPU.
    """

    def __init__(self, size: Size, variant: str = "fp32", device: str = "cpu") -> None:
        self.device = device
        with torch.device(device) if device != "cpu" else nullcontext():
            encoder, lm = backbones(size)
        resampler = {"depth": size.depth, "latents": size.latents, "heads": size.heads, "head_dim": size.head_dim}
        config = FlamingoConfig(
            vision_config={"arch": vision_arch(size), "image_size": size.image_size},
            text_config=lm.config,
            resampler_config=resampler,
            cross_attention_config={"heads": size.heads, "head_dim": size.head_dim},
            image_token_id=image_id(size),
            eoc_token_id=image_id(size) + 1,
        )
        self.model = FlamingoForConditionalGeneration(config, vision_module=encoder, causal_lm=lm).eval()
        if device != "cpu":  # or else it may be meant to have no memory
            self.model.to(device)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if self.model.part_of(name) not in ("vision", "language"):
                    parameter.copy_(seeded(name, parameter.shape, device))
        self.bf16 = variant.startswith("bf16")
        self.state = "fp32" if variant == "fused" else variant.partition("state_")[2]
        if self.bf16:
            self.model.vision_encoder.tower.to(torch.bfloat16)
            self.model.language_model.to(torch.bfloat16)
        self.optimizer: torch.optim.Optimizer | None = None

    def _images(self, rows: list[Row]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat([row.images for row in rows])[:, None].to(self.device),
            "image_counts": torch.tensor([len(row.images) for row in rows], device=self.device),
        }

    def casting(self) -> Any:
        """Return the context that everything runs in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def generate(self, row: Row, new_tokens: int, beams: int, stamp: Any) -> list[int]:
        """Return the new tokens; `stamp` is called at each."""
        with self.casting():
            out = self.model.generate(
                row.ids[None].to(self.device),
                **self._images([row]),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                num_beams=beams,
                do_sample=False,
                logits_processor=LogitsProcessorList([stamp]),
            )
        return out[0, len(row.ids) :].tolist()

    def rank(self, row: Row, names: list[list[int]]) -> list[float]:
        """Return the log-probability of each name after the prompt."""
        with self.casting():
            given = {"input_ids": row.ids[None].to(self.device), **self._images([row])}
            return self.model.score_candidates(given, names)[0].tolist()

    def forward(self, row: Row) -> Tensor:
        """Return the last position's logits (V + 2,) of a pass that computes those of all positions."""
        return self.logits(row)[-1]

    def logits(self, row: Row) -> Tensor:
        """Return the logits (T, V + 2) of all positions."""
        with torch.no_grad(), self.casting():
            out = self.model(input_ids=row.ids[None].to(self.device), **self._images([row]), use_cache=False)
            return out.logits[0].float()

    def train_step(self, rows: list[Row]) -> float:
        """Run forward, backward, clipping and AdamW; return the loss."""
        self.model.train()
        parameters = [parameter for _, parameter in self.model.trainable_parameters()]
        if self.optimizer is None and self.state:
            groups = [{"params": parameters, "lr": 1e-4, "weight_decay": 0.1}]
            self.optimizer = adamw(groups, betas=(0.9, 0.999), eps=1e-8, state=self.state)
        elif self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1)
        ids, labels = (torch.stack([getattr(row, name) for row in rows]).to(self.device) for name in ("ids", "labels"))
        with self.casting():
            loss = self.model(input_ids=ids, labels=labels, **self._images(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
