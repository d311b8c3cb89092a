"""Which learning rate: a short training whose rate rises from step to step until the loss does too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finespun.data.packing import step_indices
from finespun.data.templates import TokenizedExample
from finespun.errors import TrainingDiverged
from finespun.models.gradient_checkpointing import gradient_checkpointing
from finespun.training.loop import ResolvedTraining, fitting_gradients
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.optim import MasterOptimizer

STEPS = 80
"""At the most: the search ends when the loss has clearly risen."""

DECADES = 5
"""The rate rises by so many powers of ten, two of them above the default."""

SMOOTHING = 0.8
"""Share of the smoothed loss that comes from the steps before."""

RISEN = 1.25
"""The search ends when the smoothed loss is so many times its lowest."""


@dataclass(frozen=True)
class RateSearch:
    """For each step the rate and the smoothed loss (nats a token), and the rate to begin with."""

    rates: list[float]
    losses: list[float]
    suggested: float


def search_rate(
    objective: CausalLM,
    examples: Sequence[TokenizedExample],
    recipe: ResolvedTraining,
    on_step: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RateSearch:
    """Trains on batches of `examples` with a rate that rises exponentially (Smith 2017, arXiv:1506.01186). The weights
    are spoilt afterwards. `on_step` gets step, rate and smoothed loss. Raises `TrainingDiverged` if the loss never
    fell."""
    optimizer = MasterOptimizer(
        objective.outer, recipe.optimizer, recipe.weight_decay, recipe.compute_dtype, None, recipe.b_rate_ratio
    )
    lowest = recipe.learning_rate * 10.0 ** (2 - DECADES)
    batches = step_indices(len(examples), recipe.batch_size, recipe.seed)
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step in range(STEPS):
        rate = lowest * 10 ** (DECADES * step / (STEPS - 1))
        batch = [examples[index] for index in next(batches)]
        with gradient_checkpointing(objective.decoder, recipe.gradient_checkpointing):
            loss, _ = fitting_gradients(objective, optimizer, batch, recipe.micro_batch_tokens, None)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed):
            break
        rates.append(rate)
        losses.append(smoothed)
        on_step(step + 1, rate, smoothed)
        if smoothed > RISEN * min(losses) or not math.isfinite(optimizer.step(rate, recipe.max_gradient_norm)):
            break
    return RateSearch(rates, losses, suggest(rates, losses))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate at which the loss is lowest, rounded to two digits: there it has long fallen, and the rate is
    far from where it rises. Raises `TrainingDiverged` if the loss was lowest before it could fall."""
    if not losses or losses.index(min(losses)) < 3:
        raise TrainingDiverged(
            "The loss rose from the first steps on, at any rate: look at the data (finespun data check), or give a "
            "lower training.learning_rate to begin with."
        )
    return float(f"{rates[losses.index(min(losses))] / 10:.1e}")


def chart(search: RateSearch, width: int = 64, height: int = 12) -> list[str]:
    """Loss against rate in characters, one line a row, the suggested rate marked."""
    low, high = min(search.losses), max(search.losses)
    first, last = math.log10(search.rates[0]), math.log10(search.rates[-1])

    def column(rate: float) -> int:
        return round((math.log10(rate) - first) / max(last - first, 1e-9) * (width - 1))

    cells = [[" "] * width for _ in range(height)]
    mark = min(width - 1, max(0, column(search.suggested)))
    for row in cells:
        row[mark] = "┊"
    for rate, loss in zip(search.rates, search.losses, strict=True):
        cells[round((high - loss) / max(high - low, 1e-9) * (height - 1))][column(rate)] = "•"
    label = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    lines = [f"{label.get(number, ''):>8} ┤{''.join(row)}" for number, row in enumerate(cells)]
    ends = f"{search.rates[0]:.0e}", f"{search.rates[-1]:.0e}"
    return [*lines, " " * 9 + "└" + "─" * width, " " * 10 + ends[0] + ends[1].rjust(width - len(ends[0]))]
