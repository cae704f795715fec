"""Fast binding: two unseen classes, two unseen names, a few examples of each, then "what is this?".

An episode has `ways` classes with one name each, `shots` examples per class and a query image of one of the classes.
The answer is ranked among the episode's names, so chance is 1/ways. A model that ignores the images cannot score above
chance, because everything it could use is balanced exactly over the queries: whether the right name comes first among
the candidates, and whether it is the name shown last. With `own_names` the classes keep the names they have, which
training may have seen: at 0 shots it is naming among `ways` names.

Examples come in rounds of one image of each class; the k-shot prompt is the last k rounds of the (k + 1)-shot prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from eval.spec import TaskSpec
from eval.task import Baselines, Episode, Example, Task, Turn, content_hash, generator, hash_order
from flamingo.errors import UserError


class BindingTask(Task):
    """Episodes over a pool of labelled images (`Example.label`) and a list of names.

    Query i is an image of class i modulo the number of classes, classes and images in hash order.
    """

    def __init__(self, name: str, spec: TaskSpec, pool: Sequence[Example], names: Sequence[str]) -> None:
        self.name = name
        self.max_new_tokens = 0
        self._spec = spec
        self._ways = spec.ways
        every = _by_class(pool)
        self._own = {label: images[0].golds[0] for label, images in every.items()} if spec.own_names else {}
        names = list(self._own.values()) or names
        self.description: dict[str, object] = asdict(spec) | {"names": f"{len(names)} names"}
        self._names = sorted(set(names))
        self._shown = {label: [image for image in images if self._may_show(image)] for label, images in every.items()}
        self._classes = {label: every[label] for label, shown in self._shown.items() if len(shown) >= spec.min_images}
        if len(self._classes) < spec.ways or len(self._names) < spec.ways:
            raise UserError(
                f"task {name}: ways={spec.ways} needs as many classes and names, but there are only "
                f"{len(self._classes)} classes of at least {spec.min_images} images and {len(self._names)} names"
            )
        definition: tuple[object, ...] = (name, spec.question, spec.lead, spec.tail, spec.ways, tuple(self._names))
        if spec.ask or spec.own_names:  # which came later: tasks without them keep their hash
            definition += (spec.ask, spec.own_names)
        self.hash = content_hash(*definition, *((d.label, d.cluster) for c in self._classes.values() for d in c))
        self._queries = self._list_queries()
        if not self._queries:
            kinds = ", ".join(sorted({example.kind for example in pool})) or "not given"
            raise UserError(f"task {name}: ask={spec.ask} names no kind of image that can be asked; kinds are {kinds}")

    def _may_show(self, image: Example) -> bool:
        return not self._spec.ask or image.kind != self._spec.ask

    def _list_queries(self) -> dict[str, tuple[int, Example]]:
        labels = list(self._classes)
        order = [labels[index] for index in hash_order(labels, "classes", self.hash)]
        queries: dict[str, tuple[int, Example]] = {}
        depth = max(len(images) for images in self._classes.values())
        for rank in range(depth):
            for label in order:
                images = self._classes[label]
                enough = self._spec.queries is not None and len(queries) >= self._spec.queries
                if rank < len(images) and not enough:
                    index = hash_order([p.id for p in images], "queries", self.hash)[rank]
                    if self._spec.ask in ("", images[index].kind):
                        queries[images[index].id] = (len(queries), images[index])
        return queries

    def query_ids(self) -> Sequence[str]:
        """Return the ids of the query images, one class after another."""
        return list(self._queries)

    def max_shots(self) -> int:
        """Return the size of the smallest class less one, as it may be the query's class; of what may be shown."""
        return min(len(self._shown[label]) for label in self._classes) - (not self._spec.ask)

    def episode(self, query_id: str, shots: int, seed: int) -> Episode:
        """Return the query with `shots` examples of each class, in prompt order."""
        position, query = self._queries[query_id]
        rng = generator("episode", self.hash, seed, query_id)
        labels = list(self._classes)
        others = [labels[i] for i in rng.permutation(len(labels)) if labels[i] != query.label]
        if self._spec.own_names:  # two classes may have one name
            by_name: dict[str, str] = {}
            for label in [query.label, *others]:
                by_name.setdefault(self._own[label], label)
            names = list(by_name)[: self._ways]
            classes = [by_name[name] for name in names]
        else:
            classes = [query.label, *others[: self._ways - 1]]
            names = self._draw_names(rng.permutation(len(self._names)).tolist())
        label_names = dict(zip(classes, names, strict=True))
        drawn, excluded = zip(*(self._draw_images(label, query, shots, seed) for label in classes), strict=True)
        rounds: list[list[Example]] = []
        for index in range(shots):  # round 0 is next to the query
            order = generator("round", self.hash, seed, query_id, index).permutation(self._ways).tolist()
            if index == 0:  # the name shown last is the right one for exactly one query in `ways`
                last = position % self._ways
                order = [*(way for way in order if way != last), last]
            rounds.append([drawn[way][index] for way in order])
        demos = [example for examples in reversed(rounds) for example in examples]
        # Rotated by another digit of the position, so that first and last are balanced independently.
        turn = position // self._ways % self._ways
        candidates = tuple(names[-turn:] + names[:-turn]) if turn else tuple(names)
        return Episode(
            query_id=query_id,
            demos=tuple(self._turn(example, label_names[example.label]) for example in demos),
            demo_ids=tuple(f"{example.id}={label_names[example.label]}" for example in demos),
            query=self._turn(query, names[0]),
            golds=(names[0],),
            kind=query.kind,
            cluster=query.cluster,
            candidates=candidates,
            excluded=sum(excluded),
        )

    def _turn(self, example: Example, name: str) -> Turn:
        return Turn(example.turn.image, self._spec.question, self._spec.lead, name, self._spec.tail)

    def _draw_names(self, order: Sequence[int]) -> list[str]:
        """Return the first names in `order` that differ in start and end, so that each is known by its first token."""
        chosen: list[str] = []
        for index in order:
            name = self._names[index]
            if all(name[:2] != other[:2] and name[-2:] != other[-2:] for other in chosen):
                chosen.append(name)
            if len(chosen) == self._ways:
                return chosen
        raise UserError(
            f"task {self.name}: fewer than {self._ways} of its names differ in their first and last two letters"
        )

    def _draw_images(self, label: str, query: Example, shots: int, seed: int) -> tuple[list[Example], int]:
        images = self._shown[label]
        # "pictures" is only the name of a random stream: another name would draw other images.
        order = generator("pictures", self.hash, seed, query.id, label).permutation(len(images))
        allowed = [images[int(i)] for i in order if images[int(i)].cluster != query.cluster]
        if len(allowed) < shots:
            raise UserError(
                f"task {self.name}: shots={shots} needs {shots} images of class {label} other than the query's, "
                f"but there are {len(allowed)}; use fewer shots"
            )
        return allowed[:shots], len(images) - len(allowed)

    def score(self, answer: str, episode: Episode) -> float:
        """Return 1 for the query's name."""
        return float(answer == episode.golds[0])

    def baselines(self, query_ids: Sequence[str]) -> Baselines:
        """Return chance, 1/ways, and the score of always answering with the first candidate."""
        first = [self.episode(query_id, 0, 0) for query_id in query_ids]
        hits = sum(episode.candidates[0] == episode.golds[0] for episode in first)
        return Baselines(1 / self._ways, hits / len(first), "the first candidate")


def _by_class(pool: Sequence[Example]) -> dict[str, list[Example]]:
    """Return examples by label, labels sorted, identical images of a class once."""
    classes: dict[str, dict[str, Example]] = {}
    for example in sorted(pool, key=lambda example: example.id):
        classes.setdefault(example.label, {}).setdefault(example.cluster, example)
    return {label: list(classes[label].values()) for label in sorted(classes)}
