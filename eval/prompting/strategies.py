"""Prompting strategies: how a query is put to the model, directly, with a rationale first, or many times.

A strategy is a generator that sees one query: it yields requests, is sent their responses, and returns a
`PromptingOutcome`. The runner steps the generators of all queries together, so each round of requests is batched over
the queries. What belongs to a query (the rationale of a first stage, the votes) never leaves its generator: nothing is
joined by its position in a list.

Closed answers are ranked, whatever the strategy. An answer that cannot be parsed is wrong and counted, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.records import json_objects
from eval.prompting.prompts import Completion, Decoding, EncodedPrompt, PromptBuilder, Request, Response
from eval.task import Episode, Task, Turn, generator, parse_answer
from flamingo.errors import UserError

REASON = " Let's think step by step."
CONCLUDE = " Therefore, the answer is"
SOLUTION = "\nSolution:"
ANSWER = "\nAnswer:"
CUE = re.compile(r"\s*\b(short )?answer:\s*$", re.IGNORECASE)
"""What a task's own question ends with, where the answer comes next. In two stages a rationale comes first."""
# The two triggers are those of Kojima et al. 2022; the two stages those of Zhang et al. 2023 (Multimodal-CoT).


@dataclass(frozen=True)
class PromptingSettings:
    """Settings of the strategies; written into the results."""

    samples: int = 11
    temperature: float = 0.7
    top_p: float = 1.0
    rationale_tokens: int = 128
    orders: int = 4
    rationales: str = ""  # samples.jsonl of a run, perhaps of another model, whose rationales two_stage uses


@dataclass(frozen=True)
class PromptingOutcome:
    """The result of a strategy.

    `prompt` and `episode` are those that asked for the answer; `confidence` is in [0, 1]; `votes` are the answers with
    their shares of all samples, best first (an answer that could not be parsed has no vote).
    """

    episode: Episode
    prompt: EncodedPrompt
    raw: str
    answer: str
    ended: bool
    log_probs: tuple[float, ...] = ()
    confidence: float | None = None
    rationale: str = ""
    votes: tuple[tuple[str, float], ...] = ()


Steps = Generator[list[Request], list[Response], PromptingOutcome]
"""The rounds of a strategy: requests out, responses in, the outcome at the end."""


@dataclass(frozen=True)
class Query:
    """One query as strategies see it."""

    task: Task
    episode: Episode
    builder: PromptBuilder
    settings: PromptingSettings
    seed: int

    def request(self, episode: Episode) -> Request:
        """Return the request for the answer: ranked if there are candidates, else generated as the task defines."""
        task = self.task
        whole = task.ranking == "mean"
        prompt = self.builder.build(episode, task.max_new_tokens, whole_candidates=whole, end_candidates=task.rank_end)
        if prompt.candidates:
            return Request(prompt)
        decoding = Decoding(task.max_new_tokens, num_beams=task.num_beams, length_penalty=task.length_penalty)
        return Request(prompt, decoding)

    def free(self, episode: Episode, tokens: int) -> Request:
        """Return a request that generates greedily, whether or not there are candidates."""
        return Request(self.builder.build(replace(episode, candidates=()), tokens), Decoding(tokens))

    def drawn(self, request: Request, tokens: int) -> list[Request]:
        """Return the request as several sampled ones."""
        decoding = Decoding(tokens, temperature=self.settings.temperature, top_p=self.settings.top_p)
        return [Request(request.prompt, replace(decoding, draw=draw)) for draw in range(self.settings.samples)]

    def outcome(self, episode: Episode, request: Request, response: Response, rationale: str = "") -> PromptingOutcome:
        """Return the answer in a response, with its confidence."""
        if isinstance(response, Completion):
            answer = self.task.parse(response.text, episode)
            confidence = None if response.log_prob is None else math.exp(response.log_prob)
            return PromptingOutcome(
                episode, request.prompt, response.text, answer, response.ended, (), confidence, rationale
            )
        return self.ranked(episode, request, self.scores(request, response), rationale)

    def scores(self, request: Request, response: Response) -> list[float]:
        """Return what candidates are compared by: their log-probabilities, or the means over their tokens."""
        assert isinstance(response, list)
        if self.task.ranking == "sum":
            return response
        lengths = [len(candidate) for candidate in request.prompt.candidates]
        return [round(total / length, 4) for total, length in zip(response, lengths, strict=True)]

    def ranked(
        self, episode: Episode, request: Request, scores: Sequence[float], rationale: str = ""
    ) -> PromptingOutcome:
        """Return the candidate with the highest score; of equals, the first."""
        best = max(range(len(scores)), key=scores.__getitem__)
        raw = episode.candidates[best]
        return PromptingOutcome(
            episode, request.prompt, raw, raw, True, tuple(scores), softmax(scores)[best], rationale
        )


@lru_cache(maxsize=4)
def read_rationales(path: str) -> dict[tuple[str, int], str]:
    """Return the rationales in a run's `samples.jsonl`, by query id and seed.

    Raises:
        UserError: the file cannot be read, or has two rationales for one query (several tasks, shots or strategies).
    """
    rationales: dict[tuple[str, int], str] = {}
    try:
        lines = [line for _, line in json_objects(Path(path))]
        entries = [((line["query_id"], line["seed"]), line["rationale"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"rationales={path} is not the samples.jsonl of a run: {type(error).__name__}: {error}"
        ) from None
    for key, rationale in entries:
        if rationales.setdefault(key, rationale) != rationale:
            raise UserError(
                f"rationales={path} has two rationales for query {key[0]}, seed {key[1]}; "
                "give a run of one task, one number of shots, one strategy and one image condition"
            )
    return rationales


def softmax(scores: Sequence[float]) -> list[float]:
    """Return each candidate's share of exp(score), as if there were no others; 1/n each if none is possible."""
    top = max(scores)
    weights = [math.exp(score - top) if top > -math.inf else 1.0 for score in scores]
    return [weight / sum(weights) for weight in weights]


def vote(outcomes: Sequence[PromptingOutcome]) -> PromptingOutcome:
    """Return the most frequent answer; its share of all outcomes is its confidence.

    Ties go to the answer with the higher mean confidence, then to the alphabetically first. An answer that could not be
    parsed has no vote but counts in the shares.
    """
    votes: dict[str, list[PromptingOutcome]] = {}
    for outcome in outcomes:
        if outcome.answer:
            votes.setdefault(outcome.answer, []).append(outcome)
    if not votes:
        return replace(outcomes[0], confidence=0.0)
    order = sorted(votes, key=lambda answer: (-len(votes[answer]), -_mean_confidence(votes[answer]), answer))
    shares = tuple((answer, len(votes[answer]) / len(outcomes)) for answer in order)
    return replace(votes[order[0]][0], confidence=shares[0][1], votes=shares)


def _mean_confidence(voters: Sequence[PromptingOutcome]) -> float:
    return round(sum(voter.confidence or 0.0 for voter in voters) / len(voters), 4)


def plain(query: Query) -> Steps:
    """Ask for the answer directly."""
    request = query.request(query.episode)
    (response,) = yield [request]
    return query.outcome(query.episode, request, response)


def cot0(query: Query) -> Steps:
    """Ask for a rationale, then the answer (zero-shot chain of thought); the demonstrations show only answers."""
    return _reason(query, _reasoning(query.episode))


def cot(query: Query) -> Steps:
    """Ask the same way, but with demonstrations that show their rationales (few-shot chain of thought)."""
    return _reason(query, _with_rationales(query.episode))


def two_stage(query: Query) -> Steps:
    """Ask for a rationale, then for an answer to question and rationale (multimodal chain of thought)."""
    _need_rationales(query.episode)
    rationale = _stored(query) if query.settings.rationales else (yield from _first_stage(query))
    demos = tuple(answer_turn(demo, demo.rationale) for demo in query.episode.demos)
    second = replace(query.episode, demos=demos, query=answer_turn(query.episode.query, rationale))
    request = query.request(second)
    (response,) = yield [request]
    return query.outcome(second, request, response, rationale)


def _first_stage(query: Query) -> Generator[list[Request], list[Response], str]:
    """Ask for a rationale; the demonstrations show theirs."""
    asking = replace(rationale_turn(query.episode.query), lead=SOLUTION)
    first = replace(query.episode, demos=tuple(map(rationale_turn, query.episode.demos)), query=asking)
    (response,) = yield [query.free(first, query.settings.rationale_tokens)]
    assert isinstance(response, Completion)
    return parse_answer(response.text)


def _stored(query: Query) -> str:
    """Return the rationale that another run has for this query, joined by its id."""
    path, key = query.settings.rationales, (query.episode.query_id, query.seed)
    known = read_rationales(path)
    if key not in known:
        raise UserError(f"rationales={path} has none for query {key[0]}, seed {key[1]}; run it on the same queries")
    return known[key]


def sc(query: Query) -> Steps:
    """Take the majority of several sampled answers (self-consistency, Wang et al. 2023)."""
    if query.episode.candidates:
        raise UserError("strategy=sc samples answers, but this task ranks them; use sc_cot0, sc_cot or output=generate")
    request = query.request(query.episode)
    requests = query.drawn(request, query.task.max_new_tokens)
    responses = yield requests
    return vote([query.outcome(query.episode, request, response) for response in responses])


def sc_cot0(query: Query) -> Steps:
    """Take the majority over sampled zero-shot chains of thought."""
    return _reason(query, _reasoning(query.episode), sampled=True)


def sc_cot(query: Query) -> Steps:
    """Take the majority over sampled few-shot chains of thought."""
    return _reason(query, _with_rationales(query.episode), sampled=True)


def _reason(query: Query, episode: Episode, *, sampled: bool = False) -> Steps:
    """Ask for one rationale or several sampled ones, then for the answer after each."""
    tokens = query.settings.rationale_tokens
    request = query.free(episode, tokens)
    responses = yield query.drawn(request, tokens) if sampled else [request]
    return (yield from _conclude(query, episode, responses))


def orders(query: Query) -> Steps:
    """Show the demonstrations in several orders; average the log-probabilities, or vote among generated answers."""
    episodes = [_reordered(query.episode, order) for order in different_orders(query)]
    requests = [query.request(episode) for episode in episodes]
    responses = yield requests
    outcomes = [query.outcome(*asked) for asked in zip(episodes, requests, responses, strict=True)]
    if not query.episode.candidates:
        return vote(outcomes)
    means = np.mean([outcome.log_probs for outcome in outcomes], axis=0).round(4).tolist()
    return query.ranked(query.episode, requests[0], means)


def calibrated(query: Query) -> Steps:
    """Subtract the scores of the same prompt with a content-free query (contextual calibration, Zhao et al. 2021)."""
    if not query.episode.candidates:
        raise UserError("strategy=calibrated compares candidates, but this task generates; use output=rank")
    episodes = [query.episode, replace(query.episode, query=query.task.content_free(query.episode.query))]
    requests = [query.request(episode) for episode in episodes]
    responses = yield requests
    scores, prior = (query.scores(*asked) for asked in zip(requests, responses, strict=True))
    change = [round(score - before, 4) for score, before in zip(scores, prior, strict=True)]
    return query.ranked(query.episode, requests[0], change)


PromptingStrategy = Callable[[Query], Steps]
STRATEGIES: dict[str, PromptingStrategy] = {
    "plain": plain,
    "cot0": cot0,
    "cot": cot,
    "two_stage": two_stage,
    "sc": sc,
    "sc_cot0": sc_cot0,
    "sc_cot": sc_cot,
    "orders": orders,
    "calibrated": calibrated,
}
"""Names in `strategy=[...]`."""

NEEDS_DEMOS = frozenset({"cot", "sc_cot", "orders"})
"""Strategies that are another one, or nothing, without demonstrations; they are not run at 0 shots."""

REASONS = frozenset({"cot0", "cot", "two_stage", "sc_cot0", "sc_cot"})
"""Strategies that ask for a rationale first."""


def requests_of(strategy: str, settings: PromptingSettings) -> int:
    """Return the largest number of requests for a query; for the progress bar."""
    counts = {"cot0": 2, "cot": 2, "two_stage": 2, "calibrated": 2, "sc": settings.samples, "orders": settings.orders}
    return counts.get(strategy, 2 * settings.samples if strategy.startswith("sc_") else 1)


def _reasoning(episode: Episode) -> Episode:
    return replace(episode, query=replace(episode.query, lead=REASON, tail=""))


def _with_rationales(episode: Episode) -> Episode:
    """Return demonstrations with rationale and answer; the query ends where its rationale begins."""
    _need_rationales(episode)
    demos = tuple(replace(demo, lead=f" {demo.rationale}{CONCLUDE}{_gap(demo)}") for demo in episode.demos)
    return replace(episode, demos=demos, query=replace(episode.query, lead=""))


def _need_rationales(episode: Episode) -> None:
    without = [name for name, demo in zip(episode.demo_ids, episode.demos, strict=True) if not demo.rationale]
    if without:
        raise UserError(
            f"demonstration {without[0]} has no rationale; name the field that holds it in source.fields.rationale, "
            "or use cot0, which needs none"
        )


def _gap(turn: Turn) -> str:
    """Return the fixed start of the answer, or a space if it has none."""
    return turn.lead or " "


def rationale_turn(turn: Turn) -> Turn:
    """Return the turn of the first stage: its rationale in place of its answer."""
    return replace(_uncued(turn), lead=f"{SOLUTION} ", answer=turn.rationale, tail="")


def answer_turn(turn: Turn, rationale: str) -> Turn:
    """Return the turn of the second stage: the rationale in its question."""
    return replace(_uncued(turn).with_question_suffix(f"{SOLUTION} {rationale}{ANSWER}"), lead=_gap(turn))


def _uncued(turn: Turn) -> Turn:
    """Return the turn without the "Answer:" at the end of its question."""
    if not turn.more:
        return replace(turn, question=CUE.sub("", turn.question))
    *before, (image, last) = turn.more
    return replace(turn, more=(*before, (image, CUE.sub("", last))))


def _conclude(query: Query, episode: Episode, rationales: Sequence[Response]) -> Steps:
    """Ask for the answer after each rationale; several answers are put to a vote."""
    asked: list[tuple[Episode, Request, str]] = []
    for response in rationales:
        assert isinstance(response, Completion)
        rationale = parse_answer(response.text.split(CONCLUDE.strip())[0])
        reasoning = " ".join(filter(None, (episode.query.lead.strip(), rationale)))
        own = query.episode.query
        turn = replace(own, lead=f"{' ' if reasoning else ''}{reasoning}{CONCLUDE}{_gap(own)}")
        concluding = replace(episode, query=turn)
        asked.append((concluding, query.request(concluding), rationale))
    responses = yield [request for _, request, _ in asked]
    outcomes = [query.outcome(e, r, response, why) for (e, r, why), response in zip(asked, responses, strict=True)]
    return outcomes[0] if len(outcomes) == 1 else vote(outcomes)


def different_orders(query: Query) -> list[list[int]]:
    """Return different orders of the demonstrations, the given one first; all of them if there are few."""
    count = len(query.episode.demos)
    chosen = [list(range(count))]
    rng = generator("orders", query.task.hash, query.seed, query.episode.query_id)
    while len(chosen) < min(query.settings.orders, math.factorial(min(count, 12))):
        order = rng.permutation(count).tolist()
        if order not in chosen:
            chosen.append(order)
    return chosen


def _reordered(episode: Episode, order: Sequence[int]) -> Episode:
    demos = tuple(episode.demos[i] for i in order)
    return replace(episode, demos=demos, demo_ids=tuple(episode.demo_ids[i] for i in order))
