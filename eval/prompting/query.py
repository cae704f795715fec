"""One query as strategies see it: how it becomes requests, and responses an answer with a confidence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from eval.metrics.text import parse_answer
from eval.prompting.prompts import Prompt, PromptBuilder
from eval.prompting.requests import Completion, Decoding, Request, Response
from eval.task import Episode, Task
from flamingo.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Numbers that strategies need; part of a run's provenance."""

    samples: int = 11
    temperature: float = 0.7
    top_p: float = 1.0
    rationale_tokens: int = 128
    orders: int = 4
    rationales: str = ""  # samples.jsonl of a run, by another model perhaps, whose rationales two_stage takes


@dataclass(frozen=True)
class Outcome:
    """What a strategy found out.

    `prompt` and `episode` are those that asked for the answer; `confidence` is in [0, 1]; `votes` are the answers with
    their shares of all samples, best first (what could not be parsed has no vote).
    """

    episode: Episode
    prompt: Prompt
    raw: str
    answer: str
    ended: bool
    log_probs: tuple[float, ...] = ()
    confidence: float | None = None
    rationale: str = ""
    votes: tuple[tuple[str, float], ...] = ()


Steps = Generator[list[Request], list[Response], Outcome]


@dataclass(frozen=True)
class Query:
    """One query as strategies see it."""

    task: Task
    episode: Episode
    builder: PromptBuilder
    settings: Settings
    seed: int

    def request(self, episode: Episode) -> Request:
        """The one that asks for the answer: ranked where there are candidates, else generated as the task says."""
        ranking, end = getattr(self.task, "ranking", "sum"), getattr(self.task, "rank_end", True)
        whole = ranking == "mean"
        prompt = self.builder.build(episode, self.task.max_new_tokens, whole_candidates=whole, end_candidates=end)
        if prompt.candidates:
            return Request(prompt)
        beams, penalty = getattr(self.task, "num_beams", 1), getattr(self.task, "length_penalty", 1.0)
        return Request(prompt, Decoding(self.task.max_new_tokens, num_beams=beams, length_penalty=penalty))

    def free(self, episode: Episode, tokens: int) -> Request:
        """One that generates greedily, candidates or not."""
        return Request(self.builder.build(replace(episode, candidates=()), tokens), Decoding(tokens))

    def drawn(self, request: Request, tokens: int) -> list[Request]:
        """The request as many samples."""
        how = Decoding(tokens, temperature=self.settings.temperature, top_p=self.settings.top_p)
        return [Request(request.prompt, replace(how, draw=draw)) for draw in range(self.settings.samples)]

    def outcome(self, episode: Episode, request: Request, response: Response, rationale: str = "") -> Outcome:
        """The answer in a response, with its confidence."""
        if isinstance(response, Completion):
            answer = parsed(self.task, response.text, episode)
            sure = None if response.log_prob is None else math.exp(response.log_prob)
            return Outcome(episode, request.prompt, response.text, answer, response.ended, (), sure, rationale)
        return self.ranked(episode, request, self.scores(request, response), rationale)

    def scores(self, request: Request, response: Response) -> list[float]:
        """What candidates are compared by: their log-probabilities, or each one's mean over its tokens."""
        assert isinstance(response, list)
        if getattr(self.task, "ranking", "sum") == "sum":
            return response
        lengths = [len(candidate) for candidate in request.prompt.candidates]
        return [round(total / length, 4) for total, length in zip(response, lengths, strict=True)]

    def ranked(self, episode: Episode, request: Request, scores: Sequence[float], rationale: str = "") -> Outcome:
        """The candidate of the highest score; the first of equals."""
        best = max(range(len(scores)), key=scores.__getitem__)
        raw = episode.candidates[best]
        return Outcome(episode, request.prompt, raw, raw, True, tuple(scores), softmax(scores)[best], rationale)


def parsed(task: Task, raw: str, episode: Episode) -> str:
    """The completion without the fixed start (in part already in the prompt) and end of the answer's text."""
    parse: Callable[[str, Episode], str] | None = getattr(task, "parse", None)
    if parse is not None:
        return parse(raw, episode)
    tail = episode.query.tail
    return parse_answer(parse_answer(raw).removesuffix(tail) if tail else raw)


@lru_cache(maxsize=4)
def read_rationales(path: str) -> dict[tuple[str, int], str]:
    """The rationales in a run's `samples.jsonl`, by query id and seed.

    Raises:
        UserError: it cannot be read, or has two for one query: several tasks, numbers of shots or strategies.
    """
    found: dict[tuple[str, int], str] = {}
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        entries = [((line["query_id"], line["seed"]), line["rationale"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"rationales={path} is no samples.jsonl of a run: {type(error).__name__}: {error}") from None
    for key, rationale in entries:
        if found.setdefault(key, rationale) != rationale:
            raise UserError(
                f"rationales={path} has two rationales for query {key[0]}, seed {key[1]}; "
                "give a run of one task, one number of shots and one strategy"
            )
    return found


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares of exp(score), of candidates as if they were all there is; 1/n each where none is possible."""
    top = max(scores)
    weights = [math.exp(score - top) if top > -math.inf else 1.0 for score in scores]
    return [weight / sum(weights) for weight in weights]


def vote(found: Sequence[Outcome]) -> Outcome:
    """The answer of most, ties to the one its voters are surer of, then to the alphabet; its share is the confidence.

    Shares are of all samples: an answer that could not be parsed votes for nothing.
    """
    votes: dict[str, list[Outcome]] = {}
    for one in found:
        if one.answer:
            votes.setdefault(one.answer, []).append(one)
    if not votes:
        return replace(found[0], confidence=0.0)
    order = sorted(votes, key=lambda answer: (-len(votes[answer]), -_sureness(votes[answer]), answer))
    shares = tuple((answer, len(votes[answer]) / len(found)) for answer in order)
    return replace(votes[order[0]][0], confidence=shares[0][1], votes=shares)


def _sureness(voters: Sequence[Outcome]) -> float:
    return round(sum(one.confidence or 0.0 for one in voters) / len(voters), 4)
