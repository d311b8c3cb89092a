"""How much of what a model writes stands in the texts it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finespun.data.quality import ngram_hashes, units
from finespun.errors import DataError
from finespun.evaluation.metrics.base import Better, Mean, Metric, Totals, checked
from finespun.evaluation.outputs import Output

NGRAM = 4

_BASE = np.uint64(0x9E3779B97F4A7C15)


class Copied(NamedTuple):
    """`[texts]` each: 4-grams that stand in a training text, all 4-grams, and the units of the longest run that stands
    in one training text."""

    found: NDArray[np.intp]
    ngrams: NDArray[np.intp]
    longest: NDArray[np.intp]


class Novelty:
    """Training texts in which outputs are looked up, in `finespun.data.quality.units`: words in any alphabet, without
    case and punctuation, and characters of Chinese and Japanese. 16 bytes of memory for each unit.

    `metrics` are "copied-4", the share of the outputs' 4-grams that stand in a training text (0 to 1), and
    "longest-copy", the mean over outputs of the units in the longest run that stands in one training text. Neither is
    better high or low: a set phrase is no harm, a whole text can be. Raises `DataError` where no text has words.
    """

    def __init__(self, training_texts: Iterable[str]) -> None:
        self._hashes, self._left, sizes = _joined(training_texts)
        if not len(self._hashes):
            raise DataError("Novelty: there are no words in the training texts to look outputs up in.")
        self._looked_up: tuple[list[str], Copied] | None = None
        tokenized = f"tok:units|training texts:{len(sizes)}|units:{len(self._hashes)}"
        self.metrics: list[Metric] = [
            _Lookup("copied-4", f"n:{NGRAM}|{tokenized}", self, _share),
            _Lookup(
                "longest-copy",
                f"mean over outputs|{tokenized}",
                self,
                lambda copied: Mean(copied.longest.astype(np.float64)),
            ),
        ]

    def look_up(self, texts: Sequence[str]) -> Copied:
        """What of each of `texts` stands in the training texts."""
        if self._looked_up is None or self._looked_up[0] != list(texts):
            self._looked_up = list(texts), self._compare(texts)
        return self._looked_up[1]

    def _compare(self, texts: Sequence[str]) -> Copied:
        hashes, left, sizes = _joined(texts)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        found, longest = np.zeros(len(sizes), np.intp), np.zeros(len(sizes), np.intp)
        for length, starts in self._runs(hashes, left):
            longest[owners[starts]] = length
            if length == NGRAM:
                found = np.bincount(owners[starts], minlength=len(sizes))
        return Copied(found, np.maximum(sizes - NGRAM + 1, 0), longest)

    def _runs(self, hashes: NDArray[np.uint64], left: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """For lengths from 1 up, the places of the outputs where a run of so many units begins that stands in a
        training text; until there is none. Only what was shared at one length is looked at for the next."""
        ours, theirs = (hashes, np.arange(len(hashes))), (self._hashes, np.arange(len(self._hashes)))
        length = 1
        while True:
            ours, theirs = _shared(ours, theirs)
            if not len(ours[0]):
                return
            yield length, ours[1]
            ours = _lengthened(*ours, length, hashes, left)
            theirs = _lengthened(*theirs, length, self._hashes, self._left)
            length += 1


_Grams = tuple[NDArray[np.uint64], NDArray[np.intp]]
"""Hashes of n-grams, and the places where these begin."""


def _shared(ours: _Grams, theirs: _Grams) -> tuple[_Grams, _Grams]:
    """Those that are on both sides."""
    known, of_ours = np.unique(ours[0], return_inverse=True)
    if not len(known):
        return ours, theirs
    at = np.minimum(np.searchsorted(known, theirs[0]), len(known) - 1)
    hit = known[at] == theirs[0]
    met = np.zeros(len(known), bool)
    met[at[hit]] = True
    kept = met[of_ours]
    return (ours[0][kept], ours[1][kept]), (theirs[0][hit], theirs[1][hit])


def _lengthened(
    grams: NDArray[np.uint64],
    starts: NDArray[np.intp],
    length: int,
    hashes: NDArray[np.uint64],
    left: NDArray[np.intp],
) -> _Grams:
    """The n-grams of `length` units with one unit more, where the text goes on."""
    on = left[starts] > length
    starts = starts[on]
    return grams[on] * _BASE + hashes[starts + length], starts


def _joined(texts: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.intp], NDArray[np.intp]]:
    """The hash of each unit of all texts, how many units its text has from there on, and `[texts]` their numbers."""
    parts = [next(iter(ngram_hashes(units(text), 1)), np.zeros(0, np.uint64)) for text in texts]
    sizes = np.array([len(part) for part in parts], np.intp)
    left = np.concatenate([np.arange(size, 0, -1) for size in sizes] or [np.zeros(0, np.intp)])
    return np.concatenate([*parts, np.zeros(0, np.uint64)]), left, sizes


def _share(copied: Copied) -> Totals:
    return Totals(
        copied.found / np.maximum(copied.ngrams, 1),
        np.column_stack([copied.found, copied.ngrams]).astype(np.float64),
        lambda sums: sums[0] / sums[1] if sums[1] else 0.0,
    )


class _Lookup:
    better: Better = None
    needs_references = False

    def __init__(
        self, name: str, signature: str, novelty: Novelty, measured: Callable[[Copied], Mean | Totals]
    ) -> None:
        self.name, self.signature = name, signature
        self._novelty, self._measured = novelty, measured

    def measure(self, outputs: Sequence[Output]) -> Mean | Totals:
        return self._measured(self._novelty.look_up([output.text for output in checked(self, outputs)]))
