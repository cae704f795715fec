"""GGUF, llama.cpp's files: a language model with its tokenizer and chat template in one, as transformers reads them.

The weights are unpacked to float32 when they are loaded, and from then on the model is one like any other: it trains,
is saved and is loaded again without the file.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import quantization_config as quantization

from flamingo.errors import UserError, first_line

SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_OWN_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_PACKED = ("is_quantized", "hf_quantizer", "quantization_method")


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one of a folder without a model of transformers.

    Raises:
        UserError: there is no such file, or the folder has several.
    """
    path = Path(name)
    if path.suffix.lower() == SUFFIX:
        if not path.is_file():
            raise UserError(f"the GGUF file {name} does not exist; give the path of a file on this machine")
        return path
    if not path.is_dir() or any((path / own).is_file() for own in _OWN_FILES):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"the folder {name} has {len(files)} GGUF files ({names}); give the path of one of them")
    return files[0] if files else None


def from_gguf(cls: Any, file: Path, what: str, **options: Any) -> Any:
    """Return `cls.from_pretrained` of a GGUF file: a causal LM in float32, a tokenizer or a config.

    Raises:
        UserError: the packages are missing, the file is torn or one of several parts, its architecture is not known to
            transformers, or its weights are not those of the whole model.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise UserError(f"{file} needs the package {package}; install it with: pip install 'flamingo-vlm[gguf]'")
    with_info = options.pop("output_loading_info", False)
    if _PART.search(file.name):
        raise UserError(f"{file} is one part of a model; join the parts with llama.cpp's gguf-split --merge")
    if options:
        raise UserError(
            f"{min(options)}= does not go with {file}: a GGUF file is packed already, and unpacked on loading; save "
            "that model to a folder and give the folder"
        )
    if cls is not AutoModelForCausalLM:
        return _read(cls, file, what)
    unpack = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(quantization, "GgufConfig"):  # transformers 5.23 keeps weights packed where it can
        unpack["quantization_config"] = quantization.GgufConfig(dequantize=True)
    lm, report = _read(cls, file, what, **unpack)
    wrong = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ())})
    if wrong:
        raise UserError(
            f"{file} lacks {len(wrong)} weights of a {type(lm).__name__}, the first is {wrong[0]}; they would be "
            "random, so give the whole model's file"
        )
    # What is unpacked is not quantised any more; with the marks left on it transformers would refuse to save it.
    for name in _PACKED:
        vars(lm).pop(name, None)
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    return (lm, report) if with_info else lm


def _read(cls: Any, file: Path, what: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True, **options)
    except Exception as error:  # readers raise all kinds of exceptions for foreign bytes
        raise UserError(
            f"{file} does not hold a {what} that transformers can read: {first_line(error)}; is the file whole, and "
            "its architecture one that transformers knows?"
        ) from error
