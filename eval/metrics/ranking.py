"""Scores of rankings: ROC AUC, the weighted mean average precision of RareAct, Winoground's three.

Letters: N samples, R resamples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def roc_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return (R,) areas under the ROC curve of (N,) scores and (R, N) weights; ties count half; nan without a class.

    It is the share of (positive, negative) pairs that the scores put right, so no curve is needed.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], firsts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], firsts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positives * below).sum(1) / (positives.sum(1) * negatives.sum(1))


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) sums over thresholds of (step in recall) x precision; equal scores are a single threshold."""
    order = np.argsort(-scores, kind="stable")
    lasts = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]
    hits = np.cumsum(weights[:, order] * positive[order], axis=1)[:, lasts]
    taken = np.cumsum(weights[:, order], axis=1)[:, lasts]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(taken > 0, hits / taken, 0.0)
        return (np.diff(hits, axis=1, prepend=0) * precision).sum(1) / hits[:, -1]


ANNOTATIONS = {"0": "negative", "1": "positive", "2": "verb", "3": "noun", "4": "both apart"}
"""RareAct's codes; those from 2 on are hard negatives of their own action."""


def mwap(
    matrix: np.ndarray,
    actions: Sequence[str],
    annotations: Sequence[str],
    videos: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return (R,) mean over actions of the weighted average precision (Miech et al. 2020, their `compute_score`).

    `matrix` (N, C) scores every segment for every action, `pairs` are the C (verb, noun), `actions` the "verb noun" a
    segment was annotated for. For an action count: its positives; as negatives its own annotated ones, and the
    positives of every other action. A segment weighs 1 / (segments of its video among the same action's positives,
    negatives or hard negatives); those of other actions that share verb or noun are hard ones.
    """
    weights = np.ones((1, len(actions))) if weights is None else weights
    names = [" ".join(pair) for pair in pairs]
    kind, video = np.array(annotations), np.unique(np.array(videos), return_inverse=True)[1]
    verb = dict(zip(names, (pair[0] for pair in pairs), strict=True))
    noun = dict(zip(names, (pair[1] for pair in pairs), strict=True))
    own_verb, own_noun = np.array([verb[a] for a in actions]), np.array([noun[a] for a in actions])
    precisions = []
    for column, name in enumerate(names):
        own = np.array(actions) == name
        positive = own & (kind == "positive")
        if not positive.any():
            continue
        other = (kind == "positive") & ~own
        shares = (own_verb == verb[name]) | (own_noun == noun[name])
        hard = (own & ~np.isin(kind, ["positive", "negative"])) | (other & shares)
        easy = (own & (kind == "negative")) | (other & ~shares)
        share = np.zeros(len(actions))
        for group in (positive, easy, hard):
            share[group] = 1.0 / np.bincount(video[group], minlength=video.max() + 1)[video[group]]
        used = positive | easy | hard
        precisions.append(average_precision(matrix[used, column], positive[used], weights[:, used] * share[used]))
    if not precisions:
        return np.full(len(weights), np.nan)
    known = np.isfinite(precisions)  # in a resample an action may have lost its positives
    with np.errstate(invalid="ignore"):
        return np.where(known, precisions, 0.0).sum(0) / known.sum(0)


def winoground(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (text, image, group) of (N, 2, 2) scores [item, caption, image], each (N,) bool. A tie is not a win.

    Text: for each image its own caption scores higher. Image: for each caption its own image does. Group: both.
    """
    own_0, own_1 = scores[:, 0, 0], scores[:, 1, 1]
    text = (own_0 > scores[:, 1, 0]) & (own_1 > scores[:, 0, 1])
    image = (own_0 > scores[:, 0, 1]) & (own_1 > scores[:, 1, 0])
    return text, image, text & image
