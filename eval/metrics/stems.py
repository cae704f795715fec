"""Stems as a data set's own annotations have them, for answers that are compared with stemmed ones.

OK-VQA's annotators' answers come twice, as given (`raw_answer`) and stemmed (`answer`), and the figures that are
published compare stemmed with stemmed. What the data set's authors stemmed with is not published; a table of exceptions
and a tagger imitate it elsewhere. The annotation files hold the result for every word that any annotator used, so it is
read from them: a whole answer by its most frequent stem, else word by word. Only a word that is in no answer is left to
WordNet (the verb of an -ing form, the singular of a noun), if it is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from eval.metrics.wordnet import WordNet
from eval.task import content_hash

Pair = tuple[str, str]
"""An answer as given, and stemmed."""


class Stems:
    """A stemmer made from all (given, stemmed) answers of the annotation files."""

    def __init__(self, pairs: Iterable[Pair], net: WordNet | None = None) -> None:
        whole: dict[str, Counter[str]] = {}
        words: dict[str, Counter[str]] = {}
        for given, stemmed in pairs:
            given_words, stemmed_words = _words(given), _words(stemmed)
            whole.setdefault(" ".join(given_words), Counter())[" ".join(stemmed_words)] += 1
            if len(given_words) == len(stemmed_words):
                for word, stem in zip(given_words, stemmed_words, strict=True):
                    words.setdefault(word, Counter())[stem] += 1
        self._whole = {given: _commonest(counts) for given, counts in whole.items()}
        self._words = {word: _commonest(counts) for word, counts in words.items()}
        self._net = net
        self.hash = content_hash(sorted(self._whole.items()), sorted(self._words.items()), net is not None)
        self.description = f"{len(self._whole)} answers, {len(self._words)} words"
        self.description += ", others by WordNet" if net is not None else ", others as they are (no WordNet here)"

    def __call__(self, answer: str) -> str:
        """Return the answer stemmed, in small letters."""
        words = _words(answer)
        known = self._whole.get(" ".join(words))
        return " ".join(map(self._word, words)) if known is None else known

    def _word(self, word: str) -> str:
        if word in self._words:
            return self._words[word]
        if self._net is None:
            return word
        if word.endswith("ing"):
            return next(iter(self._net.lemmas(word, "v")), word)
        lemmas = self._net.lemmas(word, "n")
        return word if word in lemmas or not lemmas else lemmas[0]


def _words(text: str) -> list[str]:
    return text.lower().split()


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda stem: (-counts[stem], stem))
