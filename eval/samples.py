"""The outcome of the loop: a `Sample` for each query of each `Cell`, as `samples.jsonl` stores it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One setting of the loop; `images` names the ablation."""

    task: str
    shots: int
    seed: int
    images: str
    strategy: str = "plain"


@dataclass(frozen=True)
class Sample:
    """One answered query, with everything needed to score it again.

    `turns` are the prompt that asked for the answer: each turn's first image (SHA-256, None for text only) and text,
    the query's last; `images_sha256` are all images of the prompt.
    """

    cell: Cell
    query_id: str
    demo_ids: tuple[str, ...]
    turns: tuple[tuple[str | None, str], ...]
    raw: str
    answer: str
    golds: tuple[str, ...]
    score: float
    kind: str = ""
    cluster: str = ""
    candidates: tuple[str, ...] = ()
    log_probs: tuple[float, ...] = ()
    ended: bool = True  # whether the model ended its answer itself; always true when ranked
    parse_failed: bool = False
    copied: bool = False  # the answer is one of the demonstrations'
    copied_last: bool = False  # ... the one nearest to the query
    shots_kept: int = 0  # demonstrations that fitted the context
    demos_dropped: int = 0
    excluded: int = 0
    refused: tuple[tuple[str, int], ...] = ()  # counted by the guard's reason
    confidence: float | None = None  # in [0, 1], as the strategy defines it
    rationale: str = ""
    votes: tuple[tuple[str, float], ...] = ()
    images_sha256: tuple[str, ...] = ()
    gold_rationale: str = ""  # of the data, where the strategy asks for one

    @property
    def seed(self) -> int:
        """Seed of the demonstrations."""
        return self.cell.seed

    @property
    def prompt(self) -> str:
        """The prompt as one string for readers; the model was given ids that were never joined as text."""
        marked = [f"{'' if image is None else '<image>'}{text}" for image, text in self.turns]
        return "<|endofchunk|>".join(marked)
