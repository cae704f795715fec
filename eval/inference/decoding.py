"""Choosing the next token: greedily, or by a sample that no other row of the batch can change.

torch's sampling draws one number after the other from a global stream, so a sample depends on its batch. Here every row
has its own counter-based stream, and the token is argmax(log p + Gumbel noise), which is an exact draw from p. As the
choice is made here, its log-probability costs nothing to keep.

Letters: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from eval.demonstrations.samplers import generator
from eval.prompting.requests import Decoding


class GreedyOrSampled(LogitsProcessor):
    """A logits processor that leaves no choice to what comes behind it.

    `log_probs` has, for each step, every row's log-probability (B,) of the chosen token under the model, before
    temperature and top-p.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[str]) -> None:
        self._decoding = decoding
        self._streams = streams
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) ids and (B, V) scores to scores that allow the chosen token alone."""
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
        """Of each row's first `lengths` tokens; None for a row of none."""
        steps = torch.stack(self.log_probs, dim=1).cpu() if self.log_probs else torch.zeros(len(lengths), 0)
        return [float(row[:length].mean()) if length else None for row, length in zip(steps, lengths, strict=True)]


def top_p(scores: Tensor, share: float) -> Tensor:
    """(B, V) scores without the tokens behind the most probable ones that together hold `share` (Holtzman 2019)."""
    if share >= 1:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = (before >= share).scatter(1, order, before >= share)
    return scores.masked_fill(dropped, -torch.inf)
