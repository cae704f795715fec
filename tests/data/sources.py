"""What the tests of the sources share: one call for `python -m data prepare`, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from data.__main__ import main
from data.shards.document import Document, Image, Text
from data.shards.writer import read_documents, read_manifest
from data.tools.verify import verify
from tests.fixtures import encoded, random_image


@dataclass
class Prepared:
    """What a preparation left: its documents in order, its manifest's facts, and what it printed."""

    documents: list[Document]
    meta: dict[str, Any]
    report: str

    @property
    def dropped(self) -> dict[str, int]:
        return self.meta["documents"]["dropped"]

    @property
    def dropped_images(self) -> dict[str, int]:
        return self.meta["images"]["dropped"]


def command(*arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `python -m data ...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as usage:  # argparse's
            status = int(usage.code or 0)
    return status, out.getvalue(), err.getvalue()


def prepare(out: Path, source: str, *arguments: object, faults: int = 0) -> Prepared:
    """Prepare in this process, check that nothing (or so much) is wrong with the result, and read it back."""
    status, report, err = command("prepare", source, "--out", out, "--workers", "1", *arguments)
    assert status == 0, err
    assert len(list(verify(out))) == faults
    part = read_manifest(out)["parts"][source]
    documents = [document for entry in part["shards"] for document in read_documents(out / entry["name"])]
    meta = part["meta"]
    assert meta["documents"]["kept"] == part["documents"] == len(documents)
    assert meta["images"]["kept"] == part["images"] == sum(len(document.images) for document in documents)
    assert set(meta["first"]) == {f"document: {r}" for r in meta["documents"]["dropped"]} | {
        f"image: {r}" for r in meta["images"]["dropped"]
    }
    return Prepared(documents, meta, report)


def refusal(out: Path, source: str, *arguments: object) -> str:
    """The one sentence of a preparation that must not succeed."""
    status, _, err = command("prepare", source, "--out", out, "--workers", "1", *arguments)
    assert status == 2
    (line,) = [line for line in err.strip().split("\n") if not line.endswith("units done")]
    assert line.startswith("error: ")
    return line


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG that no other number has."""
    return encoded(random_image("RGB", size, seed=number), "JPEG")


def flat(document: Document) -> list[str | bytes | tuple[bytes, ...]]:
    """A document as texts, images (their bytes) and clips (the bytes of the frames), in reading order."""
    out: list[str | bytes | tuple[bytes, ...]] = []
    for node in document.nodes:
        if isinstance(node, Text):
            out.append(node.text)
        else:
            assert isinstance(node, Image)
            frames = tuple(document.images[frame] for frame in node.frames)
            out.append(frames if len(frames) > 1 or node.fps is not None else frames[0])
    return out


def jsonl(path: Path, *rows: object) -> Path:
    """Rows as JSON lines; bytes and strings stand as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def add_link(path: Path, name: str, target: str) -> None:
    """Append a symbolic link to a tar."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        tar.addfile(info)


def bad_images() -> dict[str, bytes]:
    """Files under the name of an image that are none, by the reason that is given for them."""
    bomb = encoded(PILImage.new("1", (10_000, 10_000)), "PNG")
    return {
        "image is an empty file": b"",
        "HTML saved as an image": b"<!doctype html><title>404</title>",
        "not an image": b"\x00\x01\x02\x03" * 9,
        "image is a Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        "image cannot be decoded": jpeg(0)[:30],
        "image of more than 64000000 pixels": bomb,
    }


def mmc4_document(sentences: list[str], *images: tuple[str, int, float], **more: Any) -> dict[str, Any]:
    """A line of MMC4: images are (name, sentence, similarity)."""
    infos = [
        {
            "image_name": name,
            "raw_url": f"http://x/{name}",
            "matched_text_index": sentence,
            "matched_sim": similarity,
            "face_detections": None,
        }
        for name, sentence, similarity in images
    ]
    matrix = [
        [similarity if at == sentence else similarity / 2 for at in range(len(sentences))]
        for _, sentence, similarity in images
    ]
    return {
        "text_list": sentences,
        "url": "http://x",
        "could_have_url_duplicate": 0,
        "image_info": infos,
        "similarity_matrix": matrix,
    } | more
