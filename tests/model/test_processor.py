from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo import FlamingoProcessor, ImageTransform, UserError
from flamingo.vision.transform import to_rgb
from tests.model import tiny


@pytest.fixture
def processor() -> FlamingoProcessor:
    return FlamingoProcessor(tiny.tokenizer(), ImageTransform(tiny.SIZE), max_frames=3)


def test_ids_are_pieces_with_special_tokens_between(processor: FlamingoProcessor) -> None:
    assert processor.new_token_ids == [259, 260, 261]
    batch = processor(images=[[tiny.picture(0)]], text=["<image>ab<|endofchunk|>"])
    a, b = processor.encode_text("ab")
    assert batch["input_ids"].tolist() == [[1, 259, a, b, 260]]
    assert batch["pixel_values"].shape == (1, 1, 3, tiny.SIZE, tiny.SIZE)
    assert batch["pixel_values"].dtype == torch.uint8
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_counts"}


def test_tags_in_plain_text_are_plain_text(processor: FlamingoProcessor) -> None:
    ids = processor.encode_text("a <image> and </s> <|endofchunk|>")
    assert not {259, 260, 2} & set(ids)
    assert processor.decode(ids) == "a <image> and </s> <|endofchunk|>"
    row = [{"type": "text", "text": "<image>"}]
    assert 259 not in processor(text=[row])["input_ids"]


def test_padding(processor: FlamingoProcessor) -> None:
    for side, place in (("left", slice(0, 2)), ("right", slice(2, 4))):
        batch = processor(text=["abc", "a"], padding_side=side)
        assert batch["attention_mask"][1, place].tolist() == [0, 0]
        assert batch["input_ids"][1, place].tolist() == [processor.pad_token_id] * 2
        assert batch["pixel_values"].shape == (0, 1, 3, tiny.SIZE, tiny.SIZE)
        assert batch["image_counts"].tolist() == [0, 0]
    with pytest.raises(UserError, match="padding_side='middle'"):
        processor(text=["a"], padding_side="middle")


def test_chat_style_is_the_same_as_a_string(processor: FlamingoProcessor) -> None:
    first, second = tiny.picture(0), tiny.picture(1)
    plain = processor(images=[[first, second]], text=["<image>A cat.<|endofchunk|><image>A"])
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": first},
        {"type": "text", "text": "A cat."},
        {"type": "image", "image": second},
        {"type": "text", "text": "A"},
    ]
    for batch in (processor(text=[parts]), processor(text=parts)):
        assert all(torch.equal(batch[key], plain[key]) for key in plain)
    with pytest.raises(UserError, match="have roles, but neither"):
        processor(text=[{"role": "user", "content": parts[:2]}, {"role": "user", "content": parts[2:]}])
    without = [{key: value for key, value in part.items() if key != "image"} for part in parts]
    assert torch.equal(processor(images=[[first, second]], text=[without])["pixel_values"], plain["pixel_values"])
    with pytest.raises(UserError, match="type 'sound'"):
        processor(text=[[{"type": "sound"}]])


def test_the_prompt_builder_writes_the_training_text(processor: FlamingoProcessor) -> None:
    a, b = tiny.picture(0), tiny.picture(1)
    images, text = processor.prompt([(a, "This is a dax."), (None, "No image.")], (b, "This is a"))
    assert text == "<image>This is a dax.<|endofchunk|>No image.<|endofchunk|><image>This is a"
    assert len(images) == 2
    assert processor(images=[images], text=[text])["image_counts"].tolist() == [2]
    with pytest.raises(UserError, match="contains a tag"):
        processor.prompt([], (a, "<image>"))


def test_clips(processor: FlamingoProcessor) -> None:
    frames = [torch.full((3, tiny.SIZE, tiny.SIZE), i, dtype=torch.uint8) for i in range(5)]
    batch = processor(images=[[frames]], text=["<image>runs"])
    assert batch["pixel_values"][0, :, 0, 0, 0].tolist() == [0, 2, 4]
    video = processor(text=[[{"type": "video", "video": frames}, {"type": "text", "text": "runs"}]])
    assert torch.equal(video["pixel_values"], batch["pixel_values"])
    mixed = processor(images=[[frames[:2], frames[0]], [frames[2:]]], text=["<image><image>", "<image>"])
    assert mixed["frame_counts"].tolist() == [2, 1, 3]
    assert mixed["pixel_values"].shape == (6, 3, tiny.SIZE, tiny.SIZE)
    assert mixed["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 0, 2, 3, 4]


def test_mistakes_name_the_row(processor: FlamingoProcessor) -> None:
    good = tiny.picture(0)
    with pytest.raises(UserError, match="row 3 has 2 <image> tags but 1 images"):
        processor(images=[[], [], [], [good]], text=["a", "b", "c", "<image><image>"])
    with pytest.raises(UserError, match="2 lists for 3 rows"):
        processor(images=[[], []], text=["a", "b", "c"])
    with pytest.raises(UserError, match="image 1 of row 0 cannot be decoded"):
        processor(images=[[good, b"no image"]], text=["<image><image>"])
    with pytest.raises(UserError, match="needs text"):
        processor(images=[[good]])


def test_save_then_load(processor: FlamingoProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = FlamingoProcessor.from_pretrained(tmp_path)
    assert again.new_token_ids == processor.new_token_ids
    assert again.image_transform == processor.image_transform
    assert again.max_frames == 3
    text = ["<image>a</s> <|endofchunk|>"]
    inputs = [p(images=[[tiny.picture(0)]], text=text) for p in (processor, again)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    with pytest.raises(UserError, match="no Flamingo processor"):
        FlamingoProcessor.from_pretrained(tmp_path / "elsewhere")


def test_image_modes_make_squares() -> None:
    wide = torch.zeros(3, 20, 40, dtype=torch.uint8)
    wide[:, :, 10:30] = 255
    crop, squash, pad = (ImageTransform(20, mode=mode)(wide) for mode in ("crop", "squash", "pad"))
    assert crop.shape == squash.shape == pad.shape == (3, 20, 20)
    assert bool((crop == 255).all())
    assert bool((squash[:, :, 0] == 0).all())
    assert bool((pad[:, :4] == 0).all())
    assert int(pad[0, 10, 10]) == 255
    with pytest.raises(UserError, match="squash, crop, pad, pad_mean"):
        ImageTransform(20, mode="zoom")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "I", "F"])
def test_images_of_every_mode(mode: str) -> None:
    """A grey of 128 stays one, whatever it is written in."""
    grey = Image.new("L", (6, 4), 128)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((4, 6), 128 * 257, dtype=np.uint16 if mode == "I;16" else np.int32))
    elif mode == "1":
        image = Image.new("1", (6, 4), 1)
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    tensor = to_rgb(image)
    assert tensor.shape == (3, 4, 6)
    assert tensor.dtype == torch.uint8
    expected = 255 if mode == "1" else 128
    assert int((tensor.int() - expected).abs().max()) <= 3


def test_transparency_is_white_and_exif_turns() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).tolist() == torch.full((3, 2, 2), 255).tolist()
    lying = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    lying.save(buffer, "JPEG", exif=exif)
    assert to_rgb(buffer.getvalue()).shape == (3, 6, 4)
    with pytest.raises(UserError, match="cannot be decoded"):
        to_rgb(buffer.getvalue()[:100])
