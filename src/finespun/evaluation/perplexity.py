"""Perplexity of held-out texts, with the doubt that a limited number of them leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        return {key: finite(value) for key, value in asdict(self).items()}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def perplexity(losses: Sequence[float], weights: Sequence[float]) -> Interval:
    """exp(Σ loss / Σ weight) with its interval by percentile bootstrap over examples (Efron & Tibshirani 1993).

    `losses` are the weighted losses of each example in nats, `weights` the weights (for 0/1 weights: trained tokens)
    of each. One example gives an interval from 0 to infinity: it says nothing of others.
    """
    means = _bootstrap(np.asarray(losses), np.asarray(weights))
    return _interval(float(np.exp(sum(losses) / sum(weights))), np.exp(means))


def perplexity_ratio(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Interval:
    """Perplexity after divided by perplexity before, on the same examples: resampled in pairs, so that what makes an
    example hard for both does not count as doubt."""
    difference = np.asarray(after) - np.asarray(before)
    return _interval(
        float(np.exp(difference.sum() / sum(weights))), np.exp(_bootstrap(difference, np.asarray(weights)))
    )


def _bootstrap(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[RESAMPLES]` weighted mean losses, each over as many examples drawn with replacement; of one example, 0 and
    infinity, since nothing bounds the others."""
    if len(losses) == 1:
        return np.array([-np.inf, np.inf])
    random = np.random.default_rng(0)
    draws = (random.integers(0, len(losses), len(losses)) for _ in range(RESAMPLES))
    return np.array([losses[draw].sum() / weights[draw].sum() for draw in draws])


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975), method="nearest" if len(resampled) == 2 else "linear")
    return Interval(value, float(low), float(high))
