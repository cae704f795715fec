"""Zero-shot classification and image-text retrieval: which vectors are compared with which, and what is right.

Both rank a list of candidates for each query by cosine. Zero-shot: the queries are images, a candidate is a class,
whose vector is the mean over the templates' texts (Radford et al. 2021, section 3.1.4), made as open_clip makes it.
Retrieval: every image asks for its captions among all captions, and every caption for its image among all images.

Letters: N queries, C candidates, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from eval.retrieval.encoder import DIGITS, DualEncoder
from eval.samples import Cell, Sample
from eval.spec import TEMPLATE_SETS, TaskSpec
from eval.task import Baselines, Episode, Example, Task, Turn, content_hash, hash_order
from eval.tasks.build import check_spec, vocabulary_of
from eval.tasks.examples import definition_of
from eval.tasks.sources import read_examples
from flamingo.errors import UserError

KEPT = 10
"""Best candidates that a sample keeps: as many as R@10 asks for."""


@dataclass(frozen=True)
class Ranking:
    """Queries of one direction, and what they are compared with; vectors are (N, E) and (C, E)."""

    kind: str
    queries: Sequence[Example]
    query_vectors: np.ndarray
    names: Sequence[str]
    vectors: np.ndarray


class MatchingTask(Task):
    """What both kinds share: queries, no demonstrations, a right answer among the candidates."""

    max_new_tokens = 0

    def __init__(self, name: str, spec: TaskSpec, queries: Sequence[Example], definition: object) -> None:
        self.name, self.metrics = name, tuple(spec.metrics)
        self.description: dict[str, object] = asdict(spec)
        self._queries = {query.id: query for query in queries}
        if len(self._queries) != len(queries):
            raise UserError(f"task {name}: two of its items have the same id; ids must be unique")
        items = [(query.id, query.cluster, query.golds) for query in queries]
        self.hash = content_hash(name, definition_of(spec), definition, items)

    def query_ids(self) -> Sequence[str]:
        """Return all queries."""
        return list(self._queries)

    def max_shots(self) -> int:
        """Return 0: nothing is shown."""
        return 0

    def episode(self, query_id: str, shots: int, seed: int) -> Episode:
        """Return the query alone."""
        query = self._queries[query_id]
        return Episode(query.id, (), (), query.turn, query.golds, query.kind, query.cluster)

    def score(self, answer: str, episode: Episode) -> float:
        """Return 1 if the best candidate is right."""
        return float(answer in episode.golds)

    def baselines(self, query_ids: Sequence[str]) -> Baselines:
        """Return chance: the mean share of right candidates."""
        chances = [len(query.golds) / self._candidates(query) for query in map(self._queries.__getitem__, query_ids)]
        return Baselines(sum(chances) / len(chances), None, None)

    def _candidates(self, query: Example) -> int:
        raise NotImplementedError

    def rankings(self, encoder: DualEncoder, limit: int | None) -> Iterator[Ranking]:
        """Encode what is compared, at most `limit` queries of each direction; the candidates are always all."""
        raise NotImplementedError

    def samples(self, encoder: DualEncoder, limit: int | None) -> Iterator[Sample]:
        """Yield a sample for each query."""
        for ranking in self.rankings(encoder, limit):
            for start in range(0, len(ranking.queries), 256):
                part = slice(start, start + 256)
                cosines = np.round(ranking.query_vectors[part] @ ranking.vectors.T, DIGITS)
                order = np.argsort(-cosines, axis=1, kind="stable")[:, :KEPT]
                logits = encoder.scale * cosines.astype(np.float64)
                top = logits.max(1, keepdims=True)
                log_probs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
                for row, query in enumerate(ranking.queries[part]):
                    best = order[row]
                    yield self._sample(query, [ranking.names[at] for at in best], log_probs[row, best].tolist())

    def _sample(self, query: Example, names: list[str], log_probs: list[float]) -> Sample:
        image = query.turn.image
        return Sample(
            cell=Cell(self.name, 0, 0, "real"),
            query_id=query.id,
            demo_ids=(),
            turns=((None if image is None else image.sha256, query.turn.question),),
            raw=names[0],
            answer=names[0],
            golds=query.golds,
            score=self.score(names[0], self.episode(query.id, 0, 0)),
            kind=query.kind,
            cluster=query.cluster,
            candidates=tuple(names),
            log_probs=tuple(round(value, 4) for value in log_probs),
            images_sha256=() if image is None else (image.sha256,),
        )


class ZeroShotTask(MatchingTask):
    """Images, each of one of the classes; `vocabulary` are the classes where a file lists them."""

    def __init__(self, name: str, spec: TaskSpec, examples: Sequence[Example], vocabulary: Sequence[str] = ()) -> None:
        listed = [candidate for example in examples for candidate in example.candidates]
        golds = sorted({example.golds[0] for example in examples})
        self.classes = list(vocabulary or spec.candidates or dict.fromkeys(listed) or golds)
        if absent := [example for example in examples if example.golds[0] not in set(self.classes)]:
            raise UserError(
                f"task {name}: {len(absent)} of {len(examples)} items are of a class that is not among the "
                f"{len(self.classes)} candidates (first: {absent[0].id}, {absent[0].golds[0]!r}); complete candidates"
            )
        if len(self.classes) < 2:
            raise UserError(
                f"task {name}: there is one class, {self.classes[0]!r}; give the others as candidates=[...]"
            )
        self.texts = [
            [text.replace("{}", shown) for text in templates_of(spec)] for shown in _shown(name, spec, self.classes)
        ]
        order = hash_order([example.id for example in examples], "queries", name)
        chosen = [examples[index] for index in order[: spec.queries]]
        super().__init__(name, spec, chosen, self.texts)
        self.description |= {"classes": len(self.classes), "templates": len(self.texts[0])}

    def _candidates(self, query: Example) -> int:
        return len(self.classes)

    def rankings(self, encoder: DualEncoder, limit: int | None) -> Iterator[Ranking]:
        """Encode the classes' texts and the images."""
        queries = list(self._queries.values())[:limit]
        vectors = encoder.encode_texts([text for texts in self.texts for text in texts])
        means = vectors.reshape(len(self.classes), len(self.texts[0]), -1).mean(1)
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        yield Ranking("", queries, _image_vectors(self.name, encoder, queries), self.classes, means / norms)


class RetrievalTask(MatchingTask):
    """Images with captions; items of the same image (or group) are one image with several captions."""

    def __init__(self, name: str, spec: TaskSpec, examples: Sequence[Example]) -> None:
        images: dict[str, tuple[Example, list[str]]] = {}
        for example in examples:
            images.setdefault(example.cluster, (example, []))[1].extend(example.golds)
        keys = list(images)
        chosen = [keys[index] for index in hash_order(keys, "queries", name)[: spec.queries]]
        self._images, self._texts = [], []
        for key in chosen:
            example, captions = images[key]
            captions = captions[: spec.captions_each]
            ids = tuple(f"{example.id}.{number} {caption}" for number, caption in enumerate(captions))
            image = Turn(example.turn.image, "", "", ids[0])
            self._images.append(Example(f"image {example.id}", image, ids, "image to text", group=key))
            for caption, text_id in zip(captions, ids, strict=True):
                turn = Turn(None, caption, "", example.id)
                self._texts.append(Example(text_id, turn, (example.id,), "text to image", group=key))
        self._names = [query.golds[0] for query in self._texts]
        if len(self._images) < 2:
            raise UserError(f"task {name}: retrieval needs two images or more, and there is {len(self._images)}")
        super().__init__(name, spec, [*self._images, *self._texts], "retrieval")
        texts = [query.turn.question for query in self._texts]
        self.description |= {
            "gallery": {"images": len(self._images), "texts": len(texts)},
            "texts_that_occur_twice": len(texts) - len(set(texts)),  # of another image: counted as wrong, as elsewhere
        }

    def _candidates(self, query: Example) -> int:
        return len(self._images) if query.turn.image is None else len(self._texts)

    def rankings(self, encoder: DualEncoder, limit: int | None) -> Iterator[Ranking]:
        """Encode all images and all captions, and compare both ways."""
        images = _image_vectors(self.name, encoder, self._images)
        texts = encoder.encode_texts([query.turn.question for query in self._texts])
        image_names = list(dict.fromkeys(self._names))
        yield Ranking("image to text", self._images[:limit], images[:limit], [q.id for q in self._texts], texts)
        yield Ranking("text to image", self._texts[:limit], texts[:limit], image_names, images)


def _image_vectors(name: str, encoder: DualEncoder, queries: Sequence[Example]) -> np.ndarray:
    images = [query.turn.image for query in queries]
    if any(image is None for image in images):
        raise UserError(f"task {name}: some of its items have no image, so there is nothing to compare")
    if more := [query.id for query in queries if query.turn.more]:
        raise UserError(f"task {name}: item {more[0]} has several images; an encoder compares one")
    return encoder.encode_images([image for image in images if image is not None])


def templates_of(spec: TaskSpec) -> list[str]:
    """Return the templates, those of open_clip's sets written out."""
    import open_clip

    written: list[str] = []
    for template in spec.templates:
        if template in TEMPLATE_SETS:
            written += [make("{}") for make in getattr(open_clip, TEMPLATE_SETS[template])]
        else:
            written.append(template)
    return written


def _shown(name: str, spec: TaskSpec, classes: Sequence[str]) -> Sequence[str]:
    """Return what the templates call the classes."""
    if spec.class_names != "openai_imagenet":
        return classes
    import open_clip

    if len(classes) != len(open_clip.IMAGENET_CLASSNAMES):
        raise UserError(
            f"task {name}: class_names=openai_imagenet is for ImageNet's 1,000 classes in the order of their WordNet "
            f"ids, and the data have {len(classes)}; remove class_names"
        )
    return open_clip.IMAGENET_CLASSNAMES


def build_matching_task(name: str, spec: TaskSpec) -> MatchingTask:
    """Read the task's data. Raises UserError in one sentence for what is wrong with it."""
    check_spec(name, spec)
    examples = read_examples(name, spec, spec.source)
    if spec.kind == "retrieval":
        return RetrievalTask(name, spec, examples)
    return ZeroShotTask(name, spec, examples, vocabulary_of(name, spec, examples))
