"""AdamW on float32 master weights, whatever type the model computes in."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for the trainable parameters of a model.

    A model that computes in bfloat16 keeps its float32 weights here: each gradient is added in float32 as soon as
    backward has made it, and the rounded weights are copied back after a step. A float32 model is its own master.
    Norms, biases and embeddings have no weight decay.
    """

    def __init__(self, model: torch.nn.Module, weight_decay: float, compute_dtype: torch.dtype) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        decays = {name: parameter.ndim >= 2 and id(parameter) not in embeddings for name, parameter in named.items()}
        self.masters: dict[str, torch.Tensor] = {}
        self._computing: dict[str, torch.nn.Parameter] = {}
        for name, parameter in named.items():
            if parameter.dtype == compute_dtype:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().clone().float().requires_grad_()
                self._computing[name] = parameter
        model.to(compute_dtype)
        for name, parameter in self._computing.items():
            parameter.register_post_accumulate_grad_hook(_adds_to(self.masters[name]))
        groups = [
            {"params": [self.masters[name] for name in named if decays[name]], "weight_decay": weight_decay},
            {"params": [self.masters[name] for name in named if not decays[name]], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.999), fused=True
        )

    @torch.no_grad()
    def step(self, rate: float, max_gradient_norm: float) -> float:
        """One update at learning rate `rate` with the gradient scaled down to `max_gradient_norm`; returns the length
        that the gradient had. A gradient that is not finite changes nothing."""
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_gradient_norm))
        if isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self._copy_back()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`(weights, moments)`: the masters by name, and AdamW's own tensors by `name/key`."""
        weights = {name: master.detach() for name, master in self.masters.items()}
        moments = {
            f"{name}/{key}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state.get(master, {}).items()
        }
        return weights, moments

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` gave. Raises `KeyError` for a parameter that is missing."""
        self.load_weights(weights)
        for name, master in self.masters.items():
            keys = [key for key in moments if key.rpartition("/")[0] == name]
            self._adamw.state[master] = {key.rpartition("/")[2]: moments[key].to(master.device).clone() for key in keys}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets masters, and the weights the model computes with, to `weights`."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._copy_back()

    def _copy_back(self) -> None:
        for name, parameter in self._computing.items():
            parameter.copy_(self.masters[name])


def _adds_to(master: torch.Tensor):  # noqa: ANN202  # torch's own hook type is not public
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook
