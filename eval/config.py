"""The settings of a run, typed: `hydra/eval.yaml` is an `EvalConfig`, a file under `hydra/task/` a `TaskSpec`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eval.ablations import ABLATIONS
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
    pictures: list[str] = field(default_factory=lambda: ["real"])
    """real, and as controls shuffled, blank, text_only."""
    limit: int | None = None
    """Queries of each task at most, the first ones; null asks all."""
    batch_size: int = 32
    """Prompts in a batch. Results do not depend on it."""
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
        unknown = [name for name in self.pictures if name not in ABLATIONS]
        if unknown or not self.pictures:
            raise UserError(f"pictures={self.pictures}; each is one of {', '.join(ABLATIONS)}")
        for key, value in {"limit": self.limit, "batch_size": self.batch_size}.items():
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

    def device_name(self) -> str:
        """`device` with auto resolved."""
        if self.device != "auto":
            return self.device
        return "cuda" if _gpu_available() else "cpu"


def _gpu_available() -> bool:
    import torch  # only here, so that a mistake in the config is told at once

    return torch.cuda.is_available()
