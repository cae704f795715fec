"""The commands as a person runs them, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.prepare.sources.digits import WORDS
from data.shards.document import Node, Page, Picture, Text
from data.shards.index import index_path
from data.shards.writer import ShardWriter, read_manifest, read_pages
from data.toy.names import names
from tests.data.helpers import png, write_pages
from tests.data.test_index import make_tar

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def mistake(*arguments: str | Path) -> str:
    """The one sentence of a run that must fail."""
    done = run(*arguments)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    done = run("prepare", "digits", "--out", out, "--pages", "30", "--pages-per-shard", "20", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "30 naming and 30 binding pages, 1258 pairs, 539 held-out pictures" in done.stdout
    return out


def test_digits_are_split_by_picture_and_by_name(digits: Path) -> None:
    binding = list(read_pages(digits / "train/binding/digits-binding-000000.tar"))
    assert len(binding) == 20
    heldout = [page for shard in sorted((digits / "heldout").glob("*.tar")) for page in read_pages(shard)]
    pairs = [page for shard in sorted((digits / "train/pairs").glob("*.tar")) for page in read_pages(shard)]
    naming = [page for shard in sorted((digits / "train/naming").glob("*.tar")) for page in read_pages(shard)]
    kept_out = {page.images[0] for page in heldout}
    assert not kept_out & {image for page in [*binding, *naming, *pairs] for image in page.images}
    assert len(kept_out) == 539
    assert {name for page in binding for name in page.meta["names"]} <= set(names("train"))
    assert {name for page in heldout for name in page.meta["names"]} <= set(names("heldout"))
    assert {page.meta["class"] for page in heldout} == set("0123456789")
    assert run("verify", digits).returncode == 0
    parts = read_manifest(digits / "train" / "binding")["parts"]
    assert parts["digits-binding"]["meta"]["ways"] == 2


def test_a_binding_page_names_every_picture_rightly(digits: Path) -> None:
    pairs = [page for shard in (digits / "train/pairs").glob("*.tar") for page in read_pages(shard)]
    classes = {page.images[0]: page.meta["class"] for page in pairs}
    for page in read_pages(digits / "train/binding/digits-binding-000000.tar"):
        called = dict(zip(page.meta["classes"], page.meta["names"], strict=True))
        turns = [page.nodes[at : at + 2] for at in range(0, len(page.nodes), 2)]
        assert len(turns) == 7
        mentioned = set()
        for picture, name in turns:
            assert isinstance(picture, Picture)
            expected = called[classes[page.images[picture.frames[0]]]]
            assert name == Text(f" {expected}", loss=expected in mentioned)
            mentioned.add(expected)
        assert mentioned <= set(page.meta["names"])


def test_a_naming_page_says_what_the_digits_are(digits: Path) -> None:
    pairs = [page for shard in (digits / "train/pairs").glob("*.tar") for page in read_pages(shard)]
    classes = {page.images[0]: int(page.meta["class"]) for page in pairs}
    pages = list(read_pages(digits / "train/naming/digits-naming-000000.tar"))
    assert 1 < len({len(page.images) for page in pages}) <= 9
    for page in pages:
        said = [node.text for node in page.nodes if isinstance(node, Text)]
        assert said == [f" {WORDS[classes[image]]}" for image in page.images]


def test_the_same_digits_again(digits: Path, tmp_path: Path) -> None:
    assert (
        run(
            "prepare", "digits", "--out", tmp_path, "--pages", "30", "--pages-per-shard", "20", "--seed", "1"
        ).returncode
        == 0
    )
    files = [path.relative_to(digits) for path in digits.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert all((tmp_path / file).read_bytes() == (digits / file).read_bytes() for file in files)


def test_inspect_as_text_and_as_html(tmp_path: Path) -> None:
    nodes: list[Node] = [Text("<b> & "), Picture((0,)), Text("what?", loss=False), Picture((1, 0), 1.0), Text("end")]
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Page("first", [Text("x")], []))
        writer.write(Page("second", nodes, [png(0, 10), png(255, 12)], {"fact": "<i>"}))
    shown = run("inspect", tmp_path / "s-000000.tar", "--row", "1").stdout
    for piece in (
        "row 1, key second",
        "fact: <i>",
        "[picture 0: png, 10 x 10,",
        "? 'what?'",
        "[clip of 2 frames, first: png, 12 x 12",
    ):
        assert piece in shown
    page = tmp_path / "page.html"
    assert run("inspect", tmp_path / "s-000000.tar", "--row", "1", "--html", page).returncode == 0
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 3
    assert "&lt;b&gt; &amp; " in text
    assert "<i>" not in text


def test_index_of_a_tar_made_elsewhere(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", [("k.json", b"{}"), ("k.txt", b"x")])
    assert "1 samples, 2 members" in run("index", shard).stdout
    assert index_path(shard).exists()


def test_verify_finds_every_planted_fault(tmp_path: Path) -> None:
    def tar(name: str, *members: tuple[str, bytes]) -> Path:
        return make_tar(tmp_path / f"{name}.tar", list(members))

    good = write_pages(tmp_path / "good")
    page = json.dumps({"v": 1, "nodes": [{"i": 0}, {"t": "x"}]}).encode()
    cut = tar("cut", ("k.json", page), ("k.000.png", png(1)))
    cut.write_bytes(cut.read_bytes()[:1200])
    stale = write_pages(tmp_path / "stale", count=2) / "pages-000000.tar"
    index_path(stale).write_bytes(index_path(good / "pages-000000.tar").read_bytes())
    tar("twice", ("k.txt", b""), ("l.txt", b""), ("k.txt", b""))
    tar("picture", ("k.json", page), ("k.000.png", png(1)[:50]), ("l.json", page), ("l.000.jpg", b"<html>"))
    tar("json", ("k.json", b"{"), ("l.json", page), ("l.000.png", png(0)))
    tar("few", ("k.json", page))
    write_pages(tmp_path / "missing", count=8)
    (tmp_path / "missing" / "pages-000001.tar").unlink()
    write_pages(tmp_path / "extra", count=4)
    (tmp_path / "extra" / "pages-000000.tar").replace(tmp_path / "extra" / "more.tar")

    done = run("verify", tmp_path)
    assert done.returncode == 1
    faults = done.stdout.strip().split("\n")
    for piece in (
        "cut.tar is truncated",
        "pages-000000.tar has 10240 bytes but its index was built for 20480",
        "twice.tar: key 'k' appears twice (rows 0 and 2)",
        "picture.tar, row 0 (key 'k'): picture 0 is undecodable",
        "picture.tar, row 1 (key 'l'): picture 0 is not a picture",
        "json.tar, row 0 (key 'k'): bad text or JSON: JSON cannot be read",
        "few.tar, row 0 (key 'k'): its <image> places ask for 1 pictures but the sample has 0",
        "pages-000001.tar is in the folder's manifest and missing",
        "extra/more.tar is not in the folder's manifest",
        "extra/pages-000000.tar is in the folder's manifest and missing",
    ):
        assert sum(piece in fault for fault in faults) == 1, (piece, faults)
    assert len(faults) == 10
    assert "10 faults" in done.stderr
    assert run("verify", good).returncode == 0
    assert run("verify", tmp_path / "twice.tar").returncode == 1


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    shard = write_pages(tmp_path, count=4) / "pages-000000.tar"
    assert "no.tar does not exist" in mistake("inspect", tmp_path / "no.tar")
    assert "has 4 rows, counted from 0; row 9 does not exist" in mistake("inspect", shard, "--row", "9")
    assert "row -1 does not exist" in mistake("inspect", shard, "--row", "-1")
    assert "is a folder, a tar was expected" in mistake("inspect", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "neither shards nor a manifest" in mistake("verify", tmp_path / "empty")
    assert "no tar or damaged" in mistake("index", index_path(shard))
    assert "--ways must be between" in mistake("prepare", "digits", "--out", tmp_path, "--ways", "11")
    (tmp_path / "file").write_text("")
    assert "file" in mistake("prepare", "digits", "--out", tmp_path / "file")
    usage = run("prepare", "mmc5", "--out", tmp_path)
    assert usage.returncode == 2
    assert "invalid choice: 'mmc5'" in usage.stderr
