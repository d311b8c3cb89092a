"""Optimizers on float32 master weights, whatever type the model computes in."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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

NORM_PIECE = 1 << 18
"""Numbers of a gradient whose squares are summed at once."""

MEASURED_NUMBERS = 1 << 23
"""Numbers of the model on which the time of an update is measured."""

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

    A model that computes in bfloat16 keeps its float32 weights here: gradients are added up in float32, and the rounded
    weights are copied back after a step. A float32 model is its own master. Norms, biases and embeddings have no weight
    decay. With `ema_decay` d, an average of the weights goes 1 - d of the way to the new ones at each step.
    `b_rate_ratio` multiplies the rate of LoRA's B matrices (LoRA+, Hayou et al. 2024, arXiv:2402.12354). Raises
    `RecipeError` for an optimizer whose package is missing.

    On a CPU each parameter goes by itself through all that a step does to it, while it is in the cache.
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
                self.masters[name] = parameter.detach().float().requires_grad_()
                self._computing[name] = parameter
        compute_in(model, compute_dtype)
        self._gradients: dict[str, torch.Tensor] = {}
        for name, parameter in self._computing.items():
            parameter.register_post_accumulate_grad_hook(self._takes_gradient(name))
        self._kind = kind
        self._ema_decay = ema_decay
        self._averages = {name: master.detach().clone() for name, master in self.masters.items()} if ema_decay else {}
        kinds = _kinds(model, named, b_rate_ratio)
        self._on_cpu = _on_cpu(self.masters.values())
        together = [[name] for name in named] if self._on_cpu else [list(named)]
        self._parts = [
            (names, _optimizers(kind, _groups(self.masters, names, kinds, weight_decay))) for names in together
        ]
        self._room: torch.Tensor | None = None
        self._names = {id(master): name for name, master in self.masters.items()}

    @torch.no_grad()
    def step(self, rate: float, max_gradient_norm: float) -> float:
        """One update at learning rate `rate` with the gradient scaled down to `max_gradient_norm`; returns the length
        that the gradient had. A gradient that is not finite changes nothing."""
        gradients = {name: gradient for name in self.masters if (gradient := self._gradient(name)) is not None}
        norm = _norm(gradients.values())
        if isfinite(norm):
            self._step(rate, gradients, min(1.0, max_gradient_norm / (norm + 1e-6)))
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Drops what has been added up."""
        self._gradients.clear()
        for master in self.masters.values():
            master.grad = None

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Inside, the model has the weights that the run is judged by: their average, where one is kept."""
        # the schedule-free average is computed from the weights in place, and back again only up to rounding
        inexact = self.masters if self._kind == "schedule-free-adamw" else {}
        before = {name: master.detach().clone() for name, master in inexact.items()}
        self._swap(True)
        try:
            yield
        finally:
            self._swap(False, before)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`(weights, moments)`: the masters by name, and by `name/key` all that the optimizer remembers."""
        weights = {name: master.detach() for name, master in self.masters.items()}
        moments = {f"{name}/{AVERAGE}": average for name, average in self._averages.items()}
        for name, _, state in self._states():
            for key, value in state.items():
                moments |= _flat(f"{name}/{key}", value)
        for name, group, key in self._counts():
            moments[f"{name}/group.{key}"] = torch.tensor(group[key], dtype=torch.float64)
        return weights, moments

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` gave. Raises `KeyError` for a parameter that is missing."""
        if moments:
            # a step of length zero makes each optimizer set up its state, whatever that is made of
            self._step(0.0, {name: torch.zeros_like(master) for name, master in self.masters.items()})
            self.forget_gradients()
        for name, _, state in self._states():
            for key, value in state.items():
                for place, part in _flat(f"{name}/{key}", value).items():
                    part.copy_(moments[place])
        for name, group, key in self._counts():
            group[key] = type(group[key])(moments[f"{name}/group.{key}"].item())
        for name, average in self._averages.items():
            average.copy_(moments[f"{name}/{AVERAGE}"])
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._copy_back(self._computing)

    def settle(self) -> None:
        """Ends training: the weights become those that the run is judged by."""
        self._swap(True)

    def _takes_gradient(self, name: str) -> Callable[[torch.nn.Parameter], None]:
        """A hook that takes the gradient which backward has made for a parameter in bfloat16. The first of a step stays
        as it is; with the second, both become a sum in float32."""

        def hook(parameter: torch.nn.Parameter) -> None:
            assert parameter.grad is not None
            before = self._gradients.get(name)
            self._gradients[name] = parameter.grad if before is None else before.float().add_(parameter.grad)
            parameter.grad = None

        return hook

    def _gradient(self, name: str) -> torch.Tensor | None:
        return self._gradients.get(name) if name in self._computing else self.masters[name].grad

    def _step(self, rate: float, gradients: Mapping[str, torch.Tensor], scale: float = 1.0) -> None:
        """One update with `gradients` times `scale`."""
        with self._stance():
            for names, optimizers in self._parts:
                for name in names:
                    if (gradient := gradients.get(name)) is not None:
                        gradient = self._in_float32(gradient)
                        self.masters[name].grad = gradient.mul_(scale) if scale != 1.0 else gradient
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        if isinstance(group["lr"], torch.Tensor):
                            group["lr"].fill_(rate * group["rate_ratio"])
                        else:
                            group["lr"] = rate * group["rate_ratio"]
                    optimizer.step()
                for name in names:
                    self.masters[name].grad = None
                    if name in self._averages:
                        self._averages[name].lerp_(self.masters[name], 1 - (self._ema_decay or 0.0))
                self._copy_back(names)

    def _in_float32(self, gradient: torch.Tensor) -> torch.Tensor:
        if gradient.dtype == torch.float32 or not self._on_cpu:
            return gradient.float()
        # always in the same place: of the kernel, memory for the largest gradient would be a page fault for each 4 KB
        if self._room is None:
            self._room = torch.empty(max(parameter.numel() for parameter in self._computing.values()))
        return self._room[: gradient.numel()].view(gradient.shape).copy_(gradient)

    def _stance(self) -> AbstractContextManager[Any]:
        """torchao compiles its step; on a CPU that needs a C++ compiler and takes longer than it ever gives back."""
        eager = self._kind == "adamw-8bit" and self._on_cpu
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    @torch.no_grad()
    def _swap(self, averaged: bool, before: Mapping[str, torch.Tensor] | None = None) -> None:
        if self._kind == "schedule-free-adamw":
            for optimizer in self._optimizers():
                switch: Any = optimizer
                switch.eval() if averaged else switch.train()
        for name, weights in (before or {}).items():
            self.masters[name].copy_(weights)
        for name, average in self._averages.items():
            weights = self.masters[name].detach().clone()
            self.masters[name].copy_(average)
            average.copy_(weights)
        self._copy_back(self._computing)

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for _, optimizers in self._parts:
            yield from optimizers

    def _states(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """For each parameter that has been updated its name, its group and what is remembered of it."""
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                for master in group["params"]:
                    yield self._names[id(master)], group, optimizer.state.get(master, {})

    def _counts(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """What an optimizer counts for a whole group: saved with each parameter of it, as groups differ by device."""
        for name, group, _ in self._states():
            for key in ("step", "weight_sum", "lr_max"):
                if isinstance(group.get(key), float | int):
                    yield name, group, key

    def _copy_back(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._computing:
                self._computing[name].data.copy_(self.masters[name])


def update_seconds(
    model: torch.nn.Module, kind: Optimizer, compute_dtype: torch.dtype, ema_decay: float | None = None
) -> float:
    """What a step of `MasterOptimizer` takes for all trainable parameters, measured on copies of some in the middle."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen: list[torch.Tensor] = []
    for parameter in trainable[len(trainable) // 2 :]:
        if sum(each.numel() for each in chosen) < MEASURED_NUMBERS:
            chosen.append(parameter.detach().to(torch.float32, copy=True))
    part = torch.nn.ParameterList(chosen)
    optimizer = MasterOptimizer(part, kind, 0.0, compute_dtype, ema_decay)
    seconds = 0.0
    for _ in range(2):  # the first touches its memory for the first time
        torch.stack([parameter.sum() for parameter in part]).sum().backward()
        started = time.perf_counter()
        optimizer.step(0.0, 1.0)
        part[-1].flatten()[0].item()  # a GPU has done it by then
        seconds = time.perf_counter() - started
    return seconds * sum(each.numel() for each in trainable) / sum(each.numel() for each in chosen)


def _on_cpu(tensors: Iterable[torch.Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _norm(gradients: Iterable[torch.Tensor]) -> float:
    """The length of all together. In pieces: a sum of ten million squares in float32 is off by a thousandth."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float32)
        for gradient in gradients
        for piece in gradient.flatten().split(NORM_PIECE)
    ]
    return float(torch.stack(norms).double().norm()) if norms else 0.0


def _groups(
    masters: Mapping[str, torch.Tensor], names: Sequence[str], kinds: Mapping[str, _Kind], weight_decay: float
) -> list[dict[str, Any]]:
    return [
        {
            "params": [masters[name] for name in names if kinds[name] == kind],
            "weight_decay": weight_decay if kind.decays else 0.0,
            "rate_ratio": kind.rate_ratio,
            "hidden": kind.hidden,
        }
        for kind in sorted({kinds[name] for name in names}, key=str)
    ]


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
