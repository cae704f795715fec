"""Which modules are FSDP2 units: gathered together, and reduced together where they train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from flamingo.language.hooks import embedding_table, find_decoder_layers, output_head
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.training.distributed.fsdp import FsdpUnit


def flamingo_units(model: FlamingoForConditionalGeneration) -> Iterator[FsdpUnit]:
    """Return the units of a Flamingo, children before parents.

    Each decoder layer, each gated block, the encoder, the resampler, the rows of new tokens and the LM's embedding
    (where it is not tied to the head) are units of their own; the LM's remaining weights are one.
    """
    return _without_mixed(_flamingo_modules(model))


def layer_units(layers: Iterable[nn.Module]) -> Iterator[FsdpUnit]:
    """Return a unit for each layer."""
    return _without_mixed((layer, {}) for layer in layers)


def _without_mixed(modules: Iterable[tuple[nn.Module, dict[str, bool]]]) -> Iterator[FsdpUnit]:
    """Return a unit for each module with its options; trained weights in a frozen module become another, before it."""
    seen: set[nn.Parameter] = set()
    for module, options in modules:
        own = set(module.parameters()) - seen
        seen |= own
        if len({parameter.requires_grad for parameter in own}) == 2:
            # Adapters in a frozen layer. They are small, and together one unit beside that of the layer.
            leaves = [leaf for leaf in module.modules() if set(leaf.parameters(recurse=False)) & own]
            yield FsdpUnit([leaf for leaf in leaves if all(p.requires_grad for p in leaf.parameters())], keep=True)
        yield FsdpUnit([module], **options)


def _flamingo_modules(model: FlamingoForConditionalGeneration) -> Iterator[tuple[nn.Module, dict[str, bool]]]:
    lm = model.language_model
    # No gradient passes a frozen encoder, and a look-up does not need its embedding rows in backward.
    yield model.vision_encoder, {"backward": any(p.requires_grad for p in model.vision_encoder.parameters())}
    for small in (model.resampler, *model.cross_attn_blocks.values(), model.new_tokens):
        yield small, {"keep": True}
    for layer in find_decoder_layers(lm, model.config.decoder_layers_path):
        yield layer, {}
    table, head = embedding_table(lm), output_head(lm)
    if not set(table.parameters()) & set(head.parameters()):
        yield table, {"backward": any(p.requires_grad for p in table.parameters())}
    # Used last in forward and first in backward.
    yield lm, {"keep": True}
