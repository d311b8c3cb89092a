from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from finespun.recipe import TrainingRecipe
from finespun.training.schedule import Speed, default_batch_size, default_learning_rate, learning_rate, settle


def settled(speed: Speed | None = None, examples: int = 240, **recipe: object) -> tuple[int, TrainingRecipe]:
    training = TrainingRecipe(**recipe)
    steps = settle(training, examples, 200 * examples, 6000, lambda: speed or Speed(80.0, 0.0))
    return steps, training


@pytest.mark.parametrize("validate_every", [None, 5, 50])
@pytest.mark.parametrize("update_seconds", [0.0, 2.5, 40.0])
@pytest.mark.parametrize("tokens_per_second", [80.0, 400.0, 5000.0])
def test_a_time_limit_becomes_the_steps_that_fit_with_their_updates_and_validations(
    tokens_per_second: float, update_seconds: float, validate_every: int | None
) -> None:
    speed = Speed(tokens_per_second, update_seconds)
    steps, recipe = settled(speed, max_minutes=60, epochs=1e6, batch_size=4, validate_every=validate_every)
    assert steps == recipe.max_steps
    assert recipe.max_minutes is None
    validations = steps // recipe.validate_every
    taken = steps * (800 / tokens_per_second + update_seconds) + validations * 6000 / 3 / tokens_per_second
    assert 0.9 * 3600 < taken <= 3600


def test_a_time_limit_is_no_reason_for_more_steps_than_epochs_and_at_least_one_is_taken() -> None:
    assert settled(Speed(1e6, 0.0), max_minutes=3, epochs=3, batch_size=4)[0] == 180
    assert settled(Speed(1e-3, 0.0), max_minutes=3, batch_size=4)[0] == 1


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
    assert default_learning_rate("full", "adamw", 135_000_000)[0] == pytest.approx(2e-4)
    assert default_learning_rate("lora", "adamw", 135_000_000)[0] == pytest.approx(2e-3)
    assert default_learning_rate("full", "adamw", 7_000_000_000)[0] < 5e-5
    rate, why = default_learning_rate("lora", "lion", 135_000_000)
    assert rate == pytest.approx(4e-4)
    assert "LoRA" in why
    assert "Lion" in why


def rates(schedule: str, steps: int, warmup: float = 0.0, decay: float = 0.2) -> list[float]:
    return [learning_rate(step, steps, 1.0, warmup, schedule, decay) for step in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 997])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup-stable-decay"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_no_step_is_wasted_at_rate_zero_and_the_peak_is_reached(schedule: str, steps: int, warmup: float) -> None:
    found = rates(schedule, steps, warmup)
    assert max(found) == 1.0
    assert min(found) > 0.0
    rising = math.ceil(warmup * steps)
    assert found[:rising] == [(step + 1) / rising for step in range(rising)]
    assert found[rising:] == sorted(found[rising:], reverse=True)


@pytest.mark.parametrize("steps", [7, 100])
def test_schedules_are_those_of_transformers_one_step_of_warmup_ahead(steps: int) -> None:
    """transformers begins the warm-up at rate 0, which trains nothing; behind it both fall alike, to the same 0 after
    the last step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for name in ("cosine", "linear"):
        theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps)
        factor = theirs.lr_lambdas[0]
        assert rates(name, steps) == pytest.approx([factor(step) for step in range(steps)])
        assert factor(steps) == pytest.approx(0.0)


def test_warmup_stable_decay_stays_at_the_peak_and_then_falls_like_one_minus_a_root() -> None:
    found = rates("warmup-stable-decay", 100, warmup=0.1, decay=0.2)
    assert found[10:81] == [1.0] * 71
    assert found[81:] == pytest.approx([1 - math.sqrt(passed / 20) for passed in range(1, 20)])
