"""The engine: the same bytes for every number of processes and parts, after any kill, and never half a dataset."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.dataset import resolve_shards
from data.prepare.inputs import csv_units, json_lines, json_spans, line_units
from data.shards.index import index_path
from data.shards.writer import MANIFEST, ShardWriter, read_manifest
from data.tools.verify import verify
from flamingo.errors import UserError
from tests.data.sources import command, jpeg, prepare, refusal
from tests.data.test_index import make_tar

ROOT = Path(__file__).resolve().parents[2]


def write_tars(folder: Path, tars: int = 6, pairs: int = 7) -> Path:
    """img2dataset's tars; every fifth pair has an empty caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(tars):
        members = []
        for pair in range(pairs):
            key = f"{tar:05d}{pair:04d}"
            caption = b"" if pair % 5 == 4 else f"image {key}".encode()
            facts = json.dumps({"caption": caption.decode(), "url": f"http://x/{key}", "status": "success"})
            members += [(f"{key}.jpg", jpeg(tar * pairs + pair, (16, 16)))]
            members += [(f"{key}.txt", caption), (f"{key}.json", facts.encode())]
        make_tar(folder / f"{tar:05d}.tar", members)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("in"))


SMALL = ("--documents-per-shard", "3")


@pytest.fixture(scope="module")
def whole(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes in one go."""
    out = tmp_path_factory.mktemp("whole")
    done = prepare(out, "pairs", tars, *SMALL)
    assert len(done.documents) == 36
    assert done.dropped == {"no caption": 6}
    assert done.report.startswith(
        f"{out}: pairs: 36 of 42 documents kept with 36 images, in 12 shards of 0.2 MB together\n"
    )
    assert "        6  no caption  (first: 00000.tar key 000000004)" in done.report
    assert len(files(out)) == 25  # twelve tars, their indexes, the manifest
    return out


def test_manifest_has_counts_filters_and_checksums(whole: Path) -> None:
    part = read_manifest(whole)["parts"]["pairs"]
    assert part["meta"]["source"] == "pairs"
    assert part["meta"]["layout"] == "pairs"
    assert part["meta"]["options"]["min_words"] == 1
    assert [entry["documents"] for entry in part["shards"]] == [3] * 12
    assert [entry["name"] for entry in part["shards"][:3]] == [
        "pairs-000000-000000.tar",
        "pairs-000000-000001.tar",
        "pairs-000001-000000.tar",
    ]
    assert all(index_path(whole / entry["name"]).exists() for entry in part["shards"])


def test_a_moved_input_and_a_second_run_change_nothing(tars: Path, whole: Path, tmp_path: Path) -> None:
    before = files(whole)
    stamps = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    status, report, _ = command("prepare", "pairs", "--out", whole, tars, *SMALL)
    assert status == 0
    assert "was already prepared" in report
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == stamps
    moved = write_tars(tmp_path / "moved")
    prepare(tmp_path / "out", "pairs", moved, *SMALL)
    assert files(tmp_path / "out") == before


def test_parts_merge_to_the_same_bytes(tars: Path, whole: Path, tmp_path: Path) -> None:
    shared, separate = tmp_path / "shared", [tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "d"]
    for number, folder in enumerate(separate, 1):
        for out in (shared, folder):
            status, report, _ = command("prepare", "pairs", "--out", out, tars, *SMALL, "--part", f"{number}/4")
            assert status == 0
            assert f"_part-pairs-{number:03d}-of-004.json" in report
        with pytest.raises(UserError, match="no shards in"):
            resolve_shards([str(shared)])  # nobody trains on half of it
    status, report, _ = command("merge", shared)
    assert (status, report.split(": ", 1)[1][:37]) == (0, "pairs: 36 of 42 documents kept with 3")
    assert {name: body for name, body in files(shared).items() if not name.startswith("_part")} == files(whole)
    assert not (shared / ".prepare").exists()
    assert command("merge", *separate, "--out", tmp_path / "joined")[0] == 0
    assert files(tmp_path / "joined") == files(whole)
    assert list(verify(tmp_path / "joined")) == []


def test_parts_that_do_not_fit_are_named(tars: Path, tmp_path: Path) -> None:
    def part(number: int, *options: str) -> Path:
        out = tmp_path / f"{number}{''.join(options)}"
        assert command("prepare", "pairs", "--out", out, tars, "--part", f"{number}/3", *options)[0] == 0
        return out

    one, two, three, other = part(1), part(2), part(3), part(3, "--min-words", "2")
    assert "1 of 3 parts are missing (3)" in command("merge", one, two)[2]
    assert "different inputs, options or numbers" in command("merge", one, two, other)[2]
    assert "a part occurs twice" in command("merge", one, two, three, three)[2]
    assert "has no part manifest" in command("merge", tars)[2]
    shard = next(three.glob("*.tar"))
    shard.unlink()
    assert f"{shard.name} is missing or differs in size" in command("merge", one, two, three)[2]
    (three / "_part-pairs-003-of-003.json").write_text("{}")
    assert "_part-pairs-003-of-003.json is not a part manifest" in command("merge", one, two, three)[2]
    for wrong in ("0/3", "4/3", "x", "1/0"):
        assert "must be i/n with 1 <= i <= n" in refusal(tmp_path / "o", "pairs", tars, "--part", wrong)


def test_shards_end_at_a_size(tmp_path: Path) -> None:
    big = [(f"{n}.{s}", b) for n in range(4) for s, b in (("jpg", jpeg(n) + bytes(400_000)), ("txt", b"big"))]
    done = prepare(tmp_path / "out", "pairs", make_tar(tmp_path / "a.tar", big), "--mb-per-shard", 1)
    assert [entry["documents"] for entry in read_manifest(tmp_path / "out")["parts"]["pairs"]["shards"]] == [3, 1]
    assert len(done.documents) == 4


def test_other_options_need_a_decision(tars: Path, tmp_path: Path) -> None:
    cut = write_tars(tmp_path / "in") / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    out = tmp_path / "out"
    assert "00003.tar is truncated" in refusal(out, "pairs", tmp_path / "in")
    assert len(list((out / ".prepare" / "pairs-all").glob("pairs-*.json"))) == 3  # finished, and kept
    with pytest.raises(UserError, match="no shards in"):
        resolve_shards([str(out)])
    assert "unfinished preparation with other inputs or options" in refusal(out, "pairs", tars, *SMALL)
    prepare(out, "pairs", tars, *SMALL, "--restart")
    fewer = prepare(out, "pairs", tars, "--documents-per-shard", 100)  # a finished one is simply replaced
    assert len(fewer.documents) == 36
    assert len(list(out.glob("*.tar"))) == 6
    assert not (out / ".prepare").exists()


def test_mistakes(tars: Path, tmp_path: Path) -> None:
    assert "--workers 0 must be at least 1" in refusal(tmp_path, "pairs", tars, "--workers", "0")
    assert "--documents-per-shard and --mb-per-shard" in refusal(tmp_path, "pairs", tars, "--documents-per-shard", 0)
    assert "none does not exist" in refusal(tmp_path, "pairs", tmp_path / "none")


def test_an_output_that_is_no_folder(tars: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert f"cannot write into {out}: {file} is a file; give another folder" in refusal(out, "pairs", tars)
        with pytest.raises(UserError, match=f"cannot write into {out}: {file} is a file"):
            ShardWriter(out, "mine")
    assert file.read_text() == "mine"
    for url in ("https://host/out", "s3:/bucket/out"):
        status, _, err = command("prepare", "pairs", tars, "--out", url)
        assert status == 2
        assert err.startswith(f"error: cannot write into {url}: shards are written to a folder or to a store as s3://")
    status, _, err = command("merge", tars, "--out", file)
    assert (status, "no part manifest" in err) == (2, True)


def test_an_input_that_is_a_url(tmp_path: Path) -> None:
    said = refusal(tmp_path / "out", "pairs", "https://host/{00..02}.tar")
    assert "input https://host/{00..02}.tar is a URL; inputs are files, folders and those of a store" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["p.jsonl", "p.tar", "p.csv", "p.json"])
def test_an_input_that_never_ends(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # to open it would wait for ever
    source = {"p.jsonl": "m3it", "p.json": "llava"}.get(name, "pairs")
    more = ["--images", tmp_path] if source == "llava" else []
    status, _, err = command("prepare", source, "--out", tmp_path / "out", tmp_path / name, *more)
    assert (status, err.count("\n")) == (2, 1)
    assert f"input {tmp_path / name} is a pipe or a device, not a file; write what it gives to a file" in err
    for what in ("index", "verify"):
        status, out, err = command(what, tmp_path / name)
        assert "is a pipe or a device, a tar was expected" in out + err


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_end_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setattr("data.prepare.inputs.LONGEST_LINE", 5000)
    monkeypatch.setattr("data.prepare.inputs.CHUNK", 7000)
    good = [json.dumps({"n": n}).encode() for n in range(40)]
    lines = [*good[:20], b'{"a": "' + b"x" * 60_000 + b'"}', *good[20:], b"y" * 30_000]
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(b"\n".join(lines)) if packed else b"\n".join(lines))
    values = [value for unit in line_units([str(path)], (".jsonl", ".gz"), 7000) for _, value in json_lines(unit)]
    assert [value["n"] for value in values if isinstance(value, dict)] == list(range(40))
    assert [str(value) for value in values if isinstance(value, Exception)] == ["it is longer than 5000 bytes"] * 2


def test_a_value_or_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.inputs.LONGEST_LINE", 3_000_000)
    (tmp_path / "a.json").write_bytes(b'[{"n": 1}, {"a": "' + b"x" * 8_000_000)
    with pytest.raises(UserError, match=r"a\.json has a JSON value of more than 3000000 bytes at byte 11"):
        list(json_spans(tmp_path / "a.json"))
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n" + b"x" * 8_000_000)
    with pytest.raises(UserError, match=r"a\.csv is not a table: a line of more than 3000000 bytes at byte 8"):
        csv_units(tmp_path / "a.csv", "a", 10, ",")


def test_after_nothing_was_kept_other_options_may_be_tried(tars: Path, tmp_path: Path) -> None:
    """The first try leaves nothing to go on with, so that it is in nobody's way and nothing is called unfinished."""
    out = tmp_path / "out"
    assert "not one document was kept" in refusal(out, "pairs", tars, "--min-words", 100)
    assert not (out / ".prepare").exists()
    assert list(verify(out)) == [f"folder {out} lists no shards; prepare the data again"]
    assert len(prepare(out, "pairs", tars, "--min-words", 2).documents) == 36


def start(tars: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "data", "prepare", "pairs", str(tars), "--out", str(out), *SMALL, *options]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_and_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", tars=40, pairs=60)
    assert start(tars, tmp_path / "whole", "--workers", "1").wait() == 0
    expected = files(tmp_path / "whole")
    out, killed = tmp_path / "out", 0
    for workers, shards in (("2", 30), ("1", 200), ("3", 420)):
        process = start(tars, out, "--workers", workers)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(out.glob("pairs-*.tar"))) < shards:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must end by themselves
            killed += 1
        process.wait()
        assert read_manifest(out)["parts"] == {} or process.returncode == 0
    assert killed == 3
    assert start(tars, out, "--workers", "2").wait() == 0
    assert files(out) == expected


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in", tars=30, pairs=200)
    process = start(tars, tmp_path / "out", "--workers", "2")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/pairs-*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_killed_worker_and_ctrl_c_are_one_sentence(tmp_path: Path, interrupt: bool) -> None:
    tars = write_tars(tmp_path / "in", tars=30, pairs=200)
    command = [sys.executable, "-m", "data", "prepare", "pairs", str(tars), "--out", str(tmp_path / "out"), *SMALL]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run under nohup
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/pairs-*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if interrupt:
        process.send_signal(signal.SIGINT)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    lines = [line for line in err.strip().split("\n") if not line.endswith("units done")]
    assert len(lines) == 1, err
    assert ("stopped with" if interrupt else "a worker was killed (out of memory?)") in lines[0]
    assert "run the same command again to continue" in lines[0]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_folder_lists_nothing_until_the_end(tars: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(
        '{"v": 2, "parts": {"other": {"documents": 0, "images": 0, "meta": {}, "shards": []}}}'
    )
    prepare(tmp_path, "pairs", tars)
    assert list(read_manifest(tmp_path)["parts"]) == ["other", "pairs"]
