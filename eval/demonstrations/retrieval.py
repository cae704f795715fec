"""How like each support document is to a query: by picture, by text or by both.

RICES (Yang et al. 2022, as Flamingo's appendix uses it) takes the nearest pictures, nearest last. Pictures are compared
by the cosine of what the evaluated model's own encoder sees in them, so nothing else has to be downloaded; texts by the
cosine of their words, weighted by tf-idf over the support set. All of it exact: one product of matrices.

Letters: S support documents, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eval.task import Document, Picture
from flamingo.errors import UserError

Embed = Callable[[Sequence[Picture]], np.ndarray]
"""Pictures to (N, E) vectors of length 1."""
DIGITS = 5
"""Decimals of a likeness that count: what batches of other shapes change lies below."""
POOL = 256
"""Nearest documents among which diversity is sought."""


class Retriever:
    """Likenesses to a fixed support set. `weight` is the pictures' share in them, from 0 (text alone) to 1."""

    def __init__(
        self, support: Sequence[Document], queries: Sequence[Document], weight: float, embed: Embed | None
    ) -> None:
        self._weight = weight
        self._rows = {document.id: place for place, document in enumerate(queries)}
        if weight > 0:
            if embed is None:
                raise UserError("demonstrations by likeness of pictures need a model that encodes pictures")
            self._pictures = embed([_picture(document) for document in support])
            self._query_pictures = embed([_picture(document) for document in queries])
        if weight < 1:
            texts = [document.turn.question for document in support]
            if len(set(texts)) == 1:
                raise UserError(
                    "demonstrations by likeness of text need different questions, and all of the support set "
                    f"are {texts[0]!r}; use rices_image"
                )
            from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

            # One letter is a word too: "which option is C" has a C.
            vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)
            self._texts = vectorizer.fit_transform(texts)
            self._query_texts = vectorizer.transform([document.turn.question for document in queries])

    def likeness(self, query: Document) -> np.ndarray:
        """(S,) of one query to all support documents."""
        row, found = self._rows[query.id], np.zeros(())
        if self._weight > 0:
            found = found + self._weight * (self._pictures @ self._query_pictures[row])
        if self._weight < 1:
            found = found + (1 - self._weight) * (self._texts @ self._query_texts[row].T).toarray()[:, 0]
        return np.round(found, DIGITS)

    def among(self, places: np.ndarray) -> np.ndarray:
        """(n, n) of some support documents to each other."""
        found = np.zeros(())
        if self._weight > 0:
            found = found + self._weight * (self._pictures[places] @ self._pictures[places].T)
        if self._weight < 1:
            found = found + (1 - self._weight) * (self._texts[places] @ self._texts[places].T).toarray()
        return np.round(found, DIGITS)

    def nearest(self, query: Document, ties: Sequence[int]) -> np.ndarray:
        """(S,) places of all support documents, the nearest first; `ties` says who comes first among equals."""
        return np.lexsort((np.asarray(ties), -self.likeness(query)))

    def diverse(self, query: Document, ties: Sequence[int], trade: float) -> Iterator[int]:
        """Places by maximal marginal relevance (Carbonell and Goldstein 1998), then the rest by likeness.

        Each next one has the largest `trade` x likeness to the query - (1 - `trade`) x likeness to the nearest chosen.
        The sequence does not depend on how many are taken, so demonstrations stay nested over shots.
        """
        order = self.nearest(query, ties)
        pool, likeness = order[:POOL], self.likeness(query)[order[:POOL]]
        between = self.among(pool)
        closest = np.zeros(len(pool))
        left = np.ones(len(pool), dtype=bool)
        for step in range(len(pool)):
            worth = np.where(left, trade * likeness - (1 - trade) * (closest if step else 0.0), -np.inf)
            best = int(worth.argmax())
            left[best] = False
            closest = np.maximum(closest, between[best]) if step else between[best]
            yield int(pool[best])
        yield from order[POOL:].tolist()


def _picture(document: Document) -> Picture:
    if document.turn.picture is None:
        raise UserError(f"item {document.id} has no picture to compare; use demos=rices_text")
    return document.turn.picture
