"""The model as the evaluation sees it: images to features, prompts to scores or text.

`Responder` is the whole contract, small enough that a constant model for a test is ten lines and that other models can
be evaluated by the same loop. `FlamingoResponder` is ours. Images are encoded once and travel as features from then
on: the resampler's output does not depend on the prompt, so every shot count, seed and ablation shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import LogitsProcessorList

from eval.inference.decoding import GreedyOrSampled
from eval.inference.feature_cache import FeatureCache as FeatureCache
from eval.inference.provenance import code_hash, weights_hash
from eval.inference.shared_prefix import SharedPrefix
from eval.prompting.prompts import Prompt, PromptBuilder
from eval.prompting.requests import Completion as Completion
from eval.prompting.requests import Decoding
from eval.task import EncodedImage, content_hash
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import UserError

FORMAT = 1
"""Of stored features; raised when what is stored changes."""


class FlamingoResponder:
    """A Flamingo and its processor behind `Responder`.

    With `share_prefix` what all prompts of a batch begin with is run once (eval/inference/shared_prefix.py); without
    it, the slow twin.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        device: str = "cpu",
        *,
        share_prefix: bool = True,
    ) -> None:
        # A sharded model lies where it should already, parts of it perhaps in the CPU's memory.
        self.model = (model if isinstance(model, FSDPModule) else model.to(torch.device(device))).eval()  # type: ignore[arg-type]
        self.processor = processor
        self.device = torch.device(device)
        self.start = tuple(processor.start_ids)
        self.builder = PromptBuilder(processor, start=self.start, context=context_length(model))
        self.prefix = SharedPrefix(self.model) if share_prefix else None
        self._ends = {processor.eoc_token_id, processor.eos_token_id}
        self.generate_options: dict[str, Any] = {}
        """More arguments for the model's `generate`."""

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        """Decoded, transformed, encoded; images of one call have the same number of frames."""
        return self.encode_and_embed(images)[0]

    @torch.inference_mode()
    def encode_and_embed(self, images: Sequence[EncodedImage]) -> tuple[Tensor, Tensor]:
        """The latents (N, L, Dv), and the mean of the encoder's patch tokens (N, D), which retrieval compares."""
        pixels = torch.cat([self._pixels(image) for image in images]).to(self.device)
        tokens = self.model.vision_encoder(pixels)
        return self.model.resampler(tokens), tokens.float().mean((1, 2))

    @cached_property
    def image_key(self) -> str:
        """Hash of everything that an image's features depend on: weights, preprocessing, precision, code, device."""
        parts = [self.model.vision_encoder, self.model.resampler]
        return content_hash(
            FORMAT,
            [weights_hash(part) for part in parts],
            asdict(self.model.config.vision),
            asdict(self.processor.image_transform),
            self.processor.max_frames,
            self.device.type,
            code_hash("flamingo", "eval/inference/model.py"),
            torch.__version__,
        )

    def _pixels(self, image: EncodedImage) -> Tensor:
        """(1, F, C, S, S) by the processor itself, so a clip is thinned out here as anywhere else."""
        item = image.frames[0] if len(image.frames) == 1 else list(image.frames)
        try:
            return self.processor(images=[[item]], text=["<image>"])["pixel_values"]
        except UserError as error:
            raise UserError(f"image sha256 {image.sha256[:12]} of the task's data: {error}") from None

    @torch.inference_mode()
    def rank(self, prompts: Sequence[Prompt], features: Tensor) -> list[list[float]]:
        """Sums of token log-probabilities, each candidate ended by end-of-chunk."""
        most = max(len(prompt.candidates) for prompt in prompts)
        rows = [[list(ids) for ids in prompt.candidates] for prompt in prompts]
        # Rows of one call have as many candidates each: a shorter list is filled with its first and cut again.
        filled = [row + row[:1] * (most - len(row)) for row in rows]
        batch = self._inputs(prompts, features)
        if (past := batch.get("past_key_values")) is not None:
            behind = past.get_seq_length()
            batch |= {"input_ids": batch["input_ids"][:, behind:], "phi": batch["phi"][:, behind:]}
        scores = self.model.score_candidates(batch, filled).tolist()
        return [scored[: len(row)] for scored, row in zip(scores, rows, strict=True)]

    def generate(self, prompts: Sequence[Prompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """Greedy, until end-of-chunk or the end of text."""
        return self.sample(prompts, features, Decoding(max_new_tokens), [""] * len(prompts))

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], features: Tensor, decoding: Decoding, streams: Sequence[str]
    ) -> list[Completion]:
        """Greedy, by beams or sampled, until end-of-chunk or the end of text."""
        batch = self._inputs(prompts, features)
        if "past_key_values" in batch and decoding.num_beams > 1:
            self._prepare_beams(batch, decoding.num_beams)
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": False}
        options |= self.generate_options
        if decoding.num_beams > 1:
            options |= {"num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty}
            out = self.model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
            rows, lengths = out.sequences.tolist(), [self._length(row) for row in out.sequences.tolist()]
            sums = [s * n**decoding.length_penalty for s, n in zip(out.sequences_scores.tolist(), lengths, strict=True)]
            means: list[float | None] = [s / n if n else None for s, n in zip(sums, lengths, strict=True)]
        else:
            chooser = GreedyOrSampled(decoding, streams)
            processors = LogitsProcessorList([chooser])
            rows = self.model.generate(**batch, **options, num_beams=1, logits_processor=processors).tolist()
            means = chooser.mean_log_probs([self._length(row) for row in rows])
        return [self._completion(row, mean) for row, mean in zip(rows, means, strict=True)]

    def _end(self, ids: list[int]) -> int | None:
        """The place of the token that ended a row."""
        return next((place for place, token in enumerate(ids) if token in self._ends), None)

    def _length(self, ids: list[int]) -> int:
        """Tokens of a row, the one that ended it included, without padding behind it."""
        end = self._end(ids)
        return len(ids) if end is None else end + 1

    def _completion(self, ids: list[int], log_prob: float | None) -> Completion:
        end = self._end(ids)
        return Completion(self.processor.decode(ids[:end]), end is not None, log_prob)

    def _inputs(self, prompts: Sequence[Prompt], features: Tensor) -> dict[str, Any]:
        """The batch, or where its prompts begin alike what goes on behind that."""
        batch = self._batch(prompts, features)
        behind = None if self.prefix is None else self.prefix.continued(prompts, features.to(self.device), batch)
        return batch if behind is None else behind

    def _prepare_beams(self, batch: dict[str, Any], beams: int) -> None:
        """Run the rows up to their last token, then repeat their cache for the beams, which transformers does not."""
        past, width = batch["past_key_values"], batch["input_ids"].shape[1]
        columns = slice(past.get_seq_length(), width - 1)
        if columns.start < columns.stop:
            ids, phi = batch["input_ids"][:, columns], batch["phi"][:, columns]
            mask = batch["attention_mask"][:, : width - 1]
            self.model(ids, attention_mask=mask, phi=phi, past_key_values=past, use_cache=True, logits_to_keep=1)
        past.batch_repeat_interleave(beams)

    def _batch(self, prompts: Sequence[Prompt], features: Tensor) -> dict[str, Tensor]:
        """Left-padded model inputs; `features` stand in for pixels."""
        counts = torch.tensor([len(prompt.images) for prompt in prompts])
        batch = {**self.processor.pad([prompt.ids for prompt in prompts]), "image_counts": counts}
        if len(features):
            batch["media_features"] = features
        return {name: value.to(self.device) for name, value in batch.items()}


def context_length(model: FlamingoForConditionalGeneration) -> int | None:
    """The longest row, in tokens, that the language model has positions for; None when it states none."""
    config = model.language_model.config
    return next(
        (n for n in (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")) if n), None
    )
