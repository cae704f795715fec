"""One's own Markdown in: images where the document shows them."""

from __future__ import annotations

from pathlib import Path

from data.shards.document import Image
from tests.data.sources import flat, jpeg, prepare, refusal


def test_documents_with_their_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "deep" / "pics").mkdir(parents=True)
    (root / "deep" / "pics" / "a b.jpg").write_bytes(jpeg(1))
    (root / "1.jpg").write_bytes(jpeg(2))
    (tmp_path / "secret.jpg").write_bytes(jpeg(3))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    documents = {
        "deep/doc.md": '# Title\n\nSee ![a](pics/a%20b.jpg "Chart") and ![](../1.jpg)\n![](<pics/a b.jpg>) again.\n',
        "only.txt": "words only",
        "none.md": "![](none.jpg)",
        "out.md": "![](../secret.jpg)",
        "link.md": "![](link.jpg)",
        "empty.md": " \n",
        "remote.md": "x ![](http://x/y.jpg)",
    }
    for name, body in documents.items():
        (root / name).write_text(body)
    (root / "latin.txt").write_bytes(b"\xff\xfe")
    done = prepare(tmp_path / "out", "folder", root)
    first, second = done.documents
    assert flat(first) == ["# Title\n\nSee", jpeg(1), "and", jpeg(2), jpeg(1), "again."]
    assert [node.frames for node in first.nodes if isinstance(node, Image)] == [(0,), (1,), (0,)]
    assert first.meta == {"file": "deep/doc.md"}
    assert flat(second) == ["words only"]
    assert done.dropped == {
        "image is missing": 2,
        "image's name leads out of its folder": 1,
        "image is a link out of its folder": 1,
        "empty document": 1,
        "document is not UTF-8": 1,
    }
    assert len(prepare(tmp_path / "some", "folder", root, "--min-images", 1).documents) == 1
    assert "is not a folder" in refusal(tmp_path / "o", "folder", root / "only.txt")
