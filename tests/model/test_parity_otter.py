"""With the same weights the same numbers as Otter's formulas (its package does not install any more)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flamingo.convert import from_otter
from flamingo.processing.chat import CHAT_TEMPLATES
from tests.model import otter, peers, tiny
from tests.model.test_parity_openflamingo import IMAGES, ROWS, padded, show


@pytest.mark.parametrize("family", ["llama", "mpt"])
@pytest.mark.parametrize(("every", "frames"), [(1, None), (2, 3), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_model(family: str, every: int, frames: int | None, dtype: torch.dtype) -> None:
    theirs: Any = otter.Otter(family, every, frames).to(dtype)
    ours, processor = from_otter(
        theirs.released(),
        vision=tiny.vision(),
        language=peers.language(family).config,
        tokenizer=tiny.tokenizer(),
        cross_attn_every_n_layers=every,
        image_size=tiny.SIZE,
    )
    assert processor.tokenizer.get_vocab() == otter.tokenizer().get_vocab()
    assert processor.chat_template == CHAT_TEMPLATES["otter"]
    if dtype == torch.float64:
        peers.exact_norms(ours)
        peers.exact_norms(theirs)
    shots = 1 if frames is None else 2  # fewer frames than there are embeddings for
    images = [
        [[tiny.picture(50 * r + 5 * j + f) for f in range(shots)] for j in range(n)] for r, n in enumerate(IMAGES)
    ]
    batch = processor(images=images, text=ROWS, padding_side="right")
    mean, std = (getattr(ours.vision_encoder, name).to(dtype).view(-1, 1, 1) for name in ("mean", "std"))
    batch["pixel_values"] = (batch["pixel_values"].to(dtype) / 255 - mean) / std
    real = batch["attention_mask"].bool()
    b = theirs(padded(IMAGES, batch["pixel_values"]), batch["input_ids"], batch["attention_mask"])
    a = ours(**batch).logits
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert show(f"Otter {family} {dtype} every {every}, frames {frames}", (a[real], b[real])) <= limit
    a[real].sin().sum().backward()
    b[real].sin().sum().backward()
    mine, other = peers.gradients(ours.resampler), peers.gradients(theirs.perceiver)
    pairs = [(mine["latents"], other["latents"]), (mine["norm.weight"], other["norm.weight"])]
    if frames is not None:
        pairs.append((mine["frame_embeddings"], other["frame_embs"]))
    scale = max(float(grad.abs().max()) for _, grad in pairs)
    assert show("  gradients, of the largest", *((a / scale, b / scale) for a, b in pairs)) <= limit
