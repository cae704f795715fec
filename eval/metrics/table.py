"""Metrics of a whole set of answers, each with its 95 % interval and n.

`measure` takes what a run wrote down about its answers and nothing else, so a finished run can be measured again. A
metric is an entry of `METRICS`: a function from answers to named values. Single answers are scored in
`eval.metrics.text`; here is what needs the whole set (CIDEr's example frequencies, an AUC) or several views of one
answer (the medical scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from eval.metrics.captions import ONE_IMAGE, Cider, bleu, bleu_counts, rouge_l
from eval.metrics.interval import RESAMPLES, Interval, mean_interval, statistic_interval, two_level_bootstrap
from eval.metrics.java import PROGRAMS, meteor, program, spice
from eval.metrics.medical import closed, is_closed, medical_exact, open_scores, published_closed, published_open
from eval.metrics.ranking import mwap, roc_auc, winoground
from eval.metrics.vqa import vqa_accuracy
from eval.metrics.wups import BY_EQUALITY, wups_score
from eval.samples import Sample
from flamingo.errors import UserError


@dataclass(frozen=True)
class MetricValue:
    """A score with its 95 % interval; `n` answers (or items of several answers) went into it.

    nan where there is none; `note` says why, or what else a reader has to know.
    """

    score: float
    low: float
    high: float
    n: int
    method: str
    note: str = ""


Answers = Sequence[Sample]
Metric = Callable[[Answers], dict[str, MetricValue]]


def _value(score: float | np.floating, interval: Interval, n: int) -> MetricValue:
    return MetricValue(float(score), interval.low, interval.high, n, interval.method, interval.note)


def _ties(answers: Answers) -> tuple[list[str], list[int]]:
    """Return what makes scores dependent: clusters and seeds."""
    return [answer.cluster for answer in answers], [answer.seed for answer in answers]


def _mean(scores: Sequence[float], answers: Answers) -> MetricValue:
    return _value(np.mean(scores), mean_interval(scores, *_ties(answers)), len(scores))


def _statistic(
    score: float | np.floating, statistic: Callable[[np.ndarray], np.ndarray], answers: Answers, resamples: int
) -> MetricValue:
    clusters, seeds = _ties(answers)
    return _value(score, statistic_interval(statistic, clusters, resamples, seeds), len(answers))


def _captions(answers: Answers) -> dict[str, MetricValue]:
    """Measure BLEU, ROUGE-L and CIDEr-D, with the frequencies of the scored images, as the reference scorer does."""
    references = list({answer.query_id: answer.golds for answer in answers}.values())
    cider = Cider(references)
    each = [cider.score(answer.answer, answer.golds) for answer in answers]
    values = {"cider": _value(np.mean(each), two_level_bootstrap(each, *_ties(answers)), len(each))}
    if len(references) == 1:
        values["cider"] = replace(values["cider"], note=ONE_IMAGE)
    counts = np.stack([bleu_counts(answer.answer, answer.golds) for answer in answers])
    corpus = bleu(counts.sum(0))
    for n in range(4):
        values[f"bleu_{n + 1}"] = _statistic(corpus[n], partial(_bleu_n, counts, n), answers, 2000)
    return values | {"rouge_l": _mean([rouge_l(answer.answer, answer.golds) for answer in answers], answers)}


def _bleu_n(counts: np.ndarray, n: int, weights: np.ndarray) -> np.ndarray:
    """Return (R,) BLEU-(n + 1) under (R, N) weights."""
    return bleu(weights @ counts)[:, n]


def _vqa(answers: Answers) -> dict[str, MetricValue]:
    values = {"vqa_accuracy": _mean([vqa_accuracy(answer.answer, answer.golds) for answer in answers], answers)}
    for kind in sorted({answer.kind for answer in answers if answer.kind}):
        part = [answer for answer in answers if answer.kind == kind]
        values[f"vqa_accuracy {kind}"] = _mean([vqa_accuracy(answer.answer, answer.golds) for answer in part], part)
    return values


def _auc(answers: Answers) -> dict[str, MetricValue]:
    """Measure the AUC of the margin of the last candidate, which is the positive class, over the first."""
    if any(len(answer.log_probs) != 2 for answer in answers):
        raise UserError("the metric roc_auc needs two ranked candidates, the positive one last")
    margins = np.array([answer.log_probs[1] - answer.log_probs[0] for answer in answers])
    positive = np.array([answer.golds[0] == answer.candidates[-1] for answer in answers])
    score = roc_auc(margins, positive)[0]
    return {"roc_auc": _statistic(score, lambda w: roc_auc(margins, positive, w), answers, RESAMPLES)}


def _medical(answers: Answers) -> dict[str, MetricValue]:
    """Open and closed questions apart, each in the published and the mended way."""
    values: dict[str, MetricValue] = {}
    open_answers = [answer for answer in answers if not is_closed(answer.kind)]
    closed_answers = [answer for answer in answers if is_closed(answer.kind)]
    if open_answers:
        published = [published_open(answer.answer, answer.golds[0]) for answer in open_answers]
        mended = [open_scores(answer.answer, answer.golds[0]) for answer in open_answers]
        values["open_recall_published"] = _mean([scores[0] for scores in published], open_answers)
        values["open_f1_published"] = _mean([scores[2] for scores in published], open_answers)
        values["open_recall"] = _mean([scores[0] for scores in mended], open_answers)
        values["open_f1"] = _mean([scores[2] for scores in mended], open_answers)
        exact = [medical_exact(answer.answer, answer.golds[0]) for answer in open_answers]
        values["open_exact"] = _mean(exact, open_answers)
    if closed_answers:
        by_substring = [published_closed(answer.answer, answer.golds[0]) for answer in closed_answers]
        values["closed_published"] = _mean(by_substring, closed_answers)
        values["closed"] = _mean([closed(answer.answer, answer.golds[0]) for answer in closed_answers], closed_answers)
        for constant in ("yes", "no"):
            always = [closed(constant, answer.golds[0]) for answer in closed_answers]
            values[f"closed_if_always_{constant}"] = _mean(always, closed_answers)
    return values


def _wups(answers: Answers) -> dict[str, MetricValue]:
    values = {}
    for name, threshold in (("wups_0", 0.0), ("wups_0.9", 0.9)):
        each = [wups_score(answer.answer, answer.golds, threshold, answer.kind in BY_EQUALITY) for answer in answers]
        values[name] = _mean(each, answers)
    return values


def _winoground(answers: Answers) -> dict[str, MetricValue]:
    """Measure items of two queries, `ITEM.0` and `ITEM.1`, one per image; `ITEM.none` shows no image."""
    asked: dict[str, list[tuple[float, ...]]] = {}
    for answer in answers:
        asked.setdefault(answer.query_id, []).append(answer.log_probs)
    by_id = {query_id: np.mean(several, axis=0) for query_id, several in asked.items()}  # over seeds
    items = sorted(
        {answer.cluster for answer in answers if {f"{answer.cluster}.0", f"{answer.cluster}.1"} <= by_id.keys()}
    )
    if not items:
        return {}  # a limit has left no item both of its images
    scores = np.array([[by_id[f"{item}.{i}"] for i in (0, 1)] for item in items]).transpose(0, 2, 1)
    values = _winoground_values("winoground", scores, items)
    if all(f"{item}.none" in by_id for item in items):
        prior = np.array([by_id[f"{item}.none"] for item in items])
        values |= _winoground_values("winoground_pmi", scores - prior[:, :, None], items)
    return values


def _winoground_values(name: str, scores: np.ndarray, items: list[str]) -> dict[str, MetricValue]:
    parts = zip(("text", "image", "group"), winoground(scores), strict=True)
    wins = {f"{name}_{part}": [float(win) for win in item_wins] for part, item_wins in parts}
    return {part: _value(np.mean(each), mean_interval(each, items), len(items)) for part, each in wins.items()}


def _mwap(answers: Answers) -> dict[str, MetricValue]:
    """Measure RareAct: kind is the annotation, the gold the action it was made for, the candidates are all actions."""
    actions = answers[0].candidates
    pairs = [(action.split(" ", 1)[0], action.split(" ", 1)[-1]) for action in actions]
    matrix = np.array([answer.log_probs for answer in answers])
    facts = ([a.golds[0] for a in answers], [a.kind for a in answers], [a.cluster for a in answers])
    score = mwap(matrix, *facts, pairs)
    return {"mwap": _statistic(score[0], lambda weights: mwap(matrix, *facts, pairs, weights), answers, 300)}


def _meteor(answers: Answers) -> dict[str, MetricValue]:
    """Return the set's figure; its interval is that of the captions' mean, moved to it."""
    score, each = meteor([answer.answer for answer in answers], [answer.golds for answer in answers])
    interval = two_level_bootstrap(each, *_ties(answers))
    moved = score - float(np.mean(each))
    return {"meteor": _value(score, replace(interval, low=interval.low + moved, high=interval.high + moved), len(each))}


def _spice(answers: Answers) -> dict[str, MetricValue]:
    each = spice([answer.answer for answer in answers], [answer.golds for answer in answers])
    return {"spice": _value(np.mean(each), two_level_bootstrap(each, *_ties(answers)), len(each))}


def _by_word(answers: Answers) -> dict[str, MetricValue]:
    """Measure accuracy for each word of the kinds: ScienceQA's columns overlap (a question may have TXT and IMG)."""
    values = {}
    for word in sorted({word for answer in answers for word in answer.kind.split()}):
        part = [answer for answer in answers if word in answer.kind.split()]
        values[f"accuracy {word}"] = _mean([float(answer.answer in answer.golds) for answer in part], part)
    return values


def _rationale(answers: Answers) -> dict[str, MetricValue]:
    """Measure ROUGE-L of the rationales that came before the answers, where the data have one."""
    part = [answer for answer in answers if answer.gold_rationale]
    each = [rouge_l(answer.rationale, [answer.gold_rationale]) for answer in part]
    return {"rationale_rouge_l": _mean(each, part)} if part else {}


def _recall(answers: Answers) -> dict[str, MetricValue]:
    """Measure R@1, R@5 and R@10 for each kind: is one of the right ones among the best candidates?"""
    values = {}
    for kind in sorted({answer.kind for answer in answers}):
        part = [answer for answer in answers if answer.kind == kind]
        for k in (1, 5, 10):
            hits = [float(not set(answer.golds).isdisjoint(answer.candidates[:k])) for answer in part]
            values[f"R@{k} {kind}".strip()] = _mean(hits, part)
    return values


def _classes(answers: Answers) -> dict[str, MetricValue]:
    """Measure top-5, and the mean over classes of the accuracy in each, for sets with classes of different sizes."""
    values = {"top_5": _mean([float(answer.golds[0] in answer.candidates[:5]) for answer in answers], answers)}
    names, own = np.unique([answer.golds[0] for answer in answers], return_inverse=True)
    right = np.array([float(answer.answer in answer.golds) for answer in answers])

    def per_class(weights: np.ndarray) -> np.ndarray:
        sums = np.stack(
            [np.stack([w[:, own == c].sum(1) for c in range(len(names))]) for w in (weights * right, weights)]
        )
        with np.errstate(invalid="ignore"):
            return np.nanmean(sums[0] / sums[1], axis=0)  # a resample may have lost a class

    return values | {"mean_per_class": _statistic(per_class(np.ones((1, len(right))))[0], per_class, answers, 300)}


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
    "rationale": _rationale,
    "recall": _recall,
    "classes": _classes,
}
"""Name in a task's `metrics` to what it measures."""


def check_metric(name: str) -> None:
    """Raise UserError if this machine lacks what a metric needs: before the model runs, not after."""
    if name in PROGRAMS:
        program(name, PROGRAMS[name])


def measure(names: Sequence[str], answers: Answers) -> dict[str, dict[str, Any]]:
    """Return all values of the metrics of these names, as plain data: null for nan, no empty note."""
    values: dict[str, MetricValue] = {}
    for name in names:
        values |= METRICS[name](answers)
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: MetricValue) -> dict[str, Any]:
    facts = {key: None if isinstance(fact, float) and np.isnan(fact) else fact for key, fact in asdict(value).items()}
    return facts if value.note else {key: fact for key, fact in facts.items() if key != "note"}
