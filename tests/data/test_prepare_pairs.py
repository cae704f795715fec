"""Images with captions in: img2dataset's tars, folders and tables, as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.prepare.sources import pairs
from flamingo.vision.image_files import sniff
from tests.data.sources import add_link, bad_images, flat, jpeg, prepare, refusal
from tests.data.test_index import make_tar
from tests.fixtures import encoded, png, random_image


def facts(caption: object, **more: object) -> bytes:
    return json.dumps({"caption": caption, "url": "http://x", "status": "success", "exif": "{}"} | more).encode()


def test_tars_of_img2dataset_with_every_fault(tmp_path: Path) -> None:
    webp = encoded(random_image("RGB", (20, 20)), "WEBP")
    members = [
        ("000000001.jpg", jpeg(1)),  # completion order: 1 before 0
        ("000000001.json", facts("a dog", similarity=0.31)),
        ("000000001.txt", b"a dog"),
        ("000000000.jpg", webp),  # DataComp: bytes as they came
        ("000000000.json", facts("a cat, from the JSON", similarity=0.3)),
        ("../../000000002.jpg", jpeg(2)),  # only ever a key
        ("../../000000002.txt", b"an outsider"),
        ("../../000000002.json", facts("an outsider", similarity="0.29")),
        ("3.txt", b"no image"),
        ("4.jpg", jpeg(4)),
        ("4.txt", b" "),
        ("5.jpg", jpeg(5)),
        ("5.txt", b"\xff\xfe"),
        ("6.jpg", jpeg(6)),
        ("6.json", b"{"),
        ("7.jpg", jpeg(7)),
        ("7.json", b"[]"),
        ("8.jpg", jpeg(8)),
        ("8.json", facts(["a", "list"])),
        ("9.jpg", jpeg(9)),
        ("9.json", facts("dissimilar", similarity=0.1)),
        ("10.jpg", jpeg(9)),
        ("10.json", facts("unknown")),
        ("11.jpg", jpeg(9)),
        ("11.json", facts("odd", similarity="high")),
        ("000000001.txt", b"again"),
    ]
    for number, body in enumerate(bad_images().values()):
        members += [(f"bad{number}.jpg", body), (f"bad{number}.json", facts("x", similarity=1))]
    shard = make_tar(tmp_path / "00000.tar", members)
    add_link(shard, "link.jpg", "/etc/passwd")
    done = prepare(tmp_path / "out", "pairs", shard, "--where", "similarity>=0.28")
    assert [flat(document) for document in done.documents] == [
        [jpeg(1), "a dog"],
        [webp, "a cat, from the JSON"],
        [jpeg(2), "an outsider"],
    ]
    assert done.documents[0].meta == {"key": "000000001", "url": "http://x", "status": "success", "similarity": 0.31}
    assert done.documents[2].meta["key"] == "../../000000002"
    assert done.dropped == dict.fromkeys(bad_images(), 1) | {
        "no image": 1,
        "no caption": 1,
        "caption is not UTF-8": 1,
        "JSON cannot be read": 1,
        "JSON is not an object": 1,
        "caption is not text": 1,
        "not similarity>=0.28": 1,
        "no 'similarity'": 1,
        "'similarity' is not a number": 1,
        "key appears again later in its tar (tar --sort=name)": 1,
    }


def test_a_folder_of_images_and_texts(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "b.PNG").write_bytes(png(3))
    (root / "b.txt").write_text("bee\n")
    (root / "deep" / "a.b.jpg").write_bytes(jpeg(1))
    (root / "deep" / "a.b.json").write_bytes(facts("from JSON"))
    (root / "alone.jpg").write_bytes(jpeg(2))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "link.txt").write_text("a link")
    (tmp_path / "secret.jpg").write_bytes(jpeg(3))
    (root / "notes.pdf").write_text("no image")
    done = prepare(tmp_path / "out", "pairs", root)
    assert [flat(document) for document in done.documents] == [[png(3), "bee"], [jpeg(1), "from JSON"]]
    assert [document.meta["file"] for document in done.documents] == ["b.PNG", "deep/a.b.jpg"]
    assert done.dropped == {"no caption": 1, "image is a link out of its folder": 1}


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_tables_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(pairs, "IN_A_UNIT", chunk)
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number))
    table = tmp_path / "t.csv"
    table.write_bytes(
        b'\xef\xbb\xbfid,filepath,title\r\n7,0.jpg,"two\r\nlines, quoted"\r\n8,../t.csv,x\r\n\r\n'
        b"9,1.jpg,\r\n10,none.jpg,y\r\n11,2.jpg,z,too many\r\n12,2.jpg,\xc3\xbcber"
    )
    done = prepare(tmp_path / "out", "pairs", table, "--images", tmp_path / "images")
    assert [flat(document) for document in done.documents] == [[jpeg(0), "two\r\nlines, quoted"], [jpeg(2), "über"]]
    assert done.documents[0].meta == {"id": "7", "filepath": "0.jpg"}
    assert done.dropped == {
        "image's name leads out of its folder": 1,
        "no caption": 1,
        "image is missing": 1,
        "row with another number of columns than the header": 1,
    }
    assert "t.csv row 2)" in done.report or "t.csv row 3)" in done.report


def test_tsv_with_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    table = tmp_path / "t.tsv"
    table.write_text('where\twhat\na.jpg\tan "a"\n')
    options = ("--image-column", "where", "--caption-column", "what")
    done = prepare(tmp_path / "out", "pairs", table, *options)
    assert [flat(document) for document in done.documents] == [[jpeg(1), 'an "a"']]
    told = refusal(tmp_path / "o", "pairs", table)
    assert "has the columns where, what; say with --image-column which one is meant" in told


def test_mistakes(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", [("k.jpg", jpeg(1)), ("k.txt", b"x")])
    assert "'similarity' is not a condition" in refusal(tmp_path / "o", "pairs", shard, "--where", "similarity")
    (tmp_path / "empty").mkdir()
    assert "holds neither tars nor images" in refusal(tmp_path / "o", "pairs", tmp_path / "empty")
    table = tmp_path / "t.csv"
    table.write_bytes(b"image,caption\n\xff,x\n")
    assert "t.csv is not a UTF-8 table" in refusal(tmp_path / "o", "pairs", table)
    table.write_bytes(b"image,caption,caption\n0.jpg,x,y\n")
    assert "t.csv has two columns 'caption'" in refusal(tmp_path / "p", "pairs", table)
    shard.write_bytes(shard.read_bytes()[:700])
    assert "a.tar is truncated" in refusal(tmp_path / "o", "pairs", shard)
    assert "--min-side" in refusal(tmp_path / "o", "pairs", tmp_path / "empty", "--min-side", "0")


def test_the_kept_bytes_are_the_image_s_own(tmp_path: Path) -> None:
    gif = encoded(random_image("P", (12, 12)), "GIF")
    shard = make_tar(tmp_path / "a.tar", [("k.jpg", gif), ("k.txt", b"x")])
    (document,) = prepare(tmp_path / "out", "pairs", shard).documents
    assert document.images == [gif]
    assert sniff(document.images[0]) == "gif"
