"""What becomes FSDP2 units of any of the models that a run trains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import (
    PreTrainedModel,
)

from flamingo.language.embeddings import embedding_table, output_head
from flamingo.language.hooks import find_decoder_layers
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.distributed.fsdp import Unit


def fsdp_units(model: nn.Module) -> Iterator[Unit]:
    """What becomes FSDP2 units, children before parents, of any of the three models.

    In a Flamingo each decoder layer, each gated block, the encoder, the resampler, the rows of new tokens and, where it
    is not tied to the head, the LM's embedding are units of their own, and the LM's remaining weights are one.
    """
    seen: set[nn.Parameter] = set()
    for module, options in _unit_modules(model):
        own = set(module.parameters()) - seen
        seen |= own
        if len({parameter.requires_grad for parameter in own}) == 2:
            # Adapters in a frozen layer. They are small, and together one unit beside that of the layer.
            leaves = [leaf for leaf in module.modules() if set(leaf.parameters(recurse=False)) & own]
            yield Unit([leaf for leaf in leaves if all(p.requires_grad for p in leaf.parameters())], keep=True)
        yield Unit([module], **options)


def _unit_modules(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, bool]]]:
    if isinstance(model, FlamingoForConditionalGeneration):
        lm = model.language_model
        # The encoder runs without gradients, and a look-up has no need of its table afterwards.
        yield model.vision_encoder, {"backward": not model.vision_encoder.frozen}
        for small in (model.resampler, *model.cross_attn_blocks.values(), model.new_tokens):
            yield small, {"keep": True}
        for layer in find_decoder_layers(lm, model.config.decoder_layers_path):
            yield layer, {}
        table, head = embedding_table(lm), output_head(lm)
        if not set(table.parameters()) & set(head.parameters()):
            yield table, {"backward": any(p.requires_grad for p in table.parameters())}
        # Used last in forward and first in backward.
        yield lm, {"keep": True}
    elif isinstance(model, PreTrainedModel):
        for layer in find_decoder_layers(model):
            yield layer, {}
    else:
        for tower in (model.visual, model):
            for layer in getattr(getattr(tower, "transformer", None), "resblocks", ()):
                yield layer, {}
