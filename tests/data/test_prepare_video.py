"""Videos in: frames at one a second, through PyAV or as they were extracted before."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from data.prepare.clips import frames_of, timed_frames
from data.prepare.units import Dropped
from data.shards.document import Image
from eval.tasks.formats.video import frames_of as spread_frames_of
from flamingo.errors import UserError
from tests.data.sources import flat, jpeg, prepare, refusal
from tests.data.test_index import make_tar


def mp4(seconds: float, rate: int = 8, size: tuple[int, int] = (64, 48), sound: bool = False) -> bytes:
    """A video that gets brighter by 20 a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = Fraction(1, rate)
        for number in range(round(seconds * rate)):
            grey = np.full((size[1], size[0], 3), 20 + 20 * (number // rate), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def brightness(frame: bytes) -> int:
    with PILImage.open(io.BytesIO(frame)) as image:
        return round(float(np.asarray(image).mean()))


def test_frames_are_those_of_whole_seconds() -> None:
    video = mp4(4.5)
    frames = frames_of(video, 1.0, 64, 480, 10**8)
    assert len(frames) == 5
    assert all(abs(brightness(frame) - (20 + 20 * second)) <= 3 for second, frame in enumerate(frames))
    assert frames_of(video, 1.0, 64, 480, 10**8) == frames
    assert len(frames_of(video, 2.0, 64, 480, 10**8)) == 9
    assert frames_of(video, 1.0, 2, 480, 10**8) == frames[:2]
    with PILImage.open(io.BytesIO(frames_of(video, 1.0, 1, 32, 10**8)[0])) as small:
        assert small.size == (32, 24)
    for broken, reason in (
        (b"", "cannot be decoded"),
        (b"<html>" * 99, "cannot be decoded"),
        (video[:200], "cannot be"),
    ):
        with pytest.raises(Dropped, match=reason):
            frames_of(broken, 1.0, 8, 480, 10**8)
    with pytest.raises(Dropped, match="more than 100 pixels"):
        frames_of(video, 1.0, 8, 480, 100)


def test_tars_of_video2dataset(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.full((3, 20, 30, 3), 7, dtype=np.uint8))
    wrong = io.BytesIO()
    np.save(wrong, np.zeros((3, 20, 30), dtype=np.uint8))
    members = [
        ("000_000.mp4", mp4(2)),
        ("000_000.txt", b"it brightens "),
        ("000_000.json", json.dumps({"caption": "x", "url": "http://v", "clips": [[0, 2]]}).encode()),
        ("000_001.mp4", mp4(1)),
        ("000_001.json", json.dumps({"caption": "one frame"}).encode()),
        ("1.001.jpg", jpeg(1)),
        ("1.000.jpg", jpeg(0)),
        ("1.txt", b"frames"),
        ("2.npy", array.getvalue()),
        ("2.txt", b"array"),
        ("3.npy", wrong.getvalue()),
        ("3.txt", b"wrong array"),
        ("4.mp4", b"<html>"),
        ("4.txt", b"no video"),
        ("5.m4a", b"sound"),
        ("5.txt", b"sound only"),
        ("6.mp4", mp4(1)),
        ("7.mp4", mp4(1)),
        ("7.json", b'{"caption": 5}'),
        ("8.000.jpg", b"<html>"),
        ("8.txt", b"broken frame"),
        ("9.npy", b"nothing"),
        ("9.txt", b"no array"),
    ]
    done = prepare(tmp_path / "out", "video", make_tar(tmp_path / "0.tar", members))
    clip, single, frames, from_array = done.documents
    assert [node for node in clip.nodes if isinstance(node, Image)] == [Image((0, 1), 1.0)]
    assert clip.nodes[1].text == "it brightens"  # type: ignore[union-attr]
    assert [abs(brightness(image) - grey) <= 3 for image, grey in zip(clip.images, (20, 40), strict=True)] == [True] * 2
    assert clip.meta == {"key": "000_000", "url": "http://v", "clips": [[0, 2]]}
    assert single.nodes[0] == Image((0,))
    assert flat(frames) == [(jpeg(0), jpeg(1)), "frames"]
    assert [brightness(image) for image in from_array.images] == [7, 7, 7]
    assert done.dropped == {
        "array is not (F, H, W, 3) of uint8": 1,
        "video cannot be decoded": 1,
        "no video": 1,
        "no caption": 1,
        "caption is not text": 1,
        "HTML saved as an image": 1,
        "array cannot be read": 1,
    }


def test_a_folder_of_videos(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a.MP4").write_bytes(mp4(3))
    (root / "deep" / "a.txt").write_text("a video")
    (root / "b.mp4").write_bytes(mp4(1))
    (root / "b.json").write_text('{"caption": "from JSON"}')
    (root / "c.mp4").write_bytes(mp4(1))
    (root / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (root / "link.txt").write_text("x")
    (tmp_path / "out.mp4").write_bytes(mp4(1))
    done = prepare(tmp_path / "out", "video", root, "--max-frames", 2)
    assert [document.meta["file"] for document in done.documents] == ["b.mp4", "deep/a.MP4"]
    assert len(done.documents[1].images) == 2
    assert done.dropped == {"no caption": 1, "image is a link out of its folder": 1}
    assert "--fps must be positive" in refusal(tmp_path / "o", "video", root, "--fps", 0)
    (tmp_path / "empty").mkdir()
    assert "holds neither tars nor videos" in refusal(tmp_path / "o", "video", tmp_path / "empty")


def timed(times: list[int], form: str = "matroska", rate: int = 25) -> bytes:
    """A video whose frames, each 20 brighter than the one before, are shown at these milliseconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("form", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize("shift", [0, 400, 7000])
def test_times_are_counted_from_the_first_frame(tmp_path: Path, form: str, shift: int) -> None:
    """One slide for 4 seconds, then 10 frames in one second; whatever the time at which the container begins."""
    times = [shift, *(shift + 4000 + 100 * k for k in range(10))]
    video = timed(times, form)
    assert len(frames_of(video, 1.0, 64, 480, 10**8)) == 2
    path = tmp_path / "v"
    path.write_bytes(video)
    numbers = [round((brightness(frame) - 20) / 20) for frame in spread_frames_of(path, 5)]
    assert numbers == [0, 5]  # in the middle of the fifth second; the slide once
    assert [round((brightness(frame) - 20) / 20) for frame in spread_frames_of(path, 1, 1.0, 3.0)] == [0]
    with pytest.raises(UserError, match=r"no frame between 5.5 and 6.0 seconds: it is [45]"):
        spread_frames_of(path, 1, 5.5, 6.0)


def test_recordings_that_were_joined_go_on(tmp_path: Path) -> None:
    """Times that begin again in the middle: the second half is not lost."""
    half = [Frame(pts) for pts in (10, 11, 12, 13)]
    stream = Stream([*half, Frame(None), *half], Fraction(1))
    assert [int(time) for time, _ in timed_frames(stream, stream)] == [0, 1, 2, 3, 4, 5, 6, 7]
    jitter = Stream([Frame(pts, Fraction(1, 10)) for pts in (1, 4, 3, 5, 2, 8)], Fraction(10))  # as AVI has H.264
    assert [10 * time for time, _ in timed_frames(jitter, jitter)] == [0, 3, 3, 4, 4, 7]
    with pytest.raises(Dropped, match="video without times"):
        list(timed_frames(Stream([Frame(None)], Fraction(1)), stream))


@dataclass
class Frame:
    """What `timed_frames` needs of PyAV's."""

    pts: int | None
    time_base: Fraction = Fraction(1)


@dataclass
class Stream:
    """A container and its only track, likewise."""

    frames: list[Frame]
    average_rate: Fraction

    def decode(self, stream: object) -> list[Frame]:
        return self.frames
