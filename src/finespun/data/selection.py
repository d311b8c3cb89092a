"""Which texts of a large pool are most like those that a model should write. Strings only, after `quality.units`.

The method is DSIR (Xie et al. 2023, "Data Selection for Language Models via Importance Resampling").
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finespun.data.quality import NearDuplicates, ngram_hashes, units
from finespun.errors import DataError

# Features are hashed into as many buckets as in the paper; a bucket fits into 16 bits.
_BUCKETS = 10_000

# With more different units than this in the pool, the rarest are forgotten: their shares did not move much.
_VOCABULARY = 500_000

_UNITS_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """What was selected, and what that changed.

    `indices` are places in the pool, the first choice first; there may be fewer than asked for. `log_weights` `[pool]`
    are the log importance weights of all texts, -inf without units. `near_duplicates` counts the texts passed over.
    Divergences are KL(target ‖ texts) of the distributions of features, in nats: of the whole pool, of a random sample
    as large as the selection, and of the selection. `gained` and `lost` have the units whose share of all units moved
    most, furthest first: (unit, share in the pool, share in the selection).
    """

    indices: list[int]
    log_weights: np.ndarray
    near_duplicates: int
    divergence_before: float
    divergence_random: float
    divergence_after: float
    gained: list[tuple[str, float, float]]
    lost: list[tuple[str, float, float]]

    def __len__(self) -> int:
        return len(self.indices)


def _features(parts: list[str]) -> np.ndarray:
    """The bucket of every unit and of every pair of neighbours, `[2 × units - 1]` uint16."""
    grams = ngram_hashes(parts, 2) or [np.zeros(0, np.uint64)]
    return (np.concatenate(grams) % np.uint64(_BUCKETS)).astype(np.uint16)


def _distribution(counts: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """The distribution that `counts` `[buckets]` come from, smoothed after Witten and Bell (1991).

    As many counts as there are different features are given to all buckets in proportion to `background`, or evenly.
    """
    different = np.count_nonzero(counts)
    share = 1 / _BUCKETS if background is None else background
    return (counts + different * share) / (counts.sum() + different)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def _log_weights(log_ratios: np.ndarray, features: np.ndarray, lengths: np.ndarray, usual: float) -> np.ndarray:
    """For each text the sum of `log_ratios` `[buckets]` over its features, no more than `usual` of them at its mean."""
    sums = np.zeros(len(lengths))
    ends = np.cumsum(lengths)
    # In blocks, since the ratios of all features take four times the memory of the features.
    for first in range(0, len(lengths), 10_000):
        block = slice(first, first + 10_000)
        texts = np.repeat(np.arange(len(lengths[block])), lengths[block])
        ratios = log_ratios[features[ends[first] - lengths[first] : ends[block][-1]]]
        sums[block] = np.bincount(texts, ratios, len(lengths[block]))
    with np.errstate(divide="ignore"):
        return np.where(lengths > 0, sums * np.minimum(1, usual / lengths), -np.inf)


def _read(pool: Iterable[str]) -> tuple[array, array, Counter[str], int]:
    """The buckets of all texts end to end, how many each has, the counts of the frequent units, and of all together."""
    features, lengths = array("H"), array("q")
    vocabulary: Counter[str] = Counter()
    units_read = rare = 0
    for text in pool:
        parts = units(text)
        buckets = _features(parts)
        features.frombytes(buckets.tobytes())
        lengths.append(len(buckets))
        vocabulary.update(parts)
        units_read += len(parts)
        while len(vocabulary) > _VOCABULARY:
            rare += 1
            vocabulary = Counter({unit: count for unit, count in vocabulary.items() if count > rare})
    return features, lengths, vocabulary, units_read


def _choose(pool: Iterable[str], order: np.ndarray, keep: int, diverse: bool) -> tuple[list[int], int, Counter[str]]:
    """The first `keep` texts in `order` (with `diverse`, those like no chosen one), how many were passed over as
    near-duplicates, and the units of the chosen ones."""
    chosen: list[int] = []
    passed_over = place = 0
    size = keep
    after: Counter[str] = Counter()
    duplicates = NearDuplicates()
    while len(chosen) < keep and place < len(order):
        # Where near-duplicates abound, rounds grow, so that the pool is read a few times only.
        candidates = order[place : place + size].tolist()
        place, size = place + size, size * 2
        among = set(candidates)
        texts = {index: text for index, text in enumerate(pool) if index in among}
        for index in candidates:
            if len(chosen) == keep:
                break
            if diverse and duplicates.first_like(texts[index], index) is not None:
                passed_over += 1
                continue
            chosen.append(index)
            after.update(units(texts[index]))
    return chosen, passed_over, after


def select(pool: Iterable[str], target: Iterable[str], keep: int, seed: int = 0, diverse: bool = True) -> Selection:
    """The `keep` texts of `pool` that together are most like `target`, sampled by importance without replacement.

    Features are units and pairs of neighbouring units, hashed into 10,000 buckets. The log importance weight of a text
    is the sum over its features of log(share in the target / share in the pool); the highest after Gumbel noise are
    kept (Kool et al. 2019), texts without any unit never. With `diverse`, near-duplicates of a chosen text are passed
    over, and fewer than `keep` may be left.

    Two things differ from the authors' program, which is made for web pages and for large targets:
    - A sum favours long texts among good ones. The paper cut its texts to equal length, and the program drops those of
      fewer than 100 words. Here a text with more features than the median text of the target weighs as though it had
      just as many; a shorter one keeps its sum, for it gives that little evidence.
    - The program adds 1e-8 to every share, and whatever a small target happens to lack weighs as much as ten common
      words. Here the shares are half the target's and half the pool's, so that a feature costs at most log 2; with less
      of the pool's, long texts of the target's kind, for all that its sample lacks, weigh less than a few words of any.

    `pool` is read once for the weights, and again for texts to choose among, so it must not be an iterator. Memory
    for each of its texts: 4 bytes for every unit and some 40 more, and the texts themselves of what is selected.
    Raises `DataError` for an empty pool or target, and for more to keep than there are.
    """
    if isinstance(pool, Iterator):
        raise TypeError("select reads its pool more than once: give it a list, or an object that starts anew.")
    target_features = [_features(parts) for parts in map(units, target) if parts]
    if not target_features:
        raise DataError("The target holds no text with words. Give some texts that are like what you want.")
    if keep < 1:
        raise DataError(f"{keep} texts to keep cannot be; keep at least 1.")

    features, lengths, vocabulary, units_read = _read(pool)
    if keep > len(lengths):
        raise DataError(f"The pool holds {len(lengths)} texts, so {keep} cannot be kept. Keep fewer, or add texts.")
    if not features:
        raise DataError("The pool holds no text with words.")
    pool_features = np.frombuffer(features, np.uint16)
    pool_lengths = np.frombuffer(lengths, np.int64)

    background = _distribution(np.bincount(pool_features, minlength=_BUCKETS))
    target_counts = np.bincount(np.concatenate(target_features), minlength=_BUCKETS)
    wanted = _distribution(target_counts, background)
    log_ratios = np.log((target_counts / target_counts.sum() + background) / 2 / background)
    usual = float(np.median([len(each) for each in target_features]))
    log_weights = _log_weights(log_ratios, pool_features, pool_lengths, usual)
    generator = np.random.default_rng(seed)
    order = np.argsort(-(log_weights + generator.gumbel(size=len(log_weights))), kind="stable")
    order = order[np.isfinite(log_weights[order])]

    chosen, passed_over, after = _choose(pool, order, keep, diverse)

    def divergence(indices: Sequence[int] | np.ndarray) -> float:
        picked = np.zeros(len(pool_lengths), bool)
        picked[indices] = True
        counts = np.bincount(pool_features[np.repeat(picked, pool_lengths)], minlength=_BUCKETS)
        return _divergence(wanted, _distribution(counts, background))

    moved = [
        (unit, vocabulary[unit] / units_read, after[unit] / after.total()) for unit in vocabulary.keys() | after.keys()
    ]
    moved.sort(key=lambda unit: (unit[2] - unit[1], unit[0]))
    return Selection(
        indices=chosen,
        log_weights=log_weights,
        near_duplicates=passed_over,
        divergence_before=_divergence(wanted, background),
        divergence_random=divergence(generator.choice(len(pool_lengths), len(chosen), replace=False)),
        divergence_after=divergence(chosen),
        gained=[unit for unit in reversed(moved[-_UNITS_SHOWN:]) if unit[2] > unit[1]],
        lost=[unit for unit in moved[:_UNITS_SHOWN] if unit[2] < unit[1]],
    )
