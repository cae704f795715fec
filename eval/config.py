"""The settings of a run, typed: `hydra/eval.yaml` is an `EvalConfig`, a file under `hydra/task/` a `TaskSpec`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from eval.demonstrations.ablations import ABLATIONS
from eval.prompting.strategies import STRATEGIES, PromptingSettings
from eval.task import TaskSpec
from flamingo.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class EvalConfig:
    """`hydra/eval.yaml`. What has no default here must be given."""

    model: str
    """Folder of a saved model and its processor, or a name that is cached."""
    out: str
    """Folder for the results; files of an earlier run in it are replaced."""
    data: str
    """Root of the prepared data, which tasks refer to."""
    task: dict[str, TaskSpec] = field(default_factory=dict)
    """The chosen tasks by name, from `hydra/task/`."""
    protocol: str = "modern"
    """How tasks with a `form` are put: modern, flamingo, openflamingo or idefics; see hydra/protocol."""
    bug_compatible: bool = False
    """Whether the protocol's published mistakes are made again, to meet old figures."""
    shots: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8])
    """Numbers of demonstrations (of examples a class, for binding)."""
    seed: Any = 0
    """Seed of the demonstrations, or a list: the queries are then asked once a seed and scored together."""
    images: list[str] = field(default_factory=lambda: ["real"])
    """real, and as controls shuffled, blank, text_only."""
    strategy: list[str] = field(default_factory=lambda: ["plain"])
    """plain, cot0, cot, two_stage, sc, sc_cot0, sc_cot, orders, calibrated; see eval/prompting/strategies.py."""
    samples: int = 11
    """Self-consistency: answers sampled for each query."""
    temperature: float = 0.7
    """Self-consistency: of the sampling."""
    top_p: float = 1.0
    """Self-consistency: only the most probable tokens that together hold this share are sampled."""
    rationale_tokens: int = 128
    """Chains of thought: longest rationale, in tokens."""
    rationales: str | None = None
    """two_stage: samples.jsonl of a run, by another model perhaps, whose rationales are taken, joined by query id."""
    orders: int = 4
    """Order ensembling: different orders of the demonstrations."""
    demos: str | None = None
    """Which demonstrations all tasks show, instead of what each says; see eval/demonstrations/samplers.py."""
    limit: int | None = None
    """Queries of each task at most, the first ones; null asks all."""
    batch_size: int = 32
    """Prompts in a batch. Results do not depend on it."""
    cache: str | None = "runs/cache"
    """Folder of encoded images, shared by all runs; null keeps them for the run alone."""
    cache_gb: float = 20.0
    """The most that folder may hold, in GB; what was not used for longest goes."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    gallery: int = 8
    """Samples shown for each task and number of shots."""
    progress: bool = True
    """Show progress bars."""

    @property
    def seeds(self) -> list[int]:
        """`seed` as a list."""
        return list(self.seed) if isinstance(self.seed, list) else [self.seed]

    def check(self) -> None:
        """Raise UserError for values that no run can have, naming the key."""
        if not self.task:
            raise UserError("task is empty; give at least one, for example task=[toy_caption]")
        if not self.shots or any(k < 0 for k in self.shots) or len(set(self.shots)) < len(self.shots):
            raise UserError(f"shots={self.shots}; give different numbers of 0 or more, for example shots=[0,4]")
        if not self.seeds or not all(type(seed) is int and seed >= 0 for seed in self.seeds):
            raise UserError(f"seed={self.seed}; give a whole number of 0 or more, or a list of such")
        unknown = [name for name in self.images if name not in ABLATIONS]
        if unknown or not self.images:
            raise UserError(f"images={self.images}; each is one of {', '.join(ABLATIONS)}")
        unknown = [name for name in self.strategy if name not in STRATEGIES]
        if unknown or not self.strategy:
            raise UserError(f"strategy={self.strategy}; each is one of {', '.join(STRATEGIES)}")
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or not self.cache_gb > 0:
            raise UserError("temperature and cache_gb must be above 0, and top_p above 0 and at most 1")
        counts = {"samples": self.samples, "rationale_tokens": self.rationale_tokens, "orders": self.orders}
        for key, value in {**counts, "limit": self.limit, "batch_size": self.batch_size}.items():
            if value is not None and value < 1:
                raise UserError(f"{key}={value}; it must be at least 1")
        if self.gallery < 0:
            raise UserError(f"gallery={self.gallery}; it must be 0 or more")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}; use one of {', '.join(DTYPES)}")
        if self.device.startswith("cuda") and not _gpu_available():
            raise UserError(f"device={self.device}, and torch sees no GPU here; use device=cpu")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise UserError(f"device={self.device}; use auto, cpu, cuda or cuda:N")

    @property
    def settings(self) -> PromptingSettings:
        """What strategies need."""
        return PromptingSettings(
            self.samples, self.temperature, self.top_p, self.rationale_tokens, self.orders, self.rationales or ""
        )

    def device_name(self) -> str:
        """`device` with auto resolved."""
        device = self.device
        if device == "auto":
            device = "cuda" if _gpu_available() else "cpu"
        # Under torchrun each process has a GPU of its own.
        return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _gpu_available() -> bool:
    import torch  # only here, so that a mistake in the config is told at once

    return torch.cuda.is_available()
