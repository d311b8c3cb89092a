from __future__ import annotations

import math

import numpy as np
import pytest

from finespun.evaluation.perplexity import perplexity, perplexity_ratio


def test_it_is_the_exponential_of_the_token_weighted_mean() -> None:
    found = perplexity([10.0, 1.0, 9.0], [4.0, 2.0, 3.0])
    assert found.value == pytest.approx(math.exp(20 / 9))
    assert found.low < found.value < found.high


def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(250):
        weights = random.integers(20, 200, 60).astype(float)
        losses = weights * (3 + 0.4 * random.standard_normal(60))
        found = perplexity(losses.tolist(), weights.tolist())
        hits += found.low <= math.exp(3) <= found.high
    assert 0.92 <= hits / 250 <= 0.98  # 0.95 with the percentile bootstrap's and 250 trials' own error


def test_pairs_make_a_small_difference_between_hard_examples_certain() -> None:
    random = np.random.default_rng(0)
    weights = [50.0] * 30
    before = (50 * (3 + random.standard_normal(30))).tolist()
    after = [loss - 5 + random.normal(0, 0.5) for loss in before]
    ratio = perplexity_ratio(before, after, weights)
    assert ratio.value == pytest.approx(math.exp(-0.1), rel=0.02)
    assert ratio.high < 1
    assert perplexity(before, weights).low < perplexity(after, weights).high, "unpaired, the intervals overlap"


def test_one_example_says_nothing_of_others() -> None:
    found = perplexity([6.0], [3.0])
    assert (found.value, found.low, found.high) == (pytest.approx(math.e**2), 0.0, math.inf)
