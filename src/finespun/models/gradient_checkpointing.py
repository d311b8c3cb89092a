"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): layers forget what the backward pass needs, and compute
it again there. From outside, for any model whose layers are in a list."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""What selective checkpointing keeps: the products with weights. All else, attention too, is computed again."""


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of the layers that a language model is made of: of its lists of modules that lie in no other one (where
    experts may be), the one with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = [lists[name] for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda found: sum(x.numel() for x in found.parameters()), default=torch.nn.ModuleList())


@contextmanager
def gradient_checkpointing(model: torch.nn.Module, kind: Literal["off", "selective", "full"]) -> Generator[None]:
    """Inside, the layers of `model` keep only their inputs ("full"), or also the products with their weights
    ("selective"), of a forward pass that has a gradient. Whatever context that pass is in, the backward pass has to be
    in too, since it is there that the rest is computed again."""
    layers = decoder_layers(model) if kind != "off" else ()
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here draws numbers
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT)
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward, options)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def _checkpointed(forward: Any, options: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, **options, **keywords)
