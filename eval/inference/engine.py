"""Requests to responses: known ones from the log, the others in batches of like length, shared between processes.

Batches are planned over all requests of a round, those already answered included, and a batch of which anything is
missing is run whole. So a resumed run, or one on another number of processes, runs the very batches of an undisturbed
one and gets the same bits. Equal requests are asked once in a run, whatever cells they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.inference.distributed import Ranks
from eval.inference.feature_cache import FeatureCache
from eval.inference.protocol import Responder
from eval.inference.response_log import ResponseLog
from eval.prompting.requests import Decoding, Request, Response
from eval.task import EncodedImage
from flamingo.errors import UserError

DIGITS = 4
"""Decimals of log-probabilities that are kept. What batches of other shapes change lies below; so ties stay ties."""

MANY = 8
"""Requests of a round that begin alike from which on they are batched together and their beginning is run once."""


@dataclass(frozen=True)
class _Asked:
    key: str
    request: Request
    place: int  # of the first request of this key


class Engine:
    """`model_key` stands for weights, code, precision and device in the keys of the log."""

    def __init__(
        self,
        responder: Responder,
        cache: FeatureCache,
        batch_size: int,
        *,
        log: ResponseLog | None = None,
        ranks: Ranks | None = None,
        model_key: str = "",
    ) -> None:
        self.responder = responder
        self.cache = cache
        self.asked = 0
        self.from_log = 0
        self._batch_size = batch_size
        self._log = log
        self._known: dict[str, Response] = {} if log is None else log.known
        self._logged = frozenset(self._known)
        self._ranks = ranks or Ranks()
        self._model_key = model_key

    @property
    def encoder_name(self) -> str:
        """What images are compared by, for the results."""
        key = str(getattr(self.responder, "image_key", ""))
        return f"{type(self.responder).__name__} {key[:16]}".strip()

    def embed(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """(N, E) vectors of length 1; each process encodes its share."""
        self.cache.prepare(images, self._ranks)
        return self.cache.embeddings(images).numpy()

    def ask(self, requests: Sequence[Request], on_batch: Callable[[int], None] = lambda done: None) -> list[Response]:
        """The response to each request, in their order. `on_batch` hears how many more requests are answered."""
        keys = [request.key(self._model_key) for request in requests]
        for request in requests:
            self.cache.see(request.prompt.images)
        unique: dict[str, _Asked] = {}
        for place, (key, request) in enumerate(zip(keys, requests, strict=True)):
            unique.setdefault(key, _Asked(key, request, place))
        known = {key: self._known[key] for key in unique if key in self._known}
        self.from_log += len(unique.keys() & self._logged)
        batches = [batch for batch in self._batches(list(unique.values())) if any(a.key not in known for a in batch)]
        waiting = len(keys) - sum(len(batch) for batch in batches)
        if waiting:
            on_batch(waiting)
        answers = known | self._ranks.merged(self._run(batches, on_batch))
        assert answers.keys() >= unique.keys(), f"{len(unique.keys() - answers.keys())} requests got no response"
        self._known.update(answers)
        return [answers[key] for key in keys]

    def _batches(self, asked: list[_Asked]) -> list[list[_Asked]]:
        """Requests of one kind, and of one beginning where many have it, together; sorted by length: little padding."""
        alike = Counter(one.request.prompt.beginning for one in asked)
        groups: dict[tuple[Decoding | None, object], list[_Asked]] = {}
        for one in sorted(asked, key=lambda one: (one.request.prompt.length, one.place)):
            beginning = one.request.prompt.beginning
            if beginning is not None and alike[beginning] < MANY:
                beginning, one = None, _with_nothing_shared(one)
            groups.setdefault((one.request.decoding and one.request.decoding.kind, beginning), []).append(one)
        size = self._batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _run(self, batches: list[list[_Asked]], on_batch: Callable[[int], None]) -> dict[str, Response]:
        self.cache.prepare([p for batch in batches for one in batch for p in one.request.prompt.images], self._ranks)
        found: dict[str, Response] = {}
        for number, batch in enumerate(batches):
            if number % self._ranks.world == self._ranks.rank:
                responses = [_rounded(response) for response in self._answer(batch)]
                answered = list(zip([one.key for one in batch], responses, strict=True))
                self.asked += len(answered)
                found |= answered
                if self._log is not None:
                    self._log.append(answered)
            on_batch(len(batch))
        return found

    def _answer(self, batch: list[_Asked]) -> Sequence[Response]:
        prompts = [one.request.prompt for one in batch]
        features = self.cache.features([image for prompt in prompts for image in prompt.images])
        decoding = batch[0].request.decoding
        if decoding is None:
            return self.responder.rank(prompts, features)
        if decoding.greedy:
            return self.responder.generate(prompts, features, decoding.max_new_tokens)
        # A sample's random numbers come from the request itself, so they depend on nothing else in the batch.
        streams = [one.request.key("") for one in batch]
        sample = getattr(self.responder, "sample", None)
        if sample is None:
            raise UserError(f"{type(self.responder).__name__} only decodes greedily; choose another strategy")
        return sample(prompts, features, decoding.kind, streams)


def _with_nothing_shared(one: _Asked) -> _Asked:
    """Its prompt is to be run as a whole."""
    prompt = replace(one.request.prompt, shared=(0, 0))
    return replace(one, request=replace(one.request, prompt=prompt))


def _rounded(response: Response) -> Response:
    if isinstance(response, list):
        return [round(value, DIGITS) for value in response]
    if response.log_prob is None:
        return response
    return type(response)(response.text, response.ended, round(response.log_prob, DIGITS))
