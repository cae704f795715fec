"""How a query is put to the model: at once, with a rationale first, many times over.

A strategy is a generator: it yields requests, is sent their responses, and returns an `Outcome`. It sees one query. The
runner steps the generators of all queries together, so each round of requests is batched over the queries, and what
belongs to a query (the rationale of a first stage, the votes) never leaves its generator: nothing is joined by position
in a list.

Closed answers are ranked, whatever the strategy. An answer that cannot be parsed is wrong and counted; nothing guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from eval.demonstrations.ablations import blanked
from eval.demonstrations.samplers import generator
from eval.metrics.text import parse_answer
from eval.prompting.query import Query, Settings, Steps, read_rationales, vote
from eval.prompting.requests import Completion, Request, Response
from eval.task import Episode, Turn
from flamingo.errors import UserError

REASON = " Let's think step by step."
CONCLUDE = " Therefore, the answer is"
SOLUTION = "\nSolution:"
ANSWER = "\nAnswer:"
# The two triggers are those of Kojima et al. 2022; the two stages those of Zhang et al. 2023 (Multimodal-CoT).


def plain(query: Query) -> Steps:
    """The answer at once."""
    request = query.request(query.episode)
    (response,) = yield [request]
    return query.outcome(query.episode, request, response)


def cot0(query: Query) -> Steps:
    """Zero-shot chain of thought: reasons first, then the answer; the demonstrations show answers alone."""
    request = query.free(_reasoning(query.episode), query.settings.rationale_tokens)
    (response,) = yield [request]
    return (yield from _conclude(query, _reasoning(query.episode), [response]))


def cot(query: Query) -> Steps:
    """Few-shot chain of thought: the demonstrations show their rationale before the answer."""
    episode = _with_rationales(query.episode)
    (response,) = yield [query.free(episode, query.settings.rationale_tokens)]
    return (yield from _conclude(query, episode, [response]))


def two_stage(query: Query) -> Steps:
    """Multimodal chain of thought: a rationale from rationales, then an answer from question and rationale."""
    _need_rationales(query.episode)
    rationale = _stored(query) if query.settings.rationales else (yield from _first_stage(query))
    demos = tuple(_given(demo, demo.rationale) for demo in query.episode.demos)
    second = replace(query.episode, demos=demos, query=_given(query.episode.query, rationale))
    request = query.request(second)
    (response,) = yield [request]
    return query.outcome(second, request, response, rationale)


def _first_stage(query: Query) -> Generator[list[Request], list[Response], str]:
    """Ask for a rationale; the demonstrations show theirs."""
    asking = query.episode.query
    shown = [replace(d, lead=f"{SOLUTION} ", answer=d.rationale, tail="") for d in query.episode.demos]
    first = replace(query.episode, demos=tuple(shown), query=replace(asking, lead=SOLUTION, tail=""))
    (response,) = yield [query.free(first, query.settings.rationale_tokens)]
    assert isinstance(response, Completion)
    return parse_answer(response.text)


def _stored(query: Query) -> str:
    """The rationale that another run found for this query, joined by its id."""
    path, key = query.settings.rationales, (query.episode.query_id, query.seed)
    known = read_rationales(path)
    if key not in known:
        raise UserError(f"rationales={path} has none for query {key[0]}, seed {key[1]}; ask the same queries there")
    return known[key]


def sc(query: Query) -> Steps:
    """Self-consistency (Wang et al. 2023): the answer that most of several sampled answers give."""
    if query.episode.candidates:
        raise UserError("strategy=sc samples answers and this task ranks them; use sc_cot0, sc_cot or output=generate")
    request = query.request(query.episode)
    requests = query.drawn(request, query.task.max_new_tokens)
    responses = yield requests
    found = [query.outcome(query.episode, request, response) for response in responses]
    return vote(found)


def sc_cot0(query: Query) -> Steps:
    """Self-consistency over sampled zero-shot chains of thought."""
    episode = _reasoning(query.episode)
    tokens = query.settings.rationale_tokens
    responses = yield query.drawn(query.free(episode, tokens), tokens)
    return (yield from _conclude(query, episode, responses))


def sc_cot(query: Query) -> Steps:
    """Self-consistency over sampled few-shot chains of thought."""
    episode = _with_rationales(query.episode)
    tokens = query.settings.rationale_tokens
    responses = yield query.drawn(query.free(episode, tokens), tokens)
    return (yield from _conclude(query, episode, responses))


def orders(query: Query) -> Steps:
    """Ensemble over different orders of the demonstrations: mean log-probability, or a vote of generated answers."""
    episodes = [_reordered(query.episode, order) for order in different_orders(query)]
    requests = [query.request(episode) for episode in episodes]
    responses = yield requests
    found = [query.outcome(e, r, s) for e, r, s in zip(episodes, requests, responses, strict=True)]
    if not query.episode.candidates:
        return vote(found)
    means = np.mean([one.log_probs for one in found], axis=0).round(4).tolist()
    return query.ranked(query.episode, requests[0], means)


def calibrated(query: Query) -> Steps:
    """Contextual calibration (Zhao et al. 2021): less the score behind the same prompt with a content-free query."""
    if not query.episode.candidates:
        raise UserError("strategy=calibrated compares candidates and this task generates; use output=rank")
    content_free: Callable[[Turn], Turn] = getattr(query.task, "content_free", blanked)
    episodes = [query.episode, replace(query.episode, query=content_free(query.episode.query))]
    requests = [query.request(episode) for episode in episodes]
    responses = yield requests
    scores, prior = (query.scores(request, said) for request, said in zip(requests, responses, strict=True))
    change = [round(score - before, 4) for score, before in zip(scores, prior, strict=True)]
    return query.ranked(query.episode, requests[0], change)


STRATEGIES: dict[str, Callable[[Query], Steps]] = {
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
"""Name in `strategy=[...]` to what it does."""

NEEDS_RATIONALES = frozenset({"cot", "sc_cot", "two_stage"})


def requests_of(strategy: str, settings: Settings) -> int:
    """Requests for a query, at most; for the progress bar."""
    each = {"cot0": 2, "cot": 2, "two_stage": 2, "calibrated": 2, "sc": settings.samples, "orders": settings.orders}
    return each.get(strategy, 2 * settings.samples if strategy.startswith("sc_") else 1)


def _reasoning(episode: Episode) -> Episode:
    return replace(episode, query=replace(episode.query, lead=REASON, tail=""))


def _with_rationales(episode: Episode) -> Episode:
    """Demonstrations with rationale and answer; the query ends where its rationale begins."""
    _need_rationales(episode)
    demos = tuple(replace(demo, lead=f" {demo.rationale}{CONCLUDE}{_gap(demo)}") for demo in episode.demos)
    return replace(episode, demos=demos, query=replace(episode.query, lead=""))


def _need_rationales(episode: Episode) -> None:
    lacking = [name for name, demo in zip(episode.demo_ids, episode.demos, strict=True) if not demo.rationale]
    if lacking:
        raise UserError(
            f"demonstration {lacking[0]} has no rationale to show; name the data's field for it in "
            "source.fields.rationale, or use cot0, which needs none"
        )


def _gap(turn: Turn) -> str:
    """The answer's own fixed start, a space where it has none."""
    return turn.lead or " "


def _given(turn: Turn, rationale: str) -> Turn:
    """The turn with the rationale in its question."""
    return replace(turn.asking(f"{SOLUTION} {rationale}{ANSWER}"), lead=_gap(turn))


def _conclude(query: Query, episode: Episode, rationales: Sequence[Response]) -> Steps:
    """Ask for the answer behind each rationale; several are put to a vote."""
    asked: list[tuple[Episode, Request, str]] = []
    for response in rationales:
        assert isinstance(response, Completion)
        rationale = parse_answer(response.text.split(CONCLUDE.strip())[0])
        said = " ".join(filter(None, (episode.query.lead.strip(), rationale)))
        own = query.episode.query
        turn = replace(own, lead=f"{' ' if said else ''}{said}{CONCLUDE}{_gap(own)}")
        behind = replace(episode, query=turn)
        asked.append((behind, query.request(behind), rationale))
    responses = yield [request for _, request, _ in asked]
    found = [query.outcome(e, r, said, why) for (e, r, why), said in zip(asked, responses, strict=True)]
    return found[0] if len(found) == 1 else vote(found)


def different_orders(query: Query) -> list[list[int]]:
    """Different orders of the demonstrations, the given one first; all there are where they are few."""
    number = len(query.episode.demos)
    found = [list(range(number))]
    rng = generator("orders", query.task.hash, query.seed, query.episode.query_id)
    while len(found) < min(query.settings.orders, math.factorial(min(number, 12))):
        order = rng.permutation(number).tolist()
        if order not in found:
            found.append(order)
    return found


def _reordered(episode: Episode, order: Sequence[int]) -> Episode:
    demos = tuple(episode.demos[i] for i in order)
    return replace(episode, demos=demos, demo_ids=tuple(episode.demo_ids[i] for i in order))
