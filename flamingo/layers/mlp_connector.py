"""A two-layer projection without resampling (LLaVA-1.5): every patch token becomes one latent.

Liu et al. 2023, "Improved baselines with visual instruction tuning". The latents are as many as the patches of all
frames, so the gated blocks do several times the perceiver's work, and the images of a batch need one number of frames.

Letters: I images, F frames, P patches, V encoder's width, L = F * P latents, E width of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from flamingo.layers.attention import ACTIVATIONS, activation_function
from flamingo.layers.connector import Connector
from flamingo.options import choice, positive


@dataclass(kw_only=True, slots=True)
class MLPOptions:
    """The projection; the defaults are LLaVA-1.5's, but for the width, which is the LM's there."""

    width: int | None = None
    """Width of the latents and of the hidden layer; None: the encoder's."""
    activation: str = "gelu"
    """Between the two layers."""

    def __post_init__(self) -> None:
        choice("resampler_config.activation", self.activation, ACTIVATIONS)
        positive("resampler_config.width", self.width)


class MLPConnector(Connector):
    """(I, F, P, V) patch features to (I, F * P, E) latents: `down(act(up(x)))`, with biases."""

    Options = MLPOptions

    def __init__(self, vision_width: int, *, width: int | None = None, activation: str = "gelu") -> None:
        super().__init__()
        self.width = vision_width if width is None else width
        self.up_proj = nn.Linear(vision_width, self.width)
        self.down_proj = nn.Linear(self.width, self.width)
        self.act = activation_function(activation)

    def num_latents(self, frames: int, patches: int) -> int:
        """Return L: one latent for each patch of each frame."""
        return frames * patches

    def connect(self, features: Float[Tensor, "I F P V"]) -> Float[Tensor, "I L E"]:
        """Return the projected patches, frame after frame."""
        latents: Tensor = self.down_proj(self.act(self.up_proj(features.flatten(1, 2))))
        return latents.clone() if latents._is_view() else latents  # FSDP2 warns of a module that returns a view
