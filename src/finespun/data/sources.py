"""Sources → rows. Knows files and where each row came from; knows nothing of prompts, models or tokens.

A row is a mapping of columns. A text file gives rows with the one column `text`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from finespun.errors import DataError

Documents = Literal["blank-lines", "lines", "files"]

SUFFIXES = (".txt", ".jsonl", ".json", ".csv")

ERRORS_SHOWN = 20


@dataclass(frozen=True)
class Origin:
    """Where a row stands: a file (or another source's name) and its row, counted from 1."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True)
class Row:
    """Columns of one record, and where it stands."""

    columns: Mapping[str, Any]
    origin: Origin


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


def expand(sources: Iterable[str]) -> list[Path]:
    """Files that `sources` name; a folder gives all files in it of a kind we read, by name.

    Raises `DataError` for what is not there.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise DataError(f"{source}: the folder holds no {', '.join(SUFFIXES)} file.")
            found.extend(inside)
        elif path.is_file():
            found.append(path)
        else:
            names = ", ".join(builtin_sets())
            raise DataError(
                f"{source}: there is no such file or folder. Check the path; a set that comes "
                f"with finespun is: {names}."
            )
    return found


def read_file(path: Path, documents: Documents | None = None) -> tuple[list[Row], str]:
    """Rows of a file, and one phrase on how it was read.

    `documents` says what separates the documents of a .txt file: blank lines, line ends, or nothing (one file, one
    document); by default blank lines if there are any, else line ends. Blank documents and blank JSONL lines are no
    rows. Raises `DataError` that names the file and the line.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise DataError(f"{path}: files of this kind are not read; bring one of {', '.join(SUFFIXES)}.")
    text = _decode(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    if kind == ".txt":
        rows, how = _read_text(path, text, documents)
    else:
        rows = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[kind](path, text)
        how = f"{len(rows)} rows"
    if not rows:
        raise DataError(f"{path}: the file has no rows.")
    return rows, how


def rows_from_memory(items: Sequence[str | Mapping[str, Any]]) -> list[Row]:
    """Rows from a Python list of texts or of column mappings. Raises `DataError` for an item of another type."""
    rows = []
    for number, item in enumerate(items, 1):
        origin = Origin("data", number)
        if isinstance(item, str):
            rows.append(Row({"text": item}, origin))
        elif isinstance(item, Mapping):
            rows.append(Row(item, origin))
        else:
            raise DataError(f"{origin}: an item is a text or a dict of columns, not a {type(item).__name__}.")
    if not rows:
        raise DataError("data: the list is empty.")
    return rows


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} "
            f"(line {line}) cannot be decoded. "
            f"Convert it first, e.g. `iconv -f GB18030 -t UTF-8 {path.name}`, with the encoding it was written in."
        ) from None


def _read_text(path: Path, text: str, documents: Documents | None) -> tuple[list[Row], str]:
    lines = text.splitlines()
    chosen = documents or ("blank-lines" if any(not line.strip() for line in _strip_blank_ends(lines)) else "lines")
    if chosen == "files":
        pieces = [(1, text.strip("\r\n"))]
        how = "one document"
    elif chosen == "lines":
        pieces = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        how = f"{len(pieces)} documents, one a line"
    else:
        pieces = list(_paragraphs(lines))
        how = f"{len(pieces)} documents, separated by blank lines"
    if documents is None:
        others = " or ".join(kind for kind in ("blank-lines", "lines", "files") if kind != chosen)
        how += f" (data.documents {others} reads them otherwise)"
    return [Row({"text": piece}, Origin(str(path), number)) for number, piece in pieces], how


def _strip_blank_ends(lines: list[str]) -> list[str]:
    filled = [number for number, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _paragraphs(lines: list[str]) -> Iterable[tuple[int, str]]:
    """Runs of lines between blank lines, each with the number of its first line."""
    run: list[str] = []
    start = 1
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            start = start if run else number
            run.append(line)
        elif run:
            yield start, "\n".join(run)
            run = []


def _read_jsonl(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    faults: list[str] = []
    # not splitlines(): it also cuts at U+2028 and its like, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        shown = line.strip() if len(line.strip()) <= 80 else line.strip()[:77] + "..."
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            faults.append(f"{path}, line {number}: is not JSON ({error}): {shown}")
            continue
        if isinstance(value, dict):
            rows.append(Row(value, Origin(str(path), number)))
        else:
            faults.append(f"{path}, line {number}: a row is a JSON object of columns, not this: {shown}")
    raise_all(faults)
    return rows


def _read_json(path: Path, text: str) -> list[Row]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " One JSON object a line is a .jsonl file: rename it." if "Extra data" in str(error) else ""
        raise DataError(f"{path}: is not JSON ({error}).{hint}") from None
    if not isinstance(value, list):
        raise DataError(
            f"{path}: holds a JSON {type(value).__name__} where a list of rows belongs: [{{...}}, {{...}}]."
        )
    rows = [
        Row({"text": item} if isinstance(item, str) else item, Origin(str(path), n)) for n, item in enumerate(value, 1)
    ]
    raise_all(
        [
            f"{row.origin}: a row is a text or an object of columns, not {row.columns!r}."
            for row in rows
            if not isinstance(row.columns, dict)
        ]
    )
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    faults: list[str] = []
    try:
        names = reader.fieldnames or []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: the column {twice[0]!r} stands twice in the header; rename one.")
        for number, columns in enumerate(reader, 1):
            # DictReader puts surplus cells under the key None and fills missing ones with None
            surplus = columns.pop(None, [])
            cells = len(surplus) + sum(value is not None for value in columns.values())
            if cells != len(names):
                faults.append(
                    f"{path}, row {number} (line {reader.line_num}): has {cells} cells where "
                    f"the header has {len(names)}."
                )
            else:
                rows.append(Row(columns, Origin(str(path), number)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is not CSV ({error}).") from None
    raise_all(faults)
    return rows


def raise_all(faults: Sequence[str], remedy: str = "") -> None:
    """One `DataError` of all faults, the first ones in full; nothing if there are none."""
    if faults:
        more = [f"... and {len(faults) - ERRORS_SHOWN} more like these."] if len(faults) > ERRORS_SHOWN else []
        raise DataError("\n".join([*faults[:ERRORS_SHOWN], *more, *([remedy] if remedy else [])]))
