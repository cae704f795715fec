"""The image processor: any number of images to the model's `pixel_values`.

Notable: pixels stay uint8, because the encoder normalises; `do_rescale` and `do_normalize` go together, because the
encoder takes floating-point pixels as normalised already. The work is `ImageTransform`'s, the same for training,
`generate` and evaluation.

Letters: I images, F frames, C channels, S side in pixels.
"""

# No `from __future__ import annotations`: transformers reads the types of the options while it runs.
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from flamingo.constants import OPENAI_MEAN, OPENAI_STD
from flamingo.errors import UserError
from flamingo.vision.transform import ImageTransform, to_rgb

RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as saved processors have them, and `ImageTransform`'s words."""
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "do_convert_rgb": (None, True),
    "do_resize": (None, True),
    "default_to_square": (None, True),
    "do_pad": (None, False),
    "pad_size": (None,),
    "do_center_crop": (None, False),
    "crop_size": (None,),
    "data_format": (None, "channels_first"),
    "input_data_format": (None,),
    "device": (None, "cpu"),
    "disable_grouping": (None, True, False),
    "image_seq_length": (None,),
    "return_metadata": (None, False),
    "video_metadata": (None,),
}
"""Options of other processors, with the values that say what is done anyway; any other value is refused."""


class FlamingoImagesKwargs(ImagesKwargs, total=False):
    """Options of a call. `resize_mode`: "squash", "crop", "pad" or "pad_mean", see `ImageTransform`."""

    resize_mode: str


class PixelOptions:
    """What the image and the video processor share: size, statistics and how an image becomes square.

    `size` is the side S in pixels, or `{"height": S, "width": S}`. With `do_rescale` or `do_normalize` pixels are
    floating point: times `rescale_factor`, then normalised.
    """

    size: dict[str, int]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resize_mode: str
    resample: int
    do_rescale: bool | None
    do_normalize: bool | None
    rescale_factor: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def take_options(self, options: dict[str, Any]) -> None:
        """Set what `options` say, with the defaults for what they do not, and take it out of them."""
        self.size = _square(options.pop("size", None) or 224)
        self.image_mean = tuple(options.pop("image_mean", None) or OPENAI_MEAN)
        self.image_std = tuple(options.pop("image_std", None) or OPENAI_STD)
        self.resize_mode = options.pop("resize_mode", None) or "crop"
        resample = options.pop("resample", None)
        self.resample = _resample(3 if resample is None else resample)
        self.do_rescale, self.do_normalize = options.pop("do_rescale", None), options.pop("do_normalize", None)
        self.rescale_factor = options.pop("rescale_factor", None) or 1 / 255
        for name in [name for name in options if name in WITHOUT_EFFECT]:
            _check_without_effect(name, options.pop(name))
        assert self.transform

    @classmethod
    def of_transform(cls, transform: ImageTransform, **options: Any) -> Any:
        """Return the processor that does what an `ImageTransform` does."""
        options |= {"size": transform.size, "image_mean": transform.mean, "image_std": transform.std}
        options |= {"resize_mode": transform.mode, "resample": transform.interpolation}
        return cls(**options)

    @property
    def transform(self) -> ImageTransform:
        """The transform of one image, which training and evaluation use as well."""
        return ImageTransform(
            self.size["height"], self.image_mean, self.image_std, self.resize_mode, RESAMPLE[self.resample]
        )

    def with_options(self, options: Mapping[str, Any]) -> Any:
        """Return this processor with the options of a call.

        Raises:
            UserError: an option that has no meaning here.
        """
        changes = {name: value for name, value in options.items() if name != "return_tensors" and value is not None}
        if not changes:
            return self
        return type(self)(**{**self.to_dict(), **changes})  # type: ignore[attr-defined]

    def frames(self, images: Iterator[Any] | list[Any], where: str) -> Tensor:
        """Return (F, C, S, S) of images; uint8, or floating point where that is asked for."""
        transform = self.transform
        frames = torch.stack([transform(to_rgb(image, where)) for image in images])
        if not (self.do_rescale or self.do_normalize):
            return frames
        if False in (self.do_rescale, self.do_normalize):
            raise UserError(
                "do_rescale and do_normalize go together: the encoder takes uint8 pixels as they are and "
                "floating-point pixels as normalised; give both or neither"
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return (frames.float() * self.rescale_factor - mean) / std


class FlamingoImageProcessor(PixelOptions, BaseImageProcessor):
    """Images to `pixel_values` (I, 1, C, S, S), uint8: each image is one frame.

    Options as of `PixelOptions`; as with other image processors each may also be given in a call.

    Raises:
        UserError: an option that has no meaning here.
    """

    valid_kwargs = FlamingoImagesKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        for name in ("image_processor_type", "return_tensors"):
            options.pop(name, None)
        self.take_options(options)
        super().__init__(**options)

    def preprocess(self, images: Any, *args: Any, **options: Any) -> BatchFeature:
        """Return `pixel_values` of one image or of (lists of) many."""
        chosen = self.with_options(options)
        flat = list(flattened(images))
        if not flat:
            raise UserError("the image processor was given no image")
        frames = [chosen.frames([image], f"image {index}") for index, image in enumerate(flat)]
        return as_asked({"pixel_values": torch.stack(frames)}, options.get("return_tensors"))


def as_asked(data: dict[str, Tensor], return_tensors: Any) -> BatchFeature:
    """Return tensors, or numpy arrays for "np".

    Raises:
        UserError: another kind.
    """
    kind = str(getattr(return_tensors, "value", return_tensors or "pt"))
    if kind not in ("pt", "np"):
        raise UserError(f"return_tensors={kind!r} must be 'pt' or 'np'")
    return BatchFeature({name: value if kind == "pt" else value.numpy() for name, value in data.items()})


def flattened(images: Any) -> Iterator[Any]:
    """Yield the images of nested lists, or the one image."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flattened(image)
    else:
        yield images


def _square(size: Any) -> dict[str, int]:
    sides = [size] if isinstance(size, int) else list(size.values()) if isinstance(size, Mapping) else list(size)
    if not sides or len(set(sides)) != 1:
        raise UserError(f"size={size} must be one side in pixels: the encoder takes square images")
    return {"height": int(sides[0]), "width": int(sides[0])}


def _resample(value: Any) -> int:
    if isinstance(value, str):
        value = next((number for number, word in RESAMPLE.items() if word == value), value)
    if value not in RESAMPLE:
        raise UserError(f"resample={value!r} must be 0 (nearest), 2 (bilinear) or 3 (bicubic)")
    return int(value)


def _check_without_effect(name: str, value: Any) -> None:
    if value not in WITHOUT_EFFECT[name]:
        raise UserError(
            f"{name}={value!r} has no meaning here: images become RGB squares of `size` pixels in the way that "
            "`resize_mode` says ('squash', 'crop', 'pad', 'pad_mean')"
        )
