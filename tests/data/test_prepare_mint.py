"""MINT-1T's and NeMo Curator's tars in: texts and images in one order, frames of a TIFF where they belong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from tests.data.sources import bad_images, flat, jpeg, prepare
from tests.data.test_index import make_tar


def tiff(*values: int, mode: str = "RGB") -> bytes:
    """A file of one frame for each value, which all of its pixels have."""
    frames = [PILImage.new("L", (12 + value % 5, 10), value).convert(mode) for value in values]
    out = io.BytesIO()
    frames[0].save(out, "TIFF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def shade(image: bytes) -> int:
    with PILImage.open(io.BytesIO(image)) as opened:
        pixels = np.asarray(opened.convert("L"))
        assert opened.format == "PNG"
    assert pixels.min() == pixels.max()
    return int(pixels.min())


def body(*entries: str | tuple[str], **more: Any) -> bytes:
    """The JSON of a document: texts, and images as tuples of their names."""
    texts = [entry if isinstance(entry, str) else None for entry in entries]
    images = [None if isinstance(entry, str) else entry[0] for entry in entries]
    return json.dumps({"texts": texts, "images": images, "pdf_name": "a.pdf"} | more).encode()


def test_the_frames_of_a_tiff_are_the_images_in_their_order(tmp_path: Path) -> None:
    members = [
        ("a.json", body("One.", ("page_0_image_5",), ("page_0_image_9",), "Two.", ("page_3_image_1",))),
        ("a.tiff", tiff(10, 20, 30)),
        ("b.json", body(("page_0_image_1",), "Only.")),
        ("b.tiff", tiff(77)),
        ("c.json", body("Cut.", ("page_0_image_1",), ("page_0_image_2",))),
        ("c.tiff", tiff(1)),
        ("d.json", body("Lost.", ("page_0_image_1",))),
        ("e.json", body("Text alone.")),
        ("f.json", b"[]"),
        ("g.tiff", tiff(1)),
        ("h.json", body("Ink.", ("page_0_image_1",), ("page_0_image_2",))),
        ("h.tiff", tiff(40, 200, mode="CMYK")),
    ]
    make_tar(tmp_path / "mint.tar", members)
    done = prepare(tmp_path / "out", "mint", tmp_path / "mint.tar")
    found = [
        [value if isinstance(value, str) else shade(value) for value in flat(document) if not isinstance(value, tuple)]
        for document in done.documents
    ]
    assert found[:2] == [["One.", 10, 20, "Two.", 30], [77, "Only."]]
    assert found[2][0] == "Ink."
    assert int(found[2][1]) < int(found[2][2])
    assert done.documents[0].meta == {"pdf_name": "a.pdf"}
    assert done.dropped == {
        "the numbers of images and of frames differ": 1,
        "fewer than 1 images left": 2,
        "JSON is not an object": 1,
        "sample without JSON": 1,
    }
    assert done.dropped_images == {"image is missing": 1}


def test_every_frame_is_judged_by_its_own_size(tmp_path: Path) -> None:
    """A page often begins with a rule across it, which is much wider than it is high."""
    line, small, photo = (PILImage.new("L", size, 50) for size in ((400, 2), (9, 9), (40, 40)))
    out = io.BytesIO()
    line.save(out, "TIFF", save_all=True, append_images=[photo, small])
    members = [("a.json", body("One.", ("x",), ("y",), ("z",))), ("a.tiff", out.getvalue())]
    make_tar(tmp_path / "a.tar", members)
    done = prepare(tmp_path / "out", "mint", tmp_path / "a.tar", "--min-side", "10", "--max-aspect", "200")
    assert [[shade(image) for image in document.images] for document in done.documents] == [[50]]
    assert done.dropped_images == {"image with a side below 10 pixels": 2}
    thin = prepare(tmp_path / "thin", "mint", tmp_path / "a.tar")
    assert [len(document.images) for document in thin.documents] == [2]
    assert thin.dropped_images == {"image longer than 20 times its width": 1}


def test_curator_names_a_file_for_each_image(tmp_path: Path) -> None:
    one, two = jpeg(1), jpeg(2)
    members = [
        ("k.json", body(("k.0.jpg",), "One.", ("2.jpg",))),
        ("k.0.jpg", one),
        ("k.2.jpg", two),
        ("l.json", body(("l.0.jpg",), "One.", ("2.jpg",))),  # its second image was left out
        ("l.0.jpg", one),
        ("m.json", body(("page_1_image_1",), "An only image.")),
        ("m.jpg", two),
        ("n.json", body(("0.jpg",), "One.", ("2.jpg",))),
        ("n.0.jpg", bad_images()["not an image"]),
        ("n.2.jpg", two),
        ("o.json", body(("0.jpg",), "One.", texts=["x"])),
        ("o.0.jpg", one),
    ]
    make_tar(tmp_path / "a.tar", members)
    done = prepare(tmp_path / "out", "mint", tmp_path / "a.tar")
    assert [flat(document) for document in done.documents] == [
        [one, "One.", two],
        [one, "One."],
        [two, "An only image."],
        ["One.", two],
    ]
    assert done.dropped_images == {"image is missing": 1, "not an image": 1}
    assert done.dropped == {"'images' and 'texts' are not lists of the same length": 1}
    fewer = prepare(tmp_path / "two", "mint", tmp_path / "a.tar", "--min-images", "2")
    assert len(fewer.documents) == 1
