"""Reads samples of tars made elsewhere, grouped as in `data.shards.samples`; bytes are read when asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.prepare.units import Dropped, InputUnit, Tally
from data.records import parse_json
from data.remote.copies import shard_copy
from data.shards.places import Place
from data.shards.samples import IMAGE, SampleMember, samples_of


@dataclass(frozen=True, slots=True)
class TarSample:
    """A sample: its members by their suffixes."""

    key: str
    where: str
    members: dict[str, SampleMember]
    descriptor: int

    def read(self, suffix: str) -> bytes:
        """Return the bytes of a member."""
        member = self.members[suffix]
        return os.pread(self.descriptor, member.size, member.offset)

    def images(self) -> list[str]:
        """Return the suffixes of the sample's images, in order."""
        images = [member for member in self.members.values() if member.kind == IMAGE]
        return [member.suffix for member in sorted(images, key=lambda member: member.number)]


def tar_samples(path: str | Place, label: str, tally: Tally) -> Iterator[TarSample]:
    """Yield the samples of a tar in its order. A key that occurs again later in the tar is dropped and counted.

    Every header is read before the first sample is yielded, so a truncated or damaged tar raises UserError at once.
    Names are only keys: nothing is extracted, links are not followed. A tar of a store is copied for that long.
    """
    with contextlib.ExitStack() as held:
        copy = held.enter_context(shard_copy(str(path)))
        groups = list(samples_of(copy, lambda name: tally.drop_document("file without a suffix", f"{label} {name}")))
        seen: set[str] = set()
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, descriptor)
        for key, members in groups:
            where = f"{label} key {key}"
            if key in seen:
                tally.drop_document("key appears again later in its tar (tar --sort=name)", where)
                continue
            seen.add(key)
            parts: dict[str, SampleMember] = {}
            for member in members:
                if parts.setdefault(member.suffix, member) is not member:
                    tally.drop_image(f"second .{member.suffix} of its sample", where)
            yield TarSample(key, where, parts, descriptor)


def json_samples(unit: InputUnit, tally: Tally) -> Iterator[tuple[TarSample, dict[str, Any]]]:
    """Yield the samples of a tar with their JSON objects; those without one are dropped and counted."""
    for sample in tar_samples(unit.path, unit.label, tally):
        try:
            if "json" not in sample.members:
                raise Dropped("sample without JSON")
            body = json_of(sample)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, sample.where)
            continue
        yield sample, body


def json_of(sample: TarSample) -> dict[str, Any]:
    """Return a sample's JSON object; empty when it has none. Raises Dropped."""
    if "json" not in sample.members:
        return {}
    try:
        body = parse_json(sample.read("json"))
    except ValueError:
        raise Dropped("JSON cannot be read") from None
    if not isinstance(body, dict):
        raise Dropped("JSON is not an object")
    return body
