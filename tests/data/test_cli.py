"""The commands as a person runs them, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.prepare.sources.digits import WORDS
from data.shards.document import Document, Image, Node, Text
from data.shards.index import index_path
from data.shards.writer import ShardWriter, read_documents, read_manifest
from data.toy.names import names
from tests.data.helpers import write_documents
from tests.data.sources import command
from tests.data.test_index import make_tar
from tests.fixtures import png

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves its start."""
    return subprocess.CompletedProcess(arguments, *command(*arguments))


def started(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def mistake(*arguments: str | Path) -> str:
    """The one sentence of a run that must fail."""
    return one_error(run(*arguments))


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    done = started("prepare", "digits", "--out", out, "--documents", "30", "--documents-per-shard", "20", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "30 naming and 30 binding documents, 1258 pairs, 539 held-out images" in done.stdout
    return out


def test_digits_are_split_by_image_and_by_name(digits: Path) -> None:
    binding = list(read_documents(digits / "train/binding/digits-binding-000000.tar"))
    assert len(binding) == 20
    heldout = [document for shard in sorted((digits / "heldout").glob("*.tar")) for document in read_documents(shard)]
    pairs = [document for shard in sorted((digits / "train/pairs").glob("*.tar")) for document in read_documents(shard)]
    naming = [
        document for shard in sorted((digits / "train/naming").glob("*.tar")) for document in read_documents(shard)
    ]
    kept_out = {document.images[0] for document in heldout}
    assert not kept_out & {image for document in [*binding, *naming, *pairs] for image in document.images}
    assert len(kept_out) == 539
    assert {name for document in binding for name in document.meta["names"]} <= set(names("train"))
    assert {name for document in heldout for name in document.meta["names"]} <= set(names("heldout"))
    assert {document.meta["class"] for document in heldout} == set("0123456789")
    assert run("verify", digits).returncode == 0
    parts = read_manifest(digits / "train" / "binding")["parts"]
    assert parts["digits-binding"]["meta"]["ways"] == 2


def test_a_binding_document_names_every_image_rightly(digits: Path) -> None:
    pairs = [document for shard in (digits / "train/pairs").glob("*.tar") for document in read_documents(shard)]
    classes = {document.images[0]: document.meta["class"] for document in pairs}
    for document in read_documents(digits / "train/binding/digits-binding-000000.tar"):
        called = dict(zip(document.meta["classes"], document.meta["names"], strict=True))
        turns = [document.nodes[at : at + 2] for at in range(0, len(document.nodes), 2)]
        assert len(turns) == 7
        mentioned = set()
        for image, name in turns:
            assert isinstance(image, Image)
            expected = called[classes[document.images[image.frames[0]]]]
            assert name == Text(f" {expected}", loss=expected in mentioned)
            mentioned.add(expected)
        assert mentioned <= set(document.meta["names"])


def test_a_naming_document_says_what_the_digits_are(digits: Path) -> None:
    pairs = [document for shard in (digits / "train/pairs").glob("*.tar") for document in read_documents(shard)]
    classes = {document.images[0]: int(document.meta["class"]) for document in pairs}
    documents = list(read_documents(digits / "train/naming/digits-naming-000000.tar"))
    assert 1 < len({len(document.images) for document in documents}) <= 9
    for document in documents:
        said = [node.text for node in document.nodes if isinstance(node, Text)]
        assert said == [f" {WORDS[classes[image]]}" for image in document.images]


def test_the_same_digits_again(digits: Path, tmp_path: Path) -> None:
    assert (
        run(
            "prepare", "digits", "--out", tmp_path, "--documents", "30", "--documents-per-shard", "20", "--seed", "1"
        ).returncode
        == 0
    )
    files = [path.relative_to(digits) for path in digits.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert all((tmp_path / file).read_bytes() == (digits / file).read_bytes() for file in files)


def test_inspect_as_text_and_as_html(tmp_path: Path) -> None:
    nodes: list[Node] = [Text("<b> & "), Image((0,)), Text("what?", loss=False), Image((1, 0), 1.0), Text("end")]
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(Document("first", [Text("x")], []))
        writer.write(Document("second", nodes, [png(0, side=10), png(255, side=12)], {"fact": "<i>"}))
    shown = run("inspect", tmp_path / "s-000000.tar", "--row", "1").stdout
    for piece in (
        "row 1, key second",
        "fact: <i>",
        "[image 0: png, 10 x 10,",
        "? 'what?'",
        "[clip of 2 frames, first: png, 12 x 12",
    ):
        assert piece in shown
    document = tmp_path / "document.html"
    assert run("inspect", tmp_path / "s-000000.tar", "--row", "1", "--html", document).returncode == 0
    text = document.read_text()
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

    good = write_documents(tmp_path / "good")
    document = json.dumps({"v": 1, "nodes": [{"i": 0}, {"t": "x"}]}).encode()
    cut = tar("cut", ("k.json", document), ("k.000.png", png(1)))
    cut.write_bytes(cut.read_bytes()[:1200])
    stale = write_documents(tmp_path / "stale", count=2) / "documents-000000.tar"
    index_path(stale).write_bytes(index_path(good / "documents-000000.tar").read_bytes())
    tar("twice", ("k.txt", b""), ("l.txt", b""), ("k.txt", b""))
    tar("image", ("k.json", document), ("k.000.png", png(1)[:50]), ("l.json", document), ("l.000.jpg", b"<html>"))
    tar("json", ("k.json", b"{"), ("l.json", document), ("l.000.png", png(0)))
    tar("few", ("k.json", document))
    write_documents(tmp_path / "missing", count=8)
    (tmp_path / "missing" / "documents-000001.tar").unlink()
    write_documents(tmp_path / "extra", count=4)
    (tmp_path / "extra" / "documents-000000.tar").replace(tmp_path / "extra" / "more.tar")

    done = run("verify", tmp_path)
    assert done.returncode == 1
    faults = done.stdout.strip().split("\n")
    for piece in (
        "cut.tar is truncated",
        "documents-000000.tar has 10240 bytes but its index was built for 20480",
        "twice.tar: key 'k' appears twice (rows 0 and 2)",
        "image.tar, row 0 (key 'k'): image 0 is undecodable",
        "image.tar, row 1 (key 'l'): image 0 is not an image",
        "json.tar, row 0 (key 'k'): bad text or JSON: JSON cannot be read",
        "few.tar, row 0 (key 'k'): its nodes name image 0 but it has 0 images",
        "documents-000001.tar is in the folder's manifest but missing",
        "extra/more.tar is not in the folder's manifest",
        "extra/documents-000000.tar is in the folder's manifest but missing",
    ):
        assert sum(piece in fault for fault in faults) == 1, (piece, faults)
    assert len(faults) == 10
    assert "10 faults" in done.stderr
    assert run("verify", good).returncode == 0
    assert run("verify", tmp_path / "twice.tar").returncode == 1


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    shard = write_documents(tmp_path, count=4) / "documents-000000.tar"
    assert "no.tar does not exist" in one_error(started("inspect", tmp_path / "no.tar"))
    assert "has 4 rows, counted from 0; row 9 does not exist" in mistake("inspect", shard, "--row", "9")
    assert "row -1 does not exist" in mistake("inspect", shard, "--row", "-1")
    assert "is a folder, a tar was expected" in mistake("inspect", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "neither shards nor a manifest" in mistake("verify", tmp_path / "empty")
    assert "not a tar, or is damaged" in mistake("index", index_path(shard))
    assert "--ways must be between" in mistake("prepare", "digits", "--out", tmp_path, "--ways", "11")
    (tmp_path / "file").write_text("")
    assert "file" in mistake("prepare", "digits", "--out", tmp_path / "file")
    usage = run("prepare", "mmc5", "--out", tmp_path)
    assert usage.returncode == 2
    assert "invalid choice: 'mmc5'" in usage.stderr
