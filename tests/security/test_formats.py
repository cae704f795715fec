"""Files that Pillow would hand to another program: they reach no decoder, by whatever way an image comes in."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from data.batches.decode import decode
from data.errors import ContentError
from data.tools.show import describe_image, figure
from eval.plugins.harness_prompts import image_of
from eval.reports.gallery import data_uri
from flamingo.errors import UserError
from flamingo.processor import FlamingoProcessor
from flamingo.vision.image_files import UnreadableFormat, read_image
from flamingo.vision.transform import ImageTransform, to_rgb
from tests.data.helpers import byte_processor
from tests.fixtures import encoded, random_image

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%HiResBoundingBox: 0 0 8 8\n%%EndComments\n"
    b"8 8 scale 8 8 8 [8 0 0 -8 0 8] {<ff>} image\nshowpage\n%%EOF\n"
)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that a Ghostscript of our own makes when it is started."""
    program, mark = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_pillow_alone_starts_it(ran: Path) -> None:
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(OSError):  # noqa: PT011 (our program draws nothing)
        image.load()
    assert ran.exists()


WAYS: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, file: to_rgb(data),
    "path": lambda data, file: to_rgb(file),
    "name": lambda data, file: to_rgb(str(file)),
    "PIL": lambda data, file: to_rgb(Image.open(io.BytesIO(data))),
    "PIL, the transform": lambda data, file: ImageTransform.to_rgb(Image.open(io.BytesIO(data))),
    "training": lambda data, file: decode(data),
    "any use": lambda data, file: read_image(data, lambda image: image.load()),
    "gallery": lambda data, file: data_uri(data),
    "harness": lambda data, file: image_of(Image.open(io.BytesIO(data))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg", "a.ps", "a.pdf"])
def test_postscript_reaches_no_program(ran: Path, tmp_path: Path, way: str, name: str) -> None:
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises((UserError, UnreadableFormat, ContentError)):
        WAYS[way](EPS, tmp_path / name)
    assert not ran.exists()


def test_postscript_is_described_but_not_drawn(ran: Path) -> None:
    assert "undecodable" in describe_image(EPS)
    assert figure(EPS, "image 0")["source"].startswith("data:image/octet-stream;")
    assert not ran.exists()


def test_a_processor_takes_what_was_loaded_and_says_what_it_does_not_read(tmp_path: Path) -> None:
    processor: FlamingoProcessor = byte_processor()
    for form in ("PPM", "TGA", "JPEG2000", "PCX"):
        data = encoded(random_image("RGB", (16, 16)), form)
        with pytest.raises(UserError, match=r"is not read; PNG, JPEG"):
            processor(images=[[Image.open(io.BytesIO(data))]], text=["<image>a"])
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        processor(images=[[loaded]], text=["<image>a"])
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        processor(images=[[Image.open(io.BytesIO(encoded(random_image("RGB", (16, 16)), form)))]], text=["<image>a"])


@pytest.mark.parametrize("way", ["path", "name"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, way: str) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for file in (tmp_path / "fifo.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            WAYS[way](b"", file)
