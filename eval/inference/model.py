"""A Flamingo as a `Responder`: images to features, prompts to scores or text.

Images are encoded once and passed on as features: the resampler's output does not depend on the prompt, so every number
of shots, seed and ablation shares it. Prompts with the same start share the run of that start (`SharedPrefix`). Tokens
are chosen by `GreedyOrSampled`, whose samples do not depend on the batch.

Letters: B rows, T tokens so far, V vocabulary, P columns from the cache, I images of the shared part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from eval.inference.protocol import Responder
from eval.inference.provenance import code_hash
from eval.prompting.prompts import Completion, Decoding, EncodedPrompt, PromptBuilder
from eval.task import EncodedImage, content_hash, generator
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import UserError
from flamingo.inference.media_cache import MediaCache, attach_media
from flamingo.inference.prompts import count_phi
from flamingo.layers.media_mask import images_so_far
from flamingo.vision.image_store import weights_hash
from flamingo.vision.transform import to_rgb

FEATURE_FORMAT = 1
"""Version of stored features; raised when what is stored changes."""


class FlamingoResponder(Responder):
    """A Flamingo and its processor.

    With `share_prefix` the start that all prompts of a batch share is run once; without it, this is the slow twin.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        device: str = "cpu",
        *,
        share_prefix: bool = True,
    ) -> None:
        # A sharded model is already where it should be, perhaps partly in CPU memory.
        self.model = (model if isinstance(model, FSDPModule) else model.to(torch.device(device))).eval()  # type: ignore[arg-type]
        self.processor = processor
        self.device = torch.device(device)
        self.start = tuple(processor.start_ids)
        self.builder = PromptBuilder(processor, start=self.start, context=context_length(model), turns=processor.turns)
        self.prefix = SharedPrefix(self.model) if share_prefix else None
        self._ends = {processor.eoc_token_id, processor.eos_token_id}
        self.generate_options: dict[str, Any] = {}
        """Further arguments for the model's `generate`."""

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        """Decode, transform and encode images that all have the same number of frames."""
        return self.encode_and_embed(images)[0]

    @torch.inference_mode()
    def encode_and_embed(self, images: Sequence[EncodedImage]) -> tuple[Tensor, Tensor]:
        """Return the latents (N, L, Dv), and the mean of the encoder's patch tokens (N, D) as embeddings."""
        pixels = torch.cat([self._pixels(image) for image in images]).to(self.device)
        tokens = self.model.vision_encoder(pixels)
        return self.model.resampler(tokens), tokens.float().mean((1, 2))

    @cached_property
    def image_key(self) -> str:
        """Hash of everything that an image's features depend on: weights, preprocessing, precision, code, device."""
        parts = [self.model.vision_encoder, self.model.resampler]
        return content_hash(
            FEATURE_FORMAT,
            [weights_hash(part) for part in parts],
            asdict(self.model.config.vision),
            asdict(self.processor.image_transform),
            self.processor.max_frames,
            self.device.type,
            code_hash("flamingo", "eval/inference/model.py"),
            torch.__version__,
        )

    def _pixels(self, image: EncodedImage) -> Tensor:
        """Return (1, F, C, S, S) from the processor itself, so that a clip is subsampled as everywhere else."""
        item = image.frames[0] if len(image.frames) == 1 else list(image.frames)
        try:
            return self.processor(images=[[item]], text=["<image>"])["pixel_values"]
        except UserError:
            for index, frame in enumerate(image.frames):
                to_rgb(frame, image.label(index))  # names the frame that is to blame
            raise

    @torch.inference_mode()
    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        """Return sums of token log-probabilities, each candidate ended by the end-of-chunk token."""
        most = max(len(prompt.candidates) for prompt in prompts)
        rows = [[list(ids) for ids in prompt.candidates] for prompt in prompts]
        # All rows of one call need the same number of candidates: shorter lists are padded with their first, then cut.
        padded = [row + row[:1] * (most - len(row)) for row in rows]
        batch = self._inputs(prompts, features)
        if (past := batch.get("past_key_values")) is not None:
            cached = past.get_seq_length()
            batch |= {"input_ids": batch["input_ids"][:, cached:], "phi": batch["phi"][:, cached:]}
        scores = self.model.score_candidates(batch, padded).tolist()
        return [row_scores[: len(row)] for row_scores, row in zip(scores, rows, strict=True)]

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        """Decode greedily until the end-of-chunk token or the end of text."""
        return self.sample(prompts, features, Decoding(max_new_tokens), [""] * len(prompts))

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[EncodedPrompt], features: Tensor, decoding: Decoding, streams: Sequence[str]
    ) -> list[Completion]:
        """Decode greedily, by beam search or by sampling, until the end-of-chunk token or the end of text."""
        batch = self._inputs(prompts, features)
        if "past_key_values" in batch and decoding.num_beams > 1:
            self._run_prompts(batch)
        prompt = batch["input_ids"].shape[1]
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": False}
        options |= self.generate_options
        turns = self.processor.turns() if prompts[0].chat else None
        ends = self._ends | ({turns.end_id} if turns else set())
        if turns:
            options["eos_token_id"] = sorted(end for end in ends if end is not None)
        if decoding.num_beams > 1:
            options |= {"num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty}
            out = self.model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
            rows = out.sequences[:, prompt:].tolist()
            lengths = [_length(row, ends) for row in rows]
            # transformers divides a beam's sum by its length to the power of the penalty; undo that for the mean.
            sums = [s * n**decoding.length_penalty for s, n in zip(out.sequences_scores.tolist(), lengths, strict=True)]
            means: list[float | None] = [s / n if n else None for s, n in zip(sums, lengths, strict=True)]
        else:
            chooser = GreedyOrSampled(decoding, streams)
            processors = LogitsProcessorList([chooser])
            out = self.model.generate(**batch, **options, num_beams=1, logits_processor=processors)
            rows = out[:, prompt:].tolist()
            means = chooser.mean_log_probs([_length(row, ends) for row in rows])
        said = turns.said if turns else self.processor.decode
        return [
            Completion(said(row[: _end(row, ends)]), _end(row, ends) is not None, mean)
            for row, mean in zip(rows, means, strict=True)
        ]

    def _inputs(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> dict[str, Any]:
        """Return the model's inputs; where the prompts share their start, those that continue after it."""
        batch = self._batch(prompts, features)
        rest = None if self.prefix is None else self.prefix.continued(prompts, features.to(self.device), batch)
        return batch if rest is None else rest

    def _run_prompts(self, batch: dict[str, Any]) -> None:
        """Run the rows up to their last token, so that beams, which copy the cache, share that run."""
        past, width = batch["past_key_values"], batch["input_ids"].shape[1]
        columns = slice(past.get_seq_length(), width - 1)
        if columns.start < columns.stop:
            ids, phi = batch["input_ids"][:, columns], batch["phi"][:, columns]
            mask = batch["attention_mask"][:, : width - 1]
            self.model(ids, attention_mask=mask, phi=phi, past_key_values=past, use_cache=True, logits_to_keep=1)

    def _batch(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> dict[str, Tensor]:
        """Return left-padded model inputs, with `features` in place of pixels."""
        counts = torch.tensor([len(prompt.images) for prompt in prompts])
        batch = {**self.processor.pad([prompt.ids for prompt in prompts]), "image_counts": counts}
        if len(features):
            batch["media_features"] = features
        return {name: value.to(self.device) for name, value in batch.items()}


def _end(ids: list[int], ends: Collection[int | None]) -> int | None:
    """Return the position of the token that ended a row."""
    return next((position for position, token in enumerate(ids) if token in ends), None)


def _length(ids: list[int], ends: Collection[int | None]) -> int:
    """Return the number of tokens of a row, including the one that ended it and excluding the padding."""
    end = _end(ids, ends)
    return len(ids) if end is None else end + 1


def check_model_folder(key: str, folder: str) -> None:
    """Raise UserError unless a model is in the folder that the setting `key` names."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{key}={folder} is not the folder of a saved model (config.json is missing); give the folder that "
            "save_pretrained or train.py wrote"
        )


def load_responder(key: str, folder: str, device: str, dtype: str) -> FlamingoResponder:
    """Return the model in the folder that the setting `key` names. Raises UserError when it cannot be loaded."""
    check_model_folder(key, folder)
    try:
        model = FlamingoForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        processor = FlamingoProcessor.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"{key}={folder}: {error}") from None
    return FlamingoResponder(model, processor, device)


def context_length(model: FlamingoForConditionalGeneration) -> int | None:
    """Return the longest row, in tokens, that the language model has positions for; None if it names no limit."""
    config = model.language_model.config
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    return next((limit for limit in limits if limit), None)


@dataclass(frozen=True)
class _CachedStart:
    """The shared start of some prompts, run once: the keys and values of its one row, and its images."""

    key: tuple[object, ...]
    cache: Cache
    media: MediaCache


def common_beginning(prompts: Sequence[EncodedPrompt]) -> tuple[object, ...] | None:
    """Return the start that all prompts share; None unless it is the same one."""
    starts = {prompt.beginning for prompt in prompts}
    return starts.pop() if len(starts) == 1 else None


class SharedPrefix:
    """Prompts with the same start: it is run once, and its keys and values serve all of them.

    With the same demonstrations for all queries (`demos=fixed`, `demos=file:` for all, `zero_shot: two_text_fixed`,
    several samples of one query) only the query differs. Rows are laid out as without sharing: padding on the left,
    then the prompt. Cut at column P, the length of the shared start, a row's left part is padding and the beginning of
    the shared start, which is taken from the cache and moved right by the row's padding; only the columns after P are
    run. So every model that takes left-padded rows takes these, whatever it does with positions, and scores are those
    of the plain path. The last start is kept from batch to batch.
    """

    def __init__(self, model: FlamingoForConditionalGeneration) -> None:
        self._model = model
        self._last: _CachedStart | None = None
        self._possible = True
        self.runs = 0

    def continued(
        self, prompts: Sequence[EncodedPrompt], features: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Any] | None:
        """Return inputs that continue after the shared start: `batch` with `past_key_values`, and `phi` of whole rows.

        `batch` is left-padded, on the model's device; `features` are all prompts' images in order. None if the prompts
        share nothing, or if the language model's cache drops or rearranges entries.
        """
        key = common_beginning(prompts) if self._possible else None
        if key is None:
            return None
        tokens, images = prompts[0].shared
        start = self._start(key, prompts[0], features[:images])
        if start is None:
            return None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        phi = count_phi(self._model.config, ids)
        media = _media_of_rows(start.media, prompts, features)
        media.history = images_so_far(phi[:, :tokens], ids[:, :tokens], self._model.config.media_reset_token_id)
        cache = _shifted(start.cache, (mask == 0).sum(1))
        attach_media(cache, media)
        return {"input_ids": ids, "attention_mask": mask, "phi": phi, "past_key_values": cache}

    def _start(self, key: tuple[object, ...], prompt: EncodedPrompt, features: Tensor) -> _CachedStart | None:
        if self._last is not None and self._last.key == key:
            return self._last
        self._last = None  # frees its memory before the next one is made
        ids = torch.tensor([prompt.ids[: prompt.shared[0]]], device=self._model.device)
        counts = torch.tensor([len(features)], device=self._model.device)
        images = {"media_features": features} if len(features) else {}
        out = self._model(input_ids=ids, image_counts=counts, use_cache=True, logits_to_keep=1, **images)
        self.runs += 1
        cache = out.past_key_values
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            self._possible = False
            return None
        self._last = _CachedStart(key, cache, cache.media)  # type: ignore[attr-defined]
        return self._last


def _media_of_rows(shared: MediaCache, prompts: Sequence[EncodedPrompt], features: Tensor) -> MediaCache:
    """Return the rows' images: the shared ones, whose keys and values exist already, then each row's own."""
    first = len(shared.features)
    own, rows_of_features, start = [], [], 0
    for prompt in prompts:
        count = len(prompt.images)
        own.append(features[start + first : start + count])
        start += count
    position = first
    for features_of_row in own:
        rows_of_features.append([*range(first), *range(position, position + len(features_of_row))])
        position += len(features_of_row)
    widest = max(map(len, rows_of_features))
    rows = torch.tensor([row + [-1] * (widest - len(row)) for row in rows_of_features], dtype=torch.long)
    rows = rows.view(len(prompts), widest).to(shared.features.device)
    together = torch.cat([shared.features, *(features_of_row for features_of_row in own if len(features_of_row))])
    return MediaCache(together, rows, dict(shared.keys_values))


def _shifted(cache: Cache, shifts: Tensor) -> DynamicCache:
    """Return one row's keys and values (1, H, P, D) as (B, H, P, D), each moved right by its shift, zeros before it."""
    out = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        source = torch.arange(keys.shape[2], device=keys.device) - shifts[:, None].to(keys.device)  # (B, P)
        before = (source < 0)[:, None, :, None]
        # (H, B, P, D) to (B, H, P, D)
        moved = [tensor[0][:, source.clamp(min=0)].transpose(0, 1).masked_fill(before, 0) for tensor in (keys, values)]
        out.update(moved[0], moved[1], index)
    return out


class GreedyOrSampled(LogitsProcessor):
    """A logits processor that chooses the next token: greedily, or by a sample that no other row can change.

    torch's sampling draws from one global stream, so a sample depends on its batch. Here every
    row has its own counter-based stream, and the token is argmax(log p + Gumbel noise), which is an exact draw from p.
    Since the choice is made here, its log-probability costs nothing to keep: `log_probs` has for each step every row's
    log-probability (B,) of the chosen token under the model, before temperature and top-p.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[str]) -> None:
        self._decoding = decoding
        self._streams = streams
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn (B, T) ids and (B, V) scores into scores that allow only the chosen token."""
        chosen = scores.argmax(-1, keepdim=True) if self._decoding.temperature == 0 else self._sampled(scores)
        self.log_probs.append(scores.float().log_softmax(-1).gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def _sampled(self, scores: Tensor) -> Tensor:
        log_probs = top_p(scores.float() / self._decoding.temperature, self._decoding.top_p).log_softmax(-1)
        step = len(self.log_probs)
        noise = [generator("sample", stream, step).gumbel(size=scores.shape[-1]) for stream in self._streams]
        rows = [torch.from_numpy(row).to(scores.device, torch.float32) for row in noise]
        return (log_probs + torch.stack(rows)).argmax(-1, keepdim=True)

    def mean_log_probs(self, lengths: Sequence[int]) -> list[float | None]:
        """Return the mean log-probability of each row's first `lengths` tokens; None for a row without any."""
        steps = torch.stack(self.log_probs, dim=1).cpu() if self.log_probs else torch.zeros(len(lengths), 0)
        return [float(row[:length].mean()) if length else None for row, length in zip(steps, lengths, strict=True)]


def top_p(scores: Tensor, share: float) -> Tensor:
    """Return (B, V) scores with only the most probable tokens, which together hold `share` (Holtzman et al. 2019)."""
    if share >= 1:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = (before >= share).scatter(1, order, before >= share)
    return scores.masked_fill(dropped, -torch.inf)
