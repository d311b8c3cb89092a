"""Which of several systems writes better, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finespun.evaluation.perplexity import RESAMPLES, Interval

if TYPE_CHECKING:
    from finespun.evaluation.metrics import Measured

GROUPS = 200
"""In so many parts at most does a jackknife leave examples out."""

Draw = NDArray[np.intp]
"""Rows of examples, some of them several times."""


def interval(measured: Measured, seed: int = 0, examples: int | None = None, resamples: int = RESAMPLES) -> Interval:
    """A system's score with its 95 % interval: what other examples of the same kind would have given.

    It is the percentile bootstrap's (Efron & Tibshirani 1993), widened for few examples as a t interval is (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", section 3.4). A score that is another one when each example
    stands there twice, such as the share of distinct n-grams, cannot be drawn with replacement: its interval is the
    jackknife's. One example gives an interval without bounds: it says nothing of others.

    `examples` is their number, to be given where `measured` has no scores of single ones.
    """
    if examples is None:
        if measured.per_example is None:
            raise ValueError("the number of examples has to be given where they have no scores of their own")
        examples = len(measured.per_example)
    return _resample(lambda draw: np.array([measured.value(draw)]), examples, seed, resamples).interval(np.ones(1))


@dataclass(frozen=True)
class _Resampled:
    """Scores of systems on all examples, `[systems]`, and on other choices of examples, `[choices, systems]`."""

    values: NDArray[np.float64]
    again: NDArray[np.float64]
    examples: int
    replaced: bool
    """Whether the choices are draws with replacement; else each leaves a part of the examples out."""

    def interval(self, weights: NDArray[np.float64]) -> Interval:
        """Of the weighted sum of the systems' scores: `[0, 1]` is the second one's, `[-1, 1]` what it is ahead."""
        value, again = float(weights @ self.values), self.again @ weights
        if self.examples == 1:
            return Interval(value, -math.inf, math.inf)
        if not self.replaced:
            margin = _t_quantile(len(again) - 1) * self._jackknife_error(again)
            return Interval(value, value - margin, value + margin)
        tail = NormalDist().cdf(-_t_quantile(self.examples - 1) * math.sqrt(self.examples / (self.examples - 1)))
        low, high = np.quantile(again, (tail, 1 - tail))
        return Interval(value, float(low), float(high))

    def p_value(self, weights: NDArray[np.float64]) -> float | None:
        """Of the weighted sum's being 0: how often draws, moved so that their mean is 0, are as far from it as what was
        measured (Riezler & Maxwell 2005, figure 2; sacrebleu's). None where examples cannot be drawn twice."""
        if not self.replaced:
            return None
        again = self.again @ weights
        return _p_value(again - again.mean(), float(weights @ self.values))

    @staticmethod
    def _jackknife_error(again: NDArray[np.float64]) -> float:
        """Standard error by leaving parts out in turn (Efron & Tibshirani 1993, formula 11.5, for parts)."""
        parts = len(again)
        return math.sqrt((parts - 1) / parts * float(((again - again.mean()) ** 2).sum()))


def _resample(statistic: Callable[[Draw], NDArray[np.float64]], examples: int, seed: int, resamples: int) -> _Resampled:
    """`statistic` gives the systems' scores, `[systems]`, on the examples of a draw: the same ones for all of them."""
    everything = np.arange(examples)
    values = statistic(everything)
    replaced = np.allclose(statistic(np.repeat(everything, 2)), values, rtol=1e-9, atol=1e-12)
    choices = _draws(examples, seed, resamples) if replaced else _parts_left_out(examples, seed)
    return _Resampled(values, np.array([statistic(draw) for draw in choices]), examples, replaced)


def _draws(examples: int, seed: int, resamples: int) -> Iterator[Draw]:
    random = np.random.default_rng(seed)
    return (random.integers(0, examples, examples) for _ in range(resamples))


def _parts_left_out(examples: int, seed: int) -> Iterator[Draw]:
    """All examples but those of one part, for each of up to `GROUPS` parts of one size."""
    order = np.random.default_rng(seed).permutation(examples)
    parts = min(examples, GROUPS)
    return (np.delete(order, np.s_[part::parts]) for part in range(parts))


def _p_value(under_null: NDArray[np.float64], measured: float) -> float:
    """Two-sided; what was measured counts as one of the draws, so that it is never 0 (Phipson & Smyth 2010)."""
    return (1 + _as_far(under_null, measured)) / (1 + len(under_null))


def _as_far(differences: NDArray[np.float64], measured: float) -> int:
    """How many are at least as far from 0; sums of the same numbers in another order count as equal."""
    return int((np.abs(differences) >= abs(measured) * (1 - 1e-9) - 1e-12).sum())


def _t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5; three digits from five degrees of freedom on)."""
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
