"""Prompts that begin alike: what they share is run once and its keys and values serve every one of them.

With the same demonstrations for all queries (`demos=fixed`, `demos=file:` for all, `zero_shot: two_text_fixed`, several
samples of one query) all that differs is the query. A row is laid out as without this: padding on the left, then the
prompt. Cut at column P, the length of what is shared, its left part is padding and the beginning of the shared part,
taken from the cache and moved to the right by the row's padding; only the columns behind it are run. So every model
that takes left-padded rows takes these, whatever it does with positions, and scores are those of the plain path.

Letters: B rows, T columns, P columns from the cache, I images of the shared part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from eval.prompting.prompts import Prompt
from flamingo import FlamingoForConditionalGeneration
from flamingo.inference.generation import count_phi
from flamingo.inference.media_cache import MediaCache
from flamingo.layers.media_mask import seen_after


@dataclass(frozen=True)
class Beginning:
    """The shared part of some prompts, run once: its keys and values, of one row, and its images."""

    key: tuple[object, ...]
    cache: Cache
    media: MediaCache


def common_beginning(prompts: Sequence[Prompt]) -> tuple[object, ...] | None:
    """The beginning of all the prompts; None unless it is the same one."""
    found = {prompt.beginning for prompt in prompts}
    return found.pop() if len(found) == 1 else None


class SharedPrefix:
    """Runs beginnings with one model and remembers the last one."""

    def __init__(self, model: FlamingoForConditionalGeneration) -> None:
        self._model = model
        self._last: Beginning | None = None
        self._possible = True
        self.runs = 0

    def continued(self, prompts: Sequence[Prompt], features: Tensor, batch: dict[str, Tensor]) -> dict[str, Any] | None:
        """Inputs that go on behind the shared part: `batch` with `past_key_values`, and `phi` of the whole rows.

        `batch` is left-padded, on the model's device; `features` are all prompts' images in order. None where the
        prompts share nothing, or the language model's cache is of a kind that forgets or rearranges.
        """
        key = common_beginning(prompts) if self._possible else None
        if key is None:
            return None
        tokens, images = prompts[0].shared
        beginning = self._beginning(key, prompts[0], features[:images])
        if beginning is None:
            return None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        phi = count_phi(self._model.config, ids)
        media = _media_of_rows(beginning.media, prompts, features)
        media.seen = seen_after(phi[:, :tokens], ids[:, :tokens], self._model.config.media_reset_token_id)
        cache = _shifted(beginning.cache, (mask == 0).sum(1))
        cache.media = media  # type: ignore[attr-defined]
        return {"input_ids": ids, "attention_mask": mask, "phi": phi, "past_key_values": cache}

    def _beginning(self, key: tuple[object, ...], prompt: Prompt, features: Tensor) -> Beginning | None:
        if self._last is not None and self._last.key == key:
            return self._last
        self._last = None  # its memory is free before the next one is made
        ids = torch.tensor([prompt.ids[: prompt.shared[0]]], device=self._model.device)
        counts = torch.tensor([len(features)], device=self._model.device)
        images = {"media_features": features} if len(features) else {}
        out = self._model(input_ids=ids, image_counts=counts, use_cache=True, logits_to_keep=1, **images)
        self.runs += 1
        cache = out.past_key_values
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            self._possible = False
            return None
        self._last = Beginning(key, cache, cache.media)  # type: ignore[attr-defined]
        return self._last


def _media_of_rows(shared: MediaCache, prompts: Sequence[Prompt], features: Tensor) -> MediaCache:
    """The rows' images: the shared ones, whose keys and values are there already, then each row's own."""
    first = len(shared.features)
    own, table, start = [], [], 0
    for prompt in prompts:
        count = len(prompt.images)
        own.append(features[start + first : start + count])
        start += count
    place = first
    for mine in own:
        table.append([*range(first), *range(place, place + len(mine))])
        place += len(mine)
    widest = max(map(len, table))
    rows = torch.tensor([row + [-1] * (widest - len(row)) for row in table], dtype=torch.long)
    rows = rows.view(len(prompts), widest).to(shared.features.device)
    together = torch.cat([shared.features, *(mine for mine in own if len(mine))])
    return MediaCache(together, rows, dict(shared.keys_values))


def _shifted(cache: Cache, shifts: Tensor) -> DynamicCache:
    """One row's keys and values (1, H, P, D) as (B, H, P, D), each moved `shifts` columns right, zeros before it."""
    out = DynamicCache()
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        place = torch.arange(keys.shape[2], device=keys.device) - shifts[:, None].to(keys.device)  # (B, P)
        before = (place < 0)[:, None, :, None]
        # (H, B, P, D) to (B, H, P, D)
        moved = [tensor[0][:, place.clamp(min=0)].transpose(0, 1).masked_fill(before, 0) for tensor in (keys, values)]
        out.update(moved[0], moved[1], number)
    return out
