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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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


class StoredPicture(Picture):
    """A picture that is read each time it is needed, so that thousands of them cost no memory.

    `read` gives the encoded frames; `file` is what must exist for that, where it is a file (or folder) of its own.
    """

    file: Path | None

    def __init__(self, read: Callable[[], tuple[bytes, ...]], file: Path | None = None) -> None:
        vars(self).update(_read=read, file=file)  # the class is frozen

    def __repr__(self) -> str:
        return f"StoredPicture({str(self.file)!r})"

    @property
    def frames(self) -> tuple[bytes, ...]:
        """The frames, read now."""
        return vars(self)["_read"]()


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
    candidates: tuple[str, ...] = ()  # the item's own closed answers
    group: str = ""  # what the data set calls the picture (or what else ties scores together)

    @property
    def cluster(self) -> str:
        """Scores of the same picture are not independent of each other."""
        if self.group:
            return self.group
        return self.turn.picture.sha256 if self.turn.picture is not None else self.id


@dataclass(frozen=True)
class Frame:
    """What stands around the turns of a prompt; by default nothing but the end-of-chunk token behind each one."""

    prefix: str = ""  # once, at the head: an instruction
    before: str = ""  # ahead of every turn's picture
    separator: str = ""  # behind every demonstration (and its end-of-chunk token)
    end_of_chunk: bool = True


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
    frame: Frame = Frame()
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
    """pages: shards of `python -m data prepare`; csv and jsonl: a table of one's own with columns picture, answer and
    optionally question, id, kind, choices; the others are data sets' own files, see eval/formats."""
    path: str = ""
    """Folder of shards, or the file."""
    annotations: str = ""
    """A second file that some data sets keep their answers (or splits) in."""
    images: str = ""
    """Folder of the pictures or videos, or a pattern such as `val2014/COCO_val2014_{image_id:012d}.jpg`."""
    split: str = ""
    """Which split of a file that holds several; `a+b` takes both."""
    only: dict[str, str] = field(default_factory=dict)
    """Items are taken only if these fields have these values, for example {q_lang: en}."""
    annotators: int | None = None
    """How many answers every question must have; another number stops the run."""
    frames: int = 8
    """Frames taken from a video, evenly spread."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which fact of a page's `meta` (or which column) is the question, answer, kind or label; what is not named here
    is the page's own text."""
    max_items: int | None = 4096
    """Items read at most, in file order; null reads all."""


@dataclass(kw_only=True)
class TaskSpec:
    """One YAML under `hydra/task/`. Every field is checked before a model is loaded."""

    kind: str = "documents"
    """documents: demonstrations are other items with their answers; binding: new names for classes of pictures."""
    source: SourceSpec = field(default_factory=SourceSpec)
    support: SourceSpec | None = None
    """Where demonstrations come from; null splits `source`: the first `queries` in hash order ask, the rest show."""
    root: str = ""
    """Folder that the relative paths of `source` and `support` start from."""
    published: dict[str, str] = field(default_factory=dict)
    """Files that the task needs below `root`, and where each is published; for `python -m eval prepare`."""
    expected: int | None = None
    """Queries in the published split, which `prepare` compares with."""
    support_size: int | None = None
    """Items of `support` used, chosen by their ids alone; null uses all."""
    queries: int | None = 200
    """Queries asked at most (items of `source`; episodes for binding); null asks all."""
    form: str = ""
    """Which of a protocol's prompts the task takes: caption, vqa, choice and so on; see hydra/protocol."""
    prefix: str = ""
    """Text at the head of the prompt: an instruction."""
    before: str = ""
    """Text ahead of every picture."""
    separator: str = ""
    """Text behind every demonstration."""
    end_of_chunk: bool = True
    """Whether a demonstration (and a ranked answer) ends with the end-of-chunk token; without it, with `separator`."""
    options: str = "lines"
    """How `{options}` in a question is written: lines (`A. red`, one a line) or inline (`(A) red (B) blue`)."""
    answer_as: str = "text"
    """Multiple choice: whether the answer is the option's text or its letter."""
    demo_answer: str = "first"
    """Which of several annotators' answers a demonstration shows: first or majority."""
    zero_shot: str = "none"
    """At 0 shots: none, or two_text, which shows two demonstrations without their pictures (they are no shots).
    two_text_first_picture is a historic fault: the query is then shown with a demonstration's picture."""
    num_beams: int = 1
    """Beams of a generated answer."""
    length_penalty: float = 1.0
    """Exponent of the length that beam search divides by."""
    cut: list[str] = field(default_factory=list)
    """A generated answer ends where one of these strings begins."""
    remove: str = ""
    """Characters taken out of a generated answer."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the whole set, names of eval.metrics.table.METRICS, beside the mean of `metric`."""
    question: str = "{question}"
    """The question's text node; `{question}` is the item's own question, `{options}` its choices, and what else a
    format's items have may be named likewise."""
    lead: str = ""
    """Fixed start of the answer's text node, part of the query's prompt too; a space where answers begin with one."""
    tail: str = ""
    """Fixed end of the answer's text node, shown in demonstrations and ignored in answers."""
    output: str = "generate"
    """generate: greedy decoding; rank: the most probable of the candidates (sum of token log-probabilities)."""
    candidates: list[str] = field(default_factory=list)
    """Closed answers for rank; empty takes every answer of the support set of the query's kind."""
    metric: str = "exact_match"
    """Score of one answer: a name of eval.metrics.text.SCORE_NAMES."""
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
