"""What a person names as data → files, archives, data sets and their rows. Knows where each row came from; knows
nothing of prompts, models or tokens.

A source is a file, a folder, a glob, `archive.zip/member`, `hf:dataset[config]:split`, or a set that comes with
finespun; with a weight behind a colon, `stories.jsonl:0.7`, where several are mixed.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from finespun.data.readers import KINDS, BadRow, DataFile, Documents, Origin, Row, kind_of, without_nulls
from finespun.errors import DataError

ERRORS_SHOWN = 20

Items = Sequence[str | Mapping[str, Any]]

_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_HUB = re.compile(r"hf:(?P<name>[^\[\]:]+)(?:\[(?P<config>[^\]]+)\])?(?::(?P<split>.+))?")


class RowSource(Protocol):
    """Something that gives rows, again and again the same ones: a `DataFile`, a data set, a list in memory."""

    @property
    def shown(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    def rows(self) -> Iterator[Row | BadRow]: ...
    def how(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """What one name stands for. `weight` is its part in a mixture; None where sources are only put together."""

    name: str
    parts: list[RowSource]
    weight: float | None = None


@dataclass(frozen=True)
class TextSet:
    """Texts that come with finespun: a training and a validation file and the template of their columns."""

    train: Path
    validation: Path
    template: Mapping[str, str]


def builtin_sets() -> dict[str, TextSet]:
    """The sets that come with finespun, by the name that a recipe's `data.source` gives."""
    fables = Path(str(files("finespun").joinpath("data/fables")))
    return {
        "fables": TextSet(
            train=fables / "train.jsonl",
            validation=fables / "validation.jsonl",
            template={
                "prompt": "Write a fable titled {{ title }}.",
                "completion": "{{ fable }}\n\nMoral: {{ moral }}",
            },
        )
    }


def absolute(names: Iterable[str]) -> list[str]:
    """`names`, several in one divided at its commas, with the paths in them absolute. Raises `DataError` for a name
    that is empty, and for the home of somebody unknown."""
    found = []
    for name in names:
        pieces = [name] if _exists(_split_weight(name)[0]) else [piece.strip() for piece in name.split(",")]
        if not any(pieces):
            raise DataError(f"{name!r} names no data: give a file, a folder, a pattern or hf:NAME.")
        found += [_absolute(piece) for piece in pieces if piece]
    return found


def _absolute(name: str) -> str:
    if name.startswith("hf:"):
        match = _HUB.fullmatch(name)
        if not match or not _exists(match["name"]):
            return name
        return f"hf:{Path(match['name']).absolute()}{name[match.end('name') :]}"
    try:
        return str(Path(name).expanduser().absolute())
    except RuntimeError as error:
        raise DataError(f"{name}: {error}") from None


def open_sources(names: Iterable[str], encoding: str | None = None, documents: Documents | None = None) -> list[Source]:
    """What `names` stand for, with nothing read yet. Raises `DataError` for what is not there, and for weights that
    stand behind some of the names only."""
    sources = []
    for name in names:
        path, weight = _split_weight(name)
        sources.append(Source(path, _parts(path, encoding, documents), weight))
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(source.name for source in sources if source.weight is None)
        raise DataError(f"{bare}: has no weight while {weighted[0].name} has one; give one to each source, or to none.")
    if any(source.weight == 0 for source in weighted):
        raise DataError("A source with the weight 0 takes no part; leave it out.")
    return sources


def rows_of(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a source."""
    for part in source.parts:
        yield from part.rows()


@dataclass(frozen=True)
class MemoryRows:
    """Rows from a Python list of texts or of column mappings."""

    items: Items
    shown: str = "data"

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(to_jsonl(self.items).encode()).hexdigest()

    def rows(self) -> Iterator[Row | BadRow]:
        """Raises `DataError` for an empty list and for an item of another type."""
        if not self.items:
            raise DataError(f"{self.shown}: the list is empty.")
        for number, item in enumerate(self.items, 1):
            origin = Origin(self.shown, number)
            if isinstance(item, str):
                yield Row({"text": item}, origin)
            elif isinstance(item, Mapping):
                yield Row(item, origin)
            else:
                raise DataError(f"{origin}: an item is a text or a dict of columns, not a {type(item).__name__}.")

    def how(self) -> str:
        return ""


def to_jsonl(items: Items) -> str:
    """`items` as the lines of a file that reads back as they are; half a character is written as JSON's escape."""
    rows = (dict(item) if isinstance(item, Mapping) else {"text": item} for item in items)
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return lines.encode("utf-8", "backslashreplace").decode()


def read_standard_input(documents: Documents | None = None, encoding: str | None = None) -> list[Mapping[str, Any]]:
    """Rows that are piped in: JSON where they begin like it, else a text. Raises `DataError`."""
    import tempfile

    if sys.stdin.isatty():
        raise DataError("-: the data is to come from standard input, but nothing is piped in.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin.txt"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        data = DataFile(path, "standard input", None, encoding, documents)
        with path.open(encoding=data.encoding[0]) as text:
            beginning = text.read(64).lstrip()
        if documents is None and beginning[:1] in ("{", "["):
            data = replace(data, path=path.rename(path.with_suffix(".jsonl")))
        rows = list(data.rows())
    raise_all([str(row) for row in rows if isinstance(row, BadRow)])
    return [row.columns for row in rows if isinstance(row, Row)]


@dataclass(frozen=True)
class HubRows:
    """A split of a data set that the package `datasets` finds: on the Hugging Face hub, in its cache, in a folder."""

    name: str
    config: str | None
    split: str

    @property
    def shown(self) -> str:
        return f"hf:{self.name}" + (f"[{self.config}]" if self.config else "") + f":{self.split}"

    @cached_property
    def dataset(self) -> Any:
        """Raises `DataError` where the package, the set, its config or its split is missing."""
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self.shown}: data sets of the hub need the package datasets: pip install 'finespun[tables]'"
            ) from None
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # datasets raises what its readers, the hub and the network raise
            raise DataError(f"{self.shown}: cannot be loaded: {error}") from None

    @property
    def sha256(self) -> str:
        return str(self.dataset._fingerprint)

    def rows(self) -> Iterator[Row | BadRow]:
        number = 0
        try:
            for number, columns in enumerate(self.dataset, 1):
                yield Row(without_nulls(columns), Origin(self.shown, number))
        except DataError:
            raise
        except Exception as error:  # such as a picture without the package that shows it
            raise DataError(f"{self.shown}: cannot be read behind row {number}: {error}") from None
        if not number:
            raise DataError(f"{self.shown}: the split is empty: there is no row in it. Choose another.")

    def how(self) -> str:
        return ""


def _split_weight(name: str) -> tuple[str, float | None]:
    match = _WEIGHTED.fullmatch(name)
    return (match[1], float(match[2])) if match and not _exists(name) else (name, None)


def _exists(name: str) -> bool:
    """Whether there is such a file or folder; what is too long for a name, such as a list of names, is none. Raises
    `DataError` for what lies in a folder that may not be looked into."""
    try:
        return Path(name).expanduser().exists()
    except PermissionError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from None
    except (OSError, RuntimeError):
        return False


def _parts(name: str, encoding: str | None, documents: Documents | None) -> list[RowSource]:
    if name.startswith("hf:"):
        match = _HUB.fullmatch(name)
        if not match:
            raise DataError(
                f"{name}: a data set of the hub is named hf:NAME, hf:NAME[CONFIG] or hf:NAME[CONFIG]:SPLIT."
            )
        return [HubRows(match["name"], match["config"], match["split"] or "train")]

    def file(path: Path, member: str | None = None) -> DataFile:
        shown = _shown(path) + (f"/{member}" if member else "")
        return DataFile(path, shown, member, encoding, documents)

    path = Path(name).expanduser() if _exists(name) else Path(name)
    if _exists(name) and path.is_dir():
        found = _in_folder(path)
        if not found:
            raise DataError(f"{name}: the folder holds no {', '.join((*KINDS, '.zip'))} file.")
    elif _exists(name):
        found = [path]
    elif archive := next(
        (
            parent
            for parent in path.parents
            if parent.suffix.lower() == ".zip" and _exists(str(parent)) and parent.is_file()
        ),
        None,
    ):
        pattern = path.relative_to(archive).as_posix()
        held = _members(archive)
        members = [pattern] if pattern in held else [member for member in held if fnmatch.fnmatch(member, pattern)]
        if not members:
            raise DataError(
                f"{name}: {_shown(archive)} holds no such file; it holds {', '.join(_members(archive)[:10])}."
            )
        return [file(archive, member) for member in members]
    elif glob.has_magic(name):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        found = sorted(Path(match) for match in matches if Path(match).is_file())
        if not found:
            raise DataError(f"{name}: no file matches this pattern.")
    else:
        raise DataError(
            f"{name}: there is no such file or folder. Check the path; a set that comes with finespun is: "
            f"{', '.join(builtin_sets())}."
        )
    parts: list[RowSource] = []
    for each in found:
        if each.suffix.lower() == ".zip":
            members = [member for member in _members(each) if kind_of(member) and not _left_out(Path(member))]
            if not members:
                raise DataError(f"{_shown(each)}: the archive holds no {', '.join(KINDS)} file.")
            parts += [file(each, member) for member in members]
        else:
            parts.append(file(each))
    return parts


def _in_folder(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    return sorted(
        Path(where, name)
        for where, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if not _left_out(Path(where, name).relative_to(folder)) and (kind_of(name) or name.lower().endswith(".zip"))
    )


def _left_out(path: Path) -> bool:
    """Whether a file that is not named itself is none of the data: hidden, in a hidden folder, or a README."""
    return any(part.startswith(".") for part in path.parts) or path.name.lower().partition(".")[0] == "readme"


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{_shown(archive)}: cannot be opened as a zip archive ({error}).") from None
    return [name for name in names if not name.endswith("/") and not name.startswith("__MACOSX/")]


def _shown(path: Path) -> str:
    """`path` as a person in this folder would name it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def raise_all(faults: Sequence[str], remedy: str = "", count: int | None = None, headline: str = "") -> None:
    """One `DataError` of all faults (of `count`, where only the first were kept), the first ones in full, below a
    `headline`; nothing if there are none."""
    if faults:
        rest = (count or len(faults)) - ERRORS_SHOWN
        more = [f"... and {rest} more like these."] if rest > 0 else []
        raise DataError("\n".join(filter(None, [headline, *faults[:ERRORS_SHOWN], *more, remedy])))
