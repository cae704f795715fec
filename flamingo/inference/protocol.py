"""What generation and ranking need of a model, so that they import no model.

`FlamingoForConditionalGeneration` is one; anything else with these members can be generated from and scored with too.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from flamingo.config import FlamingoConfig
from flamingo.inference.media_cache import ImageInputs, MediaCache


@runtime_checkable
class MediaModel(Protocol):
    """A causal language model whose tokens see images."""

    config: FlamingoConfig
    generation_config: GenerationConfig

    @property
    def lm_takes_positions(self) -> bool:
        """Whether the language model's `forward` has `position_ids`."""
        ...

    @property
    def language_model(self) -> Any:
        """The causal LM, a transformers `PreTrainedModel`."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; takes and returns what `FlamingoForConditionalGeneration.forward` does."""
        ...

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise UserError where an id, on the host, has no row in the tables."""
        ...

    def media_of(self, rows: int, given: MediaCache | None, past: Cache | None, inputs: ImageInputs) -> MediaCache:
        """Return what this call shows: the given cache, else that of earlier calls with new images, else new images."""
        ...
