"""The only loop: task x shots x seed x ablation.

It knows no task by name and no model by class. Prompts of a cell are sorted by length into batches, so little is
padded; samples come back in the task's order. Nothing of a sample depends on which others share its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eval.ablations import ABLATIONS, NEEDS_DEMOS
from eval.metrics.text import parse_answer
from eval.model import FeatureCache, Responder
from eval.prompts import Prompt
from eval.task import Episode, Task
from flamingo.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One setting of the loop."""

    task: str
    shots: int
    seed: int
    pictures: str


@dataclass(frozen=True)
class Sample:
    """One answered query, everything needed to judge it again.

    `turns` are the prompt: each turn's picture (SHA-256, None for text only) and text, the query's last.
    """

    cell: Cell
    query_id: str
    demo_ids: tuple[str, ...]
    turns: tuple[tuple[str | None, str], ...]
    raw: str
    answer: str
    golds: tuple[str, ...]
    score: float
    kind: str
    cluster: str
    candidates: tuple[str, ...]
    log_probs: tuple[float, ...]
    ended: bool  # the model ended its answer itself; always so when ranked
    parse_failed: bool
    copied: bool  # the answer is one of the demonstrations'
    copied_last: bool  # ... the one next to the query
    shots_kept: int  # demonstrations that fitted the context
    demos_dropped: int
    excluded: int

    @property
    def prompt(self) -> str:
        """The prompt as one string, for reading; the model got ids that were never joined as text."""
        marked = [f"{'' if picture is None else '<image>'}{text}" for picture, text in self.turns]
        return "<|endofchunk|>".join(marked)


@dataclass(frozen=True)
class Grid:
    """The settings to run, in this order of nesting; `limit` takes the first queries of every task."""

    shots: Sequence[int]
    seeds: Sequence[int]
    pictures: Sequence[str]
    limit: int | None = None
    batch_size: int = 32

    def cells(self, tasks: Mapping[str, Task]) -> list[Cell]:
        """Every cell; an ablation of demonstrations is left out where there are none."""
        every = itertools.product(tasks, self.pictures, self.shots, self.seeds)
        return [Cell(t, k, seed, p) for t, p, k, seed in every if k > 0 or p not in NEEDS_DEMOS]

    def query_ids(self, task: Task) -> Sequence[str]:
        """The queries that are asked."""
        return task.query_ids()[: self.limit]


def check_context(tasks: Mapping[str, Task], grid: Grid, responder: Responder) -> None:
    """Raise UserError if no prompt of a task can hold the most shots: its score would carry a wrong label.

    A prompt here and there that loses demonstrations is another matter; those are counted in the results.
    """
    shots = max(grid.shots)
    for name, task in tasks.items():
        kept = wanted = 0
        for query_id in grid.query_ids(task):
            episode = task.episode(query_id, shots, grid.seeds[0])
            prompt = responder.builder.build(episode, task.max_new_tokens)
            kept, wanted = max(kept, prompt.shots_kept), len(episode.demos)
            if kept == wanted:
                break
        if kept < wanted:
            raise UserError(
                f"shots={shots} does not fit the model's context for task {name}: at most {kept} of {wanted} "
                "demonstrations do; use fewer shots"
            )


def run_cell(
    task: Task,
    cell: Cell,
    responder: Responder,
    cache: FeatureCache,
    query_ids: Sequence[str],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """The samples of one cell, in the order of `query_ids`. `on_batch` hears how many more are done."""
    ablate = ABLATIONS[cell.pictures]
    episodes = [ablate(task.episode(query_id, cell.shots, cell.seed), cell.seed) for query_id in query_ids]
    prompts = [responder.builder.build(episode, task.max_new_tokens) for episode in episodes]
    ranked = [bool(prompt.candidates) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (ranked[i], prompts[i].length, i))
    samples: dict[int, Sample] = {}
    for is_ranked, group in itertools.groupby(order, key=lambda i: ranked[i]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            batch = [prompts[i] for i in rows]
            features = cache.features([picture for prompt in batch for picture in prompt.pictures])
            if is_ranked:
                for i, scores in zip(rows, responder.rank(batch, features), strict=True):
                    best = max(range(len(scores)), key=scores.__getitem__)
                    raw = episodes[i].candidates[best]
                    samples[i] = _sample(task, cell, episodes[i], prompts[i], raw, raw, True, tuple(scores))
            else:
                completions = responder.generate(batch, features, task.max_new_tokens)
                for i, completion in zip(rows, completions, strict=True):
                    answer = _answer(task, completion.text, episodes[i])
                    samples[i] = _sample(task, cell, episodes[i], prompts[i], completion.text, answer, completion.ended)
            on_batch(len(rows))
    return [samples[i] for i in range(len(prompts))]


def _answer(task: Task, raw: str, episode: Episode) -> str:
    """The completion without the fixed start (in part already in the prompt) and end of the answer's text."""
    parse: Callable[[str, Episode], str] | None = getattr(task, "parse", None)
    if parse is not None:
        return parse(raw, episode)
    turn = episode.query
    return parse_answer(parse_answer(raw).removesuffix(turn.tail) if turn.tail else raw)


def _sample(
    task: Task,
    cell: Cell,
    episode: Episode,
    prompt: Prompt,
    raw: str,
    answer: str,
    ended: bool,
    log_probs: tuple[float, ...] = (),
) -> Sample:
    demos = episode.demos[len(episode.demos) - prompt.shots_kept :]
    shown = [turn.answer for turn in demos]
    return Sample(
        cell=cell,
        query_id=episode.query_id,
        demo_ids=episode.demo_ids[len(episode.demo_ids) - prompt.shots_kept :],
        turns=tuple((None if picture is None else picture.sha256, text) for picture, text in prompt.turns),
        raw=raw,
        answer=answer,
        golds=episode.golds,
        score=task.score(answer, episode),
        kind=episode.kind,
        cluster=episode.cluster,
        candidates=episode.candidates,
        log_probs=log_probs,
        ended=ended,
        parse_failed=not answer,
        copied=answer in shown,
        copied_last=bool(shown) and answer == shown[-1],
        shots_kept=prompt.shots_kept,
        demos_dropped=len(episode.demos) - len(demos),
        excluded=episode.excluded,
    )


def run(
    tasks: Mapping[str, Task],
    grid: Grid,
    responder: Responder,
    on_batch: Callable[[Cell, int], None] = lambda cell, done: None,
) -> tuple[list[Sample], FeatureCache]:
    """All cells. The cache that comes back knows every picture shown and how many were encoded."""
    check_context(tasks, grid, responder)
    cache = FeatureCache(responder)
    samples: list[Sample] = []
    for cell in grid.cells(tasks):
        task = tasks[cell.task]

        def tell(done: int, cell: Cell = cell) -> None:
            on_batch(cell, done)

        samples += run_cell(task, cell, responder, cache, grid.query_ids(task), grid.batch_size, tell)
    return samples, cache
