"""What repeats over a corpus is left out: images, addresses, paragraphs of a site, sets of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.prepare.web.duplicates import hash_of, position_of, tabulate
from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from tests.data.sources import Prepared, command, flat, jpeg, prepare, refusal
from tests.data.test_index import make_tar


def document(*parts: int | str, url: str = "", **meta: Any) -> Document:
    """Numbers are images, each with bytes of its own."""
    numbers = list(dict.fromkeys(part for part in parts if isinstance(part, int)))
    nodes: list[Node] = [Text(p) if isinstance(p, str) else Image((numbers.index(p),)) for p in parts]
    return Document("", nodes, [jpeg(number) for number in numbers], ({"url": url} if url else {}) | meta)


def write(folder: Path, *documents: Document, per_shard: int = 3) -> Path:
    with ShardWriter(folder, "raw", per_shard) as writer:
        for one in documents:
            writer.write(one)
    return folder


def kept(done: Prepared) -> list[list[Any]]:
    names = {jpeg(number): number for number in range(40)}
    return [[names[part] if isinstance(part, bytes) else part for part in flat(one)] for one in done.documents]


def test_a_image_of_too_many_documents_goes_from_all_of_them(tmp_path: Path) -> None:
    logo = 30
    documents = [document(logo, f"Document {n}.", n, "End.") for n in range(11)] + [
        document(20, "A.", 20, "B.", 21, "C.")
    ]
    done = prepare(tmp_path / "out", "deduplicate", write(tmp_path / "in", *documents))
    assert kept(done) == [[f"Document {n}.", n, "End."] for n in range(11)] + [[20, "A.\n\nB.", 21, "C."]]
    assert done.dropped_images == {
        "image of too many documents": 11,
        "image of the same document again": 1,
    }
    done = prepare(tmp_path / "all", "deduplicate", tmp_path / "in", "--max-image-documents", 11)
    assert kept(done)[:11] == [[logo, f"Document {n}.", n, "End."] for n in range(11)]


def test_of_an_address_and_of_a_set_of_images_the_last_document_is_kept(tmp_path: Path) -> None:
    documents = [
        document(0, "Old.", url="http://a/1"),
        document(1, "Other.", url="http://a/2"),
        document(2, 3, "First.", url="http://b/1"),
        document(0, 4, "New.", url="http://a/1"),
        document(3, 2, "Second.", url="http://c/1"),
        document(5, "No address."),
        document(6, "No address."),
    ]
    done = prepare(tmp_path / "out", "deduplicate", write(tmp_path / "in", *documents))
    assert kept(done) == [
        [1, "Other."],
        [0, 4, "New."],
        [3, 2, "Second."],
        [5, "No address."],
        [6, "No address."],
    ]
    assert done.dropped == {"address of a later document": 1, "images of a later document": 1}
    done = prepare(tmp_path / "b", "deduplicate", tmp_path / "in", "--keep-same-url", "--keep-same-images")
    assert len(done.documents) == 7


def test_a_paragraph_of_too_many_documents_of_a_site_goes(tmp_path: Path) -> None:
    banner = "Subscribe now."
    documents = [document(n, f"{banner}\n\nDocument {n}.\n\n{banner}", url=f"http://a/{n}") for n in range(3)]
    documents += [document(10 + n, f"Text {n}.\n\n{banner}", url=f"http://b/{n}") for n in range(2)]
    documents += [document(20, banner, url="http://a/9")]
    done = prepare(tmp_path / "out", "deduplicate", write(tmp_path / "in", *documents))
    assert kept(done) == [[n, f"Document {n}."] for n in range(3)] + [
        [10 + n, f"Text {n}.\n\n{banner}"] for n in range(2)
    ]
    assert done.dropped == {"no text": 1}
    assert len(prepare(tmp_path / "b", "deduplicate", tmp_path / "in", "--max-paragraph-documents", 0).documents) == 6


def test_what_does_not_repeat_stays_as_it_is(tmp_path: Path) -> None:
    one = Document("", [Text("Q?", loss=False), Text("A."), Text(" B."), Image((1, 0), 2.0)], [jpeg(0), jpeg(1)])
    one.meta = {"facts": [1], "perplexity": 12}
    two = document(5, "x", perplexity=2000)
    folder = write(tmp_path / "in", one, two)
    done = prepare(tmp_path / "out", "deduplicate", folder, "--where", "perplexity<=1500")
    (left,) = done.documents
    assert left.nodes == [*one.nodes[:3], Image((0, 1), 2.0)]
    assert (left.images, left.meta) == ([jpeg(1), jpeg(0)], one.meta)
    assert done.dropped == {"not perplexity<=1500": 1}


def test_parts_and_workers_give_the_same_bytes(tmp_path: Path) -> None:
    documents = [document(n % 9, f"Document {n}.", 9 + n, url=f"http://a/{n // 2}") for n in range(24)]
    folder = write(tmp_path / "in", *documents, per_shard=2)
    assert len(prepare(tmp_path / "whole", "deduplicate", folder, "--max-image-documents", 2).documents) == 12
    for part in (2, 1, 3):
        arguments = ["--part", f"{part}/3", "--counts", tmp_path / "counts", "--max-image-documents", 2]
        assert (
            command("prepare", "deduplicate", folder, "--out", tmp_path / "parts", "--workers", 1, *arguments)[0] == 0
        )
    assert len(list((tmp_path / "counts").iterdir())) == 12
    assert command("merge", tmp_path / "parts")[0] == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    merged = sorted(path.name for path in (tmp_path / "parts").iterdir() if not path.name.startswith("_part-"))
    assert merged == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_several_processes_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", *(document(0, n + 1, f"Document {n}.") for n in range(20)), per_shard=4)
    done = prepare(tmp_path / "out", "deduplicate", folder, "--workers", 2)
    assert kept(done) == [[n + 1, f"Document {n}."] for n in range(20)]


def test_img2datasets_shards_and_what_is_broken_in_them(tmp_path: Path) -> None:
    members = [("1.jpg", jpeg(1)), ("1.txt", b"A cat."), ("2.jpg", jpeg(2)), ("2.txt", b"\xff"), ("3.txt", b"Alone.")]
    shard = make_tar(tmp_path / "00000.tar", members)
    done = prepare(tmp_path / "out", "deduplicate", shard)
    assert kept(done) == [[1, "A cat."]]
    assert done.dropped == {"bad text or JSON": 1, "fewer than 1 images left": 1}
    cut = tmp_path / "00001.tar"
    cut.write_bytes(shard.read_bytes()[:1500])
    assert "00001.tar is truncated" in refusal(tmp_path / "o", "deduplicate", shard, cut)
    done = prepare(tmp_path / "p", "deduplicate", shard, cut, "--skip-bad-files")
    assert done.dropped["whole file damaged"] == 1


def test_mistakes(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", document(0, "x"))
    assert "must not be negative" in refusal(tmp_path / "o", "deduplicate", folder, "--min-images", -1)
    assert "is not a condition" in refusal(tmp_path / "o", "deduplicate", folder, "--where", "perplexity")
    assert "does not exist" in refusal(tmp_path / "o", "deduplicate", tmp_path / "none")


def test_nothing_is_left_out_of_nothing() -> None:
    table = tabulate([], 10, 2)
    assert not table.has("images", hash_of(b"x"))
    assert table.keeps("urls", hash_of(b"x"), position_of(1, 2))
