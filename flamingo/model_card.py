"""The model card that `save_pretrained` writes: what the library knows, and fields for people to fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flamingo.files import PARTIAL

CARD = "README.md"
_TEXT = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- flamingo
# Fill in: the terms of the language model, of the encoder and of the training data all bind it.
# license: ...
# datasets: [...]
---

# {title}

A Flamingo-style visual language model: a vision encoder, a connector that turns its output into
latents, and gated cross-attention blocks between the layers of a causal language model.

## Shape

| part | what | parameters |
|---|---|---|
| vision encoder | {vision}, {size} px | {vision_encoder:,} |
| connector | {connector}: {options} | {resampler:,} |
| cross-attention | in front of {blocks} of {layers} layers | {cross_attn_blocks:,} |
| language model | {language}, width {width} | {language_model:,} |
| new tokens | {tokens} rows | {new_tokens:,} |
| all | {trained:,} of them train | {total:,} |

## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

import flamingo  # pip install flamingo-vlm; tells transformers what a Flamingo is

model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER OR NAME")
processor = AutoProcessor.from_pretrained("THIS FOLDER OR NAME")
inputs = processor(images=["image.jpg"], text="<image>A")
print(processor.batch_decode_new(model.generate(**inputs, max_new_tokens=20), inputs))
```

## Intended use

Prompts of images and text with a few examples in them, for research. It is not made for decisions about people; what it
says of an image may be wrong. *Fill in: what it was made and tested for, and what it must not be used for.*

## Training data

{training}

## Licence

*Fill in: this model's licence, and those of the encoder and the language model, which bind it as well.*

## Evaluation

*Fill in: tasks, shots, decoding, scores and the command that gives them.*
"""


_TRAINING = "*Fill in: data sets with their licences, how they were filtered, how many images and tokens were seen.*"


def add_training(folder: Path, facts: str) -> None:
    """Write what a run trained on into the card of the model in `folder`, ahead of what people have to fill in."""
    file = folder / CARD
    if file.exists():
        file.write_text(file.read_text().replace(_TRAINING, f"{facts}\n\n{_TRAINING}"))


def write_card(folder: Path, model: Any) -> None:
    """Write `README.md` beside a saved model, unless one is there."""
    file = folder / CARD
    if not folder.is_dir() or file.exists():
        return
    config, text = model.config, model.config.text_config.get_text_config(decoder=True)
    parts = ("vision_encoder", "resampler", "cross_attn_blocks", "language_model", "new_tokens")
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts}
    options = {name: value for name, value in config.resampler_config.items() if value is not None}
    file.write_text(
        _TEXT.format(
            title=folder.resolve().name.removesuffix(PARTIAL),
            training=_TRAINING,
            vision=config.vision.name or config.vision.kind,
            size=config.vision.image_size,
            connector=config.connector,
            options=", ".join(f"{name} {value}" for name, value in options.items()) or "defaults",
            blocks=len(config.cross_attn_layers),
            layers=text.num_hidden_layers,
            language=text.model_type,
            width=text.hidden_size,
            tokens=len(config.new_token_ids),
            total=sum(sizes.values()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            **sizes,
        )
    )
