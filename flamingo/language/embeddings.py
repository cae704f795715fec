"""An LM's two tables, the input embedding and the output layer: where they are, their shape, their rows.

A quantised layer's weight is packed, or a method, so a shape is never read from it where the layer says it.

Letters: V rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flamingo.errors import UserError


def embedding_table(lm: PreTrainedModel) -> Any:
    """Return the LM's input embedding."""
    return lm.get_input_embeddings()


def output_head(lm: PreTrainedModel) -> Any:
    """Return the LM's output layer (D to V); a model that has none is a UserError."""
    head = lm.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(lm).__name__} has no output embedding; give a causal LM (AutoModelForCausalLM)")
    return head


def table_shape(module: Any) -> tuple[int, int]:
    """Return rows and width of an embedding or an output layer, also of a quantised one, whose weight is packed."""
    for rows, width in (("num_embeddings", "embedding_dim"), ("out_features", "in_features")):
        if hasattr(module, rows) and hasattr(module, width):
            return int(getattr(module, rows)), int(getattr(module, width))
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def table_values(module: Any) -> Float[Tensor, "V D"] | None:
    """Return the rows of an embedding or an output layer in float32; None where they are packed."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_quantized or not weight.is_floating_point():
        return None
    return weight.detach().float() if tuple(weight.shape) == table_shape(module) else None


def embedding_scale(table: Any) -> Tensor | None:
    """Return what an input embedding multiplies its rows with, as the Gemma family's does; None: nothing.

    The output side uses the same rows without it, so the rows of new tokens are stored unscaled as well.
    """
    scale = getattr(table, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale)
