from __future__ import annotations

import pytest

from finespun.recipe import TrainingRecipe
from finespun.training.schedule import default_batch_size, default_learning_rate, settle


def settled(speed: float = 0.0, examples: int = 240, **recipe: object) -> tuple[int, TrainingRecipe]:
    training = TrainingRecipe(**recipe)
    steps = settle(training, examples, 200 * examples, 6000, 135_000_000, lambda: speed)
    return steps, training


def test_a_time_limit_becomes_the_steps_that_fit() -> None:
    steps, recipe = settled(speed=80.0, max_minutes=3, epochs=3, batch_size=4)
    assert steps == recipe.max_steps == 3 * 60 * 80 // 800
    assert recipe.max_minutes is None
    assert settled(speed=1e6, max_minutes=3, epochs=3, batch_size=4)[0] == 180
    assert settled(speed=1e-3, max_minutes=3, batch_size=4)[0] == 1


def test_validation_takes_about_a_tenth_of_the_time() -> None:
    steps, recipe = settled(batch_size=4, epochs=3)
    validations = steps / recipe.validate_every
    cost = validations * 6000 / 3 / (steps * 800)
    assert 1 <= validations <= 10
    assert cost <= 0.1
    assert settled(batch_size=4, max_steps=2)[1].validate_every == 2
    assert settled(batch_size=4, epochs=1000)[1].validate_every == 6000


@pytest.mark.parametrize(("examples", "expected"), [(1, 4), (240, 4), (1000, 8), (18_000, 32), (10**6, 32)])
def test_batch_size_by_the_number_of_examples(examples: int, expected: int) -> None:
    assert default_batch_size(examples) == expected


def test_larger_models_and_full_training_get_smaller_rates() -> None:
    assert default_learning_rate("full", 135_000_000) == pytest.approx(2e-4)
    assert default_learning_rate("lora", 135_000_000) == pytest.approx(2e-3)
    assert default_learning_rate("full", 7_000_000_000) < 5e-5
