"""What is compiled, and how often: for `test_compiled.py`, in a process of its own.

    python -m tests.model.compiled decode gpt2 llama     one graph, and the tokens of eager decoding
    python -m tests.model.compiled train gpt2 llama      graphs over 50 ragged batches, layer by layer

A process of its own, because the tests check shapes at run time in every function, which torch.compile does not take.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from flamingo.conformance.tiny_models import SIZE, VOCABULARY, document, subject, tiny_lm
from flamingo.labels import IGNORED
from flamingo.training.distributed.fsdp import compile_layers
from flamingo.training.objectives.flamingo import FlamingoObjective

BATCHES = 50


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def decode(family: str) -> None:
    """Prompts of other images, lengths and rows that see none are the same graph; other numbers of rows one more."""
    backend = "inductor" if family == "llama" else "aot_eager"
    model = subject(partial(tiny_lm, family))
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False, backend=backend)
    config._compile_all_devices = True  # type: ignore[assignment]
    static: dict[str, Any] = {"cache_implementation": "static", "compile_config": config}
    prompts: list[Any] = [document(model), document(model, (1, 2, 0)), document(model, (2, 2, 1))]
    for inputs in prompts:
        length = 20 - inputs["input_ids"].shape[1]  # static caches of one size
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        ours, eager = model.generate(**inputs, **options, **static), model.generate(**inputs, **options)
        assert torch.equal(ours, eager), "other tokens than eager decoding"
    print(family, graphs())


def ragged(image: int, source: random.Random) -> dict[str, Tensor]:
    """Return a batch of 1 to 4 rows of up to 40 tokens with 0 to 3 images each, padded on the right."""
    rows, width = source.randint(1, 4), source.randint(4, 40)
    ids = torch.tensor([[source.randrange(3, VOCABULARY) for _ in range(width)] for _ in range(rows)])
    mask, counts = torch.ones_like(ids), []
    for row in range(rows):
        tags = source.sample(range(width), source.randint(0, 3))
        length = source.randint(max([*tags, 2]) + 1, width)
        ids[row, tags] = image
        ids[row, length:] = mask[row, length:] = 0
        counts.append(len(tags))
    pixels = torch.zeros(sum(counts), 1, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    return batch | {"pixel_values": pixels, "image_counts": torch.tensor(counts)}


def train(family: str) -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # what is beyond it would run eagerly, and nobody knows
    model = subject(partial(tiny_lm, family)).train()
    objective, source = FlamingoObjective(), random.Random(0)
    compile_layers(objective.compiled_layers(model), backend="aot_eager")
    curve = []
    for _ in range(BATCHES):
        objective.sums(model, ragged(model.config.image_token_id, source))["text"].backward()
        curve.append(graphs())
    print(family, curve[0], curve[BATCHES // 2], curve[-1])


if __name__ == "__main__":
    for name in sys.argv[2:]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        {"decode": decode, "train": train}[sys.argv[1]](name)
