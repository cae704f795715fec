"""CIDEr-D, BLEU-1..4 and ROUGE-L of captions, equal to the COCO caption scorers on the same captions.

All take captions that `eval.metrics.ptb.caption_words` has made into words. In CIDEr-D (Vedantam et al. 2015) the
weight of an n-gram falls with the number of *images* whose references have it, so a caption's score depends on which
other images are scored. `Cider` therefore keeps the set it was built on: scores under the example frequencies of a
whole test set estimate that set's figure from any part of it, and a bootstrap costs nothing. A figure for a part under
its own frequencies is not comparable with that of the whole.

Letters: n the length of an n-gram, R references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from eval.metrics.ptb import caption_words

LONGEST = 4
SIGMA = 6.0  # of CIDEr-D's penalty on differences in length, in words
BETA = 1.2  # how much more ROUGE-L values recall
NGram = tuple[str, ...]
ONE_IMAGE = "CIDEr of one image is 0 whatever its caption says: every n-gram is in all images; measure two or more"


def ngrams(words: Sequence[str]) -> Counter[NGram]:
    """Return how often each n-gram of 1 to 4 words occurs."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


class Cider:
    """CIDEr-D under the example frequencies of `references`, one list of captions an image.

    `score` is 10 at most, and in practice near 1: papers print it times 100. Any references may be scored; those of
    the set itself give the reference scorer's figures.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._images = len(references)
        self._frequency: Counter[NGram] = Counter()
        for captions in references:
            self._frequency.update({gram for caption in captions for gram in ngrams(caption_words(caption).split())})
        self._known: dict[str, tuple[list[dict[NGram, float]], list[float], int]] = {}

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return mean over n and R of the clipped cosine of tf-idf weights, times the length penalty, times 10."""
        hypothesis = self._weights(caption_words(caption), remember=False)
        total = sum(self._similarity(hypothesis, self._weights(caption_words(reference))) for reference in references)
        return 10.0 * total / (LONGEST * len(references))

    def _weights(self, words: str, remember: bool = True) -> tuple[list[dict[NGram, float]], list[float], int]:
        """Return tf-idf by n, its norms, and the number of word pairs, which the scorer takes for the length."""
        if words in self._known:
            return self._known[words]
        weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
        pairs = 0
        for gram, count in ngrams(words.split()).items():
            idf = math.log(max(1, self._images)) - math.log(max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = count * idf
            pairs += count if len(gram) == 2 else 0
        made = weights, [math.sqrt(sum(w * w for w in part.values())) for part in weights], pairs
        if remember:
            self._known[words] = made
        return made

    @staticmethod
    def _similarity(
        ours: tuple[list[dict[NGram, float]], list[float], int],
        theirs: tuple[list[dict[NGram, float]], list[float], int],
    ) -> float:
        total = 0.0
        for n in range(LONGEST):
            product = sum(
                min(weight, theirs[0][n][gram]) * theirs[0][n][gram]
                for gram, weight in ours[0][n].items()
                if gram in theirs[0][n]
            )
            norms = ours[1][n] * theirs[1][n]
            total += product / norms if norms else product
        return total * math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * SIGMA**2))


def bleu_counts(caption: str, references: Sequence[str]) -> np.ndarray:
    """Return (10,) what corpus BLEU sums over images: 4 x matches, 4 x n-grams of the caption, its words, and the words
    of the reference nearest in length (the shorter of two equally near)."""
    words = caption_words(caption).split()
    lists = [caption_words(reference).split() for reference in references]
    most: Counter[NGram] = Counter()
    for reference in lists:
        most |= ngrams(reference)
    matches = [0] * LONGEST
    for gram, count in ngrams(words).items():
        matches[len(gram) - 1] += min(count, most[gram])
    lengths = [max(0, len(words) - n) for n in range(LONGEST)]
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in lists)[1]
    return np.array([*matches, *lengths, len(words), nearest], dtype=np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """Turn (..., 10) summed counts into (..., 4): BLEU-1 to BLEU-4, with the COCO scorer's constants against 0 / 0."""
    ratios = (counts[..., :4] + 1e-15) / (counts[..., 4:8] + 1e-9)
    means = np.cumprod(ratios, axis=-1) ** (1.0 / np.arange(1, LONGEST + 1))
    length = (counts[..., 8] + 1e-15) / (counts[..., 9] + 1e-9)
    penalty = np.where(length < 1, np.exp(1 - 1 / length), 1.0)
    return means * penalty[..., None]


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Return the F-measure (beta 1.2) of the best precision and best recall over R, perhaps of different references."""
    ours = caption_words(caption).split(" ")  # of an empty caption one empty word, as in the reference scorer
    precision = recall = 0.0
    for reference in references:
        theirs = caption_words(reference).split(" ")
        common = longest_common(ours, theirs)
        precision, recall = max(precision, common / len(ours)), max(recall, common / len(theirs))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; (a b c d) and (b x d) share 2."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
