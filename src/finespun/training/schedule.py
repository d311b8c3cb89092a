"""How long a run is and how fast it learns: the number of steps, the rate of each, and the defaults of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from finespun.recipe import Method, Optimizer, Schedule, TrainingRecipe

VALIDATIONS = 10
VALIDATION_SHARE = 0.1
"""A run that does not say how often validates ten times, or as often as takes a tenth of its time."""
VALIDATION_WORK = 1 / 3
"""Of a token in validation, by that of one in training: forward passes alone."""


class Speed(NamedTuple):
    """How fast a run trains on this machine: tokens a second forward and backward, and seconds of an update."""

    tokens_per_second: float
    update_seconds: float

    def seconds(self, steps: float, tokens: float, validated: float = 0) -> float:
        """What `steps` over `tokens` take, with validations on `validated` tokens."""
        return (tokens + validated * VALIDATION_WORK) / self.tokens_per_second + steps * self.update_seconds


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps in `epochs` passes; the last, smaller batch of a pass is a step too."""
    steps = max(1, round(epochs * math.ceil(examples / batch_size)))
    return min(steps, max_steps) if max_steps else steps


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: Schedule, decay: float) -> float:
    """Rate of `step` (from 0) of `steps`: linear up to `peak` over the share `warmup`, then as `schedule` says.

    What falls would reach 0 one step after the last, so that no step is taken at rate 0: half a cosine (Loshchilov &
    Hutter 2017, arXiv:1608.03983), a line, or `peak` until the share `decay` is left and then 1 - sqrt of how much of
    that has passed (Hägele et al. 2024, arXiv:2405.18392).
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    falls_from = max(rising, steps - math.ceil(decay * steps)) if schedule == "warmup-stable-decay" else rising
    passed = max(0, step - falls_from) / max(1, steps - falls_from)
    match schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * passed))
        case "linear":
            return peak * (1 - passed)
        case "warmup-stable-decay":
            return peak * (1 - math.sqrt(passed))
        case "constant":
            return peak


METHOD_RATES: dict[Method, tuple[float, str]] = {
    "full": (1.0, ""),
    "lora": (10.0, "ten times that of all weights, since the update of LoRA starts at zero and is scaled down"),
    "qlora": (10.0, "ten times that of all weights, since the update of LoRA starts at zero and is scaled down"),
    "prompt-tuning": (100.0, "a hundred times that of all weights, since a few vectors have to do it all"),
    "prefix-tuning": (30.0, "thirty times that of all weights, since a few vectors have to do it all"),
}
OPTIMIZER_RATES: dict[Optimizer, tuple[float, str]] = {
    "adamw": (1.0, ""),
    "adamw-8bit": (1.0, ""),
    "muon": (1.0, "Muon's updates are scaled to the size of AdamW's"),
    "schedule-free-adamw": (2.0, "twice AdamW's, since it averages"),
    "lion": (0.2, "a fifth of AdamW's, since each of Lion's steps moves each weight by the whole rate"),
    "adafactor": (40.0, "relative to the size of each weight matrix, as Adafactor takes it"),
}


def default_learning_rate(method: Method, optimizer: Optimizer, parameters: int) -> tuple[float, str]:
    """Peak rate where a recipe gives none, and the reason: smaller for larger models, higher for few parameters."""
    by_size = 2e-4 * (135e6 / max(parameters, 10e6)) ** 0.5
    (by_method, why_method), (by_optimizer, why_optimizer) = METHOD_RATES[method], OPTIMIZER_RATES[optimizer]
    reasons = [f"2e-4 for 135 M parameters, falling with the root of their number: {by_size:.1e}"]
    return float(f"{by_size * by_method * by_optimizer:.1e}"), "; ".join(
        filter(None, [*reasons, why_method, why_optimizer])
    )


def default_batch_size(examples: int) -> int:
    """Examples in a step where a recipe gives none: about a hundred steps a pass, from 4 up to 32 examples."""
    return min(32, max(4, 2 ** round(math.log2(max(1, examples / 100)))))


def settle(
    recipe: TrainingRecipe,
    examples: int,
    tokens: int,
    validation_tokens: int,
    measure_speed: Callable[[], Speed],
) -> int:
    """Decides what `recipe` leaves open but for rate, precision and micro-batch, and returns the number of steps.

    There are `examples` of `tokens` to train and `validation_tokens` to validate on. A time limit becomes a number of
    steps that fit into it with their validations, by the speed that is measured when it is needed.
    """
    recipe.batch_size = recipe.batch_size or default_batch_size(examples)
    recipe.schedule = recipe.schedule or ("constant" if recipe.optimizer == "schedule-free-adamw" else "cosine")
    step_tokens = tokens * min(1, recipe.batch_size / examples)
    if recipe.max_minutes is not None:
        speed, limit = measure_speed(), recipe.max_minutes * 60
        step, validation = speed.seconds(1, step_tokens), speed.seconds(0, 0, validation_tokens)
        if recipe.validate_every:
            fitting = limit / (step + validation / recipe.validate_every)
        else:
            fitting = max(limit / (1 + VALIDATION_SHARE), limit - VALIDATIONS * validation) / step
        fitting = max(1, int(fitting))
        recipe.max_steps, recipe.max_minutes = min(recipe.max_steps or fitting, fitting), None
    steps = total_steps(examples, recipe.batch_size, recipe.epochs, recipe.max_steps)
    if recipe.validate_every is None:
        affordable = int(VALIDATION_SHARE * steps * step_tokens / max(1, validation_tokens * VALIDATION_WORK))
        recipe.validate_every = math.ceil(steps / min(VALIDATIONS, max(1, affordable)))
    recipe.save_every = recipe.save_every or recipe.validate_every
    return steps
