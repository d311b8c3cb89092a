"""How long a run is and how fast it learns: the number of steps, the rate of each, and the defaults of both."""

from __future__ import annotations

import math

from finespun.recipe import TrainingRecipe

VALIDATIONS = 10
"""In a run that does not say how often."""

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


def settle(recipe: TrainingRecipe, examples: int, parameters: int) -> int:
    """Decides what `recipe` leaves open, for so many training examples and model parameters; returns the steps."""
    recipe.batch_size = recipe.batch_size or default_batch_size(examples)
    recipe.learning_rate = recipe.learning_rate or default_learning_rate(recipe.method, parameters)
    recipe.micro_batch_tokens = recipe.micro_batch_tokens or MICRO_BATCH_TOKENS
    steps = total_steps(examples, recipe.batch_size, recipe.epochs, recipe.max_steps)
    recipe.validate_every = recipe.validate_every or max(1, math.ceil(steps / VALIDATIONS))
    recipe.save_every = recipe.save_every or recipe.validate_every
    return steps
