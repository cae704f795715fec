"""Reads samples of tars made elsewhere, grouped by webdataset's rule of names; bytes are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.prepare.units import Dropped, Tally
from data.shards.index import IMAGE_SUFFIX, KEY_AND_SUFFIX, SKIPPED
from data.shards.tar import walk


@dataclass(frozen=True, slots=True)
class TarSample:
    """A sample: the offset and size of each suffix's bytes."""

    key: str
    where: str
    members: dict[str, tuple[int, int]]
    descriptor: int

    def read(self, suffix: str) -> bytes:
        """Return the bytes of a member."""
        offset, size = self.members[suffix]
        return os.pread(self.descriptor, size, offset)

    def first_image(self) -> str | None:
        """Return the suffix of the sample's first image."""
        return next((suffix for suffix in self.members if IMAGE_SUFFIX.match(suffix)), None)


def tar_samples(path: str | Path, label: str, tally: Tally) -> Iterator[TarSample]:
    """Yield the samples of a tar in its order. A key that occurs again later in the tar is dropped and counted.

    Every header is read before the first sample is yielded, so a truncated or damaged tar raises UserError at once.
    Names are only keys: nothing is extracted, links are not followed.
    """
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for member in walk(path):
        match = KEY_AND_SUFFIX.match(member.name)
        if match is None or SKIPPED.search(member.name):
            continue
        key, suffix = match[1], match[2].lower()
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        groups[-1][1].setdefault(suffix, (member.offset, member.size))
    seen: set[str] = set()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for key, members in groups:
            where = f"{label} key {key}"
            if key in seen:
                tally.drop_document("key appears again later in its tar", where)
                continue
            seen.add(key)
            yield TarSample(key, where, members, descriptor)
    finally:
        os.close(descriptor)


def json_of(sample: TarSample, decode: Any) -> dict[str, Any]:
    """Return a sample's JSON object, decoded by `decode`; empty when it has none. Raises Dropped."""
    if "json" not in sample.members:
        return {}
    try:
        body = decode(sample.read("json"))
    except (ValueError, RecursionError):
        raise Dropped("JSON cannot be read") from None
    if not isinstance(body, dict):
        raise Dropped("JSON is not an object")
    return body
