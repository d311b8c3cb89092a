"""Comparison: intervals that cover, p-values that mean what they say, the field's own tools on the same outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sacrebleu.significance import PairedTest
from scipy import stats

from conftest import WORDS
from finespun.errors import DataError
from finespun.evaluation.comparison import Wins, _Joint, _resample, check_comparable, compare, holm, interval
from finespun.evaluation.outputs import Output


@dataclass
class Mean:
    """A score that is the mean of those of the examples."""

    per_example: NDArray[np.float64]

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        return float((self.per_example if draw is None else self.per_example[draw]).mean())


@dataclass
class Sums:
    """A score that is computed from sums over the examples, `[examples, sums]`."""

    sums: NDArray[np.float64]
    score: Callable[[NDArray[np.float64]], float] = lambda sums: float(sums[0] / sums[1])

    @property
    def per_example(self) -> NDArray[np.float64]:
        return np.array([self.score(row) for row in self.sums])

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        return self.score((self.sums if draw is None else self.sums[draw]).sum(axis=0))


@dataclass
class Distinct:
    """The share of words that are different ones."""

    words: list[list[str]]
    per_example: None = None

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        words = [word for place in (range(len(self.words)) if draw is None else draw) for word in self.words[place]]
        return len(set(words)) / len(words)


@dataclass
class Own:
    """A metric made of a function."""

    measure: Callable[[Sequence[Output]], Any]
    name: str = "own"
    better: str | None = "higher"
    needs_references: bool = False
    signature: str = "own"


def number() -> Own:
    """The number that an output is."""
    return Own(lambda outputs: Mean(np.array([float(output.text) for output in outputs])), "number")


def bleu() -> Own:
    """Corpus BLEU from sacrebleu's own sufficient statistics."""

    def measure(outputs: Sequence[Output]) -> Sums:
        scorer = sacrebleu.BLEU()
        references = [[output.references[0] for output in outputs]]
        statistics = scorer._extract_corpus_statistics([output.text for output in outputs], references)
        return Sums(np.array(statistics, float), lambda sums: scorer._compute_score_from_stats(list(sums)).score)

    return Own(measure, "BLEU")


def outputs_of(texts: Sequence[object], references: Sequence[str] | None = None) -> list[Output]:
    return [
        Output(
            row,
            f"test.jsonl, row {row + 1}",
            f"Prompt {row}",
            (references[row],) if references else (),
            str(text),
            "stop",
            len(str(text)),
        )
        for row, text in enumerate(texts)
    ]


def translations(random: np.random.Generator, references: Sequence[str], noise: float) -> list[str]:
    """The references with so large a share of their words replaced."""
    return [
        " ".join(str(random.choice(WORDS)) if random.random() < noise else word for word in reference.split())
        for reference in references
    ]


REFERENCES = [
    " ".join(np.random.default_rng(row).choice(WORDS, 8 + row % 9)) + f" number {row} ends here" for row in range(150)
]


# Intervals


TRIALS, AGAIN = 1000, 200


@pytest.mark.parametrize("examples", [12, 60])
def test_intervals_of_a_mean_cover_the_truth_in_93_to_97_percent(examples: int) -> None:
    random = np.random.default_rng(1)
    found = [interval(Mean(random.gamma(9, 1, examples)), trial, resamples=AGAIN) for trial in range(TRIALS)]
    assert 0.93 <= np.mean([each.low <= 9 <= each.high for each in found]) <= 0.97


@pytest.mark.parametrize("examples", [12, 60])
def test_intervals_of_a_ratio_cover_the_truth_in_93_to_97_percent(examples: int) -> None:
    """As corpus scores are: sums of hits over sums of lengths, which differ."""
    random = np.random.default_rng(2)
    hits = 0
    for trial in range(TRIALS):
        lengths = random.integers(10, 40, examples)
        measured = Sums(np.stack([random.binomial(lengths, 0.4), lengths], axis=1).astype(float))
        found = interval(measured, trial, resamples=AGAIN)
        hits += found.low <= 0.4 <= found.high
    assert 0.93 <= hits / TRIALS <= 0.97


@pytest.mark.slow
def test_intervals_of_a_difference_cover_the_truth_in_93_to_97_percent() -> None:
    """Of pairs whose examples are hard or easy for both."""
    random = np.random.default_rng(3)
    hits = 0
    for trial in range(TRIALS):
        hard = random.normal(0, 3, 40)
        both = Mean(np.concatenate([hard + random.gamma(2, 1, 40), hard + random.gamma(3, 1, 40)]))
        found = _resample(_Joint(both, 2, 40), trial, 2 * AGAIN).interval(np.array([-1.0, 1.0]))
        hits += found.low <= 1 <= found.high
    assert 0.93 <= hits / TRIALS <= 0.97


def test_an_interval_is_that_of_scipy() -> None:
    scores = np.random.default_rng(0).gamma(2, 10, 400)
    found = interval(Mean(scores), resamples=20_000)
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(scores.mean(), rel=1e-12)
    width = theirs.high - theirs.low
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=0.03 * width),
        pytest.approx(theirs.high, abs=0.03 * width),
    )


def test_an_interval_of_few_examples_is_as_wide_as_students() -> None:
    """The plain percentile bootstrap's would be a quarter narrower here."""
    scores = np.random.default_rng(0).normal(0, 1, 7)
    found = interval(Mean(scores), resamples=50_000)
    theirs = stats.t.interval(0.95, 6, scores.mean(), stats.sem(scores))
    assert found.high - found.low == pytest.approx(theirs[1] - theirs[0], rel=0.1)


def test_a_share_of_distinct_words_is_inside_its_own_interval_which_covers_the_truth() -> None:
    """Drawn with replacement, examples stand there twice and the share falls: none of the draws would be as high."""
    random = np.random.default_rng(4)
    words = [f"word{number}" for number in range(1000)]
    chances = 1 / np.arange(1, 1001)
    texts = [random.choice(words, (80, 10), p=chances / chances.sum()).tolist() for _ in range(300)]
    truth = np.mean([Distinct(text).value() for text in texts])
    found = [interval(Distinct(text), examples=80) for text in texts[:120]]
    assert all(each.low < each.value < each.high for each in found)
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.93
    assert np.mean([each.high - each.low for each in found]) < 6 * np.std([each.value for each in found])


def test_the_jackknife_is_that_of_a_mean_where_the_error_is_known() -> None:
    """A sum changes when each example stands there twice; left out one by one, its error is √n times that of a mean."""

    class Total(Mean):
        def value(self, draw: NDArray[np.intp] | None = None) -> float:
            return float((self.per_example if draw is None else self.per_example[draw]).sum())

    scores = np.random.default_rng(0).normal(5, 1, 50)
    found = interval(Total(scores))
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 49) * stats.sem(scores) * 49, rel=1e-3)


def test_one_example_says_nothing_of_others() -> None:
    assert interval(Mean(np.array([3.0]))) == replace(interval(Mean(np.array([3.0]))), low=-math.inf, high=math.inf)
    (found,) = compare({"a": outputs_of([1]), "b": outputs_of([9])}, [number()]).differences
    assert (found.p_randomization, found.p_resampled, found.shown) == (1.0, 1.0, False)


def test_the_jackknifes_p_value_is_that_of_students_test() -> None:
    random = np.random.default_rng(10)
    one, two = random.normal(0, 1, 40), random.normal(0.4, 1, 40)

    @dataclass
    class Whole:
        """A mean that gives no scores of single examples, and says that it takes long."""

        scores: NDArray[np.float64]
        per_example: None = None
        slow: bool = True

        def value(self, draw: NDArray[np.intp]) -> float:
            return float(self.scores[draw].mean())

    whole = Own(lambda outputs: Whole(np.array([float(output.text) for output in outputs])))
    (found,) = compare({"a": outputs_of(one), "b": outputs_of(two)}, [whole]).differences
    theirs = stats.ttest_rel(two, one)
    low, high = theirs.confidence_interval()
    assert found.p_resampled == pytest.approx(theirs.pvalue, rel=0.01)
    assert (found.value.low, found.value.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    assert found.p_randomization is None
    assert found.p_corrected == found.p_resampled


def test_a_seed_gives_the_same_interval_again() -> None:
    scores = Mean(np.random.default_rng(0).normal(0, 1, 30))
    assert interval(scores, 3) == interval(scores, 3) != interval(scores, 4)


# p-values


def test_p_values_are_uniform_where_nothing_differs() -> None:
    random = np.random.default_rng(5)
    randomization, bootstrap = [], []
    for trial in range(250):
        one, two = random.normal(0, 1, (2, 30)) + random.normal(0, 2, 30)
        (found,) = compare({"a": outputs_of(one), "b": outputs_of(two)}, [number()], trial, 250).differences
        randomization.append(found.p_randomization)
        bootstrap.append(found.p_resampled)
    assert stats.kstest(randomization, "uniform").pvalue > 0.05
    assert np.mean(np.array(randomization) <= 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 250)
    assert stats.spearmanr(randomization, bootstrap).statistic > 0.95


def test_with_few_examples_all_permutations_are_gone_through() -> None:
    random = np.random.default_rng(6)
    one, two = random.normal(0, 1, 9), random.normal(1, 1, 9)
    (found,) = compare({"a": outputs_of(one), "b": outputs_of(two)}, [number()]).differences
    differences = two - one
    apart = [abs(np.mean(np.array(signs) * differences)) for signs in itertools.product((1, -1), repeat=9)]
    assert found.p_randomization == np.mean(np.array(apart) >= abs(differences.mean()) - 1e-12)
    theirs = stats.permutation_test((two, one), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples")
    assert found.p_randomization == pytest.approx(theirs.pvalue, rel=1e-12)


def test_trials_come_close_to_all_permutations() -> None:
    random = np.random.default_rng(7)
    one, two = random.normal(0, 1, 14), random.normal(1, 1, 14)
    systems = {"a": outputs_of(one), "b": outputs_of(two)}
    exact = compare(systems, [number()], resamples=2**14).differences[0].p_randomization
    assert 0.01 < exact < 0.5
    by_chance = compare(systems, [number()], resamples=2000).differences[0].p_randomization
    assert by_chance == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 2000))


def test_only_few_differing_outputs_are_gone_through_exactly() -> None:
    """Three outputs of two hundred differ, all to one side: of eight ways two are as far apart."""
    same = [1.0] * 200
    better = [2.0] * 3 + same[3:]
    (found,) = compare({"a": outputs_of(same), "b": outputs_of(better)}, [number()]).differences
    assert found.p_randomization == 2 / 8
    assert (found.wins.wins, found.wins.ties, found.wins.losses) == (3, 197, 0)


def test_a_system_beside_itself_is_no_difference() -> None:
    texts = np.random.default_rng(0).normal(0, 1, 50)
    (found,) = compare({"a": outputs_of(texts), "b": outputs_of(texts)}, [number()]).differences
    assert (found.value.value, found.value.low, found.value.high) == (0, 0, 0)
    assert found.p_resampled == found.p_randomization == 1
    assert not found.shown
    assert found.ahead is None


@pytest.mark.parametrize("noise", [0.36, 0.40])
def test_bleu_is_judged_as_sacrebleu_judges_it(noise: float) -> None:
    random = np.random.default_rng(8)
    base, other = (translations(random, REFERENCES, share) for share in (0.35, noise))
    (found,) = compare(
        {"base": outputs_of(base, REFERENCES), "other": outputs_of(other, REFERENCES)}, [bleu()], resamples=3000
    ).differences
    theirs = {}
    for kind in ("ar", "bs"):
        test = PairedTest(
            [("base", base), ("other", other)], {"BLEU": sacrebleu.BLEU()}, [REFERENCES], kind, n_samples=3000
        )
        theirs[kind] = test()[1]["BLEU"]
    assert found.value.value == pytest.approx(theirs["ar"][1].score - theirs["ar"][0].score, abs=1e-9)
    p = theirs["ar"][1].p_value
    assert found.p_randomization == pytest.approx(p, abs=4 * math.sqrt(2 * p * (1 - p) / 3000))
    # sacrebleu's bootstrap counts draws on one side only, of differences without their signs
    assert found.p_resampled >= theirs["bs"][1].p_value - 0.02
    assert found.p_resampled == pytest.approx(found.p_randomization, abs=0.03)


def test_intervals_of_bleu_are_as_wide_as_sacrebleus() -> None:
    texts = translations(np.random.default_rng(9), REFERENCES, 0.4)
    found = interval(bleu().measure(outputs_of(texts, REFERENCES)))
    score = sacrebleu.BLEU().corpus_score(texts, [REFERENCES], n_bootstrap=2000)
    assert found.value == pytest.approx(score.score, abs=1e-9)
    assert (found.high - found.low) / 2 == pytest.approx(score._ci, rel=0.08)


def test_holm_is_that_of_a_hand() -> None:
    """0.01 × 4; 0.02 × 3; 0.03 × 2 = 0.06; 0.04 × 1, but not below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=100)
def test_holm_rejects_what_the_stepwise_rule_rejects(p_values: list[float]) -> None:
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_many_comparisons_of_the_same_thing_show_nothing() -> None:
    """Six systems of noise, two metrics: thirty comparisons, of which one or two look significant by themselves."""
    random = np.random.default_rng(17)
    systems = {name: outputs_of(random.normal(0, 1, 40)) for name in "abcdef"}
    negative = Own(lambda outputs: Mean(-np.array([float(output.text) ** 3 for output in outputs])), "cubed", "lower")
    found = compare(systems, [number(), negative], resamples=500)
    assert len(found.differences) == 30
    assert any(difference.p_randomization <= 0.05 for difference in found.differences)
    assert not any(difference.shown for difference in found.differences)


def test_many_comparisons_get_as_many_trials_as_it_takes_to_show_something() -> None:
    """With ten trials each no corrected p-value could be below 3 × 1/11."""
    random = np.random.default_rng(14)
    systems = {name: outputs_of(random.normal(shift, 1, 60)) for name, shift in (("a", 0), ("b", 5), ("c", 10))}
    found = compare(systems, [number()], resamples=10)
    assert [difference.ahead for difference in found.differences] == [1, 2, 2]


# What is said


def test_what_is_better_follows_the_direction_of_the_metric() -> None:
    low, high = [1.0, 2.0, 3.0, 2.5] * 10, [2.0, 3.0, 3.0, 4.5] * 10
    systems = {"low": outputs_of(low), "high": outputs_of(high)}
    up, down, none = (replace(number(), better=better) for better in ("higher", "lower", None))
    found = [compare(systems, [metric]).differences[0] for metric in (up, down, none)]
    assert [difference.shown for difference in found] == [True] * 3
    assert [difference.ahead for difference in found] == [1, 0, None]
    assert [difference.value.value for difference in found] == [pytest.approx(1.0)] * 3
    assert [(each.wins.wins, each.wins.ties, each.wins.losses) for each in found] == [
        (30, 10, 0),
        (0, 10, 30),
        (30, 10, 0),
    ]


def test_examples_that_differ_most_are_found_over_all_metrics() -> None:
    one = [5.0] * 20
    two = [5.0] * 18 + [25.0, -10.0]
    inverse = Own(lambda outputs: Mean(-1000 * np.array([float(output.text) for output in outputs])), "inv", "lower")
    found = compare({"a": outputs_of(one), "b": outputs_of(two)}, [number(), inverse])
    assert found.furthest(0, 1) == ([18], [19])
    leads = found.leads(0, 1)
    assert (leads.argmax(), leads.argmin()) == (18, 19)
    assert leads[18] == pytest.approx(20 / np.std(np.array(two) - 5))
    unordered = compare({"a": outputs_of(one), "b": outputs_of(two)}, [replace(number(), better=None)])
    assert unordered.leads(0, 1) is unordered.furthest(0, 1) is None


def test_an_example_without_a_score_is_neither_won_nor_lost() -> None:
    texts = ["1", "2", "x", "4"]

    def measure(outputs: Sequence[Output]) -> Sums:
        known = np.array([[0.0, 0.0] if output.text == "x" else [float(output.text), 1.0] for output in outputs])
        return Sums(known, lambda sums: float(sums[0] / sums[1]) if sums[1] else math.nan)

    found = compare({"a": outputs_of(texts * 6), "b": outputs_of(["2", "2", "9", "5"] * 6)}, [Own(measure)])
    assert found.differences[0].wins == Wins(12, 6, 0)
    assert np.isfinite(found.leads(0, 1)).all()


def test_win_rates_have_wilsons_interval() -> None:
    found = Wins(30, 0, 10).rate
    theirs = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == (
        0.75,
        pytest.approx(theirs.low, rel=1e-9),
        pytest.approx(theirs.high, rel=1e-9),
    )
    assert Wins(10, 20, 10).rate.value == 0.5
    assert Wins(0, 0, 5).rate.high > 0.3


# What is refused


def test_systems_with_other_prompts_are_refused_with_the_first_difference() -> None:
    one, two = outputs_of(range(5)), outputs_of(range(5))
    long = "x" * 100
    one[2] = replace(one[2], prompt=[{"role": "user", "content": f"{long}独钓寒江雪"}])
    two[2] = replace(two[2], prompt=[{"role": "user", "content": f"{long}独钓江雪"}], origin="other.jsonl, row 9")
    two[4] = replace(two[4], prompt="later")
    with pytest.raises(DataError) as refused:
        check_comparable({"base": one, "tuned": two})
    said = str(refused.value)
    assert "base and tuned were given other prompts" in said
    assert "example 3:" in said
    assert "test.jsonl, row 3): …" in said
    assert "other.jsonl, row 9): …" in said
    assert "独钓寒江雪" in said
    assert "later" not in said


def test_systems_with_other_references_or_counts_are_refused() -> None:
    one = outputs_of(["a", "b"], ["x", "y"])
    with pytest.raises(DataError, match="other references") as refused:
        compare({"base": one, "tuned": outputs_of(["a", "b"], ["x", "z"])}, [])
    assert '["y"]' in str(refused.value)
    with pytest.raises(DataError, match=r"base has 2 examples and tuned 1.*only base has is test.jsonl, row 2"):
        check_comparable({"base": one, "tuned": one[:1]})
    with pytest.raises(DataError, match="base: there are no outputs"):
        check_comparable({"base": [], "tuned": one})


def test_a_metric_without_a_number_is_refused_by_name() -> None:
    nothing = Own(lambda outputs: Mean(np.full(len(outputs), np.nan)), "mine")
    with pytest.raises(DataError, match="mine: is no number"):
        compare({"a": outputs_of([1, 2]), "b": outputs_of([1, 2])}, [nothing])
