"""What the loop needs of a model: `Responder` is the whole contract, small enough that another model is ten lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from eval.prompting.prompts import Prompt, PromptBuilder
from eval.prompting.requests import Completion as Completion
from eval.prompting.requests import Decoding
from eval.task import EncodedImage


class Responder(Protocol):
    """What the loop needs of a model. L latents, Dv their width."""

    builder: PromptBuilder

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        """(N, L, Dv) features of N images or clips."""
        ...

    def rank(self, prompts: Sequence[Prompt], features: Tensor) -> list[list[float]]:
        """For every prompt the log-probability of each candidate; `features` (sum of I, L, Dv) in prompt order."""
        ...

    def generate(self, prompts: Sequence[Prompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """For every prompt its greedy continuation."""
        ...


class Sampler(Protocol):
    """What the loop needs beside `Responder` where text is sampled or searched for with beams."""

    def sample(
        self, prompts: Sequence[Prompt], features: Tensor, decoding: Decoding, streams: Sequence[str]
    ) -> list[Completion]:
        """For every prompt a continuation; `streams` name the random numbers of each."""
        ...
