"""What a task is: data, `episode` (what to show for one query) and `score` (what an answer is worth).

The loop in `eval.runner` knows tasks through this protocol only. A task does not know the model, the tokenizer, the
batch or the ablation; an episode is a plain value, so the same one can be shown with its images shuffled or blanked.

A prompt is a sequence of turns, each an image and the text that belongs to it. The text of a turn has four parts:
`question` is given and never learnt ("what colour is the circle?"), `lead` is a fixed start of the answer which the
query's prompt carries as well (" It is a"), `answer` is what the model must say and is judged by ("red"), `tail` a
fixed end ("."). The question is a text node of its own; lead, answer and tail are one node. As in a training page each
node is tokenised alone: this makes prompts equal to training pages, token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from eval.hashing import content_hash as content_hash
from eval.spec import SourceSpec as SourceSpec
from eval.spec import TaskSpec as TaskSpec


@dataclass(frozen=True)
class EncodedImage:
    """One image, or a clip when it has several frames, as encoded files. Decoded only if a model must see it."""

    frames: tuple[bytes, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the files: equal for identical images, whatever they are called."""
        digest = hashlib.sha256()
        for frame in self.frames:
            digest.update(hashlib.sha256(frame).digest())
        return digest.hexdigest()


class StoredImage(EncodedImage):
    """An image that is read each time it is needed, so that thousands of them cost no memory.

    `read` gives the encoded frames; `file` is what must exist for that, where it is a file (or folder) of its own.
    """

    file: Path | None

    def __init__(self, read: Callable[[], tuple[bytes, ...]], file: Path | None = None) -> None:
        vars(self).update(_read=read, file=file)  # the class is frozen

    def __repr__(self) -> str:
        return f"StoredImage({str(self.file)!r})"

    @property
    def frames(self) -> tuple[bytes, ...]:
        """The frames, read now."""
        return vars(self)["_read"]()


@dataclass(frozen=True)
class Turn:
    """An image (None: a text-only demonstration) and its text, in the parts told in the module's docstring."""

    image: EncodedImage | None
    question: str
    lead: str
    answer: str
    tail: str = ""
    rationale: str = ""  # why, where the data say so; shown by chains of thought alone
    more: tuple[tuple[EncodedImage, str], ...] = ()  # of a question about several: a further image, the text behind it

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """All of them, in order."""
        first = () if self.image is None else (self.image,)
        return (*first, *(image for image, _ in self.more))

    @property
    def pieces(self) -> tuple[tuple[EncodedImage | None, str], ...]:
        """The question as it is shown: each image with the text up to the next."""
        return ((self.image, self.question), *self.more)

    @property
    def asked(self) -> str:
        """The question for reading; the first image stands before it, `<image>` marks the others' places."""
        return self.question + "".join(f"<image>{text}" for _, text in self.more)

    def with_images(self, images: Sequence[EncodedImage]) -> Turn:
        """The same with other images in their places. Of none, the text alone is left."""
        if not images:
            question = self.question + "".join(text for _, text in self.more)
            return replace(self, image=None, question=question, more=())
        more = tuple((image, text) for image, (_, text) in zip(images[1:], self.more, strict=True))
        return replace(self, image=images[0], more=more)

    def asking(self, text: str) -> Turn:
        """The same with `text` behind the question."""
        if not self.more:
            return replace(self, question=f"{self.question}{text}")
        *before, (image, last) = self.more
        return replace(self, more=(*before, (image, f"{last}{text}")))

    @property
    def text(self) -> str:
        """Lead, answer and tail: the text node that the model learns."""
        return f"{self.lead}{self.answer}{self.tail}"


@dataclass(frozen=True)
class Example:
    """One item of a task's data, in the query or in the support set.

    `golds` are the accepted answers, the first being the one shown in demonstrations; `label` is the image's class
    where there is one; `kind` groups the report; `cluster` names what makes scores dependent (the image).
    """

    id: str
    turn: Turn
    golds: tuple[str, ...]
    kind: str = ""
    label: str = ""
    candidates: tuple[str, ...] = ()  # the item's own closed answers
    group: str = ""  # what the data set calls the image (or what else ties scores together)
    is_open: bool = False  # its answer is generated even where the task ranks

    @property
    def cluster(self) -> str:
        """Scores of the same image are not independent of each other."""
        if self.group:
            return self.group
        return self.turn.image.sha256 if self.turn.image is not None else self.id


@dataclass(frozen=True)
class Frame:
    """What stands around the turns of a prompt; by default nothing but the end-of-chunk token behind each one."""

    prefix: str = ""  # once, at the head: an instruction
    before: str = ""  # ahead of every turn's image
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
