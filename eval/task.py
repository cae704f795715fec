"""What a task is: data, `episode` (what to show for one query) and `score` (what an answer is worth).

The loop in `eval.runner` knows tasks through this protocol only. A task does not know the model, the tokenizer, the
batch or the ablation; an episode is a plain value, so the same one can be shown with its pictures shuffled or blanked.

A prompt is a sequence of turns, each a picture and the text that belongs to it. The text of a turn has four parts:
`question` is given and never learnt ("what colour is the circle?"), `lead` is a fixed start of the answer which the
query's prompt carries as well (" It is a"), `answer` is what the model must say and is judged by ("red"), `tail` a
fixed end ("."). The question is a text node of its own; lead, answer and tail are one node. As in a training page each
node is tokenised alone: this makes prompts equal to training pages, token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol


@dataclass(frozen=True)
class Picture:
    """One picture, or a clip when it has several frames, as encoded files. Decoded only if a model must see it."""

    frames: tuple[bytes, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the files: equal for identical pictures, whatever they are called."""
        digest = hashlib.sha256()
        for frame in self.frames:
            digest.update(hashlib.sha256(frame).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Turn:
    """A picture (None: a text-only demonstration) and its text, in the parts told in the module's docstring."""

    picture: Picture | None
    question: str
    lead: str
    answer: str
    tail: str = ""
    rationale: str = ""  # why, where the data say so; shown by chains of thought alone

    @property
    def text(self) -> str:
        """Lead, answer and tail: the text node that the model learns."""
        return f"{self.lead}{self.answer}{self.tail}"


@dataclass(frozen=True)
class Document:
    """One item of a task's data, in the query or in the support set.

    `golds` are the accepted answers, the first being the one shown in demonstrations; `label` is the picture's class
    where there is one; `kind` groups the report; `cluster` names what makes scores dependent (the picture).
    """

    id: str
    turn: Turn
    golds: tuple[str, ...]
    kind: str = ""
    label: str = ""

    @property
    def cluster(self) -> str:
        """Scores of the same picture are not independent of each other."""
        return self.turn.picture.sha256 if self.turn.picture is not None else self.id


@dataclass(frozen=True)
class Episode:
    """One query with its demonstrations, far end first. `candidates` is empty when the answer is generated."""

    query_id: str
    demos: tuple[Turn, ...]
    demo_ids: tuple[str, ...]
    query: Turn
    golds: tuple[str, ...]
    kind: str
    cluster: str
    candidates: tuple[str, ...] = ()
    excluded: int = 0  # drawn as demonstrations and refused by the leakage guard
    refused: tuple[tuple[str, int], ...] = ()  # the same by the guard's reason


@dataclass(frozen=True)
class Baselines:
    """What is reached without looking. A score says nothing unless these stand beside it; None where undefined."""

    chance: float | None
    constant: float | None  # the best constant answer, chosen on the support set
    constant_answer: str | None


class Task(Protocol):
    """What the loop needs of a task. `hash` covers the task's definition and its data, never the model."""

    name: str
    hash: str
    max_new_tokens: int
    description: dict[str, object]

    def query_ids(self) -> Sequence[str]:
        """All queries in the task's fixed order; a limit takes the first ones."""
        ...

    def max_shots(self) -> int:
        """The most demonstrations (a class, for binding) that the data allow for every query."""
        ...

    def episode(self, query_id: str, shots: int, seed: int) -> Episode:
        """A pure function of the task's hash and its arguments."""
        ...

    def score(self, answer: str, episode: Episode) -> float:
        """In [0, 1]."""
        ...

    def baselines(self, query_ids: Sequence[str]) -> Baselines:
        """For these queries."""
        ...


def content_hash(*parts: object) -> str:
    """Hex SHA-256 of the parts' `repr`s, each with its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        blob = repr(part).encode()
        digest.update(f"{len(blob)}:".encode() + blob)
    return digest.hexdigest()


@dataclass(kw_only=True)
class SourceSpec:
    """Where a task's items come from."""

    format: str = "pages"
    """pages: shards of `python -m data prepare`; csv: a table with columns picture, answer and optionally question, id,
    kind, its picture paths relative to the table."""
    path: str = ""
    """Folder of shards, or the CSV file."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which fact of a page's `meta` (or which column) is the question, answer, kind or label; what is not named here
    is the page's own text."""
    max_items: int = 4096
    """Items read at most, in file order."""


@dataclass(kw_only=True)
class TaskSpec:
    """One YAML under `hydra/task/`. Every field is checked before a model is loaded."""

    kind: str = "documents"
    """documents: demonstrations are other items with their answers; binding: new names for classes of pictures."""
    source: SourceSpec = field(default_factory=SourceSpec)
    support: SourceSpec | None = None
    """Where demonstrations come from; null splits `source`: the first `queries` in hash order ask, the rest show."""
    queries: int = 200
    """Queries asked at most (items of `source`; episodes for binding)."""
    question: str = "{question}"
    """The question's text node, `{question}` standing for the item's own question."""
    lead: str = ""
    """Fixed start of the answer's text node, part of the query's prompt too; a space where answers begin with one."""
    tail: str = ""
    """Fixed end of the answer's text node, shown in demonstrations and ignored in answers."""
    output: str = "generate"
    """generate: greedy decoding; rank: the most probable of the candidates (sum of token log-probabilities)."""
    candidates: list[str] = field(default_factory=list)
    """Closed answers for rank; empty takes every answer of the support set of the query's kind."""
    metric: str = "exact_match"
    """One of eval.metrics.text.SCORES."""
    demos: str = "random"
    """Which demonstrations a query gets: a name of eval.demos.SAMPLERS, with a number or file behind a colon."""
    max_new_tokens: int = 32
    """Longest generated answer, in tokens."""
    ways: int = 2
    """Binding: classes in an episode. Shots are examples of each."""
    min_pictures: int = 9
    """Binding: classes with fewer different pictures are left out; one more than the most shots."""
    names: list[str] = field(default_factory=list)
    """Binding: names to give; empty reads them from `names_source`."""
    names_source: SourceSpec | None = None
    """Binding: pages whose meta lists `names`."""
