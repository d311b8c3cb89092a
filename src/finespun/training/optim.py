"""Optimizers on float32 master weights, whatever type the model computes in."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from finespun.errors import RecipeError
from finespun.models.load import compute_in
from finespun.recipe import Optimizer

AVERAGE = "average"
"""Under this key of a parameter's state stands the moving average of its weights."""

PACKAGES = {"adamw-8bit": "torchao", "lion": "pytorch-optimizer", "schedule-free-adamw": "pytorch-optimizer"}
"""Optimizers that are not torch's own, and where they come from."""


@dataclass(frozen=True)
class _Kind:
    """Parameters that are updated in the same way. `hidden` are the matrices between embeddings and head."""

    hidden: bool
    decays: bool
    rate_ratio: float


class MasterOptimizer:
    """Updates the trainable parameters of a model.

    A model that computes in bfloat16 keeps its float32 weights here: each gradient is added in float32 as soon as
    backward has made it, and the rounded weights are copied back after a step. A float32 model is its own master.
    Norms, biases and embeddings have no weight decay. With `ema_decay` d, an average of the weights goes 1 - d of the
    way to the new ones at each step. `b_rate_ratio` multiplies the rate of LoRA's B matrices (LoRA+, Hayou et al.
    2024, arXiv:2402.12354). Raises `RecipeError` for an optimizer whose package is missing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kind: Optimizer,
        weight_decay: float,
        compute_dtype: torch.dtype,
        ema_decay: float | None = None,
        b_rate_ratio: float = 1.0,
    ) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: dict[str, torch.Tensor] = {}
        self._computing: dict[str, torch.nn.Parameter] = {}
        for name, parameter in named.items():
            if parameter.dtype == compute_dtype:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().clone().float().requires_grad_()
                self._computing[name] = parameter
        compute_in(model, compute_dtype)
        for name, parameter in self._computing.items():
            parameter.register_post_accumulate_grad_hook(_adds_to(self.masters[name]))
        self._kind = kind
        self._ema_decay = ema_decay
        self._averages = {name: master.detach().clone() for name, master in self.masters.items()} if ema_decay else {}
        kinds = _kinds(model, named, b_rate_ratio)
        groups = [
            {
                "params": [self.masters[name] for name in named if kinds[name] == of],
                "weight_decay": weight_decay if of.decays else 0.0,
                "rate_ratio": of.rate_ratio,
                "hidden": of.hidden,
            }
            for of in sorted(set(kinds.values()), key=str)
        ]
        self._optimizers = _optimizers(kind, groups)
        self._names = {id(master): name for name, master in self.masters.items()}

    @torch.no_grad()
    def step(self, rate: float, max_gradient_norm: float) -> float:
        """One update at learning rate `rate` with the gradient scaled down to `max_gradient_norm`; returns the length
        that the gradient had. A gradient that is not finite changes nothing."""
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_gradient_norm))
        if isfinite(norm):
            self._step(rate)
            for name, average in self._averages.items():
                average.lerp_(self.masters[name], 1 - (self._ema_decay or 0.0))
            self._copy_back()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Drops what has been added up."""
        for master in self.masters.values():
            master.grad = None

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Inside, the model has the weights that the run is judged by: their average, where one is kept."""
        self._swap(True)
        try:
            yield
        finally:
            self._swap(False)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`(weights, moments)`: the masters by name, and all that the optimizer remembers, by `name/key` for a
        parameter and `group-N/key` for what is common to some."""
        weights = {name: master.detach() for name, master in self.masters.items()}
        moments = {f"{name}/{AVERAGE}": average for name, average in self._averages.items()}
        for optimizer in self._optimizers:
            for master, state in optimizer.state.items():
                for key, value in state.items():
                    moments |= _flat(f"{self._names[id(master)]}/{key}", value)
        for number, key, value in self._common():
            moments[f"group-{number}/{key}"] = torch.tensor(value, dtype=torch.float64)
        return weights, moments

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` gave. Raises `KeyError` for a parameter that is missing."""
        if moments:
            # a step of length zero makes each optimizer set up its state, whatever that is made of
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
            self._step(0.0)
            self.forget_gradients()
        for optimizer in self._optimizers:
            for master, state in optimizer.state.items():
                for key, value in state.items():
                    for place, part in _flat(f"{self._names[id(master)]}/{key}", value).items():
                        part.copy_(moments[place])
        for number, key, value in self._common():
            group = self._groups()[number]
            group[key] = type(value)(moments[f"group-{number}/{key}"].item())
        for name, average in self._averages.items():
            average.copy_(moments[f"{name}/{AVERAGE}"])
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._copy_back()

    def settle(self) -> None:
        """Ends training: the weights become those that the run is judged by."""
        self._swap(True)

    def _step(self, rate: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate * group["rate_ratio"])
                else:
                    group["lr"] = rate * group["rate_ratio"]
            with self._stance():
                optimizer.step()

    def _stance(self) -> AbstractContextManager[Any]:
        """torchao compiles its step; on a CPU that needs a C++ compiler and takes longer than it ever gives back."""
        on_cpu = all(master.device.type == "cpu" for master in self.masters.values())
        return torch.compiler.set_stance("force_eager") if self._kind == "adamw-8bit" and on_cpu else nullcontext()

    @torch.no_grad()
    def _swap(self, averaged: bool) -> None:
        for optimizer in self._optimizers:
            if self._kind == "schedule-free-adamw":
                switch: Any = optimizer
                switch.eval() if averaged else switch.train()
        for name, average in self._averages.items():
            weights = self.masters[name].detach().clone()
            self.masters[name].copy_(average)
            average.copy_(weights)
        self._copy_back()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _common(self) -> Iterable[tuple[int, str, float | int | bool]]:
        """What the optimizers count for a whole group, not for a parameter."""
        for number, group in enumerate(self._groups()):
            for key in ("step", "weight_sum", "lr_max"):
                if isinstance(group.get(key), float | int):
                    yield number, key, group[key]

    def _copy_back(self) -> None:
        for name, parameter in self._computing.items():
            parameter.data.copy_(self.masters[name])


def _kinds(model: Any, named: Mapping[str, torch.nn.Parameter], b_rate_ratio: float) -> dict[str, _Kind]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    ends = embeddings | {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    return {
        name: _Kind(
            hidden=parameter.ndim == 2 and id(parameter) not in ends and "trainable_tokens" not in name,
            decays=parameter.ndim >= 2 and id(parameter) not in embeddings and "trainable_tokens" not in name,
            rate_ratio=b_rate_ratio if "lora_B" in name else 1.0,
        )
        for name, parameter in named.items()
    }


def _optimizers(kind: Optimizer, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """The optimizers that take the groups; their rates are set at each step."""
    try:
        match kind:
            case "adamw":
                return [_adamw(groups)]
            case "muon":
                hidden = [group for group in groups if group["hidden"]]
                rest = [group for group in groups if not group["hidden"]]
                # scaled so that the rate means what it does for AdamW (Liu et al. 2025, arXiv:2502.16982)
                muon = [torch.optim.Muon(hidden, lr=0.0, adjust_lr_fn="match_rms_adamw")] if hidden else []
                return [*muon, *([_adamw(rest)] if rest else [])]
            case "adafactor":
                return [torch.optim.Adafactor(groups, lr=0.0)]
            case "adamw-8bit":
                from torchao.optim import AdamW8bit

                return [AdamW8bit(groups, lr=0.0, betas=BETAS)]
            case "lion":
                from pytorch_optimizer import Lion

                return [Lion(groups, lr=0.0)]
            case "schedule-free-adamw":
                from pytorch_optimizer import ScheduleFreeAdamW

                return [ScheduleFreeAdamW(groups, lr=0.0)]
    except ImportError:
        raise RecipeError(
            f"training.optimizer {kind} comes from the package {PACKAGES[kind]}, which is not installed here: "
            "pip install 'finespun[optimizers]'"
        ) from None


BETAS = (0.9, 0.999)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def _flat(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The plain tensors of which `value` is made, by names that begin with `name`; a quantized one has several."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: optimizers keep tensors, not {type(value).__name__}")
    if hasattr(value, "__tensor_flatten__"):
        parts, _ = value.__tensor_flatten__()
        return {f"{name}.{part}": getattr(value, part) for part in parts}
    return {name: value}


def _adds_to(master: torch.Tensor):  # noqa: ANN202  # torch's own hook type is not public
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook
