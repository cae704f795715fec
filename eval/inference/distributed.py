"""Several processes sharing one evaluation: who does what, and the exact merge.

Every process plans the same work in the same order and does every `world`-th piece of it, so nothing is padded, drawn
twice or lost, and one process does exactly the batches that eight do. Started by torchrun (`RANK`, `WORLD_SIZE`,
`MASTER_ADDR` in the environment); otherwise there is one rank and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from flamingo.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)
"""A rank may wait this long for the slowest one: a round of requests is exchanged at its end."""


class Ranks:
    """This process among `world`. Objects travel over gloo, whatever device the model is on."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says; the group of processes is formed on entering."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this one writes the results."""
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

    def mine(self, pieces: Sequence[T]) -> list[T]:
        """This rank's share: every `world`-th piece."""
        return list(pieces[self.rank :: self.world])

    def owns(self, sha256: str) -> bool:
        """Whether this rank does the piece of this hash, by the hash alone."""
        return int(sha256[:12], 16) % self.world == self.rank

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def merged(self, own: Mapping[str, T]) -> dict[str, T]:
        """All ranks' entries. Raises AssertionError if two ranks did the same piece."""
        found: dict[str, T] = {}
        for share in self.gathered(dict(own)):
            twice = found.keys() & share.keys()
            assert not twice, f"{len(twice)} pieces were done by two ranks, first {min(twice)}"
            found |= share
        return found

    def agree(self, what: str, value: str) -> None:
        """Raise UserError unless every rank has the same value: files that differ between machines, say."""
        values = self.gathered(value)
        if len(set(values)) > 1:
            raise UserError(
                f"{what} differs between the {self.world} processes; all must read the same files, with equal settings"
            )
