"""Packed rows: little padding, and no sample that knows of its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.collate import FlamingoCollate, LanguageCollate
from data.batches.packing import groups, join
from data.batches.tokenize import IGNORED, TokenRow
from data.dataset import DatasetSpec
from data.loading.loader import Batch, MixLoader
from data.shards.document import Image
from flamingo.conformance.tiny_models import FAMILIES, SIZE, VOCABULARY, subject, tiny_lm
from flamingo.errors import UserError
from flamingo.language.packing import packed_positions
from flamingo.training.objectives.flamingo import FlamingoObjective
from tests.data.helpers import byte_processor, write_documents
from tests.fixtures import byte_tokenizer

REFUSED = ["bloom", "mpt", "mosaic_gpt"]  # they have no positions to start again
PACKS = [family for family in FAMILIES if family not in REFUSED]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), size=st.integers(64, 256))
def test_every_sample_is_in_one_row_and_rows_keep_their_limit(lengths: list[int], size: int) -> None:
    found = groups(lengths, size)
    assert sorted(sample for row in found for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= size for row in found)
    assert found == groups(lengths, size)


@pytest.mark.parametrize(("mean", "least"), [(12.4, 0.95), (20.5, 0.95)])  # ALIGN's and LTIP's (paper, section 2.2)
@pytest.mark.parametrize("samples", [64, 128, 512])
def test_pairs_of_the_papers_lengths_fill_their_rows(mean: float, least: float, samples: int) -> None:
    random = np.random.default_rng(0)
    tokens = places = unpacked = 0
    for _ in range(50):
        drawn = random.lognormal(np.log(mean) - 0.18, 0.6, samples)
        lengths = (np.clip(drawn, 1, 61).astype(int) + 3).tolist()  # <image>, EOC and EOS
        rows = groups(lengths, 256)
        tokens += sum(lengths)
        places += len(rows) * max(sum(lengths[sample] for sample in row) for row in rows)
        unpacked += samples * 64
    assert tokens / places >= least
    assert tokens / unpacked < 0.45


def test_a_sample_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="300 tokens does not fit a row of 256"):
        groups([3, 300], 256)


def row(ids: list[int], phi: list[int], images: int) -> TokenRow:
    return TokenRow(np.array(ids), np.array(phi), np.array(ids), [Image((n,)) for n in range(images)])


def test_rows_of_the_docstring() -> None:
    joined = join([row([90, 1, 2, 91], [1, 1, 1, 1], 1), row([90, 3, 91], [1, 1, 1], 1), row([5, 6], [0, 0], 0)])
    assert joined.sequence.tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert joined.phi.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert joined.labels.tolist() == [IGNORED, 1, 2, 91, IGNORED, 3, 91, IGNORED, 6]
    assert joined.images == 2
    sequence = torch.tensor([[*joined.sequence.tolist(), 0, 0]])
    assert packed_positions(sequence).tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1]]


def packed_and_plain(folder: Path, **options: Any) -> tuple[Batch, Batch]:
    """The same samples in packed rows and in rows of their own."""
    write_documents(folder, count=16, images=2)
    found = []
    for pack in (90, 0):
        spec = DatasetSpec(name="d", shards=[str(folder)], batch_size=12, max_tokens=24, pack=pack, **options)
        loader = MixLoader([spec], FlamingoCollate(byte_processor()), prefetch_factor=0)
        found.append(next(iter(loader)).batches["d"][0])
    return found[0], found[1]


def in_order(packed: Batch, plain: Batch) -> list[tuple[int, int, int]]:
    """(row, first, stop) of each plain sample in the packed batch, found by its tokens and labels."""
    places = []
    t, p = packed.tensors, plain.tensors
    for sample in range(len(plain.keys)):
        length = int(p["attention_mask"][sample].sum())
        want = p["input_ids"][sample, :length]
        for number in range(len(t["input_ids"])):
            for sequence in range(1, int(t["sequence_ids"][number].max()) + 1):
                inside = (t["sequence_ids"][number] == sequence).nonzero()[:, 0]
                first, stop = int(inside[0]), int(inside[-1]) + 1
                if torch.equal(t["input_ids"][number, first:stop], want):
                    places.append((number, first, stop))
    return places


def test_the_same_samples_with_less_padding(tmp_path: Path) -> None:
    packed, plain = packed_and_plain(tmp_path, next_image_probability=0.5)
    t = packed.tensors
    assert packed.keys == plain.keys
    assert packed.stats["tokens"] == plain.stats["tokens"]
    assert packed.stats["images"] == plain.stats["images"] == int(t["image_counts"].sum())
    assert packed.fill >= 0.95
    assert len(t["input_ids"]) < 6
    assert (t["labels"][t["sequence_ids"] == 0] == IGNORED).all()
    assert (t["phi"][t["sequence_ids"] == 0] == 0).all()
    objective = FlamingoObjective()
    assert objective.counts(packed.tensors)["text"] == objective.counts(plain.tensors)["text"] > 0


def as_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch over bytes for a tiny model of `families`: ids folded into its vocabulary, images at its size."""
    t = dict(batch.tensors)
    specials = byte_processor()
    image = t["input_ids"] == specials.image_token_id
    ids = t["input_ids"] % (VOCABULARY - 3) + 3
    t["input_ids"] = torch.where(image, VOCABULARY, ids)
    pixels = t["pixel_values"].float().flatten(0, 1)
    pixels = torch.nn.functional.interpolate(pixels, (SIZE, SIZE))
    t["pixel_values"] = pixels.unflatten(0, t["pixel_values"].shape[:2]).to(torch.uint8)
    t.pop("labels")
    return t


@pytest.mark.parametrize("family", PACKS)
@pytest.mark.parametrize("p_next", [0.0, 1.0])
def test_packed_logits_are_those_of_the_sample_alone(tmp_path: Path, family: str, p_next: float) -> None:
    packed, plain = packed_and_plain(tmp_path, next_image_probability=p_next)
    # Their tiny forms have a window of 6.
    options = {"sliding_window": 128} if family in ("mistral", "gemma2", "gemma3") else {}
    model = subject(lambda: tiny_lm(family, **options))
    model = model if family == "gemma2" else model.double()  # it gives NaN for padding in float64, packed or not
    atol = 2e-5 if family == "gemma2" else 1e-9
    with torch.no_grad():
        together = model(**as_inputs(packed)).logits
        alone = model(**as_inputs(plain), use_cache=False).logits
    places = in_order(packed, plain)
    assert len(places) == len(plain.keys)
    for sample, (number, first, stop) in enumerate(places):
        assert torch.allclose(together[number, first:stop], alone[sample, : stop - first], atol=atol, rtol=0)


def test_packed_loss_and_gradients_are_those_of_the_samples_alone(tmp_path: Path) -> None:
    packed, plain = packed_and_plain(tmp_path)
    model = subject(lambda: tiny_lm("llama")).double()
    objective, found = FlamingoObjective(), []
    for batch in (packed, plain):
        inputs = as_inputs(batch)
        labels = batch.tensors["labels"]
        inputs["labels"] = torch.where(labels == IGNORED, IGNORED, inputs["input_ids"])
        model.zero_grad()
        loss = objective.sums(model, inputs)["text"]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((float(loss.detach()), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)  # the loss itself is in float32
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_what_cannot_keep_sequences_apart_is_refused(tmp_path: Path) -> None:
    packed, _ = packed_and_plain(tmp_path)
    inputs = as_inputs(packed)
    for family in REFUSED:
        with pytest.raises(UserError, match=r"rows cannot be packed for .*use pack=0"):
            subject(lambda family=family: tiny_lm(family))(**inputs)  # type: ignore[misc]
    with pytest.raises(UserError, match="sliding window has 6; use pack=6"):
        subject(lambda: tiny_lm("mistral"))(**inputs)
    model = subject(lambda: tiny_lm("llama"))
    with pytest.raises(UserError, match="have no cache"):
        model(**inputs, use_cache=True)
    with pytest.raises(UserError, match="need phi"):
        model(**{name: value for name, value in inputs.items() if name != "phi"})
    model.config.attend_all_previous = True
    with pytest.raises(UserError, match="attend_all_previous"):
        model(**inputs)


def test_packing_is_for_flamingo_rows(tmp_path: Path) -> None:
    folder = write_documents(tmp_path)
    spec = DatasetSpec(name="d", shards=[str(folder)], batch_size=4, kind="text", pack=256)
    with pytest.raises(UserError, match="dataset 'd': pack=256 needs the collate of a Flamingo objective"):
        MixLoader([spec], LanguageCollate(byte_tokenizer()))
    with pytest.raises(UserError, match="pack=100 must be 0 or at least max_tokens"):
        DatasetSpec(name="d", shards=["x"], batch_size=4, pack=100)
