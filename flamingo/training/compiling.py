"""torch.compile, layer by layer.

Notable: what is compiled is a layer's `forward` and not its call, so that the hooks stay outside: FSDP2 gathers the
weights there, and the gated blocks stand there. A gated block itself groups tokens by picture, differently in every
batch, and would be compiled anew each time; of it, and of the resampler, the feed-forwards are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flamingo.language.hooks import find_decoder_layers
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.layers.resampler import FeedForward


def compiled_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of any of the three models whose `forward` is compiled."""
    if isinstance(model, FlamingoForConditionalGeneration):
        yield from find_decoder_layers(model.language_model, model.config.decoder_layers_path)
        yield from (module for module in model.modules() if isinstance(module, FeedForward))
    elif isinstance(model, PreTrainedModel):
        yield from find_decoder_layers(model)
    else:
        for tower in (model.visual, model):
            yield from getattr(getattr(tower, "transformer", None), "resblocks", ())


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles the layers in place; parameters keep their names. The first updates of each shape take longer."""
    part: Any
    for part in compiled_parts(model):
        part.forward = torch.compile(part.forward, backend=backend)
