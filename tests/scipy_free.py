"""The one statistical test that the tests need."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chi_square_p(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """p-value of Pearson's chi-square test that `counts` were drawn with `probabilities`."""
    total = sum(counts)
    cells = [(count, p * total) for count, p in zip(counts, probabilities, strict=True) if p > 0]
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))
