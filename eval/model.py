"""The model as the evaluation sees it: pictures to features, prompts to scores or text.

`Responder` is the whole contract, small enough that a constant model for a test is ten lines and that other models can
be evaluated by the same loop. `FlamingoResponder` is ours. Pictures are encoded once and travel as features from then
on: the resampler's output does not depend on the prompt, so every shot count, seed and ablation shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eval.prompts import Prompt, PromptBuilder
from eval.task import Picture
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import UserError


@dataclass(frozen=True)
class Completion:
    """Generated text, and whether the model ended it (False: it ran into the limit of new tokens)."""

    text: str
    ended: bool


class Responder(Protocol):
    """What the loop needs of a model. L latents, Dv their width."""

    builder: PromptBuilder

    def encode(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, L, Dv) features of N pictures or clips."""
        ...

    def rank(self, prompts: Sequence[Prompt], features: Tensor) -> list[list[float]]:
        """For every prompt the log-probability of each candidate; `features` (sum of I, L, Dv) in prompt order."""
        ...

    def generate(self, prompts: Sequence[Prompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """For every prompt its greedy continuation."""
        ...


class FlamingoResponder:
    """A Flamingo and its processor behind `Responder`."""

    def __init__(
        self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, device: str = "cpu"
    ) -> None:
        self._model = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        self._processor = processor
        self._device = torch.device(device)
        start = () if processor.bos_token_id is None else (processor.bos_token_id,)
        self.builder = PromptBuilder(processor, start=start, context=context_length(model))
        self._ends = {processor.eoc_token_id, processor.eos_token_id}

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> Tensor:
        """Decoded, transformed, encoded; pictures of one call have the same number of frames."""
        return self._model.encode_media(torch.cat([self._pixels(picture) for picture in pictures]).to(self._device))

    def _pixels(self, picture: Picture) -> Tensor:
        """(1, F, C, S, S) by the processor itself, so a clip is thinned out here as anywhere else."""
        item = picture.frames[0] if len(picture.frames) == 1 else list(picture.frames)
        try:
            return self._processor(images=[[item]], text=["<image>"])["pixel_values"]
        except UserError as error:
            raise UserError(f"picture sha256 {picture.sha256[:12]} of the task's data: {error}") from None

    @torch.inference_mode()
    def rank(self, prompts: Sequence[Prompt], features: Tensor) -> list[list[float]]:
        """Sums of token log-probabilities, each candidate ended by end-of-chunk."""
        most = max(len(prompt.candidates) for prompt in prompts)
        rows = [[list(ids) for ids in prompt.candidates] for prompt in prompts]
        # Rows of one call have as many candidates each: a shorter list is filled with its first and cut again.
        filled = [row + row[:1] * (most - len(row)) for row in rows]
        scores = self._model.score_candidates(self._batch(prompts, features), filled).tolist()
        return [scored[: len(row)] for scored, row in zip(scores, rows, strict=True)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """Greedy, until end-of-chunk or the end of text."""
        batch = self._batch(prompts, features)
        new = self._model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return [self._completion(row) for row in new.tolist()]

    def _completion(self, ids: list[int]) -> Completion:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        text = self._processor.decode(ids[:end])
        return Completion(text, end is not None)

    def _batch(self, prompts: Sequence[Prompt], features: Tensor) -> dict[str, Tensor]:
        """Left-padded model inputs; `features` stand in for pixels."""
        counts = torch.tensor([len(prompt.pictures) for prompt in prompts])
        batch = {**self._processor.pad([prompt.ids for prompt in prompts]), "image_counts": counts}
        if len(features):
            batch["media_features"] = features
        return {name: value.to(self._device) for name, value in batch.items()}


def context_length(model: FlamingoForConditionalGeneration) -> int | None:
    """The longest row, in tokens, that the language model has positions for; None when it states none."""
    config = model.language_model.config
    return next(
        (n for n in (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")) if n), None
    )


class FeatureCache:
    """Features by SHA-256, kept for the whole run. `encoded` counts what the encoder was given."""

    def __init__(self, responder: Responder, batch_size: int = 64) -> None:
        self._responder = responder
        self._batch_size = batch_size
        self._features: dict[str, Tensor] = {}
        self.pictures: dict[str, Picture] = {}
        self.shown = 0

    @property
    def encoded(self) -> int:
        """Distinct pictures encoded so far: each exactly once."""
        return len(self._features)

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, L, Dv), the missing ones encoded first. N = 0 gives (0, 0, 0)."""
        self.shown += len(pictures)
        missing = {picture.sha256: picture for picture in pictures if picture.sha256 not in self._features}
        by_frames: dict[int, list[Picture]] = {}
        for picture in missing.values():
            by_frames.setdefault(len(picture.frames), []).append(picture)
        for group in by_frames.values():
            for start in range(0, len(group), self._batch_size):
                chunk = group[start : start + self._batch_size]
                for picture, feature in zip(chunk, self._responder.encode(chunk), strict=True):
                    self._features[picture.sha256] = feature
        self.pictures |= missing
        if not pictures:
            return torch.zeros(0, 0, 0)
        return torch.stack([self._features[picture.sha256] for picture in pictures])
