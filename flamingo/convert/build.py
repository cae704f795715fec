"""Putting renamed weights into a model: nothing is missing, nothing is left over, every shape fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import FlamingoProcessor
from flamingo.storage import refuse_nonfinite


@contextmanager
def empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build modules of this dtype whose weights are left as the memory happens to be; all of them must be loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def assemble(
    config: FlamingoConfig, encoder: nn.Module, lm: PreTrainedModel, processor: FlamingoProcessor, dtype: torch.dtype
) -> FlamingoForConditionalGeneration:
    """Return the model around both backbones, in eval mode; its new parts are yet to be loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = FlamingoForConditionalGeneration(config, vision_module=encoder, causal_lm=lm)
    finally:
        torch.set_default_dtype(before)
    for name in ("mean", "std"):  # of the images; bfloat16 would shift the colours
        statistics = torch.tensor(getattr(config.vision, name), dtype=torch.float32)
        setattr(model.vision_encoder, name, statistics)
    ends = model.generation_config.eos_token_id
    if processor.eos_token_id is not None and processor.eos_token_id not in ends:
        model.generation_config.eos_token_id = [*ends, processor.eos_token_id]
    model.generation_config.pad_token_id = processor.pad_token_id
    return model.eval()


def load_clean(
    model: FlamingoForConditionalGeneration, clean: Mapping[str, Tensor], *, loaded: tuple[str, ...]
) -> None:
    """Copy renamed weights into the model; what starts with one of `loaded` has its weights and may be missing.

    Raises:
        UserError: a weight that the model does not have, that it has in another shape, that is missing or that is not
            finite; tied weights of different values.
    """
    own = model.state_dict(keep_vars=True)
    own = {name: t for name, t in own.items() if name not in ("vision_encoder.mean", "vision_encoder.std")}
    if unknown := sorted(set(clean) - set(own)):
        raise UserError(
            f"the checkpoint has {unknown[0]} (and {len(unknown) - 1} more), which this model lacks; do its backbones "
            "and hyper-parameters match?"
        )
    for name, value in clean.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint but {tuple(own[name].shape)} in this model; "
                "do the backbones and hyper-parameters match?"
            )
    # Tied weights are one parameter under two names: copying both would let the last one win unnoticed.
    first: dict[int, str] = {}
    for name in clean:
        twin = first.setdefault(id(own[name]), name)
        if not torch.equal(clean[twin], clean[name]):
            raise UserError(f"{twin} and {name} are tied in this model, but the checkpoint has two values for them")
    needed = [name for name, value in own.items() if isinstance(value, nn.Parameter) and not name.startswith(loaded)]
    missing = [name for name in needed if id(own[name]) not in first]
    if missing:
        raise UserError(f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more); is it complete?")
    with torch.no_grad():
        for name, value in clean.items():
            own[name].copy_(value)
    refuse_nonfinite(model, "the checkpoint")


def dtype_of(clean: Mapping[str, Tensor], wanted: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype to convert to: as asked for, else the file's own."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted is None:
        latents = clean.get("resampler.latents")
        return torch.float32 if latents is None else latents.dtype
    dtype = getattr(torch, wanted, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {wanted!r} is not one of float32, bfloat16, float16, float64")
    return dtype
