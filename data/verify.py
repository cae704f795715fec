"""Everything that can be wrong with a shard, found before training: one sentence for each fault."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data.decode import decode
from data.errors import ContentError
from data.index import TarIndex, build_index, index_path, load_index
from data.reader import ShardReader
from data.schema import MANIFEST, read_manifest
from flamingo.errors import UserError


def verify(path: str | Path) -> Iterator[str]:
    """The faults of a shard, or of a folder of shards and its manifest.

    Truncated, damaged, compressed or empty tars, stale indexes, keys and members that occur twice, broken JSON, pages
    that name pictures they do not have, pictures that cannot be decoded; in a folder also shards that are missing,
    unknown to the manifest or changed since it was written.
    """
    path = Path(path)
    if not path.is_dir():
        yield from verify_shard(path)
        return
    shards = sorted(path.rglob("*.tar"))
    manifests = sorted(path.rglob(MANIFEST))
    if not shards and not manifests:
        raise UserError(f"folder {path} has neither shards nor a manifest; nothing to verify")
    for manifest in manifests:
        yield from verify_manifest(manifest.parent)
    for shard in shards:
        yield from verify_shard(shard)


def verify_manifest(folder: Path) -> Iterator[str]:
    """What does not agree between a folder and its manifest."""
    try:
        parts = read_manifest(folder)["parts"]
        listed = {entry["name"]: entry["sha256"] for part in parts.values() for entry in part["shards"]}
    except UserError as error:
        yield str(error)
        return
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{folder / MANIFEST} is not a manifest of this format ({type(error).__name__}: {error})"
        return
    present = {tar.name for tar in folder.glob("*.tar")}
    for name in sorted(present - listed.keys()):
        yield f"shard {folder / name} is not in the folder's manifest"
    for name, expected in sorted(listed.items()):
        if name not in present:
            yield f"shard {folder / name} is in the folder's manifest and missing"
            continue
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                yield f"shard {folder / name} is not the one of the folder's manifest (another sha256)"


def verify_shard(shard: Path) -> Iterator[str]:
    """The faults of one shard."""
    try:
        index = build_index(shard)
    except UserError as error:
        yield str(error)
        return
    if index_path(shard).exists():
        try:
            load_index(shard)
        except UserError as error:
            yield str(error)
    reader = ShardReader([index])
    for row in range(len(index)):
        yield from _verify_row(reader, index, row)
    reader.close()


def _verify_row(reader: ShardReader, index: TarIndex, row: int) -> Iterator[str]:
    where = f"shard {index.path}, row {row} (key {index.key(row)!r})"
    try:
        sample = reader.sample(0, row)
    except UserError as error:
        yield str(error)
        return
    except ContentError as error:
        yield f"{where}: {error}"
        return
    if not sample.nodes:
        yield f"{where}: has neither text nor pictures"
    for number in sample.numbers:
        try:
            decode(sample.picture(number))
        except ContentError as error:
            yield f"{where}: picture {number} is {error}"
