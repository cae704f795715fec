"""What the evaluation loop knows about a benchmark: the `Task` protocol, and the plain values that it passes around.

A task consists of data, `episode` (what to show for one query) and `score` (what an answer is worth). It does not know
the model, the tokenizer, the batch or the ablation. An episode is a plain value, so the same episode can be shown with
its images shuffled or blanked.

A prompt is a sequence of turns, each an image and its text. The text of a turn has four parts: `question` is given and
never in the loss ("what colour is the circle?"), `lead` is a fixed start of the answer that the query's prompt also
carries (" It is a"), `answer` is what the model has to generate and is scored on ("red"), and `tail` is a fixed end
("."). The question is one text node; lead, answer and tail together are another. Each node is tokenised on its own, as
in a training document, so prompts equal training documents token by token.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from flamingo.errors import UserError

GREY = (128, 128, 128)


@dataclass(frozen=True)
class EncodedImage:
    """One image, or a clip when it has several frames, as encoded files. Decoded only when a model has to see it.

    `names` say where the frames come from (a file, a shard's document, a table's row), for messages.
    """

    frames: tuple[bytes, ...]
    names: Sequence[str] = field(default=(), compare=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the files: equal for identical images, whatever their names."""
        digest = hashlib.sha256()
        for frame in self.frames:
            digest.update(hashlib.sha256(frame).digest())
        return digest.hexdigest()

    def label(self, frame: int) -> str:
        """Return what a message calls a frame."""
        names = self.names
        if len(names) == len(self.frames):
            return f"the image {names[frame]}"
        return f"the image {names[0]}, frame {frame + 1}" if names else f"the image with sha256 {self.sha256[:12]}"

    def blank(self) -> EncodedImage:
        """Return a grey image (or clip) of the size and number of frames that the model sees.

        Raises:
            UserError: it cannot be decoded; names its file.
        """
        return self._blank

    @cached_property
    def _blank(self) -> EncodedImage:
        from flamingo.vision.transform import to_rgb

        shapes = [to_rgb(frame, self.label(index)).shape for index, frame in enumerate(self.frames)]
        return EncodedImage(tuple(_grey((shape[-1], shape[-2])) for shape in shapes))


@lru_cache(maxsize=64)
def _grey(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, GREY).save(buffer, format="PNG")
    return buffer.getvalue()


class StoredImage(EncodedImage):
    """An image that is read each time it is needed, so that thousands of them use no memory.

    `read` returns the encoded frames; `file` is the file or folder that has to exist for that, if there is one; `names`
    returns the frames' names, by default the file's; `segment` says between which seconds of it the frames are, for a
    clip cut out of a video.
    """

    file: Path | None
    segment: tuple[float, float | None] | None

    def __init__(
        self,
        read: Callable[[], tuple[bytes, ...]],
        file: Path | None = None,
        names: Callable[[], Sequence[str]] | None = None,
        segment: tuple[float, float | None] | None = None,
    ) -> None:
        vars(self).update(_read=read, file=file, _names=names, segment=segment)  # the class is frozen

    def __repr__(self) -> str:
        return f"StoredImage({str(self.file)!r})"

    @property
    def frames(self) -> tuple[bytes, ...]:
        """The frames, read now. Raises UserError for a file that cannot be read (any more)."""
        try:
            return vars(self)["_read"]()
        except OSError as error:
            raise UserError(f"the image {self.file} cannot be read: {error.strerror or error}") from None

    @property
    def names(self) -> Sequence[str]:
        """What the frames are called."""
        names = vars(self)["_names"]
        return names() if names is not None else () if self.file is None else (str(self.file),)


@dataclass(frozen=True)
class Turn:
    """An image (None: a text-only demonstration) and its text, in the parts that the module's docstring describes."""

    image: EncodedImage | None
    question: str
    lead: str
    answer: str
    tail: str = ""
    rationale: str = ""  # the reason for the answer, where the data have one; shown only by chains of thought
    more: tuple[tuple[EncodedImage, str], ...] = ()  # further images of the question, each with the text after it

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """All images, in order."""
        first = () if self.image is None else (self.image,)
        return (*first, *(image for image, _ in self.more))

    @property
    def segments(self) -> tuple[tuple[EncodedImage | None, str], ...]:
        """The question as it is shown: each image with the text up to the next one."""
        return ((self.image, self.question), *self.more)

    @property
    def question_text(self) -> str:
        """The question for readers. The first image comes before it; `<image>` marks where the others are."""
        return self.question + "".join(f"<image>{text}" for _, text in self.more)

    def with_images(self, images: Sequence[EncodedImage]) -> Turn:
        """Return the turn with other images in the same positions. Without any, only the text is left."""
        if not images:
            question = self.question + "".join(text for _, text in self.more)
            return replace(self, image=None, question=question, more=())
        more = tuple((image, text) for image, (_, text) in zip(images[1:], self.more, strict=True))
        return replace(self, image=images[0], more=more)

    def blank(self) -> Turn:
        """Return the turn with grey images."""
        return self.with_images([image.blank() for image in self.images]) if self.images else self

    def with_question_suffix(self, text: str) -> Turn:
        """Return the turn with `text` appended to the question."""
        if not self.more:
            return replace(self, question=f"{self.question}{text}")
        *before, (image, last) = self.more
        return replace(self, more=(*before, (image, f"{last}{text}")))

    @property
    def text(self) -> str:
        """Lead, answer and tail: the text node that is in the loss."""
        return f"{self.lead}{self.answer}{self.tail}"


@dataclass(frozen=True)
class Said:
    """A turn that is over, of the item with this id."""

    id: str
    question: str
    answer: str


def history_of(said: Iterable[Said]) -> str:
    """Return what was said, as questions show it."""
    return "".join(f"Question: {turn.question}\nAnswer: {turn.answer}\n" for turn in said)


@dataclass(frozen=True)
class Example:
    """One item of a task's data, in the query set or in the support set.

    `golds` are the accepted answers, the first being the one shown in demonstrations; `label` is the image's class
    where there is one; `kind` groups the report; `cluster` names what makes scores dependent (the image).
    """

    id: str
    turn: Turn
    golds: tuple[str, ...]
    kind: str = ""
    label: str = ""
    candidates: tuple[str, ...] = ()  # the item's own closed answers
    group: str = ""  # the data set's name for the image (or for whatever else ties scores together)
    is_open: bool = False  # its answer is generated even if the task ranks
    support: tuple[Example, ...] = ()  # the only demonstrations that may be shown for it, where the data say so
    said: tuple[Said, ...] = ()  # what was said before it in its conversation

    @property
    def cluster(self) -> str:
        """Scores of the same image are not independent of each other."""
        if self.group:
            return self.group
        return self.turn.image.sha256 if self.turn.image is not None else self.id


@dataclass(frozen=True)
class Frame:
    """What surrounds the turns of a prompt; by default nothing but the end-of-chunk token after each turn."""

    prefix: str = ""  # once, at the start: an instruction
    before: str = ""  # before every turn's image
    separator: str = ""  # after every demonstration (and its end-of-chunk token)
    end_of_chunk: bool = True
    chat: bool = False  # turns are messages of user and assistant, written by the model's chat template


@dataclass(frozen=True)
class Episode:
    """One query with its demonstrations, the farthest first. `candidates` is empty when the answer is generated."""

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
    refused: tuple[tuple[str, int], ...] = ()  # the refused ones counted by the guard's reason


@dataclass(frozen=True)
class Baselines:
    """Scores that need no image, which every score is compared with; None where undefined."""

    chance: float | None
    constant: float | None  # the best constant answer, chosen on the support set
    constant_answer: str | None


class Embedder(Protocol):
    """What a task needs to compare images: a function with a name, which the results record."""

    @property
    def name(self) -> str:
        """What embeds."""
        ...

    def __call__(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """Return (N, E) vectors of length 1."""
        ...


class Task(Protocol):
    """A benchmark. The first four members and the methods that end in `...` have to be written; the rest have defaults.

    `hash` covers the task's definition and its data, never the model. `description` is written into the results.
    """

    name: str
    hash: str
    max_new_tokens: int
    description: dict[str, object]
    metrics: Sequence[str] = ()
    """Metrics of the whole set (`eval.metrics.table`), beside the mean of `score`."""
    num_beams: int = 1
    length_penalty: float = 1.0
    ranking: str = "sum"
    """How candidates are compared: by the sum of their tokens' log-probabilities, or by the mean."""
    rank_end: bool = True
    """Whether a candidate is scored with its end-of-chunk token."""

    def query_ids(self) -> Sequence[str]:
        """Return all queries in the task's fixed order; a limit takes the first ones."""
        ...

    def max_shots(self) -> int:
        """Return the largest number of demonstrations (per class, for binding) that the data allow for every query."""
        ...

    def episode(self, query_id: str, shots: int, seed: int) -> Episode:
        """Return the query with its demonstrations: a pure function of the task's hash and the arguments."""
        ...

    def score(self, answer: str, episode: Episode) -> float:
        """Return the score of an answer, in [0, 1] for most metrics (CIDEr goes up to 10)."""
        ...

    def baselines(self, query_ids: Sequence[str]) -> Baselines:
        """Return the baselines of these queries."""
        ...

    def parse(self, raw: str, episode: Episode) -> str:
        """Return the answer in a completion, without the fixed end of the answer's text; "" where there is none."""
        tail = episode.query.tail
        return parse_answer(parse_answer(raw).removesuffix(tail) if tail else raw)

    def content_free(self, turn: Turn) -> Turn:
        """Return the query without content, which contextual calibration compares with."""
        return turn.blank()

    def earlier(self, query_id: str) -> Sequence[str]:
        """Return the ids of the turns whose answers by the model this query shows, first to last."""
        return ()

    def continued(self, episode: Episode, answers: Sequence[str]) -> Episode:
        """Return the episode after the model's `answers` to the turns before it."""
        return episode

    def connect(self, embed: Embedder, query_ids: Sequence[str]) -> None:
        """Prepare to choose demonstrations by image similarity; called once, before the first episode."""
        return None


def parse_answer(raw: str) -> str:
    """Return the first non-empty line of a completion, white space collapsed; "" if there is none."""
    lines = [" ".join(line.split()) for line in raw.splitlines()]
    return next((line for line in lines if line), "")


def content_hash(*parts: object) -> str:
    """Return the hex SHA-256 of the parts' `repr`s with their lengths, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        blob = repr(part).encode()
        digest.update(f"{len(blob)}:".encode() + blob)
    return digest.hexdigest()


def generator(*purpose: str | int) -> np.random.Generator:
    """Return the random generator of one purpose: equal parts give equal numbers, any difference another stream."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in purpose).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def hash_order(ids: Sequence[str], *purpose: str | int) -> list[int]:
    """Return the indices of `ids` in a shuffled order that depends on each id alone: a new item moves no others."""
    prefix = "\x1f".join(str(part) for part in purpose).encode()
    keys = [hashlib.sha256(prefix + b"\x1f" + name.encode()).digest() for name in ids]
    return sorted(range(len(ids)), key=lambda index: (keys[index], ids[index]))
