"""Multiply-adds of an update as they happen, and the share of what the device could do.

Counted, not estimated from the number of parameters: six times those overstate the work of a model whose backbones
are frozen by about a half. Each matrix product of a layer counts 2 FLOPs a multiply-add, once forward, once more where
a gradient goes to its input, once more where its weight trains. What activation checkpointing does again is not counted
(it is no work of the model), nor are the products of queries, keys and values inside attention, which have no weights:
the figures are lower bounds, low by 5 to 15 % for rows of some hundred tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) by a word of the device's name, from NVIDIA's data sheets; the H100's is the SXM model's."""


class Flops:
    """Counts the layers' products of every forward and backward of a model from now on."""

    def __init__(self, model: nn.Module) -> None:
        """Hooks on linear layers, transformers' `Conv1D` and convolutions, wherever in the model they are."""
        self._count = 0
        self._hooks = [
            module.register_forward_hook(self._add)
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | Conv1D)
        ]

    def _add(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or torch._C._current_graph_task_id() != -1:
            return  # inside a backward: activation checkpointing does it again
        weight = module.weight
        if isinstance(module, nn.Linear):
            products = output.numel() * module.in_features
        elif isinstance(module, Conv1D):
            products = output.numel() * weight.shape[0]
        else:
            products = output.numel() * weight[0].numel()
        passes = 1
        if torch.is_grad_enabled():
            passes += int(weight.requires_grad) + int(isinstance(inputs[0], Tensor) and inputs[0].requires_grad)
        self._count += 2 * products * passes

    def take(self) -> int:
        """FLOPs of this process since the last call."""
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        """Counts no more."""
        for hook in self._hooks:
            hook.remove()


def peak_tflops(device: torch.device) -> float | None:
    """What one device can do at most, or None where that is not known: a share of a guess would be no figure."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name.replace("-", " ").split()), None)
