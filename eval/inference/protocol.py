"""What the loop needs from a model: `Responder` is the whole contract, small enough that another model is ten lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from eval.prompting.prompts import Completion, Decoding, EncodedPrompt, PromptBuilder
from eval.task import EncodedImage
from flamingo.errors import UserError


class Responder(Protocol):
    """A model to evaluate. Subclasses write `encode`, `rank` and `generate`; the rest have defaults.

    Letters: N images, L latents, Dv their width, E width of an embedding.
    """

    builder: PromptBuilder
    device: torch.device = torch.device("cpu")
    """Where features have to be."""

    @property
    def image_key(self) -> str:
        """Hash of everything that an image's features depend on; "" where features are not stored."""
        return ""

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return (N, L, Dv) features of N images or clips with the same number of frames."""
        ...

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        """Return each prompt's log-probabilities of its candidates; `features` (sum of images, L, Dv) in prompt order.

        A log-probability is the sum over the candidate's tokens.
        """
        ...

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """Return each prompt's greedy continuation."""
        ...

    def encode_and_embed(self, images: Sequence[EncodedImage]) -> tuple[Tensor, Tensor]:
        """Return the features and (N, E) embeddings, which retrieval compares; by default the mean over latents."""
        latents = self.encode(images)
        return latents, latents.float().mean(1)

    def sample(
        self, prompts: Sequence[EncodedPrompt], features: Tensor, decoding: Decoding, streams: Sequence[str]
    ) -> list[Completion]:
        """Return a continuation for each prompt, sampled or found by beam search.

        `streams` name the random numbers of each prompt.

        Raises:
            UserError: the model only decodes greedily.
        """
        raise UserError(f"{type(self).__name__} only decodes greedily; choose another strategy or num_beams=1")
