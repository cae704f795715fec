"""`python -m flamingo convert FAMILY --checkpoint FILE_OR_DIR --out DIR`: a released checkpoint to a folder of ours.

What is written is always the whole model with its processor, the folder that `from_pretrained`, `python -m flamingo
generate` and `python -m eval` take: nothing has to be joined again later, and the backbones are needed here anyway,
since only they can show that the checkpoint is theirs. For a trainable-only checkpoint (OpenFlamingo) they come from
the hub, its cache or given folders; without them the conversion is refused. Otter and IDEFICS bring everything.

    python -m flamingo convert openflamingo --preset openflamingo-9b --checkpoint checkpoint.pt --out DIR
    python -m flamingo convert openflamingo --checkpoint checkpoint.pt --vision ViT-L-14 --vision-pretrained openai
        --language LM_FOLDER --every 4 --out DIR
    python -m flamingo convert otter --checkpoint OTTER_FOLDER --out DIR
    python -m flamingo convert idefics --checkpoint IDEFICS_FOLDER --out DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from flamingo.convert.presets import PRESETS, Preset, preset
from flamingo.errors import UserError
from flamingo.files import write_folder

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("openflamingo", "otter", "idefics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("family", choices=FAMILIES, help="whose layout the checkpoint has")
    parser.add_argument("--checkpoint", required=True, type=Path, help="file, or folder with shards and config.json")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not hold a model yet")
    parser.add_argument("--preset", help=f"a released model's numbers: {', '.join(PRESETS)}")
    parser.add_argument("--vision", help="encoder: open_clip name (OpenAI's have -quickgelu), or folder")
    parser.add_argument("--vision-pretrained", help="open_clip's tag, or a file of weights")
    parser.add_argument("--language", help="base language model: name or folder")
    parser.add_argument("--tokenizer", help="name or folder; by default the language model's or the checkpoint's")
    parser.add_argument("--every", type=int, help="a gated block before every n-th decoder layer; checked")
    parser.add_argument("--dtype", help="of the written model: float32, bfloat16, float16; by default the checkpoint's")
    parser.add_argument("--final-norm", action="store_true", help="trained on tokens after the encoder's final norm")
    parser.add_argument(
        "--allow-changed-embeddings", action="store_true", help="rows of old tokens may differ from the base LM's"
    )


def run(options: argparse.Namespace) -> int:
    """Convert, write, and report what was written."""
    from transformers.utils import logging

    from flamingo.convert.files import read_checkpoint, read_config

    logging.disable_progress_bar()
    chosen = None if options.preset is None else preset(options.preset, options.family)
    check_out(options.out)
    state, config = read_checkpoint(options.checkpoint), read_config(options.checkpoint)
    convert = {"openflamingo": _openflamingo, "otter": _otter, "idefics": _idefics}[options.family]
    model, processor = convert(state, config, options, chosen)
    write_whole(options.out, model.save_pretrained, processor.save_pretrained)
    count = sum(p.numel() for p in model.parameters()) / 1e9
    print(
        f"{len(state)} tensors read, {count:.3g} billion parameters of {model.dtype} written to {options.out}; gated "
        f"blocks before layers {', '.join(map(str, model.config.cross_attn_layers))}"
    )
    return 0


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, before anything is read.

    Raises:
        UserError: it holds a model or other files, is not a folder, or is not writable.
    """
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; give another --out or remove it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give another --out")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {out} cannot be made: {above} is not a writable folder")


def write_whole(out: Path, *writers: Callable[[Path], Any]) -> None:
    """Write everything beside `out` and move it there at the end, so that `out` is complete or absent.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    try:
        write_folder(out, *writers)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}") from error


def _openflamingo(
    state: Mapping[str, Tensor], config: Any, options: argparse.Namespace, chosen: Preset | None
) -> tuple[Any, Any]:
    from flamingo.convert.openflamingo import from_openflamingo

    vision: str | None = options.vision or (chosen.vision if chosen else None)
    language: str | None = options.language or (chosen.language if chosen else None)
    if vision is None or language is None:
        missing = "--vision" if vision is None else "--language"
        raise UserError(f"the checkpoint does not name its backbones; give --preset, or {missing}")
    pretrained = options.vision_pretrained or (chosen.vision_pretrained if chosen and not options.vision else None)
    return from_openflamingo(
        state,
        vision=vision,
        language=language,
        vision_pretrained=pretrained,
        cross_attn_every_n_layers=options.every or (chosen.cross_attn_every_n_layers if chosen else None),
        **_common(options),
    )


def _otter(
    state: Mapping[str, Tensor], config: dict[str, Any] | None, options: argparse.Namespace, chosen: Preset | None
) -> tuple[Any, Any]:
    from flamingo.convert.otter import backbones_of, from_otter

    if config is None:
        raise UserError(f"{options.checkpoint} has no config.json, which says what Otter's language model is")
    every = options.every or config.get("cross_attn_every_n_layers")
    if chosen and every != chosen.cross_attn_every_n_layers:
        raise UserError(
            f"config.json has cross_attn_every_n_layers={every}, but the preset has {chosen.cross_attn_every_n_layers}"
        )
    given = _common(options) | backbones_of(config, vision=options.vision, language=options.language)
    given["tokenizer"] = given["tokenizer"] or _beside(options.checkpoint)
    return from_otter(state, vision_pretrained=options.vision_pretrained, cross_attn_every_n_layers=every, **given)


def _idefics(
    state: Mapping[str, Tensor], config: dict[str, Any] | None, options: argparse.Namespace, chosen: Preset | None
) -> tuple[Any, Any]:
    from flamingo.convert.idefics import from_idefics

    if config is None and chosen is None:
        raise UserError(f"{options.checkpoint} has no config.json; put IDEFICS' own beside it, or give --preset")
    source = dict(chosen.config) if config is None and chosen else config or {}
    for name, value in (chosen.config if chosen else {}).items():
        if not isinstance(value, Mapping) and source.get(name, value) != value:
            raise UserError(f"config.json has {name}={source[name]}, but the preset {options.preset} has {value}")
    tokenizer = options.tokenizer or _beside(options.checkpoint)
    return from_idefics(state, config=source, tokenizer=tokenizer, dtype=options.dtype)


def _common(options: argparse.Namespace) -> dict[str, Any]:
    names = ("tokenizer", "dtype", "final_norm", "allow_changed_embeddings")
    return {name: getattr(options, name) for name in names}


def _beside(checkpoint: Path) -> str:
    """Return the folder of the checkpoint, where its tokenizer is expected."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{folder} holds no tokenizer; give --tokenizer")
    return str(folder)
