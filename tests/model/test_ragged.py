"""Ragged batches: rows with and without images, clips of different lengths, and nothing that is padded is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flamingo import FlamingoForConditionalGeneration, UserError
from flamingo.vision.encoder import distinct, flat_frames
from tests.model import tiny

text_rows = torch.tensor([[1, 40, 41, 42, 43], [1, 50, 51, 52, 53]])
BLOCK = {"heads": 2, "head_dim": 8}


def frames(*seeds: int) -> list[Tensor]:
    return [tiny.picture(seed) for seed in seeds]


# Rows of images and clips: [an image and a clip of 3], [a clip of 2], [none].
CLIPS: list[list[Any]] = [[tiny.picture(1), frames(2, 3, 4)], [frames(5, 6)], []]
TEXTS = ["<image>A cat.<|endofchunk|><image>A dog", "hm <image>A cow", "no image"]


def count_frames(model: FlamingoForConditionalGeneration) -> list[int]:
    seen: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    return seen


def test_clips_of_different_lengths_in_one_batch_are_one_by_one() -> None:
    """Through processor, forward, generate and ranking; the encoder sees each frame once and no padded one."""
    model, processor = tiny.flamingo()
    together = processor(images=CLIPS, text=TEXTS)
    assert together["frame_counts"].tolist() == [1, 3, 2]
    assert together["image_counts"].tolist() == [2, 1, 0]
    seen = count_frames(model)
    with torch.no_grad():
        logits = model(**together).logits
        assert seen == [6]
        new = model.generate(**together, max_new_tokens=6, num_beams=2)
        scores = model.score_candidates(together, [[40, 41], [42]])
        for row in range(3):
            alone = processor(images=[CLIPS[row]], text=[TEXTS[row]])
            mine = logits[row][together["attention_mask"][row].bool()]
            torch.testing.assert_close(mine, model(**alone).logits[0], rtol=0, atol=2e-5)
            by_itself = model.generate(**alone, max_new_tokens=6, num_beams=2)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(new[row, together["input_ids"].shape[1] :], by_itself)
            torch.testing.assert_close(
                scores[row], model.score_candidates(alone, [[40, 41], [42]])[0], rtol=0, atol=1e-4
            )


def test_clips_of_different_lengths_train() -> None:
    """The gradients of a mixed batch are the sum of its rows'."""
    gradients = []
    for rows in ([[0, 1, 2]], [[0], [1], [2]]):
        model, processor = tiny.flamingo()
        model.train()
        for chosen in rows:
            picked, texts = [CLIPS[row] for row in chosen], [TEXTS[row] for row in chosen]
            inputs = dict(processor(images=picked, text=texts, padding_side="right"))
            labels = tiny.labels_of(inputs, model.config.image_token_id)
            model(**inputs, labels=labels, num_items_in_batch=10).loss.backward()
        gradients.append({name: p.grad for name, p in model.trainable_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_flat_and_padded_frames_are_the_same_images(counts: list[int]) -> None:
    """(N, C, S, S) with counts, (I, F, C, S, S) with counts, and each clip alone."""
    model, _ = MODEL
    clips = [torch.stack(frames(*(10 * i + j for j in range(count)))) for i, count in enumerate(counts)]
    padded = torch.zeros(len(counts), 3, 3, tiny.SIZE, tiny.SIZE, dtype=torch.uint8)
    for place, clip in zip(padded, clips, strict=True):
        place[: len(clip)] = clip
    with torch.no_grad():
        expected = torch.cat([model.encode_media(clip[None]) for clip in clips])
        for pixels in (torch.cat(clips), padded):
            latents = model.encode_media(pixels, torch.tensor(counts))
            torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5)


MODEL = tiny.flamingo()


def test_frame_counts_that_do_not_fit() -> None:
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert flat_frames(pixels)[1] == [1, 1, 1, 1]
    with pytest.raises(UserError, match="frame_counts sum to 3, but pixel_values has 4 frames"):
        flat_frames(pixels, [1, 2])
    with pytest.raises(UserError, match="an image of 0 frames"):
        flat_frames(pixels, [4, 0])
    with pytest.raises(UserError, match="1 entries up to 3, but pixel_values has 2 images of 2 frames"):
        flat_frames(torch.zeros(2, 2, 3, 8, 8), [3])
    with pytest.raises(UserError, match="3 dimensions"):
        flat_frames(pixels[0])


def test_equal_images_are_encoded_once() -> None:
    """One demonstration in several rows, as few-shot prompts have it; in training everything is run as it is."""
    model, processor = tiny.flamingo()
    demo, clip = tiny.picture(1), frames(2, 3)
    rows = [[demo, tiny.picture(7)], [demo, demo], [clip, demo, list(clip)]]
    inputs = processor(images=rows, text=["<image>a<image>b", "<image>c<image>d", "<image>e<image>f<image>g"])
    assert distinct(inputs["pixel_values"], inputs["frame_counts"].tolist()) == ([0, 1, 4], [0, 1, 0, 0, 2, 0, 2])
    seen = count_frames(model)
    with torch.no_grad():
        once = model(**inputs).logits
    assert seen == [1 + 1 + 2]
    every = model(**inputs).logits
    assert seen == [4, 4 * 1 + 1 + 2 * 2]
    torch.testing.assert_close(once, every.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_text_row_does_not_depend_on_its_batch_mates(family: str) -> None:
    """Beside rows with images, beside text, alone, and with no images in the call at all."""
    model, processor = tiny.flamingo(family)
    with torch.no_grad():
        alone = model(**processor(text=[tiny.TEXTS[2]])).logits[0]
        without = processor(text=[tiny.TEXTS[2]])
        bare = model(input_ids=without["input_ids"]).logits[0]
        torch.testing.assert_close(bare, alone, rtol=0, atol=0)
        for rows in ([0, 2], [2, 1], [2, 2]):
            inputs = tiny.batch(processor, rows)
            place = rows.index(2)
            mine = model(**inputs).logits[place][inputs["attention_mask"][place].bool()]
            torch.testing.assert_close(mine, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_without_image_are_the_frozen_lms_with_masked_ffn(family: str) -> None:
    """Exactly: text before the first image, and whole rows of text beside rows with images."""
    model, processor = tiny.flamingo(family, cross_attention={**BLOCK, "mask_ffn_without_media": True})
    plain = tiny.lm(family)
    inputs = processor(
        images=[[tiny.picture(0)], [], [tiny.picture(1)]], text=["abcd<image>ef", "abcdefg", "ab<image>cdef"]
    )
    image = model.config.image_token_id
    before = (inputs["input_ids"] == image).cumsum(1) == 0
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits[..., : tiny.TOKENS]
        theirs = plain(input_ids=inputs["input_ids"].masked_fill(~before, 5), use_cache=False).logits
    assert inputs["attention_mask"].all()
    assert torch.equal(ours[before], theirs[before])
    assert not torch.equal(ours[~before], theirs[~before])


def test_text_rows_cost_no_cross_attention() -> None:
    """Queries are projected for tokens that see an image only; a batch of text calls no cross-attention at all."""
    model, processor = tiny.flamingo()
    queries: list[int] = []
    block: Any = model.cross_attn_blocks["1"]
    block.attn.q_proj.register_forward_pre_hook(lambda _, args: queries.append(len(args[0])))
    inputs = tiny.batch(processor)
    with torch.no_grad():
        model(**inputs)
        model(input_ids=text_rows)
    phi = (inputs["input_ids"] == model.config.image_token_id).cumsum(1)
    assert queries == [int((phi > 0).sum())]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=text_rows)
    spent = {name: sum(found.values()) for name, found in counter.get_flop_counts().items() if "blocks" in name}
    assert sum(count for name, count in spent.items() if name.endswith(".mlp")) > 0
    assert sum(count for name, count in spent.items() if ".attn" in name) == 0


@pytest.mark.parametrize("batch", [[0, 1, 2], [2, 2]])
def test_no_padded_image_is_encoded(batch: list[int]) -> None:
    model, processor = tiny.flamingo()
    seen = count_frames(model)
    with torch.no_grad():
        model(**tiny.batch(processor, batch))
        model.generate(**tiny.batch(processor, batch), max_new_tokens=3, num_beams=2)
    assert seen == ([3, 3] if 0 in batch else [])


def test_explicit_phi_of_the_next_image() -> None:
    """The text in front of an image sees it: the paper's other placement, as `phi` from the batch."""
    from flamingo.layers.media_mask import phi_from_ids

    model, processor = tiny.flamingo()
    inputs = dict(tiny.batch(processor, [0]))
    phi = phi_from_ids(inputs["input_ids"], model.config.image_token_id, attend="next")
    with torch.no_grad():
        ours = model(**inputs, phi=phi).logits[0]
        inputs["pixel_values"][1] = tiny.picture(99)
        changed = (model(**inputs, phi=phi).logits[0] != ours).any(-1)
    first = int((phi[0] == 2).nonzero()[0, 0])
    assert not changed[:first].any()
    assert changed[first:].all()


def test_all_previous_images_are_seen_with_the_switch() -> None:
    """The text behind the second image attends to the first one too; cached is uncached."""
    model, processor = tiny.flamingo(cross_attn_layers=[3])
    assert not model.config.attend_all_previous
    model.config.attend_all_previous = True
    assert type(model.config).from_dict(model.config.to_dict()).attend_all_previous
    inputs = processor(images=[frames(1, 2)], text=["ab<image>cd<image>ef"])
    with torch.no_grad():
        whole = model(**inputs, output_cross_attentions=True)
        maps = whole.cross_attentions[0]
        assert maps.shape == (1, 2, inputs["input_ids"].shape[1], 2 * 4)
        torch.testing.assert_close(maps.sum(-1), (whole.phi > 0)[:, None].expand(-1, 2, -1).float())
        assert bool((maps[0, :, -1] > 0).all())
        new = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(new, model.generate(**inputs, max_new_tokens=5, use_cache=False))
        other = {**inputs, "pixel_values": torch.stack(frames(9, 2))[:, None]}
        changed = model(**other, output_cross_attentions=True).cross_attentions[0] != maps
        assert bool(changed[0, :, -1].all())
        model.config.attend_all_previous = False
        alone = [
            model(**given, output_cross_attentions=True).cross_attentions[0][0, :, -1] for given in (inputs, other)
        ]
        assert alone[0].shape == (2, 4)
        assert torch.equal(*alone)
