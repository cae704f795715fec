"""The only loop: task x strategy x ablation x shots x seed.

It knows no task by name and no model by class. The strategies of a cell's queries are stepped together, so that each
round of their requests is batched over the queries; samples come back in the task's order. Nothing in a sample depends
on which others share its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from eval.demonstrations import ablations
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.protocol import Responder
from eval.prompting.prompts import Request, Response
from eval.prompting.strategies import (
    NEEDS_DEMOS,
    REASONS,
    STRATEGIES,
    PromptingOutcome,
    PromptingSettings,
    Query,
    Steps,
)
from eval.samples import Cell, Sample
from eval.task import Embedder, Episode, Task
from flamingo.errors import UserError


@dataclass(frozen=True)
class Grid:
    """The settings to run, in this order of nesting; `limit` takes the first queries of every task."""

    shots: Sequence[int]
    seeds: Sequence[int]
    images: Sequence[str]
    limit: int | None = None
    batch_size: int = 32
    strategies: Sequence[str] = ("plain",)
    settings: PromptingSettings = field(default_factory=PromptingSettings)

    def cells(self, tasks: Mapping[str, Task]) -> list[Cell]:
        """Return every cell but those that `left_out` tells of.

        Raises:
            UserError: none is left.
        """
        every = itertools.product(tasks, self.strategies, self.images, self.shots, self.seeds)
        cells = [
            Cell(task, shots, seed, images, strategy)
            for task, strategy, images, shots, seed in every
            if shots > 0 or not (images in ablations.NEEDS_DEMOS or strategy in NEEDS_DEMOS)
        ]
        if not cells:
            raise UserError(f"nothing is left to ask: {'; '.join(self.left_out())}")
        return cells

    def left_out(self) -> list[str]:
        """Return a sentence for each ablation and strategy that is about demonstrations, if there are 0 shots."""
        settings = {"strategy": (self.strategies, NEEDS_DEMOS), "images": (self.images, ablations.NEEDS_DEMOS)}
        return [
            f"{key}={name} is left out at 0 shots, where it has no demonstrations to work on"
            for key, (names, needing) in settings.items()
            for name in names
            if name in needing and 0 in self.shots
        ]

    def query_ids(self, task: Task) -> Sequence[str]:
        """Return the queries that are asked."""
        return task.query_ids()[: self.limit]

    def description(self) -> dict[str, Any]:
        """Return the settings as plain data, for the results."""
        return {
            "strategies": {"names": list(self.strategies), **asdict(self.settings)},
            "shots": list(self.shots),
            "seeds": list(self.seeds),
            "limit": self.limit,
            "batch_size": self.batch_size,
            **({"left_out": left_out} if (left_out := self.left_out()) else {}),
        }


def check_context(tasks: Mapping[str, Task], grid: Grid, responder: Responder) -> None:
    """Raise UserError if no prompt of a task can hold the largest number of shots: its score would be mislabelled.

    Single prompts that lose demonstrations are counted in the results instead.
    """
    shots = max(grid.shots)
    for name, task in tasks.items():
        kept = wanted = 0
        for query_id in grid.query_ids(task):
            episode = task.episode(query_id, shots, grid.seeds[0])
            shown = responder.builder.build(episode, task.max_new_tokens).shots_kept
            kept, wanted = max(kept, shown), max(wanted, len(episode.demos))
            if shown == len(episode.demos):
                break
        else:
            raise UserError(
                f"shots={shots} does not fit the model's context for task {name}: at most {kept} of {wanted} "
                "demonstrations fit; use fewer shots"
            )


def run_cell(
    task: Task,
    cell: Cell,
    engine: Engine,
    query_ids: Sequence[str],
    settings: PromptingSettings | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Return the samples of one cell, in the order of `query_ids`; `on_batch` is called as in `Engine.ask`."""
    ablate, strategy = ablations.ABLATIONS[cell.images], STRATEGIES[cell.strategy]
    episodes = [ablate(task.episode(query_id, cell.shots, cell.seed), cell.seed) for query_id in query_ids]
    settings, builder = settings or PromptingSettings(), engine.responder.builder

    def steps(query_id: str, episode: Episode) -> Steps:
        """Step what was asked before in the same conversation first; the engine asks equal requests only once."""
        answers: list[str] = []
        for name in task.earlier(query_id):
            before = task.continued(ablate(task.episode(name, cell.shots, cell.seed), cell.seed), answers)
            answers.append((yield from strategy(Query(task, before, builder, settings, cell.seed))).answer)
        last = task.continued(episode, answers)
        return (yield from strategy(Query(task, last, builder, settings, cell.seed)))

    runs = list(map(steps, query_ids, episodes))
    outcomes = step_together(runs, engine, on_batch)
    return [_sample(task, cell, episode, outcome) for episode, outcome in zip(episodes, outcomes, strict=True)]


def step_together(runs: Sequence[Steps], engine: Engine, on_batch: Callable[[int], None]) -> list[PromptingOutcome]:
    """Step all queries' strategies round by round, asking the requests of a round together."""
    outcomes: dict[int, PromptingOutcome] = {}
    waiting: dict[int, list[Request]] = {}

    def advance(index: int, responses: list[Response] | None) -> None:
        try:
            waiting[index] = next(runs[index]) if responses is None else runs[index].send(responses)
        except StopIteration as finished:  # the generator's return value
            outcomes[index] = finished.value

    for index in range(len(runs)):
        advance(index, None)
    while waiting:
        asked, waiting = waiting, {}
        responses = iter(engine.ask([request for requests in asked.values() for request in requests], on_batch))
        for index, requests in asked.items():
            advance(index, list(itertools.islice(responses, len(requests))))
    return [outcomes[index] for index in range(len(runs))]


def _sample(task: Task, cell: Cell, episode: Episode, outcome: PromptingOutcome) -> Sample:
    """Make the sample of `episode`; the outcome's own episode may hold a rationale or another order."""
    prompt, asked = outcome.prompt, outcome.episode
    # Prompts that are too long lose the farthest demonstrations, which come first.
    dropped = len(asked.demos) - prompt.shots_kept
    shown = [turn.answer for turn in asked.demos[dropped:]]
    return Sample(
        cell=cell,
        query_id=episode.query_id,
        demo_ids=asked.demo_ids[dropped:],
        turns=tuple((None if image is None else image.sha256, text) for image, text in prompt.turns),
        raw=outcome.raw,
        answer=outcome.answer,
        golds=episode.golds,
        score=task.score(outcome.answer, episode),
        kind=episode.kind,
        cluster=episode.cluster,
        candidates=episode.candidates,
        log_probs=outcome.log_probs,
        ended=outcome.ended,
        parse_failed=not outcome.answer,
        copied=outcome.answer in shown,
        copied_last=bool(shown) and outcome.answer == shown[-1],
        shots_kept=prompt.shots_kept,
        demos_dropped=dropped,
        excluded=episode.excluded,
        refused=episode.refused,
        confidence=None if outcome.confidence is None else round(outcome.confidence, 6),
        rationale=outcome.rationale,
        votes=outcome.votes,
        images_sha256=tuple(image.sha256 for image in prompt.images),
        gold_rationale=episode.query.rationale if cell.strategy in REASONS else "",
    )


def run(
    tasks: Mapping[str, Task],
    grid: Grid,
    responder: Responder,
    on_batch: Callable[[Cell, int], None] = lambda cell, done: None,
    engine: Engine | None = None,
    embed: Embedder | None = None,
) -> tuple[list[Sample], FeatureCache]:
    """Run all cells; `embed` compares images in the model's place.

    The returned cache knows every image shown and how many were encoded.
    """
    engine = engine or Engine(responder, FeatureCache(responder), grid.batch_size)
    for task in tasks.values():
        task.connect(embed or engine, grid.query_ids(task))
    check_context(tasks, grid, responder)
    samples: list[Sample] = []
    for cell in grid.cells(tasks):
        task = tasks[cell.task]
        samples += run_cell(task, cell, engine, grid.query_ids(task), grid.settings, partial(on_batch, cell))
    return samples, engine.cache
