"""How similar each support example is to a query: by image, by text or by both.

RICES (Yang et al. 2022, as Flamingo's appendix uses it) takes the nearest images, nearest last. Images are compared by
the cosine of the evaluated model's own image embeddings, so nothing else has to be downloaded; texts by the cosine of
their words, weighted by tf-idf over the support set. Both are exact: one matrix product.

Letters: S support examples, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eval.task import EncodedImage, Example
from flamingo.errors import UserError

Embed = Callable[[Sequence[EncodedImage]], np.ndarray]
"""From images to (N, E) vectors of length 1."""
DIGITS = 5
"""Decimals of a similarity that count. Batches of other shapes change only what is below."""
POOL = 256
"""Number of nearest examples among which `mmr` looks for diversity."""


class Retriever:
    """Similarities to a fixed support set. `weight` is the images' share, from 0 (only text) to 1."""

    def __init__(
        self, support: Sequence[Example], queries: Sequence[Example], weight: float, embed: Embed | None
    ) -> None:
        self._weight = weight
        self._rows = {example.id: index for index, example in enumerate(queries)}
        if weight > 0:
            if embed is None:
                raise UserError("retrieval by image needs a model that encodes images")
            self._images = embed([_image(example) for example in support])
            self._query_images = embed([_image(example) for example in queries])
        if weight < 1:
            texts = [example.turn.question for example in support]
            if len(set(texts)) == 1:
                raise UserError(
                    f"retrieval by text needs different questions, but the support set only has {texts[0]!r}; "
                    "use rices_image"
                )
            from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

            # One letter is a word too: "which option is C" has a C.
            vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)
            self._texts = vectorizer.fit_transform(texts)
            self._query_texts = vectorizer.transform([example.turn.question for example in queries])

    def similarity(self, query: Example) -> np.ndarray:
        """Return (S,) similarities of a query to all support examples."""
        row, similarities = self._rows[query.id], np.zeros(())
        if self._weight > 0:
            similarities = similarities + self._weight * (self._images @ self._query_images[row])
        if self._weight < 1:
            similarities = similarities + (1 - self._weight) * (self._texts @ self._query_texts[row].T).toarray()[:, 0]
        return np.round(similarities, DIGITS)

    def among(self, indices: np.ndarray) -> np.ndarray:
        """Return (n, n) similarities of some support examples to each other."""
        similarities = np.zeros(())
        if self._weight > 0:
            similarities = similarities + self._weight * (self._images[indices] @ self._images[indices].T)
        if self._weight < 1:
            similarities = similarities + (1 - self._weight) * (self._texts[indices] @ self._texts[indices].T).toarray()
        return np.round(similarities, DIGITS)

    def nearest(self, query: Example, ties: Sequence[int]) -> np.ndarray:
        """Return (S,) indices of all support examples, nearest first; equals in the order of `ties`."""
        return np.lexsort((np.asarray(ties), -self.similarity(query)))

    def diverse(self, query: Example, ties: Sequence[int], trade: float) -> Iterator[int]:
        """Yield indices by maximal marginal relevance (Carbonell and Goldstein 1998), then the rest by similarity.

        Each has the largest `trade` x similarity to the query - (1 - `trade`) x similarity to the nearest chosen.
        The sequence does not depend on how many are taken, so demonstrations stay nested over shots.
        """
        order = self.nearest(query, ties)
        pool, similarity = order[:POOL], self.similarity(query)[order[:POOL]]
        between = self.among(pool)
        closest = np.zeros(len(pool))
        left = np.ones(len(pool), dtype=bool)
        for step in range(len(pool)):
            worth = np.where(left, trade * similarity - (1 - trade) * (closest if step else 0.0), -np.inf)
            best = int(worth.argmax())
            left[best] = False
            closest = np.maximum(closest, between[best]) if step else between[best]
            yield int(pool[best])
        yield from order[POOL:].tolist()


def _image(example: Example) -> EncodedImage:
    if example.turn.image is None:
        raise UserError(f"item {example.id} has no image to compare; use demos=rices_text")
    return example.turn.image
