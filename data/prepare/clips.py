"""Extracts frames from a video file, through PyAV."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from data.prepare.inputs import required
from data.prepare.units import Dropped
from flamingo.errors import UserError


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for which frames of a video are taken."""
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second (default 1, as in the paper)")
    parser.add_argument("--max-frames", type=int, default=64, help="most frames kept of a video (default 64)")
    parser.add_argument("--side", type=int, default=480, metavar="PX", help="frames fit into this square (default 480)")


def check_clip_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for limits that no video has."""
    if not args.fps > 0 or args.max_frames < 1 or args.side < 16:
        raise UserError("--fps must be positive, --max-frames at least 1, --side at least 16")


def frames_of(data: bytes, fps: float, most: int, side: int, max_pixels: int) -> list[bytes]:
    """Return at most `most` frames at `fps` from the start of a video, as JPEGs of at most `side` x `side` pixels.

    Times are those at which frames are shown, whatever the rate: a frame is taken when it is the first one shown at
    k / fps seconds or later, and at most one for each k, so a slide that stands for long counts once. A rotation given
    by the container is applied. One thread, no hardware: the same video gives the same bytes. Raises Dropped for what
    has no video or cannot be decoded.
    """
    av = required("av", "reading videos")
    frames: list[bytes] = []
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise Dropped("video without an image track")
            stream = container.streams.video[0]
            stream.thread_count = 1
            if stream.codec_context.width * stream.codec_context.height > max_pixels:
                raise Dropped(f"video of more than {max_pixels} pixels")
            due = 0
            for seconds, frame in timed_frames(container, stream):
                if float(seconds) * fps >= due - 1e-6:
                    frames.append(_jpeg(frame, side))
                    # A slide may have been shown for long: what was due meanwhile is not made up for afterwards.
                    due = max(due + 1, math.floor(float(seconds) * fps + 1e-6) + 1)
                    if len(frames) == most:
                        break
    except (av.FFmpegError, ValueError, OSError):
        if not frames:
            raise Dropped("video cannot be decoded") from None
    if not frames:
        raise Dropped("video without frames")
    return frames


def timed_frames(container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    """Yield (seconds since the first frame, frame) of a video track, in the order in which frames are shown.

    Frames without a time are passed over. Where times start again (recordings that were joined), they go on from the
    frame before; a time that is only a little earlier than it (AVI stores none for frames out of order) is the same.
    Raises Dropped when no frame has a time.
    """
    begin = last = None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        time = frame.pts * Fraction(frame.time_base or stream.time_base)
        if begin is None or last is None:
            begin = time
        elif time < last - 1:
            begin -= last - time + length_of(stream)
        else:
            time = max(time, last)
        last = time
        yield time - begin, frame
    if begin is None:
        raise Dropped("video without times")


def length_of(stream: Any) -> Fraction:
    """Return how long a frame is shown on average, in seconds, as the container says; 1/25 when it does not."""
    return 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(1, 25)


def upright(frame: Any) -> Any:
    """Return a decoded frame as a PIL image, turned as its container says."""
    image = frame.to_image()
    rotation = getattr(frame, "rotation", 0)
    return image.rotate(rotation, expand=True) if rotation else image


def _jpeg(frame: Any, side: int) -> bytes:
    image = upright(frame)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
