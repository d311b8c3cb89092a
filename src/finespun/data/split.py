"""What is held out for validation: by the content of an example, or by what it belongs to, so that order and additions
do not move it."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from finespun.data.formats import Example, RatedExample, texts_of
from finespun.errors import DataError


def content_hash(example: Example) -> int:
    """The first 64 bits of the SHA-256 of what an example says, wherever it stands."""
    label = str(example.label) if isinstance(example, RatedExample) else ""
    return key_hash("\x00".join([label, *texts_of(example)]))


def key_hash(key: str) -> int:
    """The first 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def hold_out(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which of the examples with these `hashes` are held out, about `share` of them.

    An example is held out when its hash falls into the lowest `share` of all hashes: those with the same hash stay on
    one side, and appended rows leave the others where they were. With a share above 0, both sides get at least one
    example. Raises `DataError` where that cannot be.
    """
    if share == 0:
        return np.zeros(len(hashes), dtype=np.bool_)
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise DataError(
            "One distinct example, or group of them, cannot be split into training and validation. "
            "Add more, check data.documents and data.group_by, or train without validation (data.validation 0)."
        )
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    limit = min(max(limit, distinct[0] + np.uint64(1)), distinct[-1])
    return hashes < limit
