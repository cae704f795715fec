"""Metrics of a whole set of answers, each with its 95 % interval and n.

`measure` takes what a run wrote down about its answers and nothing else, so a finished run can be measured again. A
metric is an entry of `METRICS`: a function from answers to named values. Single answers are scored in
`eval.metrics.text`; here is what needs the whole set (CIDEr's example frequencies, an AUC) or several views of one
answer (the medical scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from eval.metrics.captions import Cider, bleu, bleu_counts, rouge_l
from eval.metrics.interval import RESAMPLES, Interval, mean_interval, statistic_interval, two_level_bootstrap
from eval.metrics.java import PROGRAMS, meteor, program, spice
from eval.metrics.medical import closed, is_closed, medical_exact, open_scores, published_closed, published_open
from eval.metrics.ranking import mwap, roc_auc, winoground
from eval.metrics.vqa import vqa_accuracy
from eval.metrics.wups import BY_EQUALITY, wups_score
from flamingo.errors import UserError


class Answered(Protocol):
    """What a metric needs of a sample."""

    @property
    def query_id(self) -> str:
        """Which query; several answers may share it, of several seeds."""
        ...

    @property
    def answer(self) -> str:
        """What was said, parsed."""
        ...

    @property
    def golds(self) -> tuple[str, ...]:
        """The accepted answers."""
        ...

    @property
    def kind(self) -> str:
        """The query's kind."""
        ...

    @property
    def cluster(self) -> str:
        """What ties scores together: the image."""
        ...

    @property
    def seed(self) -> int:
        """Of its demonstrations."""
        ...

    @property
    def candidates(self) -> tuple[str, ...]:
        """The closed answers, if it was ranked."""
        ...

    @property
    def log_probs(self) -> tuple[float, ...]:
        """Of each candidate."""
        ...


@dataclass(frozen=True)
class MetricValue:
    """A score with its 95 % interval; `n` answers (or items of several answers) went into it."""

    score: float
    low: float
    high: float
    n: int
    method: str


Answers = Sequence[Answered]
Metric = Callable[[Answers], dict[str, MetricValue]]


def _value(score: float | np.floating, interval: Interval, n: int) -> MetricValue:
    return MetricValue(float(score), interval.low, interval.high, n, interval.method)


def _ties(answers: Answers) -> tuple[list[str], list[int]]:
    """What makes scores dependent: clusters and seeds."""
    return [one.cluster for one in answers], [one.seed for one in answers]


def _mean(scores: Sequence[float], answers: Answers) -> MetricValue:
    return _value(np.mean(scores), mean_interval(scores, *_ties(answers)), len(scores))


def _statistic(
    score: float | np.floating, statistic: Callable[[np.ndarray], np.ndarray], answers: Answers, resamples: int
) -> MetricValue:
    clusters, seeds = _ties(answers)
    return _value(score, statistic_interval(statistic, clusters, resamples, seeds), len(answers))


def _captions(answers: Answers) -> dict[str, MetricValue]:
    """CIDEr-D under the frequencies of the very images scored, which is the reference scorer's figure."""
    said = list({one.query_id: one.golds for one in answers}.values())
    cider = Cider(said)
    each = [cider.score(one.answer, one.golds) for one in answers]
    found = {"cider": _value(np.mean(each), two_level_bootstrap(each, *_ties(answers)), len(each))}
    counts = np.stack([bleu_counts(one.answer, one.golds) for one in answers])
    corpus = bleu(counts.sum(0))
    for n in range(4):
        found[f"bleu_{n + 1}"] = _statistic(corpus[n], partial(_bleu_n, counts, n), answers, 2000)
    return found | {"rouge_l": _mean([rouge_l(one.answer, one.golds) for one in answers], answers)}


def _bleu_n(counts: np.ndarray, n: int, weights: np.ndarray) -> np.ndarray:
    """(R,) BLEU-(n + 1) under (R, N) weights."""
    return bleu(weights @ counts)[:, n]


def _vqa(answers: Answers) -> dict[str, MetricValue]:
    found = {"vqa_accuracy": _mean([vqa_accuracy(one.answer, one.golds) for one in answers], answers)}
    for kind in sorted({one.kind for one in answers if one.kind}):
        part = [one for one in answers if one.kind == kind]
        found[f"vqa_accuracy {kind}"] = _mean([vqa_accuracy(one.answer, one.golds) for one in part], part)
    return found


def _auc(answers: Answers) -> dict[str, MetricValue]:
    """Of the margin of the last candidate, which is the positive class, over the first."""
    if any(len(one.log_probs) != 2 for one in answers):
        raise UserError("the metric roc_auc needs two ranked candidates, the positive one last")
    margins = np.array([one.log_probs[1] - one.log_probs[0] for one in answers])
    positive = np.array([one.golds[0] == one.candidates[-1] for one in answers])
    score = roc_auc(margins, positive)[0]
    return {"roc_auc": _statistic(score, lambda w: roc_auc(margins, positive, w), answers, RESAMPLES)}


def _medical(answers: Answers) -> dict[str, MetricValue]:
    """Open and closed questions apart, each in the published and the mended way."""
    found: dict[str, MetricValue] = {}
    opened = [one for one in answers if not is_closed(one.kind)]
    shut = [one for one in answers if is_closed(one.kind)]
    if opened:
        published = [published_open(one.answer, one.golds[0]) for one in opened]
        mended = [open_scores(one.answer, one.golds[0]) for one in opened]
        found["open_recall_published"] = _mean([scores[0] for scores in published], opened)
        found["open_f1_published"] = _mean([scores[2] for scores in published], opened)
        found["open_recall"] = _mean([scores[0] for scores in mended], opened)
        found["open_f1"] = _mean([scores[2] for scores in mended], opened)
        found["open_exact"] = _mean([medical_exact(one.answer, one.golds[0]) for one in opened], opened)
    if shut:
        found["closed_published"] = _mean([published_closed(one.answer, one.golds[0]) for one in shut], shut)
        found["closed"] = _mean([closed(one.answer, one.golds[0]) for one in shut], shut)
        for constant in ("yes", "no"):
            found[f"closed_if_always_{constant}"] = _mean([closed(constant, one.golds[0]) for one in shut], shut)
    return found


def _wups(answers: Answers) -> dict[str, MetricValue]:
    found = {}
    for name, threshold in (("wups_0", 0.0), ("wups_0.9", 0.9)):
        each = [wups_score(one.answer, one.golds, threshold, one.kind in BY_EQUALITY) for one in answers]
        found[name] = _mean(each, answers)
    return found


def _winoground(answers: Answers) -> dict[str, MetricValue]:
    """Queries `ITEM.0`, `ITEM.1` are its images, `ITEM.none` the captions without one, where that was asked."""
    asked: dict[str, list[tuple[float, ...]]] = {}
    for one in answers:
        asked.setdefault(one.query_id, []).append(one.log_probs)
    by_id = {query_id: np.mean(several, axis=0) for query_id, several in asked.items()}  # over seeds
    items = sorted({one.cluster for one in answers if {f"{one.cluster}.0", f"{one.cluster}.1"} <= by_id.keys()})
    if not items:
        return {}  # a limit has left no item both of its images
    scores = np.array([[by_id[f"{item}.{i}"] for i in (0, 1)] for item in items]).transpose(0, 2, 1)
    found = _winoground_values("winoground", scores, items)
    if all(f"{item}.none" in by_id for item in items):
        prior = np.array([by_id[f"{item}.none"] for item in items])
        found |= _winoground_values("winoground_pmi", scores - prior[:, :, None], items)
    return found


def _winoground_values(name: str, scores: np.ndarray, items: list[str]) -> dict[str, MetricValue]:
    parts = zip(("text", "image", "group"), winoground(scores), strict=True)
    wins = {f"{name}_{part}": [float(win) for win in found] for part, found in parts}
    return {part: _value(np.mean(each), mean_interval(each, items), len(items)) for part, each in wins.items()}


def _mwap(answers: Answers) -> dict[str, MetricValue]:
    """Kind is what was annotated, the gold the action it was annotated for, candidates all actions."""
    actions = answers[0].candidates
    pairs = [(action.split(" ", 1)[0], action.split(" ", 1)[-1]) for action in actions]
    matrix = np.array([one.log_probs for one in answers])
    facts = [one.golds[0] for one in answers], [one.kind for one in answers], [one.cluster for one in answers]
    score = mwap(matrix, *facts, pairs)
    return {"mwap": _statistic(score[0], lambda weights: mwap(matrix, *facts, pairs, weights), answers, 300)}


def _meteor(answers: Answers) -> dict[str, MetricValue]:
    """The set's figure; its interval is that of the captions' mean, moved to it."""
    score, each = meteor([one.answer for one in answers], [one.golds for one in answers])
    interval = two_level_bootstrap(each, *_ties(answers))
    moved = score - float(np.mean(each))
    return {"meteor": MetricValue(score, interval.low + moved, interval.high + moved, len(each), interval.method)}


def _spice(answers: Answers) -> dict[str, MetricValue]:
    each = spice([one.answer for one in answers], [one.golds for one in answers])
    return {"spice": _value(np.mean(each), two_level_bootstrap(each, *_ties(answers)), len(each))}


def _by_word(answers: Answers) -> dict[str, MetricValue]:
    """Accuracy over the answers whose kind has a word: ScienceQA's columns overlap (a question has TXT and IMG)."""
    found = {}
    for word in sorted({word for one in answers for word in one.kind.split()}):
        part = [one for one in answers if word in one.kind.split()]
        found[f"accuracy {word}"] = _mean([float(one.answer in one.golds) for one in part], part)
    return found


NEEDS_RANKING = frozenset({"roc_auc", "winoground", "mwap"})
"""Metrics that are made of candidates' log-probabilities; a task that generates cannot have them."""
METRICS: dict[str, Metric] = {
    "by_word": _by_word,
    "captions": _captions,
    "meteor": _meteor,
    "spice": _spice,
    "vqa": _vqa,
    "roc_auc": _auc,
    "medical": _medical,
    "wups": _wups,
    "winoground": _winoground,
    "mwap": _mwap,
}
"""Name in a task's `metrics` to what it measures."""


def check_metric(name: str) -> None:
    """Raise UserError if what a metric needs is not on this machine: told now, not when the answers are there."""
    if name in PROGRAMS:
        program(name, PROGRAMS[name])


def measure(names: Sequence[str], answers: Answers) -> dict[str, dict[str, Any]]:
    """All values of the metrics of these names, as plain data."""
    found: dict[str, MetricValue] = {}
    for name in names:
        found |= METRICS[name](answers)
    return {name: asdict(value) for name, value in found.items()}
