"""How like each support example is to a query: by image, by text or by both.

RICES (Yang et al. 2022, as Flamingo's appendix uses it) takes the nearest images, nearest last. Images are compared
by the cosine of what the evaluated model's own encoder sees in them, so nothing else has to be downloaded; texts by the
cosine of their words, weighted by tf-idf over the support set. All of it exact: one product of matrices.

Letters: S support examples, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eval.task import EncodedImage, Example
from flamingo.errors import UserError

Embed = Callable[[Sequence[EncodedImage]], np.ndarray]
"""Images to (N, E) vectors of length 1."""
DIGITS = 5
"""Decimals of a likeness that count: what batches of other shapes change lies below."""
POOL = 256
"""Nearest examples among which diversity is sought."""


class Retriever:
    """Likenesses to a fixed support set. `weight` is the images' share in them, from 0 (text alone) to 1."""

    def __init__(
        self, support: Sequence[Example], queries: Sequence[Example], weight: float, embed: Embed | None
    ) -> None:
        self._weight = weight
        self._rows = {example.id: place for place, example in enumerate(queries)}
        if weight > 0:
            if embed is None:
                raise UserError("demonstrations by likeness of images need a model that encodes images")
            self._images = embed([_image(example) for example in support])
            self._query_images = embed([_image(example) for example in queries])
        if weight < 1:
            texts = [example.turn.question for example in support]
            if len(set(texts)) == 1:
                raise UserError(
                    "demonstrations by likeness of text need different questions, and all of the support set "
                    f"are {texts[0]!r}; use rices_image"
                )
            from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

            # One letter is a word too: "which option is C" has a C.
            vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)
            self._texts = vectorizer.fit_transform(texts)
            self._query_texts = vectorizer.transform([example.turn.question for example in queries])

    def likeness(self, query: Example) -> np.ndarray:
        """(S,) of one query to all support examples."""
        row, found = self._rows[query.id], np.zeros(())
        if self._weight > 0:
            found = found + self._weight * (self._images @ self._query_images[row])
        if self._weight < 1:
            found = found + (1 - self._weight) * (self._texts @ self._query_texts[row].T).toarray()[:, 0]
        return np.round(found, DIGITS)

    def among(self, places: np.ndarray) -> np.ndarray:
        """(n, n) of some support examples to each other."""
        found = np.zeros(())
        if self._weight > 0:
            found = found + self._weight * (self._images[places] @ self._images[places].T)
        if self._weight < 1:
            found = found + (1 - self._weight) * (self._texts[places] @ self._texts[places].T).toarray()
        return np.round(found, DIGITS)

    def nearest(self, query: Example, ties: Sequence[int]) -> np.ndarray:
        """(S,) places of all support examples, the nearest first; `ties` says who comes first among equals."""
        return np.lexsort((np.asarray(ties), -self.likeness(query)))

    def diverse(self, query: Example, ties: Sequence[int], trade: float) -> Iterator[int]:
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


def _image(example: Example) -> EncodedImage:
    if example.turn.image is None:
        raise UserError(f"item {example.id} has no image to compare; use demos=rices_text")
    return example.turn.image
