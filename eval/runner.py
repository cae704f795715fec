"""The only loop: task x strategy x ablation x shots x seed.

It knows no task by name and no model by class. The strategies of a cell's queries are stepped together, so that each
round of their requests is batched over the queries; samples come back in the task's order. Nothing of a sample depends
on which others share its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from eval.demonstrations.ablations import ABLATIONS, NEEDS_DEMOS
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.protocol import Responder
from eval.prompting.query import Outcome, Query, Settings, Steps
from eval.prompting.requests import Request, Response
from eval.prompting.strategies import NEEDS_RATIONALES, STRATEGIES
from eval.task import Episode, Task
from flamingo.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One setting of the loop."""

    task: str
    shots: int
    seed: int
    images: str
    strategy: str = "plain"


@dataclass(frozen=True)
class Sample:
    """One answered query, everything needed to judge it again.

    `turns` are the prompt that asked for the answer: each turn's first image (SHA-256, None for text only) and text,
    the query's last; `images_sha256` are all of the prompt.
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
    refused: tuple[tuple[str, int], ...] = ()  # by the guard's reason
    confidence: float | None = None  # in [0, 1], as the strategy says
    rationale: str = ""
    votes: tuple[tuple[str, float], ...] = ()
    images_sha256: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Of the demonstrations."""
        return self.cell.seed

    @property
    def prompt(self) -> str:
        """The prompt as one string, for reading; the model got ids that were never joined as text."""
        marked = [f"{'' if image is None else '<image>'}{text}" for image, text in self.turns]
        return "<|endofchunk|>".join(marked)


@dataclass(frozen=True)
class Grid:
    """The settings to run, in this order of nesting; `limit` takes the first queries of every task."""

    shots: Sequence[int]
    seeds: Sequence[int]
    images: Sequence[str]
    limit: int | None = None
    batch_size: int = 32
    strategies: Sequence[str] = ("plain",)
    settings: Settings = field(default_factory=Settings)

    def cells(self, tasks: Mapping[str, Task]) -> list[Cell]:
        """Every cell; an ablation of demonstrations, or a strategy over them, is left out where there are none."""
        every = itertools.product(tasks, self.strategies, self.images, self.shots, self.seeds)
        return [
            Cell(t, k, seed, p, s)
            for t, s, p, k, seed in every
            if k > 0 or (p not in NEEDS_DEMOS and s not in NEEDS_RATIONALES and s != "orders")
        ]

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
    engine: Engine | None = None,
    settings: Settings | None = None,
) -> list[Sample]:
    """The samples of one cell, in the order of `query_ids`. `on_batch` hears how many more requests are done."""
    engine = engine or Engine(responder, cache, batch_size)
    ablate, strategy = ABLATIONS[cell.images], STRATEGIES[cell.strategy]
    episodes = [ablate(task.episode(query_id, cell.shots, cell.seed), cell.seed) for query_id in query_ids]
    chosen = settings or Settings()
    runs = [strategy(Query(task, episode, responder.builder, chosen, cell.seed)) for episode in episodes]
    outcomes = step_together(runs, engine, on_batch)
    return [_sample(task, cell, episode, outcome) for episode, outcome in zip(episodes, outcomes, strict=True)]


def step_together(runs: Sequence[Steps], engine: Engine, on_batch: Callable[[int], None]) -> list[Outcome]:
    """Step all queries' strategies round by round, the requests of a round in one go."""
    outcomes: dict[int, Outcome] = {}
    waiting: dict[int, list[Request]] = {}

    def advance(number: int, said: list[Response] | None) -> None:
        try:
            waiting[number] = next(runs[number]) if said is None else runs[number].send(said)
        except StopIteration as done:
            outcomes[number] = done.value

    for number in range(len(runs)):
        advance(number, None)
    while waiting:
        asked, waiting = waiting, {}
        responses = iter(engine.ask([request for requests in asked.values() for request in requests], on_batch))
        for number, requests in asked.items():
            advance(number, list(itertools.islice(responses, len(requests))))
    return [outcomes[number] for number in range(len(runs))]


def _sample(task: Task, cell: Cell, episode: Episode, outcome: Outcome) -> Sample:
    """`episode` is the query as it was put; the outcome's own may hold a rationale or another order."""
    prompt, asked = outcome.prompt, outcome.episode
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
    )


def run(
    tasks: Mapping[str, Task],
    grid: Grid,
    responder: Responder,
    on_batch: Callable[[Cell, int], None] = lambda cell, done: None,
    engine: Engine | None = None,
) -> tuple[list[Sample], FeatureCache]:
    """All cells. The cache that comes back knows every image shown and how many were encoded."""
    engine = engine or Engine(responder, FeatureCache(responder), grid.batch_size)
    connect(tasks, grid, engine)
    check_context(tasks, grid, responder)
    samples: list[Sample] = []
    for cell in grid.cells(tasks):
        task = tasks[cell.task]

        def tell(done: int, cell: Cell = cell) -> None:
            on_batch(cell, done)

        ids = grid.query_ids(task)
        samples += run_cell(task, cell, responder, engine.cache, ids, grid.batch_size, tell, engine, grid.settings)
    return samples, engine.cache


def connect(tasks: Mapping[str, Task], grid: Grid, engine: Engine) -> None:
    """Give tasks that choose demonstrations by likeness of images the means to compare them."""
    for task in tasks.values():
        offer: Callable[[Engine, Sequence[str]], None] | None = getattr(task, "connect", None)
        if offer is not None:
            offer(engine, grid.query_ids(task))
