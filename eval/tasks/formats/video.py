"""A few frames of a video, as encoded images."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.prepare.clips import length_of, timed_frames, upright
from data.prepare.units import Dropped
from flamingo.errors import UserError
from flamingo.vision.image_files import sniff


def frames_of(path: Path, count: int, start: float = 0.0, end: float | None = None) -> tuple[bytes, ...]:
    """Return `count` frames of `start` to `end` seconds, each what is shown in the middle of its part of that time.

    Times are those of the player: since the first frame, whatever the rate. A folder's images count as frames in the
    order of their names, `start` and `end` do not apply to it. Frames of a video are PNG, so nothing is lost twice; a
    frame that is shown in several parts is returned once.

    Raises:
        UserError: nothing there can be read, or the video ends before `start`.
    """
    if path.is_dir():
        kept = _frame_files(path, count)
        images = tuple(file.read_bytes() for file in kept)
        if not images or any(sniff(image) is None for image in images):
            odd = [file.name for file, image in zip(kept, images, strict=True) if sniff(image) is None]
            raise UserError(f"{path} is not a folder of images{f': it has {odd[0]}' if odd else ''}")
        return images
    av = _decoder()
    wanted: list[bytes] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # Decoded twice: which frames to take depends on the times of all, and all frames may not fit into memory.
            times: list[Fraction] = []
            shown = Fraction(0)  # for how long the last one is
            for time, frame in timed_frames(container, stream):
                times.append(time)
                shown = frame.duration * Fraction(frame.time_base) if frame.duration else length_of(stream)
            chosen = shown_at(times, times[-1] + shown, count, start, end)
            if not chosen:
                raise UserError(
                    f"{path} has no frame between {start} and {end} seconds: it is {float(times[-1] + shown):.3f} "
                    "seconds long"
                )
            container.seek(0)
            for index, (_, frame) in enumerate(timed_frames(container, stream)):
                if index in chosen:
                    buffer = io.BytesIO()
                    upright(frame).save(buffer, format="PNG", compress_level=1)
                    wanted.append(buffer.getvalue())
                if index == chosen[-1]:
                    break
    except UserError:
        raise
    except Dropped as dropped:
        raise UserError(f"{path} cannot be used: {dropped.reason}") from None
    except (av.error.FFmpegError, IndexError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be decoded as a video: {error}") from None
    return tuple(wanted)


def shown_at(times: Sequence[Fraction], length: Fraction, count: int, start: float, end: float | None) -> list[int]:
    """Return which frames are shown in the middle of `count` equal parts of a segment; none when it is beyond the end.

    `times` are those at which each frame begins to be shown, `length` is that of the video, all in seconds.
    """
    if not (0 <= start < length and start < (math.inf if end is None else end)):  # NaN is neither
        return []
    first, last = Fraction(start), length if end is None or end >= length else Fraction(end)
    middles = (first + (last - first) * (2 * part + 1) / (2 * count) for part in range(count))
    return sorted({max(bisect_right(times, middle) - 1, 0) for middle in middles})


def seconds_of(path: Path) -> float | None:
    """Return the length of a video as its header has it, in seconds; None when it says nothing, or for a folder."""
    if path.is_dir():
        return None
    av = _decoder()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
    except (av.error.FFmpegError, IndexError, OSError, ValueError):
        return None  # what is wrong is said when it is read
    return float(length) or None


def _decoder() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            "videos are decoded by PyAV: pip install flamingo-vlm[tasks]; or give folders of frames"
        ) from None
    return av


def frame_names(path: Path, count: int) -> list[str]:
    """Return what the frames of a folder are called; of a video, its name."""
    return [str(file) for file in _frame_files(path, count)] if path.is_dir() else [str(path)]


def _frame_files(path: Path, count: int) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [files[index] for index in spread(len(files), count)]


def spread(total: int, count: int) -> list[int]:
    """Return `count` indices out of `total`, in the middle of equal parts; (10, 2) gives 2, 7."""
    return list(range(total)) if total <= count else [(2 * index + 1) * total // (2 * count) for index in range(count)]
