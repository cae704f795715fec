"""What the tests of the sources share: one call for `python -m data prepare`, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.__main__ import main
from data.shards.document import Page, Picture, Text
from data.shards.writer import read_manifest, read_pages
from data.tools.verify import verify
from tests.data.helpers import encoded, random_image


@dataclass
class Prepared:
    """What a preparation left: its pages in order, its manifest's facts, and what it printed."""

    pages: list[Page]
    meta: dict[str, Any]
    report: str

    @property
    def dropped(self) -> dict[str, int]:
        return self.meta["pages"]["dropped"]

    @property
    def dropped_pictures(self) -> dict[str, int]:
        return self.meta["pictures"]["dropped"]


def command(*arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `python -m data ...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def prepare(out: Path, source: str, *arguments: object, faults: int = 0) -> Prepared:
    """Prepare in this process, check that nothing (or so much) is wrong with the result, and read it back."""
    status, report, err = command("prepare", source, "--out", out, "--workers", "1", *arguments)
    assert status == 0, err
    assert len(list(verify(out))) == faults
    part = read_manifest(out)["parts"][source]
    pages = [page for entry in part["shards"] for page in read_pages(out / entry["name"])]
    meta = part["meta"]
    assert meta["pages"]["kept"] == part["pages"] == len(pages)
    assert meta["pictures"]["kept"] == part["pictures"] == sum(len(page.images) for page in pages)
    assert set(meta["first"]) == {f"page: {r}" for r in meta["pages"]["dropped"]} | {
        f"picture: {r}" for r in meta["pictures"]["dropped"]
    }
    return Prepared(pages, meta, report)


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


def flat(page: Page) -> list[str | bytes | tuple[bytes, ...]]:
    """A page as texts, pictures (their bytes) and clips (the bytes of the frames), in reading order."""
    out: list[str | bytes | tuple[bytes, ...]] = []
    for node in page.nodes:
        if isinstance(node, Text):
            out.append(node.text)
        else:
            assert isinstance(node, Picture)
            frames = tuple(page.images[frame] for frame in node.frames)
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


def bad_pictures() -> dict[str, bytes]:
    """Files under the name of a picture that are none, by the reason that is given for them."""
    bomb = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    return {
        "picture is an empty file": b"",
        "HTML saved as a picture": b"<!doctype html><title>404</title>",
        "not a picture": b"\x00\x01\x02\x03" * 9,
        "picture is a Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        "picture cannot be decoded": jpeg(0)[:30],
        "picture of more than 64000000 pixels": bomb,
    }


def document(sentences: list[str], *pictures: tuple[str, int, float], **more: Any) -> dict[str, Any]:
    """A line of MMC4: pictures are (name, sentence, similarity)."""
    infos = [
        {
            "image_name": name,
            "raw_url": f"http://x/{name}",
            "matched_text_index": sentence,
            "matched_sim": similarity,
            "face_detections": None,
        }
        for name, sentence, similarity in pictures
    ]
    matrix = [
        [similarity if at == sentence else similarity / 2 for at in range(len(sentences))]
        for _, sentence, similarity in pictures
    ]
    return {
        "text_list": sentences,
        "url": "http://x",
        "could_have_url_duplicate": 0,
        "image_info": infos,
        "similarity_matrix": matrix,
    } | more
