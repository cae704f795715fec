"""Finds everything that can be wrong with a shard before training: one sentence for each fault."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data.batches.decode import decode
from data.errors import ContentError
from data.prepare.inputs import one_line, refuse_pointer
from data.remote.copies import shard_copy
from data.remote.download import expand, is_remote
from data.shard_store import CATALOGUE, is_folder, read_catalogue
from data.shards.document import Text
from data.shards.index import TarIndex, build_index, index_path, load_index, read_head
from data.shards.places import Place, place, sizes_in
from data.shards.reader import ShardReader
from data.shards.writer import MANIFEST, read_manifest
from flamingo.errors import UserError


def verify(path: str | Path) -> Iterator[str]:
    """Yield the faults of a shard, or of a folder of shards and its manifest, also of a store (s3://bucket/folder).

    Truncated, damaged, compressed or empty tars, Git-LFS pointers, stale indexes and catalogues, duplicate keys and
    members, links and names that lead out of the folder, broken JSON, documents without text or that name images they
    do not have, images that cannot be decoded or are too large; in a folder also shards that are missing, unknown to
    the manifest or changed since it was written, and preparations that were not finished.
    """
    if is_remote(str(path)):
        yield from _verify_remote(str(path))
        return
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
    for catalogue in sorted(path.rglob(CATALOGUE)):
        yield from verify_catalogue(catalogue.parent)
    for shard in shards:
        yield from verify_shard(shard)


def _verify_remote(url: str) -> Iterator[str]:
    """Yield the faults of what a URL holds. One shard after the other is copied to this machine's disk, once."""
    shards, digests = expand(url), {}
    if is_folder(url):
        folder = place(url)
        names = sizes_in(folder)
        shards = [str(folder / name) for name in sorted(names) if name.endswith(".tar")]
        if MANIFEST in names:
            yield from verify_manifest(folder)
            with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):  # has been said
                digests = _listed(folder)
        elif not shards:
            raise UserError(f"folder {url} has neither shards nor a manifest; nothing to verify")
    for shard in shards:
        with shard_copy(shard) as copy:
            yield from _changed(copy, shard, digests.get(shard.rpartition("/")[2]))
            for fault in verify_shard(copy):
                yield fault.replace(str(copy), shard)


def _listed(folder: Place) -> dict[str, str]:
    """Return the digest of every shard that a folder's manifest lists."""
    parts = read_manifest(folder)["parts"]
    return {entry["name"]: entry["sha256"] for part in parts.values() for entry in part["shards"]}


def _changed(file: Path, shard: str, expected: str | None) -> Iterator[str]:
    with file.open("rb") as opened:
        if expected is not None and hashlib.file_digest(opened, "sha256").hexdigest() != expected:
            yield f"shard {shard} differs from the folder's manifest (another sha256)"


def verify_manifest(folder: Place) -> Iterator[str]:
    """Yield the differences between a folder and its manifest; of a store's folder without comparing digests."""
    names = sizes_in(folder)
    try:
        listed = _listed(folder)
        if not listed and any(name.startswith("_part-") for name in names):
            yield f"folder {folder} holds parts that are not joined; join them: python -m data merge {folder}"
            return
        if (folder / ".prepare").exists():
            yield f"folder {folder} holds an unfinished preparation; start the same command again to finish it"
            return
        if not listed:
            yield f"folder {folder} lists no shards; prepare the data again"
    except UserError as error:
        yield str(error)
        return
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{folder / MANIFEST} is not a manifest of this format ({type(error).__name__}: {error})"
        return
    present = {name for name in names if name.endswith(".tar")}
    for name in sorted(present - listed.keys()):
        yield f"shard {folder / name} is not in the folder's manifest"
    for name, expected in sorted(listed.items()):
        if name not in present:
            yield f"shard {folder / name} is in the folder's manifest but missing"
        elif isinstance(folder, Path):
            yield from _changed(folder / name, str(folder / name), expected)


def verify_catalogue(folder: Path) -> Iterator[str]:
    """Yield what a folder's catalogue says of its shards otherwise than their indexes do."""
    try:
        heads = read_catalogue(folder)
    except UserError as error:
        yield str(error)
        return
    for name, head in heads.items():
        with suppress(UserError, OSError):  # of the index, or the shard: reported with the shard
            if read_head(folder / name) != head:
                yield (
                    f"catalogue {folder / CATALOGUE} and the index of {name} differ; write both again: "
                    f"python -m data index {folder / name}"
                )


def verify_shard(shard: Path) -> Iterator[str]:
    """Yield the faults of one shard."""
    try:
        if shard.is_file():
            refuse_pointer(shard)
        index = build_index(shard)
    except UserError as error:
        yield str(error)
        return
    if index_path(shard).exists():
        try:
            if load_index(shard).digest != index.digest:
                yield f"shard {shard} changed after its index was built; build it again: python -m data index {shard}"
        except UserError as error:
            yield str(error)
    yield from _odd_members(shard)
    if not len(index):
        yield f"shard {shard} has no sample"
    reader = ShardReader([index])
    for row in range(len(index)):
        yield from _verify_row(reader, index, row)
    reader.close()


def _odd_members(shard: Path) -> Iterator[str]:
    """Yield links, and names that lead out of the folder: harmless here, but other programs may follow them."""
    try:
        with tarfile.open(shard, ignore_zeros=True) as tar:
            for member in tar:
                if member.issym() or member.islnk():
                    yield f"shard {shard} has a link, {member.name!r} to {member.linkname!r}; links are never followed"
                elif member.name.startswith("/") or ".." in member.name.split("/"):
                    yield f"shard {shard} has a member whose name leads out of its folder, {member.name!r}"
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield f"shard {shard} is read here, but not by Python's tarfile ({one_line(error)}); write it again"


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
    if not any(isinstance(node, Text) and node.text.strip() for node in sample.nodes):
        yield f"{where}: has no text" + ("" if sample.nodes else " and no images")
    for number in sample.numbers:
        try:
            decode(sample.image(number))
        except ContentError as error:
            yield f"{where}: image {number} is {error}"
