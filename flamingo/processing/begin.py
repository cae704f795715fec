"""What a row begins with; a module of its own because data workers use it, and it imports nothing."""

from __future__ import annotations

from typing import Any


def start_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer itself puts in front of a text; often nothing, though it has a BOS (GPT-2, Qwen)."""
    with_start = list(tokenizer("a")["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for place in range(len(with_start) - len(text) + 1):
        if with_start[place : place + len(text)] == text:
            return with_start[:place]
    return []
