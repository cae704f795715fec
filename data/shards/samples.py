"""Groups the members of a tar into samples by their names: one rule for the index, training in place and `prepare`.

A sample's key is the name up to the first dot of its last part, as in webdataset: `p.1.jpg p.2.jpg p.txt` is one
sample of two images. Only where names themselves have dots does that not hold: `22.05.jpg 22.05.txt` names its text
after its image, so the text's name is the key (`22.05`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.shards.tar import Member, walk
from flamingo.vision.image_files import SUFFIXES

OTHER, JSON, TEXT, IMAGE = 0, 1, 2, 3  # kinds of members
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
MEDIA = SUFFIXES | {*VIDEOS, "npy"}
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's rule (base_plus_ext)
SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's rule for members that are not samples
IMAGE_SUFFIX = re.compile(rf"^(?:(\d+)\.)?(?:{'|'.join(sorted(SUFFIXES))})$")
MOST_IMAGES = 1 << 16  # in a sample: the numbers have 16 bits
SORT = "write the tar again with its members by name: tar --sort=name -cf NEW.tar ..."


@dataclass(frozen=True, slots=True)
class SampleMember:
    """A member of a sample: its suffix in small letters, kind, which image it is (from 0), offset and size in bytes."""

    suffix: str
    kind: int
    number: int
    offset: int
    size: int


def samples_of(
    path: str | Path, passed_over: Callable[[str], None] | None = None
) -> Iterator[tuple[str, list[SampleMember]]]:
    """Yield (key, members) of each sample of a tar, in its order. A key occurs again where members are not adjacent.

    `passed_over` is called with the name of a file that belongs to no sample, since it has no suffix. Raises UserError
    as `walk`.
    """
    run: list[tuple[str, Member]] = []
    last = ""
    for member in walk(path):
        if SKIPPED.match(member.name):
            continue
        match = KEY_AND_SUFFIX.match(member.name)
        if match is None:
            if passed_over is not None and not member.name.rpartition("/")[2].startswith("."):
                passed_over(member.name)
            continue
        if run and match[1] != last:
            yield from _divided(last, run)
            run = []
        last = match[1]
        run.append((match[2].lower(), member))
    if run:
        yield from _divided(last, run)


def _divided(key: str, run: list[tuple[str, Member]]) -> Iterator[tuple[str, list[SampleMember]]]:
    """Yield the samples among neighbours whose names are the same up to the first dot: nearly always one."""
    texts = [suffix.rpartition(".")[0] for suffix, _ in run if suffix.rpartition(".")[2] in ("txt", "json")]
    stems: set[str] = set()
    if texts and "" not in texts:
        media = [suffix for suffix, _ in run if suffix.rpartition(".")[2] in MEDIA]
        stems = {stem for stem in texts if any(suffix.startswith(f"{stem}.") for suffix in media)}
    if not stems:
        yield key, _members(run)
        return
    parts: dict[str, list[tuple[str, Member]]] = {}
    for suffix, member in run:
        stem = suffix.rpartition(".")[0]
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        stem = stem or suffix.rpartition(".")[0]  # no text has this name
        parts.setdefault(stem, []).append((suffix[len(stem) + 1 if stem else 0 :], member))
    for stem, members in parts.items():
        # The key as it is written in the tar: suffixes are compared in small letters.
        name = members[0][1].name[: len(key) + 1 + len(stem)] if stem else key
        yield name, _members(members)


def _members(run: Sequence[tuple[str, Member]]) -> list[SampleMember]:
    """Return a sample's members; an image whose number is taken, or too large, gets the next one that is free."""
    numbers = [int(match[1] or 0) if (match := IMAGE_SUFFIX.match(suffix)) else -1 for suffix, _ in run]
    if max(numbers, default=0) >= MOST_IMAGES:
        order = sorted(range(len(run)), key=lambda k: (numbers[k], k))
        ranks = {k: rank for rank, k in enumerate(k for k in order if numbers[k] >= 0)}
        numbers = [ranks.get(k, -1) for k in range(len(run))]
    seen: set[int] = set()
    for k, number in enumerate(numbers):
        if number in seen:
            numbers[k] = number = max(numbers) + 1
        if number >= 0:
            seen.add(number)
    return [
        SampleMember(suffix, *_kind_of(suffix, number), member.offset, member.size)
        for (suffix, member), number in zip(run, numbers, strict=True)
    ]


def _kind_of(suffix: str, number: int) -> tuple[int, int]:
    return (IMAGE, number) if number >= 0 else ({"json": JSON, "txt": TEXT}.get(suffix, OTHER), 0)
