"""One way for images: what a model sees is the same in training, here and in the harnesses; broken ones are named."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data.batches.decode import decode
from data.shards.document import Document, Node, Text
from data.shards.document import Image as ImageNode
from data.shards.writer import ShardWriter
from eval.demonstrations.samplers import near_duplicates
from eval.inference.model import FlamingoResponder
from eval.plugins.harness_prompts import image_of, shown
from eval.reports.gallery import data_uri
from eval.spec import SourceSpec, TaskSpec
from eval.task import EncodedImage
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from flamingo.vision.transform import to_rgb
from tests.eval.published.files import clip, dump, dump_lines, image
from tests.fixtures import png
from tests.model import tiny


def encoded(made: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    made.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(mode: str, ground: object, ink: object) -> Image.Image:
    made = Image.new(mode, (80, 40), ground)  # type: ignore[arg-type]
    ImageDraw.Draw(made).text((5, 5), "y = x + 1", fill=ink)  # type: ignore[arg-type]
    return made


def sixteen() -> bytes:
    return encoded(Image.fromarray((np.arange(48 * 32, dtype=np.uint16) * 40).reshape(32, 48)))


def turned() -> bytes:
    made, exif = drawn("RGB", "white", "red"), Image.Exif()
    exif[0x0112] = 6
    return encoded(made, "JPEG", exif=exif.tobytes())


def palette() -> bytes:
    made = drawn("P", 0, 1)
    made.putpalette([0, 0, 0, 0, 0, 255])
    return encoded(made, transparency=0)


def animated() -> bytes:
    first, *rest = (Image.new("P", (20, 20), colour) for colour in (1, 2, 3))
    first.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return encoded(first, "GIF", save_all=True, append_images=rest)


KINDS: dict[str, Callable[[], bytes]] = {
    "alpha": lambda: encoded(drawn("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))),
    "grey and alpha": lambda: encoded(drawn("LA", (0, 0), (0, 255))),
    "16 bits": sixteen,
    "turned by EXIF": turned,
    "transparent palette": palette,
    "CMYK": lambda: encoded(drawn("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "JPEG"),
    "animated": animated,
    "one bit": lambda: encoded(drawn("1", 1, 0)),
    "plain": lambda: png((10, 200, 30), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_harness_shows_what_training_shows(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    file = tmp_path / "image.bin"
    file.write_bytes(data)
    seen = decode(data)
    assert torch.equal(to_rgb(data), seen)
    dicts = [{"bytes": data, "path": None}, {"bytes": None, "path": str(file)}]
    for given in (data, str(file), Image.open(io.BytesIO(data)), *dicts, seen.permute(1, 2, 0).numpy()):
        (frame,) = image_of(given).frames
        assert torch.equal(to_rgb(frame), seen)
    assert seen.float().std() > 0 or kind == "animated"
    blank = to_rgb(EncodedImage((data,)).blank().frames[0])
    assert blank.shape == seen.shape  # of a turned image too


def test_transparent_images_are_not_near_duplicates_of_each_other() -> None:
    """Black ink on nothing: without a white ground all of them are black."""
    first, second = (Image.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in range(2))
    ImageDraw.Draw(first).rectangle((0, 0, 31, 63), fill=(0, 0, 0, 255))
    ImageDraw.Draw(second).rectangle((32, 0, 63, 63), fill=(0, 0, 0, 255))
    ours, other = (EncodedImage((encoded(made),)) for made in (first, second))
    assert not near_duplicates(ours, other)
    assert near_duplicates(ours, EncodedImage((encoded(first, "WEBP", lossless=True),)))


@pytest.fixture(scope="module")
def responder() -> FlamingoResponder:
    return FlamingoResponder(*tiny.flamingo("llama"))


def broken() -> bytes:
    return encoded(drawn("RGB", "white", "red"), "JPEG")[:-60]


def shards(root: Path) -> SourceSpec:
    with ShardWriter(root / "shards", "pages") as writer:
        nodes: list[Node] = [ImageNode((0,)), Text("a", loss=False), Text(" b"), ImageNode((1,)), Text(" c")]
        writer.write(Document("", nodes, [png((1, 2, 3), 0), broken()]))
    return SourceSpec(path=str(root / "shards"))


def table(root: Path) -> SourceSpec:
    image(root / "0.png", 0)
    (root / "1.jpg").write_bytes(broken())
    dump_lines(root / "t.jsonl", [{"image": name, "answer": "a"} for name in ("0.png", "1.jpg")])
    return SourceSpec(format="jsonl", path=str(root / "t.jsonl"))


def folder(root: Path) -> SourceSpec:
    clip(root / "v0", 0)
    (root / "v0" / "001.png").write_bytes(png((1, 2, 3), 0)[:60])
    dump(root / "t.json", [{"videoID": "v0", "enCap": ["a"]}])
    return SourceSpec(format="vatex", path=str(root / "t.json"))


def parquet(root: Path) -> SourceSpec:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    row = {"id": "a_1", "question": "?", "options": "['x', 'y']", "answer": "A", "question_type": "multiple-choice"}
    rows = [row | {"image_1": {"bytes": data}} for data in (png((1, 2, 3), 0), broken())]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "validation-0.parquet")
    return SourceSpec(format="mmmu", path=str(root))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (shards, r"shards/pages.*\.tar: document .*, image 1 cannot be decoded"),
        (table, r"/1\.jpg cannot be decoded"),
        (folder, r"v0/001\.png cannot be decoded"),
        (parquet, r"validation-0\.parquet: row 2, image_1 cannot be decoded"),
    ],
)
def test_a_broken_image_is_named_by_its_file(
    write: Callable[[Path], SourceSpec], name: str, tmp_path: Path, responder: FlamingoResponder
) -> None:
    source = write(tmp_path)
    lead = " " if source.format == "documents" else ""
    last = read_examples("t", TaskSpec(source=source, lead=lead), source)[-1]
    assert last.turn.image is not None
    for use in (lambda one: responder.encode([one]), EncodedImage.blank):
        with pytest.raises(UserError, match=name):
            use(last.turn.image)


def test_a_file_that_went_away_or_is_a_folder_is_named(tmp_path: Path, responder: FlamingoResponder) -> None:
    source = table(tmp_path)
    first = read_examples("t", TaskSpec(source=source), source)[0].turn.image
    assert first is not None
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png cannot be read: No such file"):
        responder.encode([first])


def test_a_broken_image_of_a_harness_is_named_by_its_document(tmp_path: Path, responder: FlamingoResponder) -> None:
    file = tmp_path / "b.jpg"
    file.write_bytes(broken())
    where = "document 3 of task t"
    with (
        Image.open(file) as opened,
        pytest.raises(UserError, match=r"image 1 of document 3 of task t \(.*b\.jpg\) cannot be decoded"),
    ):
        shown("?", [opened], where=where)
    with pytest.raises(UserError, match=r"image 1 of document 3 of task t \(.*b\.jpg\) cannot be decoded"):
        responder.encode(shown("?", [str(file)], where=where).images)
    with pytest.raises(UserError, match=r"image 2 of document 3 of task t \(.*no\.jpg\) cannot be read"):
        shown("?", [png((1, 2, 3), 0), str(tmp_path / "no.jpg")], where=where)
    with pytest.raises(UserError, match="image 1 of document 3 of task t is a float; it must be PIL"):
        shown("?", [0.5], where=where)


def test_the_gallery_shows_transparent_images_on_white() -> None:
    uri = data_uri(encoded(Image.new("RGBA", (400, 400), (0, 0, 0, 0))))
    thumbnail = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert thumbnail.getpixel((10, 10)) == (255, 255, 255)
