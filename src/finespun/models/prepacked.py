"""Weights laid out once as a CPU's matrix products read them, for passes without a gradient. torch would lay bfloat16
ones out anew in each product, which takes as long as the product itself where few tokens are read."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

SHARE = 0.25
"""Of the memory that is free, so much may be taken."""


class Prepacked:
    """The linear layers of `model`, as they are now, laid out for oneDNN. Takes as much memory again as they do. Empty
    where there is nothing to gain: on GPUs, for types other than bfloat16, or if this torch cannot; or too little
    memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._forwards: dict[torch.nn.Linear, Any] = {}
        layers = [
            layer
            for layer in model.modules()
            if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.is_cpu
        ]
        size = sum(layer.weight.nbytes for layer in layers)
        if not can_prepack() or size > SHARE * psutil.virtual_memory().available:
            return
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
            self._forwards[layer] = functools.partial(_linear, weight, layer.bias)

    @contextmanager
    def used(self) -> Generator[None]:
        """Inside, the layers compute with what was laid out."""
        for layer, forward in self._forwards.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._forwards:
                del layer.forward  # the class's own comes back


def can_prepack() -> bool:
    """Whether this CPU multiplies bfloat16 and this torch can lay out weights for that."""
    operators = torch.ops.mkldnn  # what torch's own compiler uses for this
    names = "_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise"
    return all(hasattr(operators, name) for name in names) and operators._is_mkldnn_bf16_supported()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == x.shape[-1]:  # oneDNN adds up one row in another order than the same row among others
        return _linear(weight, bias, torch.cat([x, x], -2))[..., :1, :]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
