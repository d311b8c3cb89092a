"""What can be said of outputs without references: how varied, repetitive and long they are, and how they end.

Words are those of `finespun.evaluation.metrics.base.tokens`: case-folded, with punctuation marks, in any language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finespun.evaluation.metrics.base import Better, Mean, checked, tokens
from finespun.evaluation.outputs import Output

LOOP_REPEATS = 3
LOOP_TOKENS = 12


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n successive words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


class Distinct:
    """Distinct-n (Li et al. 2016): of all n-grams of all outputs, the share that are different ones, 0 to 1; 0 where
    there are none. It falls with the number and length of outputs: only collections of the same size compare."""

    better: Better = "higher"
    needs_references = False

    def __init__(self, n: int) -> None:
        self.name = f"distinct-{n}"
        self.signature = f"n:{n}|of:all n-grams|tok:tokens"
        self._n = n

    def measure(self, outputs: Sequence[Output]) -> MeasuredDistinct:
        counted = [Counter(ngrams(tokens(output.text), self._n)) for output in checked(self, outputs)]
        ids, sizes = _numbered(counted)
        return MeasuredDistinct(ids, np.repeat(np.arange(len(counted)), sizes), np.array([c.total() for c in counted]))


@dataclass(frozen=True)
class MeasuredDistinct:
    """`ids` are the different n-grams of each output, one after another, `owners` the outputs they are of, and
    `totals` `[n]` the numbers of n-grams of each."""

    ids: NDArray[np.intp]
    owners: NDArray[np.intp]
    totals: NDArray[np.intp]
    per_example: None = None

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        times = np.ones(len(self.totals), int) if draw is None else np.bincount(draw, minlength=len(self.totals))
        seen = np.zeros(self.ids.max(initial=-1) + 1, bool)
        seen[self.ids[times[self.owners] > 0]] = True
        return float(seen.sum() / max(times @ self.totals, 1))


class SelfBleu:
    """Self-BLEU (Zhu et al. 2018), 0 to 100: the mean sentence BLEU of each output with all others as its references;
    high where outputs are alike. Sentence BLEU is sacrebleu's, smoothed and with effective order.

    A collection of one output has none, and scores 0. Others are other places in the list: a place that is drawn twice
    is no other of itself, or resampling would find alike what it has copied.
    """

    name = "self-BLEU"
    better: Better = "lower"
    needs_references = False
    signature = "others:all|order:4|eff:yes|smooth:exp|tok:tokens"

    def measure(self, outputs: Sequence[Output]) -> MeasuredSelfBleu:
        words = [tokens(output.text) for output in checked(self, outputs)]
        grams = [Counter(gram for n in range(1, 5) for gram in ngrams(each, n)) for each in words]
        ids, sizes = _numbered(grams)
        owners = np.repeat(np.arange(len(words)), sizes)
        counts = np.array([count for each in grams for count in each.values()], int)
        orders = np.array([len(gram) - 1 for each in grams for gram in each], int)
        # What only one output has is in no reference.
        common = np.bincount(ids)[ids] > 1 if len(ids) else np.zeros(0, bool)
        ids, owners, counts, orders = ids[common], owners[common], counts[common], orders[common]
        by_gram = np.lexsort((-counts, ids))
        return MeasuredSelfBleu(
            np.array([len(each) for each in words]), ids[by_gram], owners[by_gram], counts[by_gram], orders[by_gram]
        )


@dataclass(frozen=True)
class MeasuredSelfBleu:
    """`lengths` `[n]` of the outputs, and for each n-gram in each output that others have too its number, owner, count
    and order (0 to 3), sorted by n-gram and then from the highest count down."""

    lengths: NDArray[np.intp]
    ids: NDArray[np.intp]
    owners: NDArray[np.intp]
    counts: NDArray[np.intp]
    orders: NDArray[np.intp]
    per_example: None = None

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        places = np.arange(len(self.lengths)) if draw is None else draw
        drawn, times = np.unique(places, return_counts=True)
        if len(drawn) == 1:
            return 0.0
        present = np.zeros(len(self.lengths), bool)
        present[drawn] = True
        totals = np.maximum(self.lengths[drawn, None] - np.arange(4), 0)
        correct = self._shared(present)[drawn]
        scores = _sentence_bleu(correct, totals, self._closest_lengths(drawn))
        return float(scores @ times / times.sum())

    def _shared(self, present: NDArray[np.bool]) -> NDArray[np.float64]:
        """`[n, 4]`: of the n-grams of each output, how many are in another one of those that are `present`."""
        kept = present[self.owners]
        ids, owners, counts, orders = self.ids[kept], self.owners[kept], self.counts[kept], self.orders[kept]
        first = np.flatnonzero(np.diff(ids, prepend=-1))
        sizes = np.diff(first, append=len(ids))
        # The most that another output has: the highest count, or the second highest for the owner of the highest.
        most = np.repeat(counts[first], sizes)
        most[first] = np.where(sizes > 1, counts[np.minimum(first + 1, len(ids) - 1)], 0) if len(ids) else 0
        shared = np.bincount(owners * 4 + orders, np.minimum(counts, most), minlength=len(self.lengths) * 4)
        return shared.astype(np.float64).reshape(-1, 4)

    def _closest_lengths(self, drawn: NDArray[np.intp]) -> NDArray[np.intp]:
        """`[drawn]`: the length of another drawn output that is closest to that of each, the shorter of two."""
        order = np.argsort(self.lengths[drawn], kind="stable")
        ascending = self.lengths[drawn][order]
        below = np.concatenate([[-(10**9)], ascending[:-1]])
        above = np.concatenate([ascending[1:], [10**9]])
        closest = np.empty_like(ascending)
        closest[order] = np.where(ascending - below <= above - ascending, below, above)
        return closest


def _sentence_bleu(
    correct: NDArray[np.float64], totals: NDArray[np.intp], reference_lengths: NDArray[np.intp]
) -> NDArray[np.float64]:
    """`[n]` sentence BLEU from `[n, 4]` counts, smoothed as mteval-v13a does (Chen & Cherry 2014, method 3): the
    precision of the k-th order without a match counts 1 / 2^k matches. Orders without n-grams do not count."""
    lengths = totals[:, 0]
    smoothed = np.where(correct > 0, correct, 0.5 ** np.cumsum(correct == 0, axis=1))
    logs = np.where(totals > 0, np.log(smoothed / np.maximum(totals, 1)), 0)
    precision = np.exp(logs.sum(axis=1) / np.maximum((totals > 0).sum(axis=1), 1))
    brevity = np.exp(np.minimum(0, 1 - reference_lengths / np.maximum(lengths, 1)))
    return np.where(correct.any(axis=1), 100 * brevity * precision, 0.0)


class Repetition:
    """rep-4 (seq-rep-4 of Welleck et al. 2020): 1 − different 4-grams / 4-grams of an output, the mean over outputs,
    0 to 1; 0 for an output of fewer than four words."""

    name = "rep-4"
    better: Better = "lower"
    needs_references = False
    signature = "n:4|mean over outputs|tok:tokens"

    def measure(self, outputs: Sequence[Output]) -> Mean:
        grams = [ngrams(tokens(output.text), 4) for output in checked(self, outputs)]
        return Mean(np.array([1 - len(set(each)) / len(each) if each else 0.0 for each in grams]))


class Loops:
    """The share of outputs that end in a loop, 0 to 1."""

    name = "loops"
    better: Better = "lower"
    needs_references = False
    signature = f"repeats:{LOOP_REPEATS}|words:{LOOP_TOKENS}|tok:tokens"

    def measure(self, outputs: Sequence[Output]) -> Mean:
        return Mean(np.array([float(ends_in_loop(tokens(output.text))) for output in checked(self, outputs)]))


def ends_in_loop(words: Sequence[Hashable]) -> bool:
    """Whether the last 12 words or more are one sequence, of any length, at least three times in direct succession;
    the first of them may be cut."""
    # Seen from its end, a text that ends in a loop begins with one. The shortest period of a beginning is its length
    # less that of its longest border (Knuth, Morris & Pratt 1977).
    backwards = words[::-1]
    borders = [0] * len(words)
    border = 0
    for place in range(1, len(words)):
        while border and backwards[place] != backwards[border]:
            border = borders[border - 1]
        border += backwards[place] == backwards[border]
        borders[place] = border
        length = place + 1
        if length >= LOOP_TOKENS and length >= LOOP_REPEATS * (length - border):
            return True
    return False


class Length:
    """The mean number of tokens that the model wrote for an output."""

    name = "length"
    better: Better = None
    needs_references = False
    signature = "unit:tokens of the model"

    def measure(self, outputs: Sequence[Output]) -> Mean:
        return Mean(np.array([float(output.tokens) for output in checked(self, outputs)]))


class Ended:
    """The share of outputs that the model ended by itself, 0 to 1; the others were cut at the limit of new tokens."""

    name = "ended"
    better: Better = "higher"
    needs_references = False
    signature = "finish_reason:stop"

    def measure(self, outputs: Sequence[Output]) -> Mean:
        return Mean(np.array([float(output.finish_reason == "stop") for output in checked(self, outputs)]))


def _numbered(counted: Iterable[Counter[tuple[str, ...]]]) -> tuple[NDArray[np.intp], list[int]]:
    """A number for each different n-gram, in the order of `counted`, and how many each of those has."""
    numbers: dict[tuple[str, ...], int] = {}
    ids, sizes = [], []
    for grams in counted:
        ids += [numbers.setdefault(gram, len(numbers)) for gram in grams]
        sizes.append(len(grams))
    return np.array(ids, np.intp), sizes
