"""Extracts frames from a video file, through PyAV."""

from __future__ import annotations

import io
from typing import Any

from data.prepare.inputs import required
from data.prepare.units import Dropped


def frames_of(data: bytes, fps: float, most: int, side: int, max_pixels: int) -> list[bytes]:
    """Return at most `most` frames at `fps` from the start of a video, as JPEGs of at most `side` x `side` pixels.

    Frame k is the first one shown at k / fps seconds or later, so a video of s seconds gives about s * fps of them. A
    rotation given by the container is applied. One thread, no hardware: the same video gives the same bytes. Raises
    Dropped for what has no video or cannot be decoded.
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
            start = None
            for frame in container.decode(stream):
                if frame.time is None:
                    raise Dropped("video without times")
                start = frame.time if start is None else start
                if (frame.time - start) * fps >= len(frames) - 1e-6:
                    frames.append(_jpeg(frame, side))
                    if len(frames) == most:
                        break
    except (av.FFmpegError, ValueError, OSError):
        if not frames:
            raise Dropped("video cannot be decoded") from None
    if not frames:
        raise Dropped("video without frames")
    return frames


def _jpeg(frame: Any, side: int) -> bytes:
    image = frame.to_image()
    if rotation := getattr(frame, "rotation", 0):
        image = image.rotate(rotation, expand=True)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
