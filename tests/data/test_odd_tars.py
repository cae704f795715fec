"""Tars of other programs: concatenated, damaged, oddly named. Read whole or refused in a sentence, never by half."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare.tars import tar_samples
from data.prepare.units import Tally
from data.shards.index import TarIndex, build_index
from data.shards.tar import walk
from data.tools.verify import verify
from flamingo.errors import UserError
from tests.data.sources import command, flat, jpeg, prepare
from tests.data.test_index import make_tar
from tests.data.test_pairs_in_place import in_place


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", body) for key in keys for suffix, body in (("jpg", jpeg(1)), ("txt", key.encode()))]


def keys(index: TarIndex) -> list[str]:
    return [index.key(row) for row in range(len(index))]


def header(name: bytes, body: bytes, kind: bytes) -> bytes:
    """A member, whatever its name, body and type."""
    info = tarfile.TarInfo("x")
    info.size, info.type = len(body), kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[:100] = name.ljust(100, b"\0")[:100]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + body + bytes(-len(body) % 512)


END = bytes(1024)


@pytest.mark.parametrize("padding", [0, 512, 10_240])
def test_concatenated_tars_are_read_on(tmp_path: Path, padding: int) -> None:
    parts = [make_tar(tmp_path / f"{name}.tar", pairs(f"{name}0", f"{name}1")).read_bytes() for name in "abc"]
    whole = tmp_path / "whole.tar"
    whole.write_bytes(bytes(padding).join(parts))
    assert keys(build_index(whole)) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert len(in_place(whole)[0]) == len(prepare(tmp_path / "out", "pairs", whole).documents) == 6
    assert list(verify(whole)) == []


def test_pax_records_of_one_tar_do_not_reach_the_next(tmp_path: Path) -> None:
    common = header(b"g", b"12 path=k.x\n", b"g")
    whole = tmp_path / "whole.tar"
    whole.write_bytes(common + header(b"a.txt", b"a", b"0") + END + header(b"b.txt", b"b", b"0") + END)
    assert [member.name for member in walk(whole)] == ["k.x", "b.txt"]


@pytest.mark.parametrize("tail", [b"garbage", b"\0" * 700 + b"x" * 600, b"HTTP/1.1 200 OK" + bytes(600)])
def test_what_follows_the_end_and_is_no_tar_is_refused(tmp_path: Path, tail: bytes) -> None:
    whole = make_tar(tmp_path / "a.tar", pairs("a"))
    whole.write_bytes(whole.read_bytes() + tail)
    with pytest.raises(UserError, match=r"truncated|damaged"):
        build_index(whole)
    assert command("prepare", "pairs", whole, "--out", tmp_path / "o", "--workers", "1")[0] == 2


@pytest.mark.parametrize(
    "body",
    [
        b"abc path=x\n",
        b"12345",
        b"0 a=b\n",
        b"-5 a=b\n",
        b"9999 a=b\n",
        b"7 ab\n",
        b"6 a=b\0",
        b" 6 a=b\n",
        b"9" * 5000,
    ],
)
@pytest.mark.parametrize("kind", [b"x", b"g"])
def test_damaged_pax_records_are_one_sentence(tmp_path: Path, body: bytes, kind: bytes) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(header(b"PaxHeaders/0", body, kind) + header(b"0.txt", b"x", b"0") + END)
    with pytest.raises(UserError, match="damaged: a PAX header cannot be read at byte 0"):
        build_index(tar)


@pytest.mark.parametrize("size", [b"-1", b"abc", b"1.5", b""])
def test_damaged_sizes_are_one_sentence(tmp_path: Path, size: bytes) -> None:
    record = b" size=" + size + b"\n"
    body = b"%d" % (len(record) + 2) + record
    tar = tmp_path / "a.tar"
    tar.write_bytes(header(b"PaxHeaders/0", body, b"x") + header(b"0.txt", b"x", b"0") + END)
    with pytest.raises(UserError, match="damaged"):
        build_index(tar)


def test_names_and_records_that_are_not_utf8(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    record = header(b"PaxHeaders/0", b"28 SCHILY.xattr.user.caf\xe9=1\n", b"x")
    image, text = header(b"caf\xe9.jpg", jpeg(1), b"0"), header(b"caf\xe9.txt", b"a card", b"0")
    tar.write_bytes(record + image + text + END)
    assert keys(build_index(tar)) == ["caf\udce9"]
    assert command("index", tar)[0] == 0
    assert command("verify", tar) == (0, "", "no faults\n")
    assert [flat(document) for document in prepare(tmp_path / "out", "pairs", tar).documents] == [[jpeg(1), "a card"]]
    assert command("inspect", tar)[0] == 0


@pytest.mark.parametrize(
    "stems",
    [
        ["22.05", "23.05"],
        ["22.05", "22.06", "22.07"],
        ["2024.05.01", "2024.05.02"],
        ["d.x/a.b", "d.x/c"],
        ["v1.0-final", "v1.0-draft"],
        ["A.B", "A.C"],
    ],
)
def test_dotted_names_are_one_rule(tmp_path: Path, stems: list[str]) -> None:
    tar = make_tar(tmp_path / "a.tar", pairs(*stems))
    shown, bad = in_place(tar)
    assert ([text for _, text in shown.values()], bad) == (stems, {})
    assert list(shown) == stems
    assert [flat(document)[1] for document in prepare(tmp_path / "out", "pairs", tar).documents] == stems


def test_dotted_names_of_frames_and_of_parts(tmp_path: Path) -> None:
    frames = [("22.05.000.jpg", jpeg(0)), ("22.05.001.jpg", jpeg(1)), ("22.05.txt", b"a clip")]
    parts = [("k.jpg", jpeg(2)), ("k.seg.png", jpeg(3)), ("k.txt", b"a mask"), ("k.cls.json", b"[]")]
    tar = make_tar(tmp_path / "a.tar", [*frames, *parts])
    assert in_place(tar)[0] == {"22.05": ([jpeg(0), jpeg(1)], "a clip"), "k": ([jpeg(2)], "a mask")}


def test_members_that_are_not_adjacent_get_a_hint(tmp_path: Path) -> None:
    members = pairs("a", "b")
    tar = make_tar(tmp_path / "a.tar", [members[0], members[2], members[1], members[3]])
    with pytest.raises(UserError, match=r"key 'a' appears twice.*tar --sort=name"):
        build_index(tar)
    status, _, err = command("prepare", "pairs", tar, "--out", tmp_path / "o", "--workers", "1")
    assert status == 2
    assert "key appears again later in its tar (tar --sort=name)" in err


def test_a_member_that_appears_twice_is_counted(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("k.jpg", jpeg(1)), ("k.JPG", jpeg(2)), ("k.txt", b"x")])
    done = prepare(tmp_path / "out", "pairs", tar)
    assert done.dropped_images == {"second .jpg of its sample": 1}


FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    edits=st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=9)), max_size=3),
    cut=st.integers(0, 6000),
    name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=120),
)
def test_damage_anywhere_is_one_sentence(form: int, edits: list[tuple[int, bytes]], cut: int, name: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": name}) as tar:
        for member in (f"{name}.txt", "k.jpg", "k.txt"):
            with contextlib.suppress(ValueError):  # a name that does not fit into a ustar header
                info = tarfile.TarInfo(member)
                info.size = 2
                tar.addfile(info, io.BytesIO(b"ab"))
    data = bytearray(file.getvalue())
    for at, new in edits:
        data[at % len(data) : at % len(data) + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data[: len(data) - cut % 4000])
        with contextlib.suppress(UserError):
            build_index(path)
        with contextlib.suppress(UserError):
            list(tar_samples(path, "a.tar", Tally()))
        assert isinstance(list(verify(path)), list)
