"""Soft prompts: a few trained vectors in front of every row, in a file of kilobytes, for a model that stays as it is.

Lester et al. 2021; Med-PaLM (Singhal et al. 2022) put such vectors in front of a written prompt, and so does this: they
stand behind the tokens with which the LM's own tokenizer begins a text, and see no image. A model may know several by
name. The one called "default" stands in every row; `processor(..., soft_prompt=["law", "medicine", ""])` chooses for
each row. How they get into a row: `language/hooks.py:SoftPrompts`.

Letters: n vectors, D width of the LM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flamingo.errors import UserError, first_line
from flamingo.files import write_atomically
from flamingo.fingerprints import hash_tensors
from flamingo.labels import SOFT_ID
from flamingo.language.hooks import SoftPrompts, embedding_table, table_shape, table_values
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import FlamingoProcessor

DEFAULT = "default"
SOFT_PROMPT_FILE = "soft_prompt.safetensors"
"""Beside an exported model, the soft prompt alone."""
KEY = "new_tokens.soft.rows"
"""Of the state dict: the vectors of all soft prompts."""


def new_soft_prompt(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    name: str = DEFAULT,
    *,
    tokens: int = 0,
    text: str | None = None,
) -> None:
    """Put a soft prompt into a model, where it starts as the embeddings of a text, whose logits it then gives.

    Without a text it starts as those of `tokens` tokens drawn by torch's generator.

    Raises:
        UserError: neither is given, or both and they disagree; the name is taken; the LM's table cannot be read.
    """
    table = table_values(embedding_table(model.language_model))
    if table is None:
        raise UserError(
            "a soft prompt starts from the language model's embeddings, which are packed here and unreadable"
        )
    ids = torch.tensor(processor.encode_text(text or ""), dtype=torch.long)
    if not len(ids):
        ids = torch.randint(len(table), (max(tokens, 0),))
    if not len(ids) or len(ids) != (tokens or len(ids)):
        raise UserError(
            f"a soft prompt of {tokens} vectors from a text of {len(ids)} tokens: give a text, whose tokens it then "
            "has, or a number of vectors"
        )
    _put(model, processor, name, table[ids.to(table.device)])


def save_soft_prompt(model: FlamingoForConditionalGeneration, path: str | Path, name: str = DEFAULT) -> None:
    """Write a model's soft prompt into one small file.

    Raises:
        UserError: the model has no soft prompt of that name.
    """
    weights = model.state_dict()
    write_soft_prompt(rows_of(model, name, weights.get(KEY)), path, weights_fingerprint(weights))


def load_soft_prompt(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, path: str | Path, name: str = DEFAULT
) -> None:
    """Put a saved soft prompt into the model and the processor, under a name of one's choice; a known name is replaced.

    Raises:
        UserError: it is not a soft prompt, it was trained in front of another model, or it is not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts, rows = file.metadata() or {}, file.get_tensor("rows")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a soft prompt: {first_line(error)}") from None
    width = table_shape(embedding_table(model.language_model))[1]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(
            f"{path} has vectors of shape {tuple(rows.shape)}, and the language model is {width} wide: the soft prompt "
            "is of another model"
        )
    if (own := weights_fingerprint(model.state_dict())) != facts.get("model"):
        raise UserError(
            f"{path} was trained in front of another model (its weights have the fingerprint {facts.get('model')}, "
            f"these {own}): load the model that it was trained with"
        )
    if not bool(rows.isfinite().all()):
        raise UserError(f"{path} has vectors that are not finite: train it again with a smaller optim.lr")
    _put(model, processor, name, rows, replace=True)


def write_soft_prompt(rows: Tensor, path: str | Path, model: str) -> None:
    """Write vectors (n, D) and the fingerprint of their model, the whole file or none."""
    tensors = {"rows": rows.detach().to("cpu", torch.float32).contiguous()}
    facts = {"format": "pt", "model": model}
    write_atomically(Path(path), lambda part: save_file(tensors, str(part), metadata=facts))


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a short hash of all weights of a model but its soft prompts."""
    return hash_tensors({name: value for name, value in weights.items() if name != KEY})


def rows_of(model: FlamingoForConditionalGeneration, name: str, rows: Tensor | None) -> Tensor:
    """Return the vectors (n, D) of one soft prompt among those of all.

    Raises:
        UserError: there is none of that name; says which there are.
    """
    known = ids_of(model)
    if name not in known or rows is None:
        raise UserError(f"the model has no soft prompt {name!r}; it has {', '.join(known) or 'none'}")
    return rows[known[name].start - SOFT_ID : known[name].stop - SOFT_ID]


def sizes_of(model: FlamingoForConditionalGeneration) -> dict[str, int]:
    """Return the number of vectors of each soft prompt that a model has, in the order of their ids."""
    return dict(getattr(model.config, "soft_prompts", {}))


def ids_of(model: FlamingoForConditionalGeneration) -> dict[str, range]:
    """Return the ids of the vectors of each soft prompt that a model has."""
    sizes = sizes_of(model)
    stops = [SOFT_ID + stop for stop in accumulate(sizes.values())]
    return {name: range(stop - sizes[name], stop) for name, stop in zip(sizes, stops, strict=True)}


@torch.no_grad()
def _put(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    name: str,
    rows: Tensor,
    *,
    replace: bool = False,
) -> None:
    sizes = sizes_of(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"a soft prompt cannot be called {name!r}: use letters, digits, _ and -")
    if name in sizes and not (replace and sizes[name] == len(rows)):
        raise UserError(
            f"the model has a soft prompt {name!r} of {sizes[name]} vectors already: give this one another name"
        )
    soft, table = model.new_tokens.soft, embedding_table(model.language_model).weight
    if name in sizes and soft is not None:
        rows_of(model, name, soft.rows).copy_(rows)
    else:
        known = rows.new_empty(0, rows.shape[1]) if soft is None else soft.rows.detach()
        model.new_tokens.soft = soft = SoftPrompts(0, rows.shape[1])
        whole = torch.cat([known.to(table.device, torch.float32), rows.to(table.device, torch.float32)])
        soft.rows = nn.Parameter(whole, requires_grad=model.policy["new_tokens"] == "train")
        model.config.soft_prompts = {**sizes, name: len(rows)}
    register(model, processor)


def register(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> None:
    """Tell a processor the ids of a model's soft prompts."""
    processor.soft_prompts |= {name: list(ids) for name, ids in ids_of(model).items()}
