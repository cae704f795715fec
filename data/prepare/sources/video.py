"""Videos with captions: video2dataset's tars, folders of mp4 + txt, and frames extracted before.

    {key}.mp4 + {key}.txt (+ {key}.json)            decoded here, through PyAV, at --fps
    {key}.000.jpg {key}.001.jpg ... + {key}.txt     frames unchanged; --fps says at which rate they were taken
    {key}.npy + {key}.txt                           the same as an array (F, H, W, 3) of uint8

A document is one clip and its caption. video2dataset's clipping gives keys such as 000000_00001, one sample a clip.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from data.prepare.clips import add_clip_arguments, check_clip_arguments, frames_of
from data.prepare.images import ImageFolder, ImageRule, add_image_arguments
from data.prepare.inputs import file_units, folder_files, folder_units
from data.prepare.tars import json_of, tar_samples
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Text
from data.shards.samples import IMAGE_SUFFIX, VIDEOS
from flamingo.errors import UserError

LAYOUT = "interleaved"
IN_A_UNIT = 500
ENDINGS = tuple(f".{suffix}" for suffix in VIDEOS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare video`."""
    add_clip_arguments(parser)
    parser.add_argument("--caption-key", default="caption", metavar="NAME", help="in a JSON (default caption)")
    add_image_arguments(parser)


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units: whole tars, files of folders."""
    check_clip_arguments(args)
    result: list[InputUnit] = []
    for item in args.inputs:
        inside = folder_files(item)
        if inside is None or any(name.lower().endswith(".tar") for name in inside):
            result += file_units([item], (".tar",))
            continue
        videos = {name: size for name, size in inside.items() if name.lower().endswith(ENDINGS)}
        if not videos:
            raise UserError(
                f"folder {item} holds neither tars nor videos ({', '.join(VIDEOS)}); correct the path "
                "(frames that were extracted before are given as tars)"
            )
        result += folder_units(item, videos, IN_A_UNIT)
    return result


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield a document for each video."""
    rule = ImageRule.of(args)
    for where, read in _from_folder(unit) if unit.names else _from_tar(unit, tally):
        try:
            caption, facts, members = read()
            if caption is None:
                caption = facts.get(args.caption_key)
            if not isinstance(caption, str | None):
                raise Dropped("caption is not text")
            if not caption or not caption.strip():
                raise Dropped("no caption")
            frames = [rule.check(frame) for frame in _frames(members, args)]
        except Dropped as dropped:
            tally.drop_document(dropped.reason, where)
            continue
        clip = Image(tuple(range(len(frames))), args.fps if len(frames) > 1 else None)
        meta: dict[str, Any] = {name: facts[name] for name in ("key", "file", "url", "clips") if name in facts}
        yield Document("", [clip, Text(caption.strip())], frames, meta)


Read = Callable[[], tuple[str | None, dict[str, Any], dict[str, Callable[[], bytes]]]]


def _from_tar(unit: InputUnit, tally: Tally) -> Iterator[tuple[str, Read]]:
    for sample in tar_samples(unit.path, unit.label, tally):

        def read(sample: Any = sample) -> Any:
            facts = {"key": sample.key} | json_of(sample)
            caption = _utf8(sample.read("txt")) if "txt" in sample.members else None
            return caption, facts, {suffix: partial(sample.read, suffix) for suffix in sample.members}

        yield sample.where, read


def _from_folder(unit: InputUnit) -> Iterator[tuple[str, Read]]:
    folder = ImageFolder(unit.path)
    for name in unit.names:

        def read(name: str = name) -> Any:
            stem, _, suffix = name.rpartition(".")
            caption: str | None = None
            facts: Any = {}
            try:
                caption = _utf8(folder.read(f"{stem}.txt"))
            except Dropped as dropped:
                if "missing" not in dropped.reason:
                    raise
            try:
                facts = json.loads(folder.read(f"{stem}.json")) if caption is None else {}
            except Dropped:
                pass
            except ValueError:
                raise Dropped("JSON cannot be read") from None
            if not isinstance(facts, dict):
                raise Dropped("JSON is not an object")
            return caption, {"file": name} | facts, {suffix.lower(): lambda: folder.read(name)}

        yield name, read


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Dropped("caption is not UTF-8") from None


def _frames(members: dict[str, Callable[[], bytes]], args: argparse.Namespace) -> list[bytes]:
    """Return the frames of one sample. Raises Dropped."""
    for suffix, read in members.items():
        if suffix in VIDEOS:
            return frames_of(read(), args.fps, args.max_frames, args.side, args.max_pixels)
    numbered = [(int(match[1] or 0), suffix) for suffix in members if (match := IMAGE_SUFFIX.match(suffix))]
    if numbered:
        return [members[suffix]() for _, suffix in sorted(numbered)[: args.max_frames]]
    if "npy" in members:
        return _from_array(members["npy"](), args)
    raise Dropped("no video")


def _from_array(data: bytes, args: argparse.Namespace) -> list[bytes]:
    import numpy as np
    from PIL import Image

    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise Dropped("array cannot be read") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise Dropped("array is not (F, H, W, 3) of uint8")
    frames = []
    for frame in array[: args.max_frames]:
        image = Image.fromarray(frame)
        image.thumbnail((args.side, args.side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        frames.append(file.getvalue())
    return frames
