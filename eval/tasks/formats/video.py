"""A few frames of a video, as encoded images."""

from __future__ import annotations

import io
from pathlib import Path

from data.prepare.clips import upright
from flamingo.errors import UserError
from flamingo.vision.image_files import sniff


def frames_of(path: Path, count: int, start: float = 0.0, end: float | None = None) -> tuple[bytes, ...]:
    """Return `count` frames evenly spread over `start` to `end` seconds, each from the middle of its part.

    A folder's images count as frames in the order of their names, `start` and `end` do not apply to it. Frames of a
    video are PNG, so nothing is lost twice; a video with fewer frames gives those it has.

    Raises:
        UserError: nothing there can be read.
    """
    if path.is_dir():
        kept = _frame_files(path, count)
        images = tuple(file.read_bytes() for file in kept)
        if not images or any(sniff(image) is None for image in images):
            odd = [file.name for file, image in zip(kept, images, strict=True) if sniff(image) is None]
            raise UserError(f"{path} is not a folder of images{f': it has {odd[0]}' if odd else ''}")
        return images
    try:
        import av
    except ImportError:
        raise UserError(
            "videos are decoded by PyAV: pip install flamingo-vlm[tasks]; or give folders of frames"
        ) from None
    wanted: list[bytes] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # Decoded twice: which frames to take depends on the times of all, and all frames may not fit into memory.
            inside = [
                frame.time
                for frame in container.decode(stream)
                if frame.time is not None and frame.time >= start and (end is None or frame.time < end)
            ]
            chosen = {inside[index] for index in spread(len(inside), count)}
            container.seek(0)
            for frame in container.decode(stream):
                if frame.time in chosen:
                    buffer = io.BytesIO()
                    upright(frame).save(buffer, format="PNG", compress_level=1)
                    wanted.append(buffer.getvalue())
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path} cannot be decoded as a video: {error}") from None
    if not wanted:
        raise UserError(f"{path} has no frame between {start} and {end} seconds")
    return tuple(wanted)


def frame_names(path: Path, count: int) -> list[str]:
    """Return what the frames of a folder are called; of a video, its name."""
    return [str(file) for file in _frame_files(path, count)] if path.is_dir() else [str(path)]


def _frame_files(path: Path, count: int) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [files[index] for index in spread(len(files), count)]


def spread(total: int, count: int) -> list[int]:
    """Return `count` indices out of `total`, in the middle of equal parts; (10, 2) gives 2, 7."""
    return list(range(total)) if total <= count else [(2 * index + 1) * total // (2 * count) for index in range(count)]
