"""Connectors: what maps the vision encoder's tokens to the latents that the gated blocks attend to.

To add one, write a module with a subclass of `Connector` and add its line to `CONNECTORS`. Everything else asks the
connector: the gated blocks for its width, the model for its empty stack and its initial weights, the config for its
options, the FLOP counter for the products of its attention. Memory plan, FSDP units, saving and freezing take the
module as it is. Whichever connector a model has, it is the part `resampler` (attribute, weights, freezing policy).

Letters: I images, F frames, N frames of all images, P patches, V encoder's width, L latents, E width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flamingo.errors import UserError
from flamingo.transfer import sent

# Strings, because the modules import this one.
CONNECTORS = {
    "perceiver": "flamingo.layers.resampler.PerceiverResampler",
    "mlp": "flamingo.layers.mlp_connector.MLPConnector",
}
"""Name in the config -> class."""


class Connector(nn.Module):
    """Base class: `Options`, `width` and the methods that raise NotImplementedError are a connector's own.

    It is built as `cls(V, **options)`, with the fields of `Options` as keyword arguments. An attention of its own,
    a module whose class name ends in "Attention", has a method `attention_products` with the arguments of its `forward`
    that returns the multiply-adds of its two products.
    """

    Options: ClassVar[type]
    """Dataclass of the options, with defaults; checks their values."""
    width: int
    """E."""
    _no_split_modules: ClassVar[tuple[str, ...]] = ()
    """Classes that a `device_map` keeps on one device."""

    def connect(self, features: Float[Tensor, "I F P V"]) -> Float[Tensor, "I L E"]:
        """Return the latents of images or clips of F frames each."""
        raise NotImplementedError

    def num_latents(self, frames: int, patches: int) -> int:
        """Return L for an image or clip of so many frames, each of so many patches."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Draw anew what torch's layers do not draw themselves; nothing by default."""

    def forward(
        self, features: Float[Tensor, "*frames P V"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "I L E"]:
        """Return the latents of each image or clip, in this module's dtype whatever the encoder's.

        `features` is (I, F, P, V), or, with the number of frames of each image in `counts`, (N, P, V) of all frames.

        Raises:
            UserError: the images have different numbers of frames and would get different numbers of latents.
        """
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(next(self.parameters()).dtype)
        if counts is None:
            return self.connect(features)
        if len({self.num_latents(frames, features.shape[-2]) for frames in counts}) > 1:
            raise UserError(
                f"the images of a batch have {min(counts)} to {max(counts)} frames, but this connector "
                f"({type(self).__name__}) needs the same number for all; use the perceiver, or clips of one length"
            )
        return by_length(self.connect, features, counts)

    def empty(self) -> Float[Tensor, "0 L E"]:
        """Return the latents of no image."""
        return next(self.parameters()).new_zeros(0, self.num_latents(1, 1), self.width)


def connector_class(name: str) -> type[Connector]:
    """Return a connector's class by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in CONNECTORS:
        raise UserError(f"connector={name!r} must be one of {', '.join(CONNECTORS)}")
    module, _, attribute = CONNECTORS[name].rpartition(".")
    resolved: Any = getattr(import_module(module), attribute)
    return resolved


def by_length(
    work: Callable[[Tensor], Tensor], features: Float[Tensor, "N P D"], counts: Sequence[int]
) -> Float[Tensor, "I L E"]:
    """Return what `work`, (I, F, P, D) to (I, L, E), makes of each image; it runs once for each number of frames."""
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    groups, order = [], []
    for frames in sorted(set(counts)):
        which = [image for image, count in enumerate(counts) if count == frames]
        indices = sent(first[which][:, None] + torch.arange(frames), features.device)
        groups.append(work(features[indices]))
        order += which
    back = sent(torch.tensor(order).argsort(), features.device)
    return torch.cat(groups).index_select(0, back)
