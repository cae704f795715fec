"""Tasks whose demonstrations are other items with their answers: captions and question answering.

If the answers are a closed set they are ranked, by default by the sum of their tokens' log-probabilities, and there is
nothing to parse; otherwise the answer is generated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from eval.demonstrations.retrieval import Retriever
from eval.demonstrations.samplers import OF_OWN, draw, parse_sampler, read_listed
from eval.metrics.stems import Stems
from eval.metrics.text import clean, scorer
from eval.spec import TaskSpec
from eval.task import (
    Baselines,
    Embedder,
    Episode,
    Example,
    Frame,
    Task,
    Turn,
    content_hash,
    generator,
    hash_order,
    history_of,
)
from flamingo.errors import UserError

LOCATIONS = ("source", "support", "root", "published", "expected", "candidates_from")
"""Settings that a task's hash leaves out: the same data elsewhere is the same task."""
_LATER = (
    "form prefix before separator end_of_chunk options answer_as demo_answer zero_shot num_beams length_penalty cut "
    "remove metrics support_size ranking rank_end open_metric stem ask own_names chat templates class_names "
    "captions_each history"
)
LATER = frozenset(_LATER.split())
"""Settings that came later: they count in the hash where they are not at their default, so older tasks keep theirs."""


_HASHED_KEYS = {"min_images": "min_pictures"}
_HASHED_VALUES = {"examples": "documents", "two_text_first_image": "two_text_first_picture"}
"""Earlier names, which hashes keep: demonstrations are drawn by the hash, so new ones would change every result."""


def definition_of(spec: TaskSpec) -> dict[str, object]:
    """Return the settings that are part of a task's identity, under the names that its hash uses."""
    defaults = asdict(TaskSpec())
    known = {f.name for f in fields(spec)}
    assert known >= {*LOCATIONS, *LATER}
    definition = {
        _HASHED_KEYS.get(key, key): value
        for key, value in asdict(spec).items()
        if key not in LOCATIONS and (key not in LATER or value != defaults[key])
    }
    for key in definition.keys() & {"kind", "zero_shot"}:
        definition[key] = _HASHED_VALUES.get(definition[key], definition[key])
    return definition


class ExampleTask(Task):
    """Queries and support are examples. `support=None` splits `examples`: the first in hash order are the queries.

    `vocabulary` are the candidates of `candidates_from`, `stems` those of `stem`.
    """

    def __init__(
        self,
        name: str,
        spec: TaskSpec,
        examples: Sequence[Example],
        support: Sequence[Example] | None = None,
        *,
        vocabulary: Sequence[str] = (),
        stems: Stems | None = None,
    ) -> None:
        self.name = name
        self.max_new_tokens = spec.max_new_tokens
        self.description: dict[str, object] = asdict(spec)
        order = [examples[index] for index in hash_order([example.id for example in examples], "queries", name)]
        queries = order[: spec.queries]
        rest = [] if spec.queries is None else order[spec.queries :]  # if all are queries, none is left to show
        self._own = any(example.support for example in examples)
        self._support = [] if self._own else list(rest if support is None else support)
        _check_overlap(name, queries, support)
        self._queries = {example.id: example for example in queries}
        self._turns = {example.id: example for example in examples if spec.history == "own"}
        shown = examples if spec.history == "own" else queries
        if twice := [key for key, count in Counter(example.id for example in shown).items() if count > 1]:
            raise UserError(f"task {name}: two queries have the id {twice[0]!r}; ids must be unique")
        if not queries:
            raise UserError(f"task {name}: source.path={spec.source.path} has no item to ask about")
        self._spec = spec
        self.metrics = tuple(spec.metrics)
        self.num_beams, self.length_penalty = spec.num_beams, spec.length_penalty
        self._frame = Frame(spec.prefix, spec.before, spec.separator, spec.end_of_chunk, spec.chat)
        self.ranking, self.rank_end = spec.ranking, spec.rank_end
        self._closed = tuple(vocabulary or spec.candidates)
        self._stems = stems
        self._score = scorer(spec.metric, [query.golds for query in queries])
        self._open_score = scorer(spec.open_metric or spec.metric, [query.golds for query in queries])
        definition = definition_of(spec)
        self._sampler = parse_sampler(spec.demos)
        self._check_own(queries)
        self._listed = read_listed(self._sampler.path, self._support) if self._sampler.name == "file" else None
        self._retriever: Retriever | None = None
        # The content of a list of demonstrations counts, not its path.
        definition |= {} if self._listed is None else {"demos": sorted(self._listed.items())}
        definition |= {"vocabulary": tuple(vocabulary)} if vocabulary else {}
        definition |= {} if stems is None else {"stems": stems.hash}
        self.description |= {} if stems is None else {"stems": stems.description}
        self.description |= {"vocabulary": f"{len(vocabulary)} answers"} if vocabulary else {}
        own = [demo for query in queries for demo in query.support]
        self.hash = content_hash(name, definition, *(_identity(d) for d in [*queries, *self._support, *own]))
        self._answers = _answers_by_kind(self._support)

    def query_ids(self) -> Sequence[str]:
        """Return the ids in hash order."""
        return list(self._queries)

    def max_shots(self) -> int:
        """Return the size of the support set; of those that queries bring the smallest, with `given` the largest."""
        if not self._own:
            return len(self._support)
        if self._sampler.name == "given":
            return max(len(query.support) for query in self._queries.values())
        return min(map(self._fewest, self._queries.values()))

    def _fewest(self, query: Example) -> int:
        """Return how many demonstrations of a query's own there are, whichever of the other classes are drawn."""
        if self._sampler.name != "balanced":
            return len(query.support)
        counts = Counter(demo.label for demo in query.support)
        return counts.pop(query.label, 0) + sum(sorted(counts.values())[: self._spec.ways - 1])

    def _check_own(self, queries: Sequence[Example]) -> None:
        """Raise UserError where `demos` does not fit with what the queries bring, or do not bring."""
        where = f"task {self.name}: demos={self._spec.demos}"
        if not self._own:
            if self._sampler.name == "given":
                raise UserError(f"{where} shows what each query brings, and these bring nothing; use another of demos")
            return
        if self._sampler.name not in OF_OWN or self._spec.support is not None:
            raise UserError(
                f"{where}: the queries bring their own demonstrations; leave out support=, and set demos to one of "
                f"{', '.join(OF_OWN)}"
            )
        if bare := [query.id for query in queries if not query.support]:
            raise UserError(f"{where}: query {bare[0]} brings no demonstrations, which others do; correct the file")
        for query in queries if self._sampler.name == "balanced" else ():
            if (ways := len({query.label, *(demo.label for demo in query.support)})) < self._spec.ways:
                raise UserError(f"{where}, ways={self._spec.ways}: query {query.id} brings {ways} classes; lower ways")

    def _may_show(self, query: Example, seed: int, sampler: str) -> Sequence[Example]:
        """Return what demonstrations are drawn from; balanced ones of a query's own are of its class and `ways` - 1."""
        if not self._own or sampler != "balanced":
            return query.support if self._own else self._support
        others = sorted({demo.label for demo in query.support} - {query.label})
        order = generator("ways", self.hash, seed, query.id).permutation(len(others)).tolist()
        kept = {query.label, *(others[index] for index in order[: self._spec.ways - 1])}
        return [demo for demo in query.support if demo.label in kept]

    def episode(self, query_id: str, shots: int, seed: int) -> Episode:
        """Return the query with `shots` demonstrations from the support set; at 0 shots as `zero_shot` defines."""
        if shots == 0 and self._spec.zero_shot != "none":
            fixed = self._spec.zero_shot == "two_text_fixed"
            return self._with_two_texts(self._episode(query_id, 2, seed, "fixed" if fixed else self._spec.demos))
        return self._episode(query_id, shots, seed, self._spec.demos)

    def _episode(self, query_id: str, shots: int, seed: int, sampler: str) -> Episode:
        query = self._turns.get(query_id) or self._queries[query_id]
        demos = draw(
            self._may_show(query, seed, sampler),
            query,
            shots,
            task_hash=self.hash,
            seed=seed,
            sampler=sampler,
            retriever=self._retriever,
            listed=self._listed,
        )
        return Episode(
            query_id=query.id,
            demos=tuple(example.turn for example in demos.examples),
            demo_ids=tuple(example.id for example in demos.examples),
            query=query.turn,
            golds=query.golds,
            kind=query.kind,
            cluster=query.cluster,
            candidates=self._candidates(query),
            excluded=demos.excluded,
            refused=demos.refused,
            frame=self._frame,
        )

    def earlier(self, query_id: str) -> Sequence[str]:
        """Return the turns before this one, with history=own."""
        return [turn.id for turn in self._turns[query_id].said] if self._turns else ()

    def continued(self, episode: Episode, answers: Sequence[str]) -> Episode:
        """Put the model's answers in the place of the data's."""
        if not answers:
            return episode
        said = self._turns[episode.query_id].said
        own = [replace(turn, answer=answer) for turn, answer in zip(said, answers, strict=True)]
        question = episode.query.question.replace(history_of(said), history_of(own), 1)
        return replace(episode, query=replace(episode.query, question=question))

    def connect(self, embed: Embedder, query_ids: Sequence[str]) -> None:
        """Embed support and queries if demonstrations are chosen by similarity."""
        if not self._sampler.retrieves or not self._support:
            return
        asked = dict.fromkeys(name for query_id in query_ids for name in (*self.earlier(query_id), query_id))
        queries = [self._turns.get(name) or self._queries[name] for name in asked]
        weight = self._sampler.weight(all(d.turn.image is not None for d in [*self._support, *queries]))
        try:
            self._retriever = Retriever(self._support, queries, weight, embed)
        except UserError as error:
            raise UserError(f"task {self.name}: demos={self._spec.demos}: {error}") from None
        self.description["retrieval"] = {"images": weight, "encoder": embed.name}

    def content_free(self, turn: Turn) -> Turn:
        """Return the query with a grey image and N/A for the question."""
        question = self._spec.question.replace("{question}", "N/A") if turn.question else ""
        return replace(turn.with_images(turn.images[:1]) if turn.more else turn, question=question).blank()

    def _with_two_texts(self, episode: Episode) -> Episode:
        """Take the images from the demonstrations; with the historic fault the query gets the first one's image."""
        query = episode.query
        if self._spec.zero_shot == "two_text_first_image":
            query = replace(query, image=episode.demos[0].image)
        return replace(episode, demos=tuple(demo.with_images(()) for demo in episode.demos), query=query)

    def parse(self, raw: str, episode: Episode) -> str:
        """Return the answer in a completion; "" if there is none."""
        answer = clean(raw, tail=episode.query.tail, cut=self._spec.cut, remove=self._spec.remove)
        return answer if self._stems is None else self._stems(answer)

    def _candidates(self, query: Example) -> tuple[str, ...]:
        if self._spec.output != "rank" or query.is_open:
            return ()
        if query.candidates or self._closed:
            return query.candidates or self._closed
        answers = self._answers.get(query.kind)
        if not answers:
            raise UserError(
                f"task {self.name}: output=rank has no candidates for kind {query.kind!r} (query {query.id}); "
                "list candidates= or enlarge the support set"
            )
        return tuple(sorted(answers))

    def score(self, answer: str, episode: Episode) -> float:
        """Return the task's metric."""
        score = self._open_score if self._queries[episode.query_id].is_open else self._score
        return score(answer, episode.golds)

    def baselines(self, query_ids: Sequence[str]) -> Baselines:
        """Return chance (if ranked), and the score of each kind's most frequent answer in the support set."""
        queries = [self._queries[query_id] for query_id in query_ids]
        chance = None
        if self._spec.output == "rank":
            closed = [self._candidates(query) for query in queries]
            chance = sum(1 / len(several) for several in closed if several) / len(queries)  # an open one: 0
        if self._own:
            modes = [_mode(Counter(demo.turn.answer for demo in query.support)) for query in queries]
            own = [self._score(mode, query.golds) for mode, query in zip(modes, queries, strict=True)]
            return Baselines(chance, sum(own) / len(own), "the most frequent answer that the query itself brings")
        if not self._support:
            return Baselines(chance, None, None)
        overall = sum(self._answers.values(), Counter())
        constant = {query.kind: _mode(self._answers.get(query.kind) or overall) for query in queries}
        scores = [
            (self._open_score if query.is_open else self._score)(constant[query.kind], query.golds) for query in queries
        ]
        answer = ", ".join(sorted({constant[kind] if not kind else f"{kind}: {constant[kind]}" for kind in constant}))
        return Baselines(chance, sum(scores) / len(scores), answer)


def _check_overlap(name: str, queries: Sequence[Example], support: Sequence[Example] | None) -> None:
    """Raise UserError for a support set that contains queries: their answers would be shown to each other."""
    asked = {_identity(example) for example in queries}
    both = sorted(example.id for example in support or () if _identity(example) in asked)
    if both:
        raise UserError(
            f"task {name}: {len(both)} of its {len(queries)} queries are also in the support set (first: {both[0]}); "
            "give another support=, or leave it out so that the source is split"
        )


def _identity(example: Example) -> tuple[str, str, tuple[str, ...], str]:
    return example.id, example.cluster, example.golds, example.turn.question


def _answers_by_kind(support: Sequence[Example]) -> dict[str, Counter[str]]:
    answers: dict[str, Counter[str]] = {}
    for example in support:
        answers.setdefault(example.kind, Counter())[example.turn.answer] += 1
    return answers


def _mode(answers: Counter[str]) -> str:
    return min(answers, key=lambda answer: (-answers[answer], answer))
