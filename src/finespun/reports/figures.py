"""Figures as people read them, on pages and on terminals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.cells import cell_len


def count(number: float) -> str:
    """12345.6 → 12,346."""
    return f"{number:,.0f}"


def share(number: int, of: int) -> str:
    """12 of 250 (4.8 %)."""
    return f"{count(number)} of {count(of)} ({percent(100 * number / max(of, 1))})"


def percent(value: float) -> str:
    """Percent with as many digits as it takes to tell it from 0, and a fall from 100."""
    if math.isinf(value):
        return "∞ %"
    distance = min(abs(value), abs(100 - abs(value)) if abs(value) < 100 else math.inf)
    return f"{value:,.{0 if distance >= 9.95 or not distance else 1 if distance >= 0.095 else 2}f} %"


def perplexity(value: float) -> str:
    """Three digits or more: 3.14, 31.4, 3,142."""
    return "∞" if math.isinf(value) else f"{value:,.{2 if value < 9.995 else 1 if value < 999.5 else 0}f}"


def perplexity_interval(value: Mapping[str, float]) -> str:
    """The 95 % confidence interval of a perplexity."""
    return f"{perplexity(value['low'])} to {perplexity(value['high'])}"


def figure(value: float | None, signed: bool = False) -> str:
    """Four digits or more: 0.413, 41.30, 1,234.5; "–" where there is none."""
    if value is None:
        return "–"
    size = abs(value)
    digits = 1 if size >= 99.995 else 2 if size >= 9.9995 else 3 if size >= 0.00995 or not size else 4
    sign = "−" if value < 0 else "+" if signed else ""
    return f"{sign}{size:,.{digits}f}"


def between(low: float | None, high: float | None, signed: bool = False) -> str:
    """A 95 % interval; one example alone gives none."""
    if low is None or high is None or math.isinf(low) or math.isinf(high):
        return "none"
    return f"{figure(low, signed)} to {figure(high, signed)}"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def date(when: datetime) -> str:
    """7 March 2026, 14:05."""
    return f"{when.day} {when:%B %Y, %H:%M}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines, each column as wide as its widest cell on a terminal."""
    widths = [max(cell_len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
