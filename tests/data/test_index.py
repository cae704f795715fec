"""The walk over a tar's headers agrees with `tarfile`, and the grouping with webdataset's."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data.shards.index import build_index, index_path, load_index, open_index
from data.shards.tar import walk
from flamingo.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(path: Path, members: list[tuple[str, bytes]], form: str = "ustar", **options: object) -> Path:
    with tarfile.open(path, "w", format=FORMATS[form], **options) as tar:  # type: ignore[call-overload]
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def ordinary(count: int = 5) -> list[tuple[str, bytes]]:
    return [(f"k{n}.{suffix}", suffix.encode() * n) for n in range(count) for suffix in ("json", "000.png", "001.JPG")]


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def by_walk(path: Path) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset, member.size) for member in walk(path)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "names",
    [
        ["a.txt", "b.txt"],
        ["d/" * 40 + "x.000.jpg", "e.txt"],  # longer than 100 bytes with a place to split
        ["ünï-ключ.txt", "z.json"],
        ["../../x.txt", "/etc/y.txt", "./a/b.c/d.e.f.txt", ".hidden", "none", "__meta__", "__dir__/a.txt"],
    ],
)
def test_walk_agrees_with_tarfile(tmp_path: Path, form: str, names: list[str]) -> None:
    path = make_tar(tmp_path / "a.tar", [(name, bytes(n * 511)) for n, name in enumerate(names)], form)
    assert by_walk(path) == by_tarfile(path)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_walk_reads_names_longer_than_a_header(tmp_path: Path, form: str) -> None:
    path = make_tar(tmp_path / "a.tar", [("n" * 300 + ".txt", b"x"), ("short.txt", b"y")], form)
    assert by_walk(path) == by_tarfile(path)


def test_walk_reads_global_pax_headers_and_sizes_from_pax(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"k{number}.txt")
            info.size, info.pax_headers = 700, {"size": "700", "note": "ü"}
            tar.addfile(info, io.BytesIO(bytes(700)))
    assert by_walk(path) == by_tarfile(path)


def test_links_folders_and_devices_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("k.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert by_walk(path) == by_tarfile(path) == [("k.txt", 2048, 3)]


@pytest.mark.parametrize("form", FORMATS)
def test_grouping_is_webdatasets(tmp_path: Path, form: str) -> None:
    members = ordinary()
    members += [("p/q.r.s.png", b"1"), ("p/q.json", b"2"), ("__x__", b""), ("noext", b""), ("dir.v1/key.txt", b"3")]
    path = make_tar(tmp_path / "a.tar", members, form)
    with path.open("rb") as file:
        samples = [dict(sample) for sample in group_by_keys({**m, "__url__": ""} for m in tar_file_iterator(file))]
    index = build_index(path)
    raw = path.read_bytes()
    assert [index.key(row) for row in range(len(index))] == [sample["__key__"] for sample in samples]
    for row, sample in enumerate(samples):
        bodies = [raw[offset : offset + size] for _, _, offset, size in index.members(row)]
        assert bodies == [value for name, value in sample.items() if not name.startswith("__")]


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert len(build_index(make_tar(tmp_path / "a.tar", []))) == 0


def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", ordinary(3))
    whole = path.read_bytes()
    end = max(member.offset + 512 for member in walk(path))
    for cut in [1, 100, 512, 513, 1024, *range(1500, end, 700), end - 512, end]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.tar is truncated"):
            build_index(path)


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for body, reason in (
        (b"", "empty"),
        (gzip.compress(b"x" * 600), "gzip-compressed"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 20, "not a tar"),
    ):
        path.write_bytes(body)
        with pytest.raises(UserError, match=reason):
            build_index(path)
    with pytest.raises(UserError, match="does not exist"):
        build_index(tmp_path / "none.tar")
    with pytest.raises(UserError, match="folder"):
        build_index(tmp_path)


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", ordinary(2))
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="no header at byte 0"):
        build_index(path)


def test_keys_and_members_that_return_are_errors(tmp_path: Path) -> None:
    twice = make_tar(tmp_path / "a.tar", [("k.txt", b""), ("l.txt", b""), ("k.png", b"")])
    with pytest.raises(UserError, match=r"key 'k' appears twice \(rows 0 and 2\)"):
        build_index(twice)
    member = make_tar(tmp_path / "b.tar", [("j.txt", b""), ("k.txt", b""), ("k.TXT", b"")])
    with pytest.raises(UserError, match=r"'k\.TXT' appears twice in row 1"):
        build_index(member)


def test_sidecar_gives_back_the_index_and_knows_its_tar(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", ordinary())
    built = open_index(path)
    assert index_path(path).exists()
    loaded = open_index(path)
    for name in ("first", "offset", "size", "kind", "number", "keys", "key_end", "images_per_row"):
        assert np.array_equal(getattr(built, name), getattr(loaded, name)), name
    assert loaded.images_per_row.tolist() == [2] * 5

    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"a\.tar has 19968 bytes but its index was built for 20480"):
        open_index(path)
    make_tar(path, [(name, body[::-1]) for name, body in ordinary()])
    with pytest.raises(UserError, match="changed after its index was built"):
        open_index(path)
    path.write_bytes(whole)
    index_path(path).write_bytes(index_path(path).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.tar\.idx is damaged"):
        load_index(path)
    index_path(path).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"a\.tar\.idx is damaged"):
        load_index(path)
