"""With the same weights the same numbers as transformers' IdeficsForVisionText2Text; `-s` shows the differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from flamingo.convert import from_idefics
from flamingo.convert.keys import IDEFICS, renumber_blocks, translate
from flamingo.layers.media_mask import images_so_far, phi_from_ids
from tests.model import peers, tiny
from tests.model.test_parity_openflamingo import padded, show

FAKE, IMAGE = "<fake_token_around_image>", "<image>"
ROWS = [
    "<image>A cat.</s>hm <image>A dog",
    "hm <image>A cow is",
    "no image</s>at all",
    "<image><image>ab</s>c<image>d",
]
IMAGES = [2, 1, 0, 3]


def tokenizer() -> Any:
    tokens = tiny.tokenizer()
    tokens.add_tokens([FAKE, IMAGE], special_tokens=True)
    tokens.add_special_tokens({"additional_special_tokens": [FAKE, IMAGE]})
    tokens.pad_token = "<unk>"
    return tokens


def config(every: int = 2, **options: Any) -> IdeficsConfig:
    perceiver = {
        "qk_layer_norms_perceiver": options.pop("perceiver_norms", True),
        "resampler_depth": 2,
        "resampler_head_dim": options.pop("head_dim", 12),
        "resampler_n_heads": 2,
        "resampler_n_latents": 4,
    }
    vision = {"embed_dim": 24, "image_size": peers.SIZE, "intermediate_size": 48, "patch_size": 14,
              "num_attention_heads": 2, "num_hidden_layers": 2}  # fmt: skip
    values = {"alpha_type": "float", "qk_layer_norms": True, "rms_norm_eps": 1e-4, **options}
    return IdeficsConfig(
        vocab_size=tiny.TOKENS, additional_vocab_size=2, hidden_size=32, intermediate_size=56, num_hidden_layers=4,
        num_attention_heads=2, cross_layer_interval=every, use_resampler=True, perceiver_config=perceiver,
        vision_config=vision, max_position_embeddings=128, freeze_text_layers=False, freeze_vision_layers=False,
        **values,
    )  # fmt: skip


def idefics(every: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    return peers.randomise(IdeficsForVisionText2Text(config(every, **options)), 7)


def convert(theirs: Any, dtype: torch.dtype) -> Any:
    state = {name: value.clone() for name, value in theirs.to(dtype).state_dict().items()}
    ours, processor = from_idefics(state, config=theirs.config.to_dict(), tokenizer=tokenizer())
    if dtype == torch.float64:
        peers.exact_norms(ours)
        peers.exact_norms(theirs)
    return ours, processor


def inputs_for(processor: Any, model: Any, side: str = "left") -> tuple[Any, dict[str, Tensor]]:
    """The same batch for us and, with the mask that its own processor makes, for IDEFICS."""
    images = [[tiny.picture(10 * r + j) for j in range(n)] for r, n in enumerate(IMAGES)]
    batch = processor(images=images, text=ROWS, padding_side=side)
    dtype = model.resampler.latents.dtype
    mean, std = (getattr(model.vision_encoder, name).to(dtype).view(-1, 1, 1) for name in ("mean", "std"))
    batch["pixel_values"] = (batch["pixel_values"].to(dtype) / 255 - mean) / std
    counted, _ = image_attention_mask_for_packed_input_ids(batch["input_ids"], processor.tokenizer, "pt")
    mask = incremental_to_binary_attention_mask(counted, "pt", num_classes=max(IMAGES))
    pixels = padded(IMAGES, batch["pixel_values"])[:, :, 0]
    names = ("input_ids", "attention_mask")
    return batch, {**{n: batch[n] for n in names}, "pixel_values": pixels, "image_attention_mask": mask}


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_layer_norms": False, "perceiver_norms": False}, {"alpha_type": "vector"}],
    ids=["released", "no norms of q and k", "vector gates"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_model(every: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = idefics(every, **options)
    ours, processor = convert(theirs, dtype)
    assert ours.config.cross_attn_layers == list(range(0, 4, every))
    limit = 1e-4 if dtype == torch.float32 else 1e-12
    for side in ("left", "right"):
        batch, other = inputs_for(processor, ours, side)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            a, b = ours(**batch).logits, theirs(**other).logits
        assert a.shape == b.shape
        assert show(f"IDEFICS {dtype} every {every} {options}, padded {side}", (a[real], b[real])) <= limit
    labels = tiny.labels_of(batch, processor.image_token_id)
    ours.freeze(dict.fromkeys(("vision", "language"), "train"))
    for model, values in ((ours, batch), (theirs, other)):
        logits = model(**values).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()
    grads = renumber_blocks(translate(peers.gradients(theirs), IDEFICS), every)
    own = peers.gradients(ours)
    assert len(grads) > 100
    assert show("  gradients", *((own[name], grad) for name, grad in grads.items())) <= limit


def test_nothing_is_seen_behind_the_end_of_a_sequence() -> None:
    """The vectorised rule against IDEFICS' loop over tokens, on random rows."""
    tokens = tokenizer()
    image, end = tokens.convert_tokens_to_ids([IMAGE, "</s>"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, image, end])[torch.randint(0, 3, (200, 12), generator=generator)]
    expected, _ = image_attention_mask_for_packed_input_ids(ids, tokens, "pt")
    assert torch.equal(phi_from_ids(ids, image, reset_token_id=end), expected + 1)
    assert not torch.equal(phi_from_ids(ids, image), expected + 1)


def test_the_part_before_may_have_ended() -> None:
    ids = torch.tensor([[5, 9, 6, 2, 7, 9, 8], [2, 5, 9, 2, 5, 5, 5]])
    phi = phi_from_ids(ids, 9, reset_token_id=2)
    assert phi.tolist() == [[0, 1, 1, 1, 0, 2, 2], [0, 0, 1, 1, 0, 0, 0]]
    for cut in range(1, 7):
        seen = images_so_far(phi[:, :cut], ids[:, :cut], 2)[:, -1]
        rest = phi_from_ids(ids[:, cut:], 9, seen=seen, reset_token_id=2)
        assert torch.equal(rest, phi[:, cut:])
        assert torch.equal(images_so_far(rest, ids[:, cut:], 2, seen)[:, -1], torch.tensor([2, -1]))


def test_generation_continues_behind_the_end_of_a_sequence() -> None:
    """Greedy decoding with the cache is IDEFICS' own; token by token without any help from the caller is too."""
    theirs = idefics()
    ours, processor = convert(theirs, torch.float32)
    batch, other = inputs_for(processor, ours)
    for name in ("eos_token_id", "suppress_tokens"):
        setattr(ours.generation_config, name, None)
        setattr(theirs.generation_config, name, None)
    ours.config.text_config.eos_token_id = None
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mine = ours.generate(**batch, **plain)
    with torch.no_grad():
        assert torch.equal(mine, theirs.generate(**other, **plain))
        ids = batch["input_ids"][:1]
        own = {"pixel_values": batch["pixel_values"][:2], "image_counts": torch.tensor([2])}
        whole = ours(input_ids=ids, **own).logits
        first = ours(input_ids=ids[:, :12], pixel_values=own["pixel_values"][:1], use_cache=True)
        cut = int((ids[0] == processor.image_token_id).nonzero()[1])
        pieces, cache = [first.logits], first.past_key_values
        for i in range(12, ids.shape[1]):
            new = {"pixel_values": own["pixel_values"][1:], "image_counts": torch.tensor([1])} if i == cut else {}
            out = ours(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True, **new)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-4)
