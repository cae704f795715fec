"""Short hashes of weights, by which one notices that what was trained beside some weights is used beside others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn


def fingerprint(module: nn.Module) -> str:
    """Return a short hash of a module: the names and shapes of its weights, and all of their values.

    Values are taken in bfloat16, so that a module stored in bfloat16 and its float32 original have one fingerprint.
    They are read from memory, at several GB/s.
    """
    return hash_tensors(module.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the same of named tensors, or with their values in another precision."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().to("cpu")
        values = values.to(dtype) if values.is_floating_point() else values
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
