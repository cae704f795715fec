"""The settings of a run, typed: `hydra/eval.yaml` is an `EvalConfig`, a file under `hydra/task/` a `TaskSpec`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from eval.demonstrations.ablations import ABLATIONS
from eval.demonstrations.samplers import parse_sampler
from eval.prompting.strategies import STRATEGIES, PromptingSettings
from eval.spec import VECTOR_KINDS, TaskSpec
from flamingo.configs.validate import AboveZero, AsList, AtLeast0, AtLeast1, one_of
from flamingo.errors import UserError


def _device(name: str) -> str:
    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise ValueError("is not one of auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not _gpu_available():
        raise ValueError("needs a GPU, and torch sees none here: use device=cpu")
    return name


NotEmpty = Field(min_length=1)
Ablation = Annotated[str, one_of(ABLATIONS)]
Strategy = Annotated[str, one_of(STRATEGIES)]


@dataclass(kw_only=True)
class EvalConfig:
    """`hydra/eval.yaml`. What has no default here must be given."""

    model: str
    """Folder of a saved model and its processor, or a name that is cached; for zero_shot and retrieval an encoder."""
    out: str
    """Folder for the results; files of an earlier run in it are replaced."""
    data: str
    """Root of the prepared data, which tasks refer to."""
    task: Annotated[dict[str, TaskSpec], NotEmpty] = field(default_factory=dict)
    """The chosen tasks by name, from `hydra/task/`."""
    protocol: str = "modern"
    """Prompts of tasks with a `form`: modern, flamingo, openflamingo or idefics; see hydra/protocol."""
    bug_compatible: bool = False
    """Whether to repeat the protocol's published mistakes, to reproduce old figures."""
    shots: Annotated[list[AtLeast0], AsList, NotEmpty] = field(default_factory=lambda: [0, 1, 2, 4, 8])
    """Numbers of demonstrations (for binding: of examples per class)."""
    seed: Annotated[list[AtLeast0], AsList, NotEmpty] = field(default_factory=lambda: [0])
    """Seed of the demonstrations, or a list: the queries are then asked once per seed and scored together."""
    images: Annotated[list[Ablation], AsList, NotEmpty] = field(default_factory=lambda: ["real"])
    """real, and as controls shuffled, blank, text_only, unordered."""
    strategy: Annotated[list[Strategy], AsList, NotEmpty] = field(default_factory=lambda: ["plain"])
    """plain, cot0, cot, two_stage, sc, sc_cot0, sc_cot, orders, calibrated; see eval/prompting/strategies.py."""
    samples: AtLeast1 = 11
    """Self-consistency: answers sampled for each query."""
    temperature: AboveZero = 0.7
    """Self-consistency: temperature of the sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Self-consistency: sample only among the most probable tokens that together hold this share."""
    rationale_tokens: AtLeast1 = 128
    """Chains of thought: longest rationale, in tokens."""
    rationales: str | None = None
    """two_stage: samples.jsonl of a run, perhaps of another model, whose rationales are used, joined by query id."""
    orders: AtLeast1 = 4
    """Order ensembling: different orders of the demonstrations."""
    demos: str | None = None
    """Sampler of demonstrations for all tasks, instead of each task's own; see eval/demonstrations/samplers.py."""
    index: str | None = None
    """Folder of an index (`python -m eval index`) whose vectors and encoder compare the images of rices and mmr."""
    limit: AtLeast1 | None = None
    """At most this many queries of each task, the first ones; null asks all."""
    batch_size: AtLeast1 = 32
    """Prompts in a batch. Results do not depend on it."""
    cache: str | None = "runs/cache"
    """Folder of encoded images, shared by all runs; null keeps them in memory for this run alone."""
    cache_gb: AboveZero = 20.0
    """Limit of that folder in GB; the least recently used images are removed."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """float32, bfloat16 or float16."""
    gallery: AtLeast0 = 8
    """Samples shown for each task and number of shots."""
    progress: bool = True
    """Show progress bars."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        if not self.out.strip():
            yield "out is empty: name a folder for the results"
        if len(set(self.shots)) < len(self.shots):
            yield f"shots={self.shots} has duplicates: give different values, for example shots=[0,4]"
        kinds = {spec.kind for spec in self.task.values()}
        if len(kinds & VECTOR_KINDS) and kinds - VECTOR_KINDS:
            yield "task has both tasks of prompts and tasks of vectors (zero_shot, retrieval): run them apart"
        by_image = False
        samplers = {"": self.demos or "random"} | {f"task.{name}.": spec.demos for name, spec in self.task.items()}
        for path, sampler in samplers.items():
            try:
                chosen = parse_sampler(sampler)
                by_image = by_image or (chosen.retrieves and chosen.weight(images=True) > 0)
            except UserError as error:
                yield f"{path}{error}"
        if self.index is not None and not by_image:
            yield f"index={self.index} has no effect: no task chooses its demonstrations by image, as demos=rices_image"

    @property
    def settings(self) -> PromptingSettings:
        """What strategies need."""
        return PromptingSettings(
            self.samples, self.temperature, self.top_p, self.rationale_tokens, self.orders, self.rationales or ""
        )

    @property
    def compares_vectors(self) -> bool:
        """Whether the tasks are for an encoder of images and texts, not for a Flamingo."""
        return any(spec.kind in VECTOR_KINDS for spec in self.task.values())

    def device_name(self) -> str:
        """Return `device` with auto resolved."""
        device = self.device
        if device == "auto":
            device = "cuda" if _gpu_available() else "cpu"
        # Under torchrun each process has a GPU of its own.
        return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _gpu_available() -> bool:
    import torch  # only here, so that mistakes in the config are reported without waiting for it

    return torch.cuda.is_available()
