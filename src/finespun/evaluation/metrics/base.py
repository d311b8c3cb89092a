"""What a metric is, and what most of them are made of: sums over examples, the tokens of a text, its language."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finespun.data.quality import language, units
from finespun.errors import DataError, RecipeError
from finespun.evaluation.outputs import Output

Better = Literal["higher", "lower"] | None


class Measured(Protocol):
    """A metric's scores of a list of outputs.

    `per_example` is `[n]`, or None where an example by itself has no score. `value(draw)` is the score of the examples
    whose places are in `draw`, with repetition, as if they alone had been measured; of all without a draw. It costs
    little, since resampling asks for it thousands of times.

    Where `per_example` is None the score is one of a collection: drawing with repetition changes it, since copies are
    alike, and its bootstrap interval says nothing. What holds is exchanging the outputs of two systems for the same
    examples: `value` of draws, without repetition, from the measured outputs of both.
    """

    @property
    def per_example(self) -> NDArray[np.float64] | None: ...

    def value(self, draw: NDArray[np.intp] | None = None) -> float: ...


class Metric(Protocol):
    """A way to score outputs. `signature` is all that is needed to get the same number again; where it depends on what
    is measured, as the number of references, it is complete after `measure`. `measure` raises `DataError`."""

    @property
    def name(self) -> str: ...
    @property
    def better(self) -> Better: ...
    @property
    def needs_references(self) -> bool: ...
    @property
    def signature(self) -> str: ...
    def measure(self, outputs: Sequence[Output]) -> Measured: ...


def checked(metric: Metric, outputs: Sequence[Output]) -> Sequence[Output]:
    """The outputs, if `metric` can be had of them; `DataError` if not."""
    if not outputs:
        raise DataError(f"{metric.name}: there are no outputs to measure.")
    if metric.needs_references and (without := [output.origin for output in outputs if not output.references]):
        raise DataError(
            f"{metric.name} compares with references, and {len(without):,} of {len(outputs):,} examples have none "
            f"(the first: {without[0]}). Give each a reference, or choose metrics that need none, such as distinct-2, "
            "rep-4 and length."
        )
    return outputs


def needs(package: str, metric: str, extra: str = "evaluate") -> None:
    """Raises `RecipeError` where a package that `metric` is computed with is not installed."""
    if find_spec(package) is None:
        raise RecipeError(f"{metric} needs the package {package}: pip install 'finespun[{extra}]'")


def texts_in_language(outputs: Iterable[Output]) -> Iterable[str]:
    """The texts that tell which language is asked for: references, or outputs where an example has none."""
    for output in outputs:
        yield from output.references or (output.text,)


_TOLD_FROM = 200
"""Characters from which a language is told well."""

_PARTS_TOLD = 50


def common_language(texts: Iterable[str]) -> str | None:
    """The ISO 639-1 code of the language that most of the first 50 stretches of 200 characters are in; None where it
    cannot be told. Short texts are put together."""
    votes: Counter[str] = Counter()
    parts, length = [], 0
    for text in texts:
        parts.append(text)
        length += len(text)
        if length >= _TOLD_FROM:
            votes[language("\n".join(parts)) or ""] += 1
            parts, length = [], 0
        if votes.total() == _PARTS_TOLD:
            break
    told = [code for code, _ in votes.most_common() if code]
    return told[0] if told else language("\n".join(parts))


class _Spaced(dict[int, str]):
    """For each character what `tokens` reads in its place: punctuation marks and symbols stand alone."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = f" {character} " if _is_mark(character) else character
        return self[code]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


_spaced = _Spaced()


def tokens(text: str) -> list[str]:
    """Case-folded words, punctuation marks and symbols, in any language; in scripts that put no space between words,
    each character. Words are those of `finespun.data.quality.units`."""
    found = []
    for piece in text.translate(_spaced).split():
        found += [piece] if _is_mark(piece[0]) else units(piece)
    return found


@dataclass(frozen=True)
class Mean:
    """A score that is the mean of those of the examples."""

    per_example: NDArray[np.float64]

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        return float((self.per_example if draw is None else self.per_example[draw]).mean())


@dataclass(frozen=True)
class Totals:
    """A score that is computed from sums over the examples: `statistics` is `[n, k]`, `score` takes the k sums."""

    per_example: NDArray[np.float64]
    statistics: NDArray[np.float64]
    score: Callable[[list[float]], float]

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        if draw is None:
            return self.score(self.statistics.sum(axis=0).tolist())
        times = np.bincount(draw, minlength=len(self.statistics)).astype(np.float64)
        return self.score((times @ self.statistics).tolist())
