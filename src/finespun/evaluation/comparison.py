"""Which of several systems writes better, by how much, and how sure that is.

Systems are compared on the same examples, so that what makes an example hard for all of them counts for nothing: in
each resampling the same examples are drawn for all (paired bootstrap, Koehn 2004), and in each permutation the outputs
for some examples change sides (approximate randomization, Riezler & Maxwell 2005).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from finespun.errors import DataError
from finespun.evaluation.outputs import Output
from finespun.evaluation.perplexity import RESAMPLES, Interval

if TYPE_CHECKING:
    from finespun.evaluation.metrics import Measured, Metric

Better = Literal["higher", "lower"] | None
"""Which scores of a metric are the better ones, if any are."""

SIGNIFICANCE = 0.05
"""A difference is called shown where its corrected p-value is at most this."""

TRIALS_EACH = 50
"""Trials of a randomization for each comparison that is made at once: with fewer, corrected p-values stay too high."""

PARTS = 50
"""In so many parts at most does a jackknife leave examples out."""

Draw = NDArray[np.intp]
"""Rows of examples, some of them several times."""


def interval(measured: Measured, seed: int = 0, examples: int | None = None, resamples: int = RESAMPLES) -> Interval:
    """A system's score with its 95 % interval: what other examples of the same kind would have given.

    It is the percentile bootstrap's (Efron & Tibshirani 1993), widened for few examples as a t interval is (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", section 3.4). A score of a collection, such as the share of
    distinct n-grams, changes where an example is drawn twice: its interval is the jackknife's, rather too wide a one.
    One example gives an interval without bounds: it says nothing of others.

    `examples` is their number, to be given where `measured` has no scores of single ones.
    """
    if examples is None:
        if measured.per_example is None:
            raise ValueError("the number of examples has to be given where they have no scores of their own")
        examples = len(measured.per_example)
    return _resample(_Joint(measured, 1, examples), seed, resamples).interval(np.ones(1))


@dataclass(frozen=True)
class Wins:
    """On how many examples one system is ahead of another, level with it, and behind."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> Interval:
        """Share of the wins, a tie as half a one, with Wilson's score interval (1927), which ties make wider than it
        need be. Without examples it is anything from 0 to 1."""
        examples = self.wins + self.ties + self.losses
        if not examples:
            return Interval(math.nan, 0.0, 1.0)
        share, z = (self.wins + self.ties / 2) / examples, NormalDist().inv_cdf(0.975)
        centre = (share + z**2 / (2 * examples)) / (1 + z**2 / examples)
        margin = math.sqrt(share * (1 - share) / examples + (z / (2 * examples)) ** 2) * z / (1 + z**2 / examples)
        return Interval(share, max(0.0, centre - margin), min(1.0, centre + margin))


@dataclass(frozen=True)
class Scores:
    """What one metric says of each system: `systems` in their order; `per_example` is `[systems, examples]`, or None
    where an example by itself has no score."""

    metric: str
    better: Better
    signature: str
    systems: tuple[Interval, ...]
    per_example: NDArray[np.float64] | None


@dataclass(frozen=True)
class Difference:
    """By how much the score of `second` exceeds that of `first`, which are places among the systems.

    `p_resampled`, of the bootstrap or the jackknife, and `p_randomization`, None where it would take hours, are of this
    comparison alone; `p_corrected` is the latter, else the former, corrected for all comparisons that were made at
    once. `wins` are the second system's, by example; where neither direction is better, the examples on which its
    score is higher.
    """

    metric: str
    better: Better
    first: int
    second: int
    value: Interval
    p_resampled: float
    p_randomization: float | None
    p_corrected: float
    wins: Wins | None

    @property
    def shown(self) -> bool:
        """Whether it is too large for chance: both its corrected p-value and its interval say so."""
        return self.p_corrected <= SIGNIFICANCE and not self.value.low <= 0 <= self.value.high

    @property
    def ahead(self) -> int | None:
        """The system that is shown to be better, if one is."""
        if not self.shown or self.better is None:
            return None
        return self.second if (self.value.value > 0) == (self.better == "higher") else self.first


@dataclass(frozen=True)
class Comparison:
    """Several systems' outputs for the same examples, compared by several metrics, each system with each before it."""

    systems: Mapping[str, Sequence[Output]]
    scores: tuple[Scores, ...]
    differences: tuple[Difference, ...]
    seed: int
    resamples: int
    trials: int
    """Of each randomization."""

    @property
    def examples(self) -> int:
        return len(next(iter(self.systems.values())))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The places of each two systems that are compared, the earlier first."""
        return list(combinations(range(len(self.systems)), 2))

    def leads(self, first: int, second: int) -> NDArray[np.float64] | None:
        """How far `second` is ahead of `first` on each example: its difference in standard deviations of it, the mean
        over all metrics that score single examples and say which direction is better. None where none does."""
        leads = []
        for scores in self.scores:
            if scores.per_example is not None and scores.better:
                ahead = _ahead(scores.per_example[first], scores.per_example[second], scores.better)
                leads.append(np.nan_to_num(ahead / (np.nanstd(ahead) or 1.0)))
        return np.mean(leads, axis=0) if leads else None

    def furthest(self, first: int, second: int, count: int = 5) -> tuple[list[int], list[int]] | None:
        """The examples on which `second` is furthest ahead, and those on which `first` is; None as for `leads`."""
        leads = self.leads(first, second)
        if leads is None:
            return None
        order = np.argsort(-leads, kind="stable").tolist()
        return (
            [example for example in order[:count] if leads[example] > 0],
            [example for example in order[: -count - 1 : -1] if leads[example] < 0],
        )


def compare(
    systems: Mapping[str, Sequence[Output]],
    metrics: Sequence[Metric],
    seed: int = 0,
    resamples: int = RESAMPLES,
    on_metric: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Compares systems, by name, in all metrics and pairs. `on_metric` hears how many metrics are done.

    Raises `DataError` where they did not answer the same prompts or have other references, with the first place, and
    where a metric gives no number.
    """
    check_comparable(systems)
    outputs = list(systems.values())
    pairs = list(combinations(range(len(outputs)), 2))
    trials = max(resamples, TRIALS_EACH * len(pairs) * len(metrics))
    scores: list[Scores] = []
    found: list[Difference] = []
    for done, metric in enumerate(metrics):
        on_metric(done, len(metrics))
        joint = _Joint(metric.measure([output for each in outputs for output in each]), len(outputs), len(outputs[0]))
        resampled = _resample(joint, seed, resamples)
        if not (np.isfinite(resampled.values).all() and np.isfinite(resampled.again).all()):
            raise DataError(f"{metric.name}: is no number for some of these outputs. Leave it out with --metrics.")
        intervals = tuple(resampled.interval(row) for row in np.eye(len(outputs)))
        scores.append(Scores(metric.name, metric.better, metric.signature, intervals, joint.per_example))
        for pair in pairs:
            differing = _differing(outputs, joint, pair)
            found.append(_difference(metric, joint, resampled, pair, differing, seed, trials))
    on_metric(len(metrics), len(metrics))
    corrected = holm([difference.p_corrected for difference in found])
    differences = tuple(replace(difference, p_corrected=p) for difference, p in zip(found, corrected, strict=True))
    return Comparison(systems, tuple(scores), differences, seed, resamples, trials)


def check_comparable(systems: Mapping[str, Sequence[Output]]) -> None:
    """Raises `DataError` where systems did not answer the same prompts with the same references, in the same order."""
    (name, outputs), *others = systems.items()
    if not outputs:
        raise DataError(f"{name}: there are no outputs to compare.")
    for other, answers in others:
        for one, two in zip(outputs, answers, strict=False):
            if one.prompt != two.prompt:
                raise DataError(_unlike("prompts", name, one, one.prompt, other, two, two.prompt))
            if one.references != two.references:
                raise DataError(_unlike("references", name, one, one.references, other, two, two.references))
        if len(outputs) != len(answers):
            longer, more = (name, outputs) if len(outputs) > len(answers) else (other, answers)
            raise DataError(
                f"{name} has {len(outputs):,} examples and {other} {len(answers):,}, so they cannot be compared. The "
                f"first that only {longer} has is {more[min(len(outputs), len(answers))].origin}. {_SAME_DATA}"
            )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being the smallest among several (Holm 1979): with all of them judged at one level, the
    chance that any difference is called shown that is none stays below it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


class _Joint:
    """A metric's scores of several systems' outputs, measured one behind the other in one list: so that an output can
    be drawn for another system than its own."""

    def __init__(self, measured: Measured, systems: int, examples: int) -> None:
        self.measured, self.systems, self.examples = measured, systems, examples
        scores = measured.per_example
        self.per_example = None if scores is None else scores.reshape(systems, examples)

    def values(self, draw: Draw) -> NDArray[np.float64]:
        """Each system's score on the examples of `draw`."""
        return np.array([self.measured.value(system * self.examples + draw) for system in range(self.systems)])


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

    def p_value(self, weights: NDArray[np.float64]) -> float:
        """Of the weighted sum's being 0: how often draws, moved so that their mean is 0, are as far from it, on either
        side, as what was measured (Riezler & Maxwell 2005, figure 2); of a collection's score by Student's t test."""
        if self.examples == 1:
            return 1.0
        value, again = float(weights @ self.values), self.again @ weights
        if self.replaced:
            return _p_value(again - again.mean(), value)
        error = self._jackknife_error(again)
        return _t_test(value / error, len(again) - 1) if error else float(value == 0)

    @staticmethod
    def _jackknife_error(again: NDArray[np.float64]) -> float:
        """Standard error by leaving parts out in turn (Efron & Tibshirani 1993, formula 11.5, for parts)."""
        parts = len(again)
        return math.sqrt((parts - 1) / parts * float(((again - again.mean()) ** 2).sum()))


def _resample(joint: _Joint, seed: int, resamples: int) -> _Resampled:
    """The same choices of examples for all systems."""
    everything = np.arange(joint.examples)
    values = joint.values(everything)
    if joint.examples == 1:
        return _Resampled(values, values[None], 1, False)
    twice = joint.per_example is not None and joint.values(np.repeat(everything, 2))
    replaced = twice is not False and np.allclose(twice, values, rtol=1e-9, atol=1e-12)
    choices = _draws(joint.examples, seed, resamples) if replaced else _parts_left_out(joint.examples, seed)
    return _Resampled(values, np.array([joint.values(draw) for draw in choices]), joint.examples, replaced)


def _draws(examples: int, seed: int, resamples: int) -> Iterator[Draw]:
    random = np.random.default_rng(seed)
    return (random.integers(0, examples, examples) for _ in range(resamples))


def _parts_left_out(examples: int, seed: int) -> Iterator[Draw]:
    """All examples but those of one part, for each of up to `PARTS` parts of one size."""
    order = np.random.default_rng(seed).permutation(examples)
    parts = min(examples, PARTS)
    return (np.delete(order, np.s_[part::parts]) for part in range(parts))


def _differing(outputs: Sequence[Sequence[Output]], joint: _Joint, pair: tuple[int, int]) -> Draw:
    """The examples for which two systems did not write the same, or do not score the same."""
    first, second = (outputs[place] for place in pair)
    differ = np.array([a.text != b.text or a.tokens != b.tokens for a, b in zip(first, second, strict=True)])
    if joint.per_example is not None:
        differ |= joint.per_example[pair[0]] != joint.per_example[pair[1]]
    return np.flatnonzero(differ)


def _difference(
    metric: Metric,
    joint: _Joint,
    resampled: _Resampled,
    pair: tuple[int, int],
    differing: Draw,
    seed: int,
    trials: int,
) -> Difference:
    """Of two systems, not yet corrected for others being compared too."""
    weights = np.zeros(len(resampled.values))
    weights[list(pair)] = -1, 1
    p_resampled = resampled.p_value(weights)
    slow = getattr(joint.measured, "slow", False)
    p_randomization = None if slow else _randomization(joint, pair, differing, seed, trials)
    return Difference(
        metric.name,
        metric.better,
        *pair,
        resampled.interval(weights),
        p_resampled,
        p_randomization,
        p_resampled if p_randomization is None else p_randomization,
        _wins(joint.per_example, pair, metric.better),
    )


def _randomization(joint: _Joint, pair: tuple[int, int], differing: Draw, seed: int, trials: int) -> float:
    """p-value of two systems' being as good as each other: how often their scores are as far apart when chance decides
    which of the two wrote which output. Where few outputs differ, all ways to decide are gone through."""
    own, other = (system * joint.examples + np.arange(joint.examples) for system in pair)

    def apart(changed: Draw) -> float:
        first, second = own.copy(), other.copy()
        first[changed], second[changed] = other[changed], own[changed]
        return joint.measured.value(second) - joint.measured.value(first)

    measured = apart(differing[:0])
    if 2 ** len(differing) <= trials:
        ways = (np.flatnonzero(number >> np.arange(len(differing)) & 1) for number in range(2 ** len(differing)))
        by_chance = np.array([apart(differing[changed]) for changed in ways])
        return _as_far(by_chance, measured) / len(by_chance)
    random = np.random.default_rng(seed)
    ways = (random.random(len(differing)) < 0.5 for _ in range(trials))
    return _p_value(np.array([apart(differing[changed]) for changed in ways]), measured)


def _wins(per_example: NDArray[np.float64] | None, pair: tuple[int, int], better: Better) -> Wins | None:
    if per_example is None:
        return None
    ahead = _ahead(*per_example[list(pair)], better)
    return Wins(int((ahead > 0).sum()), int((ahead == 0).sum()), int((ahead < 0).sum()))


def _ahead(first: NDArray[np.float64], second: NDArray[np.float64], better: Better) -> NDArray[np.float64]:
    """What the second's scores are better by, or higher by where neither is better; rounding does not count. NaN where
    one has none."""
    difference = first - second if better == "lower" else second - first
    return np.where(np.abs(difference) <= 1e-9, 0.0, difference)


def _p_value(under_null: NDArray[np.float64], measured: float) -> float:
    """Two-sided; what was measured counts as one of the draws, so that it is never 0 (Phipson & Smyth 2010)."""
    return (1 + _as_far(under_null, measured)) / (1 + len(under_null))


def _as_far(differences: NDArray[np.float64], measured: float) -> int:
    """How many are at least as far from 0; sums of the same numbers in another order count as equal."""
    return int((np.abs(differences) >= abs(measured) * (1 - 1e-9) - 1e-12).sum())


def _t_test(statistic: float, degrees: int) -> float:
    """Two-sided p-value of Student's t (Wallace 1959; two digits)."""
    z = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(statistic**2 / degrees))
    return 2 * NormalDist().cdf(-z)


def _t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5; three digits from five degrees of freedom on)."""
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


_SAME_DATA = "Evaluate both on the same data, in the same order."


def _unlike(what: str, name: str, one: Output, ones: object, other: str, two: Output, twos: object) -> str:
    """How two systems' examples at one place differ, from shortly before the first differing character."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (ones, twos)]
    same = next((place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - 30)
    shown = [("…" if start else "") + text[start : same + 50] + ("…" if text[same + 50 :] else "") for text in texts]
    return (
        f"{name} and {other} were given other {what}, so they cannot be compared. They differ first in example "
        f"{one.index + 1}:\n  {name} ({one.origin}): {shown[0]}\n  {other} ({two.origin}): {shown[1]}\n{_SAME_DATA}"
    )
