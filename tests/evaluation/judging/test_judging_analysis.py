"""What answers come to, against known results and plain computations."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest
from studies import MODELS, answer_all, make_study, place_of, prefer

from finespun.evaluation.judging.analysis import (
    PRIOR,
    analyse,
    bradley_terry,
    krippendorff_alpha,
    read_judgements,
    sign_test,
    strengths_of,
    wilson,
)
from finespun.evaluation.judging.answers import Answer, Span
from finespun.evaluation.judging.report import preference_rows

pytest.importorskip("choix")
pytest.importorskip("krippendorff")


def planted(strengths: np.ndarray, examples: int, seed: int) -> np.ndarray:
    """Wins in examples in which each pair of models is compared once."""
    rng = np.random.default_rng(seed)
    wins = np.zeros((examples, len(strengths), len(strengths)))
    for a, b in itertools.combinations(range(len(strengths)), 2):
        first = rng.random(examples) < 1 / (1 + np.exp(strengths[b] - strengths[a]))
        wins[:, a, b], wins[:, b, a] = first, ~first
    return wins


def test_planted_strengths_are_recovered():
    strengths = np.array([0.9, 0.2, -0.3, -0.8])
    found = {one.model: one for one in bradley_terry(planted(strengths, 3000, 0), draws=200)}
    for model, strength in enumerate(strengths):
        assert found[model].value == pytest.approx(strength, abs=0.1)
        assert found[model].low <= strength <= found[model].high
        assert found[model].high - found[model].low < 0.2
    assert found[0].strongest == 1.0


def test_intervals_cover_the_planted_strength_about_as_often_as_they_say():
    strengths = np.array([0.4, -0.4])
    covered = 0
    for seed in range(100):
        first = next(one for one in bradley_terry(planted(strengths, 120, seed), draws=120) if one.model == 0)
        covered += first.low <= 0.4 <= first.high
    assert 88 <= covered <= 99


def test_strengths_are_the_most_likely_ones():
    wins = np.random.default_rng(2).integers(0, 9, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    counted = wins + PRIOR * (1 - np.eye(5))

    def loss(values: np.ndarray) -> float:
        return float((counted * np.log1p(np.exp(values[None, :] - values[:, None]))).sum())

    likeliest = minimize(loss, np.zeros(5), tol=1e-10).x
    np.testing.assert_allclose(strengths_of(wins), likeliest - likeliest.mean(), atol=1e-4)


def test_wilson_is_scipys():
    for successes, count in ((0, 5), (5, 5), (3, 10), (61, 100)):
        expected = binomtest(successes, count).proportion_ci(method="wilson")
        assert wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


NAN = math.nan
PUBLISHED = [
    [NAN, NAN, NAN, NAN, NAN, 3, 4, 1, 2, 1, 1, 3, 3, NAN, 3],
    [1, NAN, 2, 1, 3, 3, 4, 3, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    [NAN, NAN, 2, 1, 3, 4, 4, NAN, 2, 1, 1, 3, 3, NAN, 4],
]
"""The example in Krippendorff's article on Wikipedia, which the package has in its documentation."""

ORDINAL = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]
"""Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, page 8."""


def ratings(table: list[list[float]]) -> dict[tuple[int, int], float]:
    return {(a, unit): value for a, row in enumerate(table) for unit, value in enumerate(row) if not math.isnan(value)}


def test_alpha_is_the_published_one():
    assert krippendorff_alpha(ratings(PUBLISHED), "nominal")[0] == pytest.approx(0.691358, abs=1e-6)
    assert krippendorff_alpha(ratings(PUBLISHED), "interval")[0] == pytest.approx(0.810845, abs=1e-6)
    assert krippendorff_alpha(ratings(ORDINAL), "nominal")[0] == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(ratings(ORDINAL), "ordinal")[0] == pytest.approx(0.815, abs=5e-4)


def test_alpha_is_one_less_observed_over_expected_disagreement():
    said = {(0, 0): 1.0, (1, 0): 1.0, (0, 1): 1.0, (1, 1): 2.0, (0, 2): 2.0, (1, 2): 2.0, (0, 3): 1.0}
    values = [1, 1, 1, 2, 2, 2]  # of the units with two
    observed = 1 / 3  # one unit of three differs
    expected = sum(a != b for a, b in itertools.permutations(values, 2)) / (6 * 5)
    alpha, units = krippendorff_alpha(said, "nominal")
    assert alpha == pytest.approx(1 - observed / expected)
    assert units == 3
    assert krippendorff_alpha({(0, 0): 1.0, (1, 0): 1.0}, "nominal") == (None, 1)  # nothing to expect
    assert krippendorff_alpha({(0, 0): 1.0, (0, 1): 2.0}, "nominal") == (None, 0)
    assert krippendorff_alpha({}, "nominal") == (None, 0)


def test_sides_do_not_matter_to_who_wins(tmp_path):
    study = make_study(tmp_path, 30, annotators=2)
    results = analyse(study, answer_all(study, lambda who, at: prefer(study, who, at, 0)), draws=50)
    (pair,) = results.pairs
    assert (pair.wins, pair.losses, pair.ties, pair.both_bad) == (60, 0, 0, 0)
    assert (pair.rate, pair.high) == (1.0, pytest.approx(1.0))
    assert results.strengths[0].model == 0
    for worker in results.workers:
        assert (worker.known_right, worker.known, worker.repeated_same, worker.repeated) == (2, 2, 2, 2)
        assert worker.first == pytest.approx(0.5, abs=0.04)  # their sides were balanced
        assert worker.median_seconds == 3.0
    assert [one.agreement for one in results.contested] == [1.0] * 30


def test_who_always_takes_the_first_shows(tmp_path):
    study = make_study(tmp_path, 30, annotators=2, known=10, repeated=10)
    results = analyse(study, answer_all(study, lambda who, at: Answer(choice="first")), draws=50)
    (pair,) = results.pairs
    assert abs(pair.wins - pair.losses) <= 2
    for worker in results.workers:
        assert worker.first == 1.0
        assert worker.repeated_same == 0
        assert worker.known_right == 5
    assert results.preferred is None


def test_a_preference_needs_more_than_a_few_examples(tmp_path):
    """Resamples of examples that all say the same say so too; that is no certainty."""
    for count, shown in ((1, None), (5, None), (6, 0), (12, 0)):
        study = make_study(tmp_path / str(count), count, annotators=2)
        results = analyse(study, answer_all(study, functools.partial(prefer, study, candidate=0)), draws=50)
        assert results.preferred == shown
        assert results.strengths[0].low is None  # nothing that could tell how wide it is


@pytest.mark.parametrize("count", [10, 20, 50])
def test_chance_is_called_a_preference_in_about_five_of_a_hundred_studies_at_most(tmp_path, count):
    study = make_study(tmp_path, count, annotators=2)
    rng = random.Random(1)
    leaning: dict[int, int] = {}

    def say(who: int, at: int) -> Answer:
        item = study.annotators[who].tasks[at].item
        return prefer(study, who, at, leaning.setdefault(item, rng.randrange(2)))  # the two agree

    called = 0
    for _ in range(100):
        leaning.clear()
        called += analyse(study, answer_all(study, say), draws=120).preferred is not None
    assert called <= 10  # a rate of 5 % gives more in 1 of 100


def test_the_sign_test_is_scipys():
    for first, second in ((0, 0), (5, 0), (6, 0), (12, 3), (7, 9), (20, 20)):
        expected = binomtest(first, first + second).pvalue if first + second else 1.0
        assert sign_test(first, second) == pytest.approx(expected)


def test_a_tie_is_none_and_both_bad_is_told_apart(tmp_path):
    study = make_study(tmp_path, 8, annotators=2)
    said = {0: Answer(choice="tie"), 1: Answer(choice="bad")}
    results = analyse(study, answer_all(study, lambda who, at: said[who]), draws=50)
    (pair,) = results.pairs
    assert (pair.wins, pair.losses, pair.ties, pair.both_bad, pair.rate) == (0, 0, 8, 8, None)
    assert results.strengths[0].value == pytest.approx(0)
    assert {one.strongest for one in results.strengths} == {0.5}
    assert results.preferred is None
    assert {one.agreement for one in results.contested} == {0.0}


def test_practice_and_checks_do_not_count_nor_do_those_left_out(tmp_path):
    study = make_study(tmp_path, 10, annotators=3, overlap=3)
    events = answer_all(study, lambda who, at: prefer(study, who, at, 1 if who == 2 else 0))
    (pair,) = analyse(study, events, draws=20).pairs
    assert (pair.wins, pair.losses) == (20, 10)
    (pair,) = analyse(study, events, {2}, draws=20).pairs
    assert (pair.wins, pair.losses) == (20, 0)


def test_rankings_are_comparisons_of_each_two(tmp_path):
    study = make_study(tmp_path, 9, MODELS, method="ranking", annotators=2, known=2, repeated=2)

    def by_number(who: int, at: int) -> Answer:
        order = study.annotators[who].tasks[at].order
        return Answer(ranking=tuple(sorted(range(len(order)), key=lambda place: order[place])))

    results = analyse(study, answer_all(study, by_number), draws=50)
    assert [(pair.first, pair.second, pair.wins, pair.losses) for pair in results.pairs] == [
        (0, 1, 18, 0),
        (0, 2, 18, 0),
        (1, 2, 18, 0),
    ]
    assert [one.model for one in results.strengths] == [0, 1, 2]
    assert all(worker.known_right == 2 and worker.repeated_same == 2 for worker in results.workers)


def test_marks_become_means_agreement_and_preferences(tmp_path):
    study = make_study(tmp_path, 12, method="rating", annotators=2, criteria=["fluency", "style"])

    def mark(who: int, at: int) -> Answer:
        item = study.items[study.annotators[who].tasks[at].item]
        if item.known:
            return Answer(marks={"fluency": 1, "style": 1})
        better = item.candidates[0].models == (0,)
        spread = item.example % 2
        return Answer(marks={"fluency": 4 + spread if better else 2, "style": (5 if better else 1) - (who and better)})

    results = analyse(study, answer_all(study, mark), draws=200)
    means = {(one.model, one.criterion): one for one in results.means}
    assert means[0, "fluency"].value == pytest.approx(4.5)
    assert means[0, "fluency"].low < 4.5 < means[0, "fluency"].high
    assert means[1, "style"].value == 1.0
    assert means[0, "fluency"].count == 24
    agreement = {one.of: one for one in results.agreement}
    assert agreement["fluency"].alpha == pytest.approx(1.0)
    assert agreement["fluency"].level == "ordinal"
    assert agreement["style"].alpha is not None
    assert agreement["style"].alpha < 1
    assert [(pair.wins, pair.losses) for pair in results.pairs] == [(24, 0)]
    assert all(worker.known_right == worker.known == 2 for worker in results.workers)
    assert len(preference_rows(results.votes)) == 12


def test_what_decides_and_how_many_it_takes_to_turn_it(tmp_path):
    study = make_study(tmp_path, 9, annotators=1, practice=0, known=0, repeated=0)

    def say(who: int, at: int) -> Answer:
        example = study.items[study.annotators[who].tasks[at].item].example
        return Answer(choice="tie") if example > 6 else prefer(study, who, at, 0 if example < 5 else 1)

    results = analyse(study, answer_all(study, say), draws=50)
    assert results.flips == 3  # five for, two against: without three it is even
    speaks_for = {one.example for one in results.deciding if one.influence > 0.1}
    speaks_against = {one.example for one in results.deciding if one.influence < -0.1}
    assert (speaks_for, speaks_against) == (set(range(5)), {5, 6})


def test_spans_and_undone_answers(tmp_path):
    study = make_study(tmp_path, 4, annotators=1, practice=0, known=0, repeated=0)
    events = answer_all(study, lambda who, at: Answer(choice="tie", spans=(Span(0, 0, 2),)))
    judged = read_judgements(study, events[:2])
    assert [one.position for one in judged] == [0, 1]
    assert analyse(study, [], draws=5).strengths == []


def test_preferences_are_the_majoritys(tmp_path):
    study = make_study(tmp_path, 3, annotators=3, overlap=3, practice=0, known=0, repeated=0)

    def say(who: int, at: int) -> Answer:
        example = study.items[study.annotators[who].tasks[at].item].example
        if example == 0:
            return prefer(study, who, at, 1 if who < 2 else 0)  # two to one
        if example == 1:
            return Answer(choice="bad") if who == 2 else prefer(study, who, at, who)  # one to one
        return prefer(study, who, at, 0)

    rows = preference_rows(analyse(study, answer_all(study, say), draws=5).votes)
    texts = {item.example: [candidate.text for candidate in item.candidates] for item in study.items}
    assert rows == [
        {
            "prompt": "Write line 0.",
            "chosen": texts[0][1],
            "rejected": texts[0][0],
            "preferred_by": 2,
            "judged_by": 3,
        },
        {
            "prompt": "Write line 2.",
            "chosen": texts[2][0],
            "rejected": texts[2][1],
            "preferred_by": 3,
            "judged_by": 3,
        },
    ]


def test_an_empty_text_is_no_training_data(tmp_path):
    study = make_study(tmp_path, 2, text=lambda model, row: "" if model else f"words {row}", practice=0, known=0)
    events = answer_all(study, lambda who, at: prefer(study, who, at, 0))
    assert preference_rows(analyse(study, events, draws=5).votes) == []


def test_random_answers_show_no_preference(tmp_path):
    study = make_study(tmp_path, 40, MODELS, annotators=3)
    rng = random.Random(0)
    events = answer_all(study, lambda who, at: Answer(choice=rng.choice(["first", "second", "tie", "bad"])))
    results = analyse(study, events, draws=200)
    assert results.preferred is None
    (agreement,) = results.agreement
    assert agreement.alpha is not None
    assert abs(agreement.alpha) < 0.2
    assert place_of(study, 0, 0, 0) in (0, 1)
