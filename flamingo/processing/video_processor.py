"""The video processor: clips as lists of frames, arrays, files or URLs to the model's `pixel_values`.

Letters: V clips, F frames, C channels, S side in pixels.
"""

# No `from __future__ import annotations`: transformers reads the types of the options while it runs.
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import load_video

from flamingo.errors import UserError
from flamingo.processing.image_processor import PixelOptions, as_asked
from flamingo.vision.transform import read_source

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""A list of such files is one clip's frames; a list of other files is a list of clips."""


class FlamingoVideosKwargs(VideosKwargs, total=False):
    """Options of a call. `resize_mode` as of `ImageTransform`."""

    resize_mode: str


class FlamingoVideoProcessor(PixelOptions, VideoProcessorMixin):
    """Clips to `pixel_values` (V, F, C, S, S), uint8; if lengths differ, all frames (N, C, S, S) and `frame_counts`.

    Of a clip longer than `max_frames` frames at equal distances are kept; `num_frames` and `fps` (of files, frames a
    second) take fewer. Other options as of `PixelOptions`.

    Raises:
        UserError: an option that has no meaning here.
    """

    valid_kwargs = FlamingoVideosKwargs
    model_input_names = ["pixel_values", "frame_counts"]  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        for name in ("video_processor_type", "image_processor_type", "return_tensors"):
            options.pop(name, None)
        self.max_frames: int | None = options.pop("max_frames", None)
        self.num_frames: int | None = options.pop("num_frames", None)
        self.fps: float | None = options.pop("fps", None)
        self.do_sample_frames: bool | None = options.pop("do_sample_frames", None)
        if self.num_frames is not None and self.fps is not None:
            raise UserError("num_frames and fps exclude each other; give one of them")
        self.take_options(options)
        super().__init__(**options)

    def preprocess(self, videos: Any, **options: Any) -> BatchFeature:
        """Return `pixel_values` of one clip or of a list of clips."""
        chosen = self.with_options(options)
        clips = [chosen.clip(item, f"clip {index}") for index, item in enumerate(clips_of(videos))]
        return as_asked(stacked(clips), options.get("return_tensors"))

    def clip(self, item: Any, where: str) -> Tensor:
        """Return (F, C, S, S) of a file, a URL, a 4-D array, or a list of frames (files, arrays, PIL images).

        Raises:
            UserError: no frame, or one that cannot be decoded.
        """
        return self.frames(self._chosen_frames(item, where), where)

    def _chosen_frames(self, item: Any, where: str) -> list[Any]:
        if isinstance(item, str | Path | bytes | bytearray):
            return list(self._decoded(item, where))
        frames = list(item) if isinstance(item, list | tuple) or getattr(item, "ndim", 0) == 4 else [item]
        if not frames:
            raise UserError(f"{where} is a clip without frames")
        if self.do_sample_frames and self.num_frames is None and isinstance(item, list | tuple):
            raise UserError(
                f"{where}: Sampling frames from a list of images is not supported! Set `do_sample_frames=False`, or "
                "give num_frames"
            )
        if self._sampling and self.fps is not None:
            raise UserError(f"{where} is a list of frames, whose rate is not known; give num_frames instead of fps")
        self._refuse_one(len(frames), where)
        return [frames[i] for i in self._positions(len(frames), None)]

    @property
    def _sampling(self) -> bool:
        return self.do_sample_frames is not False

    def _refuse_one(self, frames: int, where: str) -> None:
        if self.max_frames == 1 < frames:
            raise UserError(f"{where} is a clip of {frames} frames, and max_frames=1 would keep one; give an image")

    def _positions(self, total: int, rate: float | None) -> list[int]:
        """Return which of `total` frames are kept; `rate` is the file's, in frames a second."""
        count = total
        if self._sampling and self.num_frames is not None:
            count = min(count, self.num_frames)
        elif self._sampling and self.fps is not None and rate:
            count = min(count, max(1, int(total / rate * self.fps)))
        if self.max_frames is not None:
            count = min(count, self.max_frames)
        if count == total:
            return list(range(total))
        positions: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
        return positions

    def _decoded(self, source: str | Path | bytes | bytearray, where: str) -> NDArray[Any]:
        """Return the frames of a file that are kept, (F, h, w, 3)."""

        def sample(metadata: Any, **_: Any) -> NDArray[Any]:
            self._refuse_one(metadata.total_num_frames, where)
            return np.array(self._positions(metadata.total_num_frames, metadata.fps))

        content = read_source(source, where) if isinstance(source, str) else source
        try:
            with tempfile.NamedTemporaryFile() as file:  # the loader takes names only
                if not isinstance(content, Path):
                    file.write(content)
                    file.flush()
                    content = Path(file.name)
                frames, _ = load_video(str(content), backend="pyav", sample_indices_fn=sample)  # type: ignore[arg-type]
        except ImportError as error:
            raise UserError(f"{where} is a video file, which needs PyAV: pip install av, or give its frames") from error
        except UserError:
            raise
        except Exception as error:  # PyAV's errors have no common class that is here without PyAV
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(f"{where} ({str(source)[:200]!r}) cannot be decoded as a video: {reason[0]}") from error
        if not len(frames):
            raise UserError(f"{where} is a clip without frames")
        return frames


def is_frame(item: Any) -> bool:
    """Say whether something in a list of videos is a frame of one clip, and not a clip."""
    if isinstance(item, str | Path):
        return Path(item).suffix.lower() in IMAGE_FILES
    return not isinstance(item, bytes | bytearray | list | tuple) and getattr(item, "ndim", 0) != 4


def clips_of(videos: Any) -> list[Any]:
    """Return a list of clips of what people give: one clip, or a list of clips or of (lists of) rows of clips."""
    if not isinstance(videos, list | tuple) or not videos:
        return [videos]
    first = videos[0]
    if is_frame(first):
        return [list(videos)]
    if isinstance(first, str | Path | bytes) or getattr(first, "ndim", 0) == 4:
        return list(videos)
    if isinstance(first, list | tuple):
        deeper = first and (isinstance(first[0], list | tuple) or getattr(first[0], "ndim", 0) == 4)
        return [clip for row in videos for clip in row] if deeper else list(videos)
    return list(videos)


def stacked(clips: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return `pixel_values` (V, F, C, S, S); if lengths differ, the frames (N, C, S, S) and `frame_counts` (V,)."""
    if len({len(clip) for clip in clips}) == 1:
        return {"pixel_values": torch.stack(list(clips))}
    return {"pixel_values": torch.cat(list(clips)), "frame_counts": torch.tensor([len(clip) for clip in clips])}
