"""Who judges what, and where each text stands."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from finespun.evaluation.judging.design import assign, balanced_orders, plan, scrambled


@given(
    sizes=st.lists(st.integers(1, 4), max_size=40),
    annotators=st.integers(1, 7),
    overlap=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_each_unit_has_its_annotators_and_loads_are_even(sizes, annotators, overlap, seed):
    kinds = [unit % 3 for unit in range(len(sizes))]
    assigned = assign(sizes, kinds, annotators, overlap, random.Random(seed))

    judged_by = Counter(unit for own in assigned for unit in own)
    assert all(judged_by[unit] == min(overlap, annotators) for unit in range(len(sizes)))
    assert all(len(own) == len(set(own)) for own in assigned)  # nobody has a unit twice
    loads = [sum(sizes[unit] for unit in own) for own in assigned]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_overlap_connects_everybody():
    assigned = assign([1] * 60, [0] * 60, 6, 2, random.Random(0))
    together = Counter(
        pair
        for unit in range(60)
        for pair in itertools.combinations([person for person in range(6) if unit in assigned[person]], 2)
    )
    assert len(together) == 15  # every two people have something in common
    assert max(together.values()) - min(together.values()) <= 2


def test_annotators_see_each_comparison_equally_often():
    kinds = [unit % 3 for unit in range(90)]
    for own in assign([1] * 90, kinds, 5, 2, random.Random(1)):
        counts = Counter(kinds[unit] for unit in own)
        assert max(counts.values()) - min(counts.values()) <= 4


groups = st.lists(st.sampled_from([("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"), ("a",)]), max_size=60)


@given(groups=groups, seed=st.integers(0, 99))
def test_each_model_stands_at_each_place_equally_often(groups, seed):
    orders = balanced_orders(groups, random.Random(seed))
    counts: Counter = Counter()
    for group, order in zip(groups, orders, strict=True):
        assert sorted(order) == list(range(len(group)))
        counts.update((group, group[which], place) for place, which in enumerate(order))
    for group in set(groups):
        at = [counts[group, model, place] for model in group for place in range(len(group))]
        assert max(at) - min(at) <= 1


def test_sides_are_random_not_only_balanced():
    first = [balanced_orders([("a", "b")] * 8, random.Random(seed)) for seed in range(30)]
    assert len({tuple(orders) for orders in first}) > 10


@given(
    count=st.integers(1, 40),
    controls=st.integers(0, 5),
    practice=st.integers(0, 3),
    known=st.integers(0, 4),
    repeated=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_a_plan_has_all_items_once_and_its_controls(count, controls, practice, known, repeated, seed):
    real = [(item, ("a", "b")) for item in range(count)]
    made = [(100 + number, 2) for number in range(controls)]
    tasks = plan(real, made, practice, known, repeated, random.Random(seed))

    kinds = Counter(task.kind for task in tasks)
    assert sorted(task.item for task in tasks if task.kind == "real") == list(range(count))
    assert kinds["practice"] == (practice if controls else 0)
    assert kinds["known"] == (known if controls else 0)
    assert kinds["repeated"] == min(repeated, count // 3)
    assert all(task.kind == "practice" for task in tasks[: kinds["practice"]])
    places = {task.item: at for at, task in enumerate(tasks) if task.kind == "real"}
    orders = {task.item: task.order for task in tasks if task.kind == "real"}
    for at, task in enumerate(tasks):
        if task.kind == "repeated":
            assert task.order == orders[task.item][::-1]
            assert at - places[task.item] > 1  # never right behind the first time


def test_a_seed_gives_one_plan():
    real = [(item, ("a", "b")) for item in range(20)]
    plans = [plan(real, [(50, 2)], 1, 1, 2, random.Random(seed)) for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]


@given(text=st.text(max_size=80), seed=st.integers(0, 9))
def test_scrambled_has_the_same_letters_in_another_order(text, seed):
    mixed = scrambled(text, random.Random(seed))
    if mixed is not None:
        assert sorted("".join(mixed.split())) == sorted("".join(text.split()))
        assert "".join(mixed.split()) != "".join(text.split()) or mixed.split() != text.split()


def test_scrambled_mixes_words_or_the_characters_of_what_has_none():
    english = "the slow river said nothing at all"
    mixed = scrambled(english, random.Random(0))
    assert mixed is not None
    assert mixed != english
    assert sorted(mixed.split()) == sorted(english.split())
    poem = "秋风吹落叶，\n寒雁过江南。\n独坐听残雨，\n灯前夜已阑。\n秋风吹落叶，\n寒雁过江南。\n"
    mixed = scrambled(poem, random.Random(0))
    assert mixed is not None
    assert "秋风吹落叶" not in mixed
    assert scrambled("yes", random.Random(0)) is None
    assert scrambled("a a a a a a a a a a a a", random.Random(0)) is None
