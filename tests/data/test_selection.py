from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from finespun.data.quality import ngram_hashes, units
from finespun.data.selection import select
from finespun.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"

COOKING = [
    "stir",
    "the",
    "soup",
    "add",
    "salt",
    "onions",
    "and",
    "butter",
    "bake",
    "bread",
    "slowly",
    "in",
    "hot",
    "oven",
]
SAILING = [
    "hoist",
    "the",
    "sail",
    "and",
    "steer",
    "windward",
    "past",
    "buoy",
    "in",
    "rough",
    "seas",
    "with",
    "crew",
    "deck",
]


def sentences(words: list[str], count: int, seed: int, shortest: int = 6, longest: int = 14) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randint(shortest, longest))) for _ in range(count)]


def bucket(*gram: str) -> int:
    return int(ngram_hashes(list(gram), len(gram))[-1][0]) % 10_000


def slow_features(text: str) -> list[int]:
    parts = units(text)
    return [bucket(part) for part in parts] + [bucket(*pair) for pair in pairwise(parts)]


def slow_distribution(texts: list[str], background: dict[int, float] | None = None) -> dict[int, float]:
    """Witten-Bell: every bucket's count, and as many counts as there are different ones shared out as `background`."""
    counts = Counter(feature for text in texts for feature in slow_features(text))
    even = dict.fromkeys(range(10_000), 1 / 10_000)
    return {
        place: (counts[place] + len(counts) * (background or even)[place]) / (counts.total() + len(counts))
        for place in range(10_000)
    }


def slow_divergence(p: dict[int, float], q: dict[int, float]) -> float:
    return sum(p[place] * math.log(p[place] / q[place]) for place in p)


def test_weights_and_divergences_are_those_of_a_slow_computation() -> None:
    target = [*sentences(COOKING, 9, 0), ""]
    pool = ["", *sentences(COOKING, 20, 1, 1, 40), *sentences(SAILING, 20, 2), "Soup!", "…"]
    selection = select(pool, target, 12, diverse=False)

    background = slow_distribution(pool)
    wanted = slow_distribution(target, background)
    seen = Counter(feature for text in target for feature in slow_features(text))
    likely = {place: (seen[place] / seen.total() + background[place]) / 2 for place in background}
    usual = sorted(len(slow_features(text)) for text in target if text)[4]
    assert len(selection.log_weights) == len(pool)
    for text, weight in zip(pool, selection.log_weights, strict=True):
        features = slow_features(text)
        if not features:
            assert weight == -math.inf
            continue
        ratios = [math.log(likely[feature] / background[feature]) for feature in features]
        assert weight == pytest.approx(sum(ratios) / len(ratios) * min(len(ratios), usual))
    after = slow_distribution([pool[index] for index in selection.indices], background)
    assert selection.divergence_before == pytest.approx(slow_divergence(wanted, background))
    assert selection.divergence_after == pytest.approx(slow_divergence(wanted, after))


def test_more_texts_than_one_block_are_each_weighed_alone() -> None:
    few = [*sentences(COOKING, 5, 1), "", "soup", *sentences(SAILING, 5, 2)]
    pool = few * 2000  # 24,000 texts
    weights = select(pool, sentences(COOKING, 30, 3), 1).log_weights.reshape(2000, len(few))
    assert np.array_equal(weights, np.broadcast_to(weights[0], weights.shape))
    assert len(set(weights[0].tolist())) > 8


@pytest.mark.parametrize("words", [COOKING, SAILING])
def test_the_texts_of_the_target_s_kind_are_kept(words: list[str]) -> None:
    pool = sentences(COOKING, 300, 1) + sentences(SAILING, 300, 2)
    random.Random(3).shuffle(pool)
    selection = select(pool, sentences(words, 40, 4), 100)
    assert len(selection) == len(set(selection.indices)) == 100
    assert all(sum(word in words for word in pool[i].split()) > len(pool[i].split()) / 2 for i in selection.indices)
    assert selection.divergence_after < selection.divergence_random
    assert selection.divergence_after < selection.divergence_before


def test_the_first_indices_are_the_best_and_noise_spreads_the_choice() -> None:
    pool = sentences(COOKING, 200, 1) + sentences(SAILING, 200, 2)
    target = sentences(COOKING, 40, 4)
    all_of_them = select(pool, target, 400, diverse=False)
    assert sum(index < 200 for index in all_of_them.indices[:200]) > 190
    assert sorted(all_of_them.indices) == list(range(400))
    # By weight alone every seed would give the same order.
    orders = {tuple(select(pool, target, 20, seed).indices) for seed in range(5)}
    assert len(orders) == 5


def test_equally_good_texts_are_kept_equally_often() -> None:
    pool = ["salt the soup and bake some bread", "salt the soup and bake some bread"]
    firsts = Counter(select(pool, ["salt the soup"], 1, seed).indices[0] for seed in range(300))
    assert 100 < firsts[0] < 200


def test_the_same_seed_gives_the_same_selection() -> None:
    pool = sentences(COOKING, 100, 1) + sentences(SAILING, 100, 2)
    one, other = (select(iter_again(pool), iter(sentences(COOKING, 40, 4)), 50, seed=7) for _ in range(2))
    assert one.indices == other.indices
    assert one.divergence_random == other.divergence_random
    assert select(pool, sentences(COOKING, 40, 4), 50, seed=8).indices != one.indices


class iter_again:  # noqa: N801
    """A pool that is no sequence, but can be read again."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def test_length_alone_makes_no_text_better() -> None:
    chance = random.Random(5)
    short = [" ".join(chance.sample(COOKING, 12)) for _ in range(100)]
    long = [
        " ".join(chance.sample(COOKING, 12) + chance.sample(COOKING, 12) + chance.sample(COOKING, 12))
        for _ in range(100)
    ]
    pool = short + long + sentences(SAILING, 200, 2)
    selection = select(pool, [" ".join(chance.sample(COOKING, 12)) for _ in range(50)], 100, diverse=False)
    assert 20 < sum(index < 100 for index in selection.indices) < 80
    assert all(index < 200 for index in selection.indices)


def test_near_duplicates_are_passed_over_and_counted() -> None:
    distinct = sentences(COOKING, 30, 1, 20, 30)
    pool = [text + end for text in distinct for end in ("", "!", " …")] + sentences(SAILING, 30, 2)
    target = sentences(COOKING, 40, 4)
    selection = select(pool, target, 30)
    assert sorted(index // 3 for index in selection.indices) == list(range(30))
    assert selection.near_duplicates > 0
    assert len({index // 3 for index in select(pool, target, 30, diverse=False).indices}) < 30
    assert select(pool, target, 30, diverse=False).near_duplicates == 0


def test_fewer_are_kept_where_diversity_leaves_fewer() -> None:
    distinct = sentences(COOKING, 6, 1, 20, 30)
    selection = select([*distinct * 50, ""], sentences(COOKING, 40, 4), 301)
    assert len(selection) == len(selection.indices) == 6
    assert sorted(index % 6 for index in selection.indices) == list(range(6))
    assert selection.near_duplicates == 294


def test_the_units_that_moved_most_are_named_with_their_shares() -> None:
    pool = ["soup salt soup salt soup", "sail sail deck crew", "sail the sea sail"]
    selection = select(pool, ["soup salt soup"], 1, diverse=False)
    assert selection.indices == [0]
    assert selection.gained == [("soup", 3 / 13, 3 / 5), ("salt", 2 / 13, 2 / 5)]
    assert selection.lost[0] == ("sail", 4 / 13, 0.0)
    assert {unit for unit, _, _ in selection.lost} == {"sail", "deck", "crew", "the", "sea"}


def test_a_vocabulary_without_end_does_not_fill_memory_nor_hide_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finespun.data.selection._VOCABULARY", 60)
    pool = [
        f"{text} rare{number}" for number, text in enumerate(sentences(COOKING, 200, 1) + sentences(SAILING, 200, 2))
    ]
    full = select(pool, sentences(COOKING, 40, 4), 100)
    # The 20 units that moved most are all among the frequent ones.
    assert {unit for unit, _, _ in full.gained[:8]} <= set(COOKING)
    assert {unit for unit, _, _ in full.lost[:8]} <= set(SAILING)


@pytest.mark.parametrize(
    ("pool", "target", "keep", "message"),
    [
        (["a pool"], [], 1, "target"),
        (["a pool"], ["", "…"], 1, "target"),
        ([], ["a target"], 1, "holds 0 texts"),
        (["", "…"], ["a target"], 1, "pool"),
        (["a pool"], ["a target"], 0, "at least 1"),
        (["a pool", "of two"], ["a target"], 3, "holds 2 texts"),
    ],
)
def test_what_cannot_be_selected_is_refused(pool: list[str], target: list[str], keep: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        select(pool, target, keep)


def test_a_pool_that_can_be_read_once_only_is_refused_before_it_is_spent() -> None:
    pool = iter(["a pool"])
    with pytest.raises(TypeError, match="more than once"):
        select(pool, ["a target"], 1)
    assert next(pool) == "a pool"


def column(path: str, name: str, count: int) -> list[str]:
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not there: it takes real corpora.")
    texts = [json.loads(line)[name] for line in (DATA / path).read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(texts)
    return texts[:count]


CORPORA = {
    "facts": ("webnlg/train.jsonl", "completion", 3100),
    "captions": ("multi30k/train.en-de.jsonl", "prompt", 3100),
    "Bildunterschriften": ("multi30k/train.en-de.jsonl", "completion", 3100),
    "summaries": ("dialogsum/train_small.jsonl", "summary", 500),
}


@pytest.mark.parametrize(
    ("wanted", "other", "keep"),
    [
        ("facts", "Bildunterschriften", 1000),
        ("Bildunterschriften", "facts", 1000),
        ("facts", "captions", 1000),
        ("captions", "facts", 1000),
        ("summaries", "facts", 200),
    ],
)
def test_real_texts_of_the_target_s_corpus_are_told_from_others(wanted: str, other: str, keep: int) -> None:
    mine, theirs = column(*CORPORA[wanted]), column(*CORPORA[other])
    target, rest = mine[:100], mine[100:]
    pool = [(text, True) for text in rest] + [(text, False) for text in theirs]
    random.Random(1).shuffle(pool)
    selection = select([text for text, _ in pool], target, keep)
    assert len(selection) == keep
    assert sum(pool[index][1] for index in selection.indices) >= 0.95 * keep
    assert selection.divergence_after < selection.divergence_random
