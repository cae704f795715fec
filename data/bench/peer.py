"""open_flamingo 2.0.1's loader, unmodified, in a process with this one's libraries.

Three shims, without which it does not run with webdataset 1.0 and transformers 5:
- webdataset's `tar_file_expander` yields an end marker after each shard, which its grouping takes for a file: removed;
- `additional_special_tokens` and their ids are no longer attributes of a tokenizer: restored;
- it needs at least one worker (`persistent_workers` is always on).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from data.bench.material import Material, tokenizer_of
from flamingo.errors import UserError

SPECIAL = ["<|endofchunk|>", "<image>"]
THRESHOLD = 0.24


def module() -> ModuleType:
    """Return open_flamingo's `train/data.py`, with the first shim. Raises UserError when it is not installed."""
    package = importlib.util.find_spec("open_flamingo")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "open_flamingo is not installed: pip install --no-deps -r requirements-peers.txt, or bench --without-peer"
        )
    folder = Path(package.submodule_search_locations[0]) / "train"
    sys.path.insert(0, str(folder))
    try:
        utils = importlib.import_module("data_utils")
    finally:  # its data.py would be taken for this package by every process that is started from here
        sys.path.remove(str(folder))
    vars(utils)["tar_file_expander"] = partial(vars(utils)["tar_file_expander"], eof_value=None)
    spec = importlib.util.spec_from_file_location("open_flamingo_data", folder / "data.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules["open_flamingo_data"] = code  # its functions are pickled by this name
    spec.loader.exec_module(code)
    return code


def tokenizer(material: Material) -> Any:
    """Return the tokenizer with its special tokens, and the second shim."""
    made = tokenizer_of(material)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    ids = made.convert_tokens_to_ids(SPECIAL)
    shim = {"additional_special_tokens": SPECIAL, "additional_special_tokens_ids": ids}
    made.__class__ = type("WithSpecialTokens", (made.__class__,), shim)
    return made


def batches(material: Material, what: str, size: int, batch: int, workers: int) -> Iterator[tuple[int, int]]:
    """Yield (documents, images that a token sees) for each batch, endlessly."""
    from open_clip import image_transform

    code, tokens = module(), tokenizer(material)
    last = {"mmc4": len(list(material.mmc4.glob("*.tar"))), "pairs": len(list(material.pairs.glob("*.tar")))}[what] - 1
    arguments = SimpleNamespace(
        mmc4_shards=f"{material.mmc4}/{{{0:09d}..{last:09d}}}.tar",
        laion_shards=f"{material.pairs}/{{{0:05d}..{last:05d}}}.tar",
        dataset_resampled=True,
        train_num_samples_mmc4=10**8,
        train_num_samples_laion=10**8,
        batch_size_mmc4=batch,
        batch_size_laion=batch,
        mmc4_textsim_threshold=THRESHOLD,
        mmc4_min_num_images=1,
        mmc4_max_num_images=6,
        workers=workers,
        world_size=1,
        seed=0,
    )
    kind = {"mmc4": "mmc4", "pairs": "image_text"}[what]
    loader = code.get_data(arguments, image_transform(size, is_train=False), tokens, kind).dataloader
    image = tokens.convert_tokens_to_ids("<image>")
    for made in loader:
        if what == "pairs":
            images, (ids, _) = made
            yield len(ids), len(images)
        else:
            rows = [ids for ids, _ in made[1]]
            yield len(rows), sum(int((ids == image).sum()) for ids in rows)
