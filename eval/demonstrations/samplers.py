"""Which demonstrations a query gets: a pure function of (task hash, seed, query id).

Every draw has its own counter-based generator, keyed by its purpose. So a query gets the same demonstrations for every
batch size, order and limit, on one process or eight; the public harnesses draw from one global stream, where each of
these changes them. (Retrieval by image also depends on the encoder, which the results name.) Demonstrations are nested:
the k-shot prompt shows the last k of the (k + 1)-shot prompt, so a curve over shots is paired and the images of the
longest prompt serve all shorter ones.

The leakage guard refuses whatever would show the answer: the query itself, an identical image (equal SHA-256) under any
name, a near duplicate of it, and, if neither has an image, the same question. It counts each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.demonstrations.retrieval import Retriever
from eval.task import EncodedImage, Example, generator
from flamingo.errors import UserError
from flamingo.vision.image_files import read_image
from flamingo.vision.transform import as_seen


@dataclass(frozen=True)
class Demonstrations:
    """The chosen examples, the farthest first (the last is next to the query), and the guard's refusals by reason."""

    examples: tuple[Example, ...]
    excluded: int
    refused: tuple[tuple[str, int], ...] = ()


def leak(demo: Example, query: Example) -> str:
    """Return why `demo` would reveal the query: item, image, near_duplicate or question; "" if it would not."""
    if demo.id == query.id:
        return "item"
    ours, theirs = demo.turn.images, query.turn.images
    if not ours and not theirs:
        return "question" if _words(demo.turn.question_text) == _words(query.turn.question_text) else ""
    if {image.sha256 for image in ours} & {image.sha256 for image in theirs}:
        return "image"
    return "near_duplicate" if any(near_duplicates(a, b) for a in ours for b in theirs) else ""


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()


HAMMING = 4
LEVELS = 14


@dataclass(frozen=True)
class Fingerprint:
    """A difference hash (64 bits) and the colours of an 8 x 8 thumbnail, (192,) of 0 to 255.

    A difference hash alone takes every flat image for a duplicate of every other, and equal shapes in two colours too.
    So near duplicates have hashes that differ in at most `HAMMING` of 64 bits, and thumbnails that differ in no channel
    of any cell by more than `LEVELS` of 256 levels.
    """

    bits: int
    colours: bytes


_KNOWN: dict[str, Fingerprint | None] = {}  # by SHA-256, so that each image is read and decoded once


def fingerprint(image: EncodedImage) -> Fingerprint | None:
    """Fingerprint an image, or a clip's middle frame; None if it cannot be decoded, which the encoder will report."""
    if image.sha256 not in _KNOWN:
        _KNOWN[image.sha256] = _fingerprint(image)
    return _KNOWN[image.sha256]


def _small_rgb(image: Image.Image) -> Image.Image:
    image.draft("RGB", (64, 64))  # decodes a JPEG at an eighth of its size if that is enough
    return as_seen(image)


def _fingerprint(encoded: EncodedImage) -> Fingerprint | None:
    try:
        frames = encoded.frames
        image = read_image(frames[len(frames) // 2], _small_rgb)
    except Exception:  # decoders raise exceptions of every kind
        return None
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
    return Fingerprint(bits, small.tobytes())


def near_duplicates(first: EncodedImage, second: EncodedImage) -> bool:
    """Return whether two images are the same except for compression and scale."""
    a, b = fingerprint(first), fingerprint(second)
    if a is None or b is None or (a.bits ^ b.bits).bit_count() > HAMMING:
        return False
    return all(abs(x - y) <= LEVELS for x, y in zip(a.colours, b.colours, strict=True))


SAMPLERS = {
    "random": "any of the support set",
    "fixed": "the same for all queries",
    "same_kind": "of the query's kind (question type, open or closed)",
    "balanced": "every class equally often",
    "rices_image": "the most similar images, nearest last",
    "rices_text": "the most similar questions, nearest last",
    "rices_joint": "both; the images' share after a colon, 0.5 by default",
    "mmr": "similar to the query and not to each other; the query's share after a colon, 0.5 by default",
    "given": "those that the query itself brings, in their order, the last ones if it brings more",
    "file": "ids from a JSON file after a colon: {query id, or * for all: [id, ...]}, the last next to the query",
}
"""Names in a task's `demos`, and what each shows."""
OF_OWN = ("given", "random", "balanced")
"""Those that can choose among demonstrations that each query brings."""


@dataclass(frozen=True)
class DemonstrationSampler:
    """A name of `SAMPLERS`, with the number or path after its colon."""

    name: str
    value: float = 0.5
    path: str = ""

    @property
    def retrieves(self) -> bool:
        """Whether examples are compared."""
        return self.name.startswith("rices") or self.name == "mmr"

    def weight(self, images: bool) -> float:
        """Return the images' share in the similarity; `images`: whether the examples have any."""
        if self.name == "mmr":
            return 1.0 if images else 0.0
        return {"rices_image": 1.0, "rices_text": 0.0}.get(self.name, self.value)


def parse_sampler(text: str) -> DemonstrationSampler:
    """Parse, for example, `rices_joint:0.3`. Raises UserError for an unknown name or a bad parameter."""
    name, colon, parameter = text.partition(":")
    if name not in SAMPLERS:
        raise UserError(f"demos={text}: use one of {', '.join(SAMPLERS)}")
    if name == "file":
        if not parameter:
            raise UserError("demos=file needs a path, for example demos=file:demos.json")
        return DemonstrationSampler(name, path=parameter)
    if not colon:
        return DemonstrationSampler(name)
    try:
        value = float(parameter)
    except ValueError:
        value = -1.0
    if name not in ("rices_joint", "mmr") or not 0 <= value <= 1:
        raise UserError(f"demos={text}: only rices_joint and mmr take a number, from 0 to 1")
    return DemonstrationSampler(name, value)


def read_listed(path: str, support: Sequence[Example]) -> dict[str, list[str]]:
    """Return the ids of a `file:` sampler. Raises UserError for an unreadable file or an unknown id."""
    try:
        listed = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"demos=file:{path} cannot be read: {error}") from None
    if not isinstance(listed, dict) or not all(isinstance(ids, list) for ids in listed.values()):
        raise UserError(f"demos=file:{path} is not a JSON object with a list of ids for each query id (or * for all)")
    known = {example.id for example in support}
    for query, ids in listed.items():
        for name in ids:
            if name not in known:
                raise UserError(f"demos=file:{path}: {name!r} (of query {query}) is not in the support set")
    return listed


def draw(
    support: Sequence[Example],
    query: Example,
    shots: int,
    *,
    task_hash: str,
    seed: int,
    sampler: str = "random",
    retriever: Retriever | None = None,
    listed: Mapping[str, Sequence[str]] | None = None,
) -> Demonstrations:
    """Draw `shots` demonstrations for `query`, nested over `shots`.

    Raises:
        UserError: the support set has too few examples that may be shown (with `given` all of them are, then).
    """
    if shots == 0:
        return Demonstrations((), 0)
    chosen: list[Example] = []
    refused: Counter[str] = Counter()
    for index in _nearest_first(support, query, parse_sampler(sampler), task_hash, seed, retriever, listed):
        reason = leak(support[index], query)
        if reason:
            refused[reason] += 1
        else:
            chosen.append(support[index])
        if len(chosen) == shots:
            break
    if len(chosen) == shots or sampler == "given":
        return Demonstrations(tuple(reversed(chosen)), refused.total(), tuple(sorted(refused.items())))
    raise UserError(
        f"query {query.id} needs {shots} demonstrations (demos={sampler}), but only {len(chosen)} of the support set's "
        f"{len(support)} may be shown; use fewer shots or a larger support set"
    )


def _nearest_first(
    support: Sequence[Example],
    query: Example,
    sampler: DemonstrationSampler,
    task_hash: str,
    seed: int,
    retriever: Retriever | None,
    listed: Mapping[str, Sequence[str]] | None,
) -> Iterable[int]:
    """Return indices into `support` of what may be shown, beginning next to the query."""
    whose = "" if sampler.name == "fixed" else query.id
    order = generator("demos", task_hash, seed, whose).permutation(len(support)).tolist()
    if sampler.name == "same_kind":
        return (index for index in order if support[index].kind == query.kind)
    if sampler.name == "given":
        return range(len(support) - 1, -1, -1)
    if sampler.name == "balanced":
        return _balanced(support, order, (task_hash, seed, query.id))
    if sampler.name == "file":
        assert listed is not None
        positions = {example.id: index for index, example in enumerate(support)}
        return [positions[name] for name in reversed(listed.get(query.id, listed.get("*", [])))]
    if sampler.retrieves:
        assert retriever is not None, "retrieval needs a retriever"
        if sampler.name == "mmr":
            return retriever.diverse(query, order, sampler.value)
        return retriever.nearest(query, order).tolist()
    return order


def _balanced(support: Sequence[Example], order: Sequence[int], purpose: tuple[str | int, ...]) -> Iterator[int]:
    """Yield rounds of one example per class, with a new order of classes each round, until none is left."""
    classes: dict[str, list[int]] = {}
    for index in order:
        classes.setdefault(support[index].label or support[index].golds[0], []).append(index)
    labels = sorted(classes)
    for turn in range(max(map(len, classes.values()), default=0)):
        for position in generator("classes", *purpose, turn).permutation(len(labels)):
            own = classes[labels[int(position)]]
            if turn < len(own):
                yield own[turn]
