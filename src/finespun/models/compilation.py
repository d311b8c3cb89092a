"""`torch.compile` where it pays: on what lies between the matrix products of a layer, norms and activations. Attention
has its own code, and whole layers would compile for minutes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch

from finespun.models.gradient_checkpointing import decoder_layers

COMPILERS = ("c++", "g++", "clang++", "cl")


def can_compile(device: torch.device) -> bool:
    """Whether what `torch.compile` needs is here: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    named = os.environ.get("CXX")
    return sys.platform != "win32" and any(map(shutil.which, (named,) if named else COMPILERS))


def compile_parts(model: torch.nn.Module) -> int:
    """Compiles norms and MLPs of the layers of `model`, in place, for any number of tokens; returns how many modules
    that is. Layers that are alike share the compiled code. It happens at their first call."""
    parts = [
        module
        for layer in decoder_layers(model)
        for module in layer.modules()
        if type(module).__name__.endswith(("MLP", "Norm"))
    ]
    for part in parts:
        part.compile(dynamic=True)
    return len(parts)
