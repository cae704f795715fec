"""Requests to responses: known ones from the log, the rest in batches of similar length, shared between processes.

Batches are planned over all requests of a round, including those already answered, and a batch with anything missing
is run whole. So a resumed run, or one with a different number of processes, runs exactly the batches of an undisturbed
one and gets the same bits. Equal requests are asked once in a run, whichever cells they come from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from eval.inference.feature_cache import FeatureCache
from eval.inference.protocol import Responder
from eval.inference.response_log import ResponseLog
from eval.prompting.prompts import Decoding, Request, Response
from eval.task import EncodedImage
from flamingo.errors import UserError

DIGITS = 4
"""Decimals of log-probabilities that are kept. Batches of other shapes change only what is below, so ties stay ties."""

SHARED_FROM = 8
"""Requests of a round with the same start from which they are batched together and that start is run once."""

TIMEOUT = timedelta(hours=6)
"""How long a rank waits for the slowest one: ranks exchange a round of requests at its end."""

T = TypeVar("T")


class Ranks:
    """This process among `world`, started by torchrun; with one process nothing here communicates.

    Every process plans the same work in the same order and does every `world`-th item, so nothing is padded, drawn
    twice or lost. Objects travel over gloo, whatever device the model is on.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read torchrun's variables; the process group is created on entering."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=TIMEOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def mine(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def owns(self, sha256: str) -> bool:
        """Return whether this rank does the item with this hash, by the hash alone."""
        return int(sha256[:12], 16) % self.world == self.rank

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def gathered(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def merged(self, own: Mapping[str, T]) -> dict[str, T]:
        """Return all ranks' entries. Raises AssertionError if two ranks did the same item."""
        merged: dict[str, T] = {}
        for share in self.gathered(dict(own)):
            twice = merged.keys() & share.keys()
            assert not twice, f"two ranks did the same {len(twice)} items, the first is {min(twice)}"
            merged |= share
        return merged

    def agree(self, what: str, value: str) -> None:
        """Raise UserError unless every rank has the same value (it differs if, say, the machines' files differ)."""
        values = self.gathered(value)
        if len(set(values)) > 1:
            raise UserError(
                f"{what} differs between the {self.world} processes; all must read the same files with equal settings"
            )


@dataclass(frozen=True)
class _KeyedRequest:
    key: str
    request: Request
    position: int  # of the first request with this key


class Engine:
    """A responder with its feature cache and its log of responses.

    `model_key` represents weights, code, precision and device in the keys of the log.
    """

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
    def name(self) -> str:
        """What compares images in this run, for the results; a property because hashing the weights takes a while."""
        return f"{type(self.responder).__name__} {self.responder.image_key[:16]}".strip()

    def __call__(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """Return (N, E) embeddings of length 1; each process encodes its share."""
        self._encode_share(images)
        return self.cache.embeddings(images).numpy()

    def _encode_share(self, images: Sequence[EncodedImage]) -> None:
        """Encode this process's share of what is missing, if there is a folder to exchange features through."""
        if self.cache.stores and self._ranks.world > 1:
            distinct = {image.sha256: image for image in images}
            self.cache.load([image for sha256, image in sorted(distinct.items()) if self._ranks.owns(sha256)])
            self._ranks.barrier()

    def ask(self, requests: Sequence[Request], on_batch: Callable[[int], None] = lambda done: None) -> list[Response]:
        """Return the response to each request, in their order.

        `on_batch` is called with the number of requests that were answered since the last call.
        """
        keys = [request.key(self._model_key) for request in requests]
        for request in requests:
            self.cache.see(request.prompt.images)
        unique: dict[str, _KeyedRequest] = {}
        for position, (key, request) in enumerate(zip(keys, requests, strict=True)):
            unique.setdefault(key, _KeyedRequest(key, request, position))
        known = {key: self._known[key] for key in unique if key in self._known}
        self.from_log += len(unique.keys() & self._logged)
        # Batches are planned before the known requests are left out: otherwise a resumed run would have other batches.
        planned = self._batches(list(unique.values()))
        batches = [batch for batch in planned if any(keyed.key not in known for keyed in batch)]
        waiting = len(keys) - sum(len(batch) for batch in batches)
        if waiting:
            on_batch(waiting)
        answers = known | self._ranks.merged(self._run(batches, on_batch))
        assert answers.keys() >= unique.keys(), f"{len(unique.keys() - answers.keys())} requests got no response"
        self._known.update(answers)
        return [answers[key] for key in keys]

    def _batches(self, requests: list[_KeyedRequest]) -> list[list[_KeyedRequest]]:
        """Group requests of one kind, and with one start where many have it; sorted by length for little padding."""
        counts = Counter(keyed.request.prompt.beginning for keyed in requests)
        groups: dict[tuple[Decoding | None, object], list[_KeyedRequest]] = {}
        for keyed in sorted(requests, key=lambda keyed: (keyed.request.prompt.length, keyed.position)):
            beginning = keyed.request.prompt.beginning
            if beginning is not None and counts[beginning] < SHARED_FROM:
                beginning, keyed = None, _with_nothing_shared(keyed)
            groups.setdefault((keyed.request.decoding and keyed.request.decoding.kind, beginning), []).append(keyed)
        size = self._batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _run(self, batches: list[list[_KeyedRequest]], on_batch: Callable[[int], None]) -> dict[str, Response]:
        self._encode_share([image for batch in batches for keyed in batch for image in keyed.request.prompt.images])
        answers: dict[str, Response] = {}
        mine = set(self._ranks.mine(range(len(batches))))
        for index, batch in enumerate(batches):
            if index in mine:
                responses = [_rounded(response) for response in self._answer(batch)]
                answered = list(zip([keyed.key for keyed in batch], responses, strict=True))
                self.asked += len(answered)
                answers |= answered
                if self._log is not None:
                    self._log.append(answered)
            on_batch(len(batch))
        return answers

    def _answer(self, batch: list[_KeyedRequest]) -> Sequence[Response]:
        prompts = [keyed.request.prompt for keyed in batch]
        features = self.cache.features([image for prompt in prompts for image in prompt.images])
        decoding = batch[0].request.decoding
        if decoding is None:
            return self.responder.rank(prompts, features)
        if decoding.greedy:
            return self.responder.generate(prompts, features, decoding.max_new_tokens)
        # A sample's random numbers come from the request itself, so they depend on nothing else in the batch.
        streams = [keyed.request.key("") for keyed in batch]
        return self.responder.sample(prompts, features, decoding.kind, streams)


def _with_nothing_shared(keyed: _KeyedRequest) -> _KeyedRequest:
    """Return the request with a prompt that is run as a whole."""
    prompt = replace(keyed.request.prompt, shared=(0, 0))
    return replace(keyed, request=replace(keyed.request, prompt=prompt))


def _rounded(response: Response) -> Response:
    if isinstance(response, list):
        return [round(value, DIGITS) for value in response]
    if response.log_prob is None:
        return response
    return replace(response, log_prob=round(response.log_prob, DIGITS))
