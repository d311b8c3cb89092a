"""How long a run is and how fast it learns: the number of steps, the rate of each, and the defaults of both."""

from __future__ import annotations

import math
from collections.abc import Callable

from finespun.recipe import TrainingRecipe

VALIDATIONS = 10
VALIDATION_SHARE = 0.1
"""A run that does not say how often validates ten times, or as often as takes a tenth of its time."""

MICRO_BATCH_TOKENS = 2048


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps in `epochs` passes; the last, smaller batch of a pass is a step too."""
    steps = max(1, round(epochs * math.ceil(examples / batch_size)))
    return min(steps, max_steps) if max_steps else steps


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of `step` (from 0) of `steps`: linear up to `peak` over the share `warmup`, then half a cosine towards 0
    (Loshchilov & Hutter 2017, arXiv:1608.03983), which it would reach one step after the last."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def default_learning_rate(method: str, parameters: int) -> float:
    """Peak rate where a recipe gives none: smaller for larger models, ten times higher for LoRA, whose update starts
    at zero and is scaled down by its rank."""
    full = 2e-4 * (135e6 / max(parameters, 10e6)) ** 0.5
    return float(f"{full * (10 if method == 'lora' else 1):.1e}")


def default_batch_size(examples: int) -> int:
    """Examples in a step where a recipe gives none: about a hundred steps a pass, from 4 up to 32 examples."""
    return min(32, max(4, 2 ** round(math.log2(max(1, examples / 100)))))


def settle(
    recipe: TrainingRecipe,
    examples: int,
    tokens: int,
    validation_tokens: int,
    parameters: int,
    tokens_per_second: Callable[[], float],
) -> int:
    """Decides what `recipe` leaves open and returns the number of steps.

    There are `examples` of `tokens` to train and `validation_tokens` to validate on; the model has so many
    `parameters`. A time limit becomes a number of steps by the speed that is measured when it is needed.
    """
    recipe.batch_size = recipe.batch_size or default_batch_size(examples)
    recipe.learning_rate = recipe.learning_rate or default_learning_rate(recipe.method, parameters)
    recipe.micro_batch_tokens = recipe.micro_batch_tokens or MICRO_BATCH_TOKENS
    step_tokens = tokens * min(1, recipe.batch_size / examples)
    if recipe.max_minutes is not None:
        fitting = max(1, int(recipe.max_minutes * 60 * tokens_per_second() / step_tokens))
        recipe.max_steps, recipe.max_minutes = min(recipe.max_steps or fitting, fitting), None
    steps = total_steps(examples, recipe.batch_size, recipe.epochs, recipe.max_steps)
    if recipe.validate_every is None:
        # A validation is a forward pass, a third of the work of training on as many tokens.
        affordable = int(3 * VALIDATION_SHARE * steps * step_tokens / max(1, validation_tokens))
        recipe.validate_every = math.ceil(steps / min(VALIDATIONS, max(1, affordable)))
    recipe.save_every = recipe.save_every or recipe.validate_every
    return steps
