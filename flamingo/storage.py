"""How weights are stored: each in its own precision, and those of a quantised LM as its quantiser packs them.

transformers loads a checkpoint in one precision, its config's, which rounds what trained in float32 beside a frozen
part in bfloat16. Here every weight keeps the one it was saved in, unless the caller asks for another.

A quantiser belongs to the language model alone: what trains is left out of it, and so is the encoder. Of the LM's
layers those stay as they are that its quantiser has left alone, such as the head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import _TYPES as SAFETENSORS_TYPES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from flamingo.errors import UserError

LANGUAGE = "language_model"
SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
"""Names of the option, which differ by method, that keeps a quantiser from modules."""
_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "is_quantized", "hf_quantizer")
_keep: ContextVar[bool] = ContextVar("keep", default=False)


@contextmanager
def own_dtypes(dtype: Any) -> Iterator[None]:
    """Have `match_dtypes` keep the precision of the file inside, unless the caller asks for `dtype`."""
    token = _keep.set(dtype in (None, "auto"))
    try:
        yield
    finally:
        _keep.reset(token)


def match_dtypes(model: nn.Module, state_dict: Mapping[str, Tensor] | None, files: Any, load_config: Any) -> None:
    """Give every weight of a model on the meta device the precision that it has in the checkpoint.

    A config that names a precision which no weight of the checkpoint has asks for that one, as in transformers.

    Raises:
        UserError: a weight is made of integers and no quantiser is there to read them.
    """
    stored = {key: value.dtype for key, value in (state_dict or {}).items()} or _dtypes_in(files)
    if load_config.hf_quantizer is None:
        _refuse_integers(model, stored)
    stored = {key: dtype for key, dtype in stored.items() if dtype.is_floating_point and dtype.itemsize > 1}
    if not _keep.get() or load_config.dtype not in stored.values():
        return
    quantizer = load_config.hf_quantizer
    own = [*model.named_parameters(), *model.named_buffers()]
    names = {name for name, _ in own}
    # What transformers renames or merges on loading (experts, say) gets the widest precision of its part in the file.
    widest: dict[str, torch.dtype] = {}
    for key, dtype in stored.items():
        if key not in names:
            part = key.split(".", 1)[0]
            widest[part] = torch.promote_types(dtype, widest.get(part, dtype))
    for name, tensor in own:
        wanted = stored.get(name, widest.get(name.split(".", 1)[0]))
        if wanted is None or not tensor.is_floating_point() or tensor.dtype == wanted:
            continue
        if quantizer is None or quantizer.pre_quantized or not quantizer.param_needs_quantization(model, name):
            tensor.data = tensor.data.to(wanted)


def _refuse_integers(model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        dtype = stored.get(name, tensor.dtype)
        if tensor.is_floating_point() and not dtype.is_floating_point:
            raise UserError(
                f"the weight {name} is stored as {str(dtype).removeprefix('torch.')} and config.json says nothing of a "
                "quantisation (quantization_config), so its values mean nothing: copy the folder again, or quantise "
                "the model with transformers"
            )


def _dtypes_in(files: Sequence[str | Path] | None) -> dict[str, torch.dtype]:
    stored: dict[str, torch.dtype] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                stored |= {key: SAFETENSORS_TYPES[opened.get_slice(key).get_dtype()] for key in opened.keys()}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="meta", weights_only=True)
            stored |= {key: value.dtype for key, value in loaded.items()}
    return stored


def refuse_incomplete(info: Mapping[str, Any], what: str) -> None:
    """Refuse a model of which a part was not in its file, and would be random.

    Args:
        info: what transformers says of a loading, by `output_loading_info=True`.
        what: the model and its folder, for the message.

    Raises:
        UserError: naming the first of the missing weights.
    """
    if missing := sorted(info.get("missing_keys") or ()):
        extra = sorted(info.get("unexpected_keys") or ())
        unknown = f"; it holds {extra[0]}, which this model does not have" if extra else ""
        raise UserError(
            f"{what} lacks the weight {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}{unknown}: "
            "it is incomplete, or its config.json belongs to another model; copy or convert it again"
        )


def refuse_nonfinite(model: nn.Module, what: str) -> None:
    """Refuse a model with NaN or an infinity in its weights, which it would answer with, and train on, in silence.

    Costs one pass over the weights in memory. Buffers that no file holds, such as masks, are not looked at.

    Raises:
        UserError: naming the first of those weights.
    """
    for name, weight in chain(model.named_parameters(), _saved_buffers(model)):
        if _is_read_as_it_is(weight) and not _all_finite(weight):
            wrong = int((~weight.isfinite()).sum())
            raise UserError(
                f"{what}: the weight {name} is not finite ({wrong} of {weight.numel()} values are NaN or infinite): it "
                "was damaged, or its training diverged; take an earlier checkpoint, or copy it again"
            )


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _is_read_as_it_is(tensor: Tensor) -> bool:
    """Say whether a tensor holds numbers here: not packed ones, none in 8 bits, none on a disk or another process."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and not tensor.is_meta and tensor.is_floating_point() and tensor.element_size() > 1


def _all_finite(tensor: Tensor) -> bool:
    # The fastest look at every value: NaN becomes both extremes, and nothing as large as the weight is allocated.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def is_quantized(lm: Any) -> bool:
    """Return whether a language model's weights are packed."""
    return getattr(lm, "hf_quantizer", None) is not None


def language_only(given: Any, model_class: Any, text_config: PreTrainedConfig) -> QuantizationConfigMixin:
    """Return a copy of a quantization config that touches no module but those of the LM, its head left out as well.

    Args:
        given: a transformers quantization config, or its dictionary.
        model_class: whose parts are left alone.
        text_config: of the LM, which says where its head is.

    Raises:
        UserError: its method cannot be told to leave modules alone.
    """
    parts = [*model_class.parts_beside_language()]
    config: Any = AutoQuantizationConfig.from_dict(dict(given)) if isinstance(given, Mapping) else copy.deepcopy(given)
    field = _skip_field(config)
    skips = getattr(config, field)
    if skips is None:  # what transformers leaves alone by itself
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(text_config)
        head = lm.get_output_embeddings()
        skips = [f"{LANGUAGE}.{name}" for name, module in lm.named_modules() if module is head]
    setattr(config, field, list(dict.fromkeys([*skips, *parts])))
    return config


def _skip_field(config: Any) -> str:
    field = next((name for name in SKIPS if hasattr(config, name)), None)
    if field is None:
        raise UserError(
            f"{type(config).__name__} cannot be told to leave modules alone, and would quantise what trains: load the "
            "language model with it by AutoModelForCausalLM.from_pretrained and give that to from_backbones"
        )
    return field


def hand_down(model: Any) -> None:
    """Give the quantiser that a model was loaded with to its LM, which it belongs to, and note how it is packed.

    The model itself is not quantised: it may be trained as it is, since its other parts can.
    """
    lm = model.language_model
    if is_quantized(model):
        for name in _FLAGS:
            if name in vars(model):
                setattr(lm, name, vars(model).pop(name))
        lm.config.quantization_config = model.config.quantization_config
        # Saving would undo what loading did to the keys; a quantiser writes packed weights as they are.
        done = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            step for step in done if not any(hasattr(part, "hf_quantizer") for part in getattr(step, "operations", ()))
        ]
    for name in _FLAGS[:2]:  # which peft looks for
        if getattr(lm, name, False):
            setattr(model, name, True)
    # On a CPU with AVX512-BF16 bitsandbytes lays out 4-bit weights anew in the first forward in eval mode, which a
    # frozen LM is in. From then on no gradient passes through them, and none is missed with an error.
    if fast := [module for module in lm.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]:
        for module in fast:
            module.support_avx512bf16_for_cpu = False
        lm.state_dict()  # restores the layout of those that have been used


@contextmanager
def described(model: Any) -> Iterator[None]:
    """Have the model's config say inside what of it is quantised, for saving.

    Raises:
        UserError: a part other than the LM is quantised, or its method cannot say which modules it left alone.
    """
    if is_quantized(model.vision_encoder.tower):
        raise UserError(
            "the vision encoder is quantised, which a saved model cannot say: quantise the language model only"
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if not is_quantized(model.language_model):
        yield
        return
    quantizer = model.language_model.hf_quantizer
    config: Any = copy.deepcopy(quantizer.quantization_config)
    plain = [name for name, module in model.named_modules() if _is_plain_linear(module)]
    inside = [name for name in plain if name.startswith(f"{LANGUAGE}.")]
    setattr(config, _skip_field(config), [*inside, *type(model).parts_beside_language()])
    model.config.quantization_config, model.hf_quantizer = config, quantizer
    try:
        yield
    finally:
        del model.hf_quantizer


def _is_plain_linear(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or isinstance(module, Conv1D)
    # torchao keeps the class and exchanges the weight.
    return plain and type(getattr(module.weight, "data", None)) is Tensor
