"""Objective `align`: to the frozen LM an image shall look like its name, before objective `flamingo` begins.

InfoNCE (van den Oord et al. 2018) between what the first gated block adds to an `<image>` token and the LM's own input
embeddings of the image's text. Encoder and LM stay frozen; the resampler and that block's attention train. The LM
itself does not run, so that an update costs little more than the resampler.

Letters: B pairs, T tokens of a text, D width of the LM, S side of an image, L latents, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from flamingo.language.hooks import embedding_table
from flamingo.layers.cross_attention import GatedCrossAttentionBlock
from flamingo.layers.media_mask import segments_from_slots
from flamingo.layers.resampler import FeedForward
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.model_config import AlignOptions, ModelConfig
from flamingo.training.objectives import flamingo as objective
from flamingo.training.objectives.protocol import BatchShape, Setup

PREFIX = "flamingo."
"""Of the names of a Flamingo's weights in `Aligned`."""


class Aligned(nn.Module):
    """A Flamingo whose `forward` gives the two sides of each pair."""

    table: Tensor
    image_token: Tensor

    def __init__(self, flamingo: FlamingoForConditionalGeneration, options: AlignOptions) -> None:
        """Leave only the resampler and the first block's attention to train, and set that block's gate."""
        super().__init__()
        flamingo.requires_grad_(False)
        self.flamingo = flamingo
        flamingo.resampler.requires_grad_(flamingo.policy["resampler"] == "train")
        if flamingo.policy["cross_attention"] == "train":
            self.block.attn.requires_grad_(True)
            nn.init.constant_(self.block.attn_gate, options.gate)
        # Buffers, which FSDP2 leaves whole: tied to the head, the table is sharded with an LM that never runs.
        table = embedding_table(flamingo.language_model)
        self.register_buffer("table", table.weight.detach(), persistent=False)
        self.register_buffer("image_token", flamingo.new_tokens.input_rows[:1].detach(), persistent=False)

    @property
    def block(self) -> GatedCrossAttentionBlock:
        """The first gated block."""
        return cast("GatedCrossAttentionBlock", next(iter(self.flamingo.cross_attn_blocks.values())))

    def forward(
        self, image: UInt8[Tensor, "B 3 S S"], text: Int[Tensor, "B T"], share: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Return what the block makes of each image, ungated, and the LM's embeddings of each text, added by share."""
        attn = self.block.attn
        media = self.flamingo.encode_media(image[:, None])
        segments = segments_from_slots(torch.arange(len(text))[:, None], len(text)).on(media.device)
        seen = attn(self.image_token.to(media).expand(len(text), -1), attn.project(media), segments)
        return seen.float(), (F.embedding(text, self.table).float() * share[..., None]).sum(1)


class AlignObjective:
    """InfoNCE over the pairs of all processes, and the distance of each image from its text.

    The distance sets the length of what the block adds: that of an embedding, which the InfoNCE does not see.
    """

    host_inputs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of pairs."""
        return dict.fromkeys(("pairs", "distance"), len(batch["text"]))

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return both terms over the whole batch, times the pairs of this process (see `ContrastiveObjective.sums`)."""
        seen, said = model(batch["image"], batch["text"], batch["share"])
        names = batch["name"]
        if dist.is_initialized() and dist.get_world_size() > 1:
            seen, said, names = (torch.cat(list(dist_nn.all_gather(each))) for each in (seen, said, names))
        whole, said = said.square().sum(), said - said.mean(0)  # what all texts have in common tells nothing
        spread, pairs = said.square().sum(), len(batch["text"])
        # Of texts that are all alike only rounding would be left to divide by: they teach nothing.
        spread = spread.masked_fill(spread <= 1e-10 * whole, torch.inf)
        return {
            "pairs": info_nce(seen, said, names, self._temperature) * pairs,
            "distance": (seen - said).square().sum() / spread * pairs,
        }

    def fsdp_units(self, model: Any) -> Iterator[FsdpUnit]:
        """Return the encoder, the resampler and the layers of the first block's attention; the root takes the rest."""
        yield FsdpUnit([model.flamingo.vision_encoder], backward=False)
        yield FsdpUnit([model.flamingo.resampler], keep=True)
        yield FsdpUnit(list(model.block.attn.children()), keep=True)  # `project` is called beside its forward

    def compiled_layers(self, model: nn.Module) -> Iterator[nn.Module]:
        """Return the feed-forwards of the resampler."""
        yield from (
            module for module in cast(Any, model).flamingo.resampler.modules() if isinstance(module, FeedForward)
        )

    def largest_batch(self, model: Any, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return `rows` pairs with texts as long as the dataset allows."""
        size, text = model.flamingo.config.vision.image_size, torch.zeros(rows, shape.tokens, dtype=torch.long)
        image = torch.empty(rows, 3, size, size, dtype=torch.uint8, device="meta")
        share = torch.empty(text.shape, device="meta")
        return {"image": image, "text": text, "share": share, "name": torch.arange(rows)}


def info_nce(
    seen: Float[Tensor, "B D"], said: Float[Tensor, "B D"], names: Int[Tensor, "B"], temperature: float
) -> Float[Tensor, ""]:
    """Return the mean over both directions; another pair of the same name is not a negative."""
    logits = F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T / temperature
    same = (names[:, None] == names) & ~torch.eye(len(names), dtype=torch.bool, device=names.device)
    logits = logits.masked_fill(same.to(logits.device), -torch.inf)
    right = logits.diagonal()
    return ((logits.logsumexp(1) - right) + (logits.logsumexp(0) - right)).mean() / 2


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Build the Flamingo as objective `flamingo` does; what is exported is one that it starts from."""
    whole = objective.build(model, run_dir, processes, texts)
    flamingo = cast("FlamingoForConditionalGeneration", whole.model)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        whole.export({name.removeprefix(PREFIX): value for name, value in weights.items()}, folder)

    return replace(
        whole,
        model=Aligned(flamingo, model.align),
        objective=AlignObjective(model.align.temperature),
        part_of=lambda name: flamingo.part_of(name.removeprefix(PREFIX)),
        collate=lambda classes: classes.AlignCollate(whole.processor, model.align.name_share),
        export=export,
    )


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, AlignObjective]:
    """Build the same without memory."""
    flamingo, _ = objective.build_on_meta(model, processes)
    with torch.device("meta"):
        aligned = Aligned(cast("FlamingoForConditionalGeneration", flamingo), model.align)
    return aligned, AlignObjective(model.align.temperature)
