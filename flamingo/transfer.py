"""Between host and device without waiting.

Integers decide shapes: who sees which image, which positions have a label, how many. Whoever asks a device for one of
them waits until it has done all that it was given. So they are computed where they are on the host anyway, and the
device is sent the result; a caller who has them on the device only waits once, when they come to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_host(x: Tensor) -> Tensor:
    """Return integers where looking at them costs nothing; waits for those that are on a device."""
    return x if x.device.type in ("cpu", "meta") else x.cpu()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`; the host does not wait until one of its own has arrived there."""
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    if device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
