"""phi as the loader gives it is the phi that the model derives from the same tokens, for every preset."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from data.batches.collate import FlamingoCollate
from data.loading.loader import MixLoader
from data.shards.writer import ShardWriter
from flamingo.layers.media_mask import phi_from_ids
from flamingo.processor import FlamingoProcessor
from flamingo.vision.transform import ImageTransform
from tests.data.helpers import SIDE, numbered_document
from tests.data.test_sampling import preset
from tests.fixtures import byte_tokenizer

PRESETS = ("flamingo", "paper", "fast", "openflamingo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 7 images, some much longer than a window, and for the pairs some with one."""
    out = tmp_path_factory.mktemp("documents")
    with ShardWriter(out, "documents", 16) as writer:
        for number in range(32):
            writer.write(numbered_document(number, 1 + number % 7, words=1 + 5 * (number % 4)))
    return out


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_the_loaders_phi_is_the_models(folder: Path, name: str, begins: bool) -> None:
    """With and without IDEFICS' rule, that behind the end of a sequence no image is seen."""
    tokenizer = byte_tokenizer()
    if begins:
        tokenizer.bos_token = tokenizer.eos_token  # as OPT has it: a row that begins with an end
    processor = FlamingoProcessor(tokenizer, ImageTransform(SIDE, mode="squash"))
    specs = [
        dataclasses.replace(spec, shards=[str(folder)], batch_size=32, lanes=0, max_tokens=min(spec.max_tokens, 60))
        for spec in preset(name).values()
    ]
    seen: dict[str, set[str]] = {}
    for step in itertools.islice(MixLoader(specs, FlamingoCollate(processor), prefetch_factor=0), 2):
        for spec in specs:
            tensors = step.batches[spec.name][0].tensors
            numbers = tensors.get("sequence_ids", tensors["attention_mask"])
            for ids, phi, sequence in zip(tensors["input_ids"], tensors["phi"], numbers, strict=True):
                before = 0
                for one in range(1, int(sequence.max()) + 1):
                    mine = phi[sequence == one]
                    mine = torch.where(mine > 0, mine - before, 0)
                    before += int((ids[sequence == one] == processor.image_token_id).sum())
                    way = derived(ids[sequence == one], mine, processor.image_token_id, tokenizer.eos_token_id)
                    seen.setdefault(spec.name, set()).add(way)
    for spec in specs:
        assert "neither" not in seen[spec.name]
        assert ("next" in seen[spec.name]) == (spec.next_image_probability > 0)
        assert "previous" in seen[spec.name]


def derived(ids: torch.Tensor, phi: torch.Tensor, image: int, end: int) -> str:
    """Which way of the model's gives this phi; both ways of "previous", with the reset and without, must agree."""
    for way in ("previous", "next"):
        if torch.equal(phi_from_ids(ids[None], image, attend=way)[0], phi):
            if way == "previous":
                assert torch.equal(phi_from_ids(ids[None], image, reset_token_id=end)[0], phi)
            return way
    return "neither"
