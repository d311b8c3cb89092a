"""Tokenized examples on disk, mapped into memory: written once, read by index, never held whole.

ids.bin         token ids of all examples end to end, uint16 or uint32
ends.npy        [examples] int64: where each example ends in it
trained.npy     [examples] int64: trained tokens of each example
run_ends.bin    int64: where each run of equal loss weight ends in it; run_weights.bin, float32: the weight of each
origins.bin     [examples, 2] int64: number of the source's name, row
names.json      names of the sources, and from which example on each source of a mixture begins
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from finespun.data.readers import Origin
from finespun.data.templates import TokenizedExample

TOGETHER = 1024
"""Examples that are written at once."""


class Share(NamedTuple):
    """A source's part of a mixture: the range of its examples, and how many of them an epoch takes."""

    first: int
    end: int
    draws: int


class TokenWriter:
    """Writes examples, one after another, into a folder that a `TokenStore` then reads."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self._files = {
            name: (folder / f"{name}.bin").open("wb") for name in ("ids", "run_ends", "run_weights", "origins")
        }
        self._ends, self._trained = array("q"), array("q")
        self._names: dict[str, int] = {}
        self._groups: list[int] = []
        self._waiting: list[TokenizedExample] = []

    def begin_source(self) -> None:
        """The examples from here on come from the next source of the mixture."""
        self._groups.append(len(self._ends) + len(self._waiting))

    def add(self, examples: Sequence[TokenizedExample]) -> None:
        """Appends `examples`, of at least one token each."""
        self._waiting += examples
        if len(self._waiting) >= TOGETHER:
            self._write()

    def _write(self) -> None:
        examples, self._waiting = self._waiting, []
        if not examples:
            return
        start = self._ends[-1] if self._ends else 0
        ends = np.cumsum([len(example.input_ids) for example in examples])
        weights = np.concatenate([example.loss_weights for example in examples])
        runs = np.union1d(np.flatnonzero(weights[1:] != weights[:-1]) + 1, ends)
        names = [self._names.setdefault(example.origin.source, len(self._names)) for example in examples]
        rows = [example.origin.row for example in examples]
        for name, numbers, dtype in (
            ("ids", np.concatenate([example.input_ids for example in examples]), self._dtype),
            ("run_ends", runs + start, np.int64),
            ("run_weights", weights[runs - 1], np.float32),
            ("origins", np.stack([names, rows], axis=1), np.int64),
        ):
            self._files[name].write(numbers.astype(dtype).tobytes())
        self._ends.extend((ends + start).tolist())
        self._trained.extend(np.add.reduceat(weights != 0, [0, *ends[:-1]], dtype=np.int64).tolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
        for file in self._files.values():
            file.close()
        np.save(self._folder / "ends.npy", np.array(self._ends, dtype=np.int64))
        np.save(self._folder / "trained.npy", np.array(self._trained, dtype=np.int64))
        about = {"names": list(self._names), "groups": self._groups, "dtype": self._dtype.name}
        (self._folder / "names.json").write_text(json.dumps(about), encoding="utf-8")


class TokenStore(Sequence[TokenizedExample]):
    """The examples in a folder that a `TokenWriter` filled."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        self._names: list[str] = about["names"]
        self.groups: list[int] = about["groups"]
        """For each source, the first of its examples."""
        self._ends: NDArray[np.int64] = np.load(folder / "ends.npy")
        self.trained: NDArray[np.int64] = np.load(folder / "trained.npy")
        """Trained tokens of each example."""
        self._ids = _mapped(folder / "ids.bin", np.dtype(about["dtype"]))
        self._run_ends = _mapped(folder / "run_ends.bin", np.dtype(np.int64))
        self._run_weights = _mapped(folder / "run_weights.bin", np.dtype(np.float32))
        self._origins = _mapped(folder / "origins.bin", np.dtype(np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        first, last = np.searchsorted(self._run_ends, (start + 1, end))
        ends = np.minimum(self._run_ends[first : last + 1], end)
        weights = np.repeat(self._run_weights[first : last + 1], np.diff(ends, prepend=start))
        name, row = self._origins[2 * index : 2 * index + 2]
        return TokenizedExample(
            self._ids[start:end].astype(np.int32), weights.astype(np.float32), Origin(self._names[name], int(row))
        )


def _mapped(path: Path, dtype: np.dtype) -> NDArray:
    """The numbers in a file; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
