"""Flamingo-style visual language models: load, prompt, generate, score, and the model that trains.

The names exported here stay fixed. They are imported on first use, so that `import flamingo` is cheap. transformers'
Auto classes and `pipeline` know the model from then on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flamingo import registry

if TYPE_CHECKING:
    from flamingo.config import FlamingoConfig as FlamingoConfig
    from flamingo.errors import UserError as UserError
    from flamingo.modeling import FlamingoForConditionalGeneration as FlamingoForConditionalGeneration
    from flamingo.processing.image_processor import FlamingoImageProcessor as FlamingoImageProcessor
    from flamingo.processing.video_processor import FlamingoVideoProcessor as FlamingoVideoProcessor
    from flamingo.processor import FlamingoProcessor as FlamingoProcessor
    from flamingo.vision.transform import ImageTransform as ImageTransform

_WHERE = {
    "FlamingoConfig": "config",
    "FlamingoForConditionalGeneration": "modeling",
    "FlamingoImageProcessor": "processing.image_processor",
    "FlamingoProcessor": "processor",
    "FlamingoVideoProcessor": "processing.video_processor",
    "ImageTransform": "vision.transform",
    "UserError": "errors",
}

__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoImageProcessor",
    "FlamingoProcessor",
    "FlamingoVideoProcessor",
    "ImageTransform",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'flamingo' has no attribute {name!r}")
    return getattr(import_module(f"flamingo.{_WHERE[name]}"), name)


registry.install()
