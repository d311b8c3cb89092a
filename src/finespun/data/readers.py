"""One file → rows: expanded, decoded, parsed. A file is read again and again as a stream; what cannot be a row is
yielded as a `BadRow` where it stands, what spoils the whole file is a `DataError`.

Memory holds one row at a time, except of a JSON document and a spreadsheet, which have to be read whole.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import reprlib
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import orjson

from finespun.errors import DataError
from finespun.recipe import Documents

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

LONGEST_ROW = 64 << 20
"""Bytes of the longest line, cell or document: more is a file that was not read as it was meant."""

LARGEST_DOCUMENT = 1 << 30
"""Bytes of the largest JSON document, which is read whole."""

MOST_CELLS = 1 << 25
"""Cells of the largest sheet, empty ones in between counted: it is held whole, in 32 bytes each."""

EXPANSION_LIMIT = 200
EXPANSION_FREE = 64 << 20
"""A compressed file may grow to this many bytes, or to this many times its size; texts shrink to about a tenth."""

CHUNK = 1 << 20

SAMPLE = 1 << 16
"""Bytes, before and behind the first that is not UTF-8, from which an encoding is found out."""

ROWS_AT_ONCE = 256
"""Rows of a table that are turned into Python's objects together."""

DEEPEST_ROW = 100
"""Levels of lists and objects in a row: what comes later walks through them by recursion."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

EAST_ASIAN = ("cp949", "euc_jp", "cp932", "big5hkscs", "gb18030")
ALPHABETIC = ("cp1252", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256")
"""What a file that is not Unicode may be; of the alphabetic ones only the first is read unasked. Each is the larger of
its family: gb18030 of GBK, cp932 of Shift-JIS, cp949 of EUC-KR, cp1252 of Latin-1. Central European cp1250 is none of
them: with it, French reads as plausibly as Czech."""

PUNCTUATION = frozenset("“”‘’„…—–·«»¿¡°§€\xa0、。〈〉《》「」『』【】〔〕（）！，：；？～　ー々")


_WIDE = re.compile(r"[\t\n\r -~\u00a0-\u04ff\u2010-\u2026\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff60]")
_ODD = re.compile(r"[\x80-\x9f\ue000-\uf8ff\ufffd]")
_CELL = re.compile(rb"""<(?:\w+:)?(?:c|row)\s[^<>]*?\br\s*=\s*["']([A-Z]{0,3})(\d{1,7})["']""")


class Origin(NamedTuple):
    """Where a row stands: a file (or another source's name) and its row, counted from 1."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


class Row(NamedTuple):
    """Columns of one record, and where it stands."""

    columns: Mapping[str, Any]
    origin: Origin


class BadRow(NamedTuple):
    """A place in a file that holds no usable row, and why."""

    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, one of `KINDS`, without a compression; None for what is not read."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in KINDS else None


@dataclass(frozen=True)
class DataFile:
    """A file, or a member of a zip archive, whose rows can be read. `shown` names it in messages."""

    path: Path
    shown: str
    member: str | None = None
    wanted_encoding: str | None = None
    documents: Documents | None = None

    @property
    def kind(self) -> str:
        kind = kind_of(self.member or self.path.name)
        if kind is None:
            raise DataError(
                f"{self.shown}: files of this kind are not read; bring one of {', '.join(KINDS)}, also compressed "
                f"({', '.join(COMPRESSIONS)}) or in a .zip."
            )
        return kind

    @cached_property
    def sha256(self) -> str:
        """Of the file on disk; of the whole archive for a member. Raises `DataError` as `rows` does."""
        self._check_unchanged()
        with self._reading(), self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._check_unchanged()
        return digest

    @cached_property
    def encoding(self) -> tuple[str, str]:
        """Python's name of the encoding, and how it was found where that was not plain; read through to its end once.
        Raises `DataError` with the offset of the first byte that does not fit."""
        if self.kind in (".parquet", ".arrow", ".xlsx"):
            return "", ""
        return _settle_encoding(self)

    @cached_property
    def separation(self) -> Documents:
        """What separates the documents of a text: as wanted; else blank lines if there are any, else line ends. A
        Markdown file is one document."""
        if self.documents or self.kind == ".md":
            return self.documents or "files"
        seen = blank = False
        for _, line in self._lines():
            if line.strip():
                if blank:
                    return "blank-lines"
                seen = True
            else:
                blank = seen
        return "lines"

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows, in their order. Blank documents and blank lines are no rows. Raises `DataError` for a file without
        any, one that is damaged, and one that has changed since it was first read."""
        self._check_unchanged()
        readers = {
            ".txt": self._text,
            ".md": self._text,
            ".jsonl": self._json,
            ".json": self._json,
            ".csv": self._csv,
            ".tsv": self._csv,
            ".parquet": self._table,
            ".arrow": self._table,
            ".xlsx": self._xlsx,
        }
        empty = True
        with self._reading():
            for row in readers[self.kind]():
                empty = False
                yield row
        self._check_unchanged()
        if empty:
            raise DataError(f"{self.shown}: the file is empty: there is no row in it. Fill it, or leave it out.")

    def how(self) -> str:
        """How the file was read, where a choice was made."""
        with self._reading():
            return ", ".join(self._choices())

    def _choices(self) -> Iterator[str]:
        if self.kind in (".txt", ".md"):
            chosen = self.separation
            said = {
                "files": "one document",
                "lines": "a document a line",
                "blank-lines": "documents between blank lines",
            }
            others = " or ".join(kind for kind in ("blank-lines", "lines", "files") if kind != chosen)
            yield said[chosen] + ("" if self.documents else f" (data.documents {others} reads them otherwise)")
        if self.kind in (".csv", ".tsv") and self._dialect.delimiter != {".csv": ",", ".tsv": "\t"}[self.kind]:
            yield f"cells separated by {self._dialect.delimiter!r}"
        if self.kind in (".csv", ".tsv") and self._dialect.escape:
            yield "backslashes read as escapes"
        if self.kind in (".csv", ".tsv") and self._dialect.quoting == csv.QUOTE_NONE:
            yield "quotation marks read as they are"
        if self.kind == ".xlsx" and len(self._sheets) > 1:
            yield f"the first of {len(self._sheets)} sheets, {self._sheets[0]!r}"
        if self.encoding[1]:
            yield self.encoding[1]

    def open(self) -> IO[bytes]:
        """The bytes of the file, expanded. Raises `DataError` where they grow beyond measure."""
        expand: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}.get(
            Path((self.member or self.path.name).lower()).suffix
        )
        if self.member is None:
            if not expand:
                return self.path.open("rb", CHUNK)  # between chunks, other threads may go on
            size, raw = self.path.stat().st_size, expand(self.path, "rb")
        else:
            archive = zipfile.ZipFile(self.path)
            try:
                size, raw = archive.getinfo(self.member).compress_size, archive.open(self.member)
            except KeyError:
                raise DataError(f"{self.shown}: the archive does not hold it any more.") from None
            raw = expand(raw, "rb") if expand else raw
        return io.BufferedReader(_Expanding(raw, self.shown, max(EXPANSION_FREE, EXPANSION_LIMIT * size)), CHUNK)

    @cached_property
    def _first_stamp(self) -> tuple[int, int]:
        return self._stamp()

    def _stamp(self) -> tuple[int, int]:
        with self._reading():
            status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._first_stamp != self._stamp():
            raise DataError(
                f"{self.shown}: the file has changed since it was first read. Start again when it is complete."
            )

    @contextmanager
    def _reading(self) -> Generator[None]:
        """Turns what the libraries below say of a file that cannot be read into a `DataError`."""
        try:
            yield
        except EOFError as error:
            raise DataError(f"{self.shown}: ends too early ({error}); the file is cut off. Get it again.") from None
        except (zlib.error, lzma.LZMAError, zstd.ZstdError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            raise DataError(f"{self.shown}: cannot be expanded ({error}); the file is damaged. Get it again.") from None
        except (RuntimeError, NotImplementedError) as error:
            if self.member is None or isinstance(error, RecursionError):
                raise
            raise DataError(f"{self.shown}: cannot be expanded ({error}). Unpack it first.") from None
        except UnicodeDecodeError:
            raise DataError(f"{self.shown}: the file has changed while it was read. Start again.") from None
        except OSError as error:
            raise DataError(f"{self.shown}: cannot be read ({error.strerror or error}).") from None

    def _decoded(self, newline: str | None) -> io.TextIOWrapper:
        return io.TextIOWrapper(self.open(), encoding=self.encoding[0], newline=newline)

    def _whole_lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        number = 0
        while line := text.readline(LONGEST_ROW):
            number += 1
            if len(line) == LONGEST_ROW:
                raise DataError(
                    f"{self.shown}, line {number}: is longer than {LONGEST_ROW >> 20} MB. Divide it into documents."
                )
            yield line

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Numbered lines of a text without their ends, which may be of any system's kind."""
        with self._decoded(None) as text:
            for number, line in enumerate(self._whole_lines(text), 1):
                yield number, line.rstrip("\n")

    def _text(self) -> Iterator[Row | BadRow]:
        separation = self.separation
        if separation == "lines":
            for number, line in self._lines():
                if line.strip():
                    yield Row({"text": line}, Origin(self.shown, number))
            return
        run: list[str] = []
        start = size = 0
        for number, line in self._lines():
            if line.strip() or (separation == "files" and run):
                start = start or number
                run.append(line)
                size += len(line) + 1
                if size > LONGEST_ROW:
                    raise DataError(
                        f"{self.shown}, line {start}: the document from here on is longer than {LONGEST_ROW >> 20} MB. "
                        "Divide it, or choose another data.documents."
                    )
            elif run:
                yield Row({"text": "\n".join(run)}, Origin(self.shown, start))
                run, start, size = [], 0, 0
        if text := "\n".join(run).rstrip("\n"):
            yield Row({"text": text}, Origin(self.shown, start))

    def _json_stream(self) -> Any:
        """Bytes, which are parsed faster, where they are UTF-8; else text."""
        if not self.encoding[0].startswith("utf-8"):
            return self._decoded("\n")
        stream = self.open()
        if self.encoding[0] == "utf-8-sig":
            stream.read(len(codecs.BOM_UTF8))
        return stream

    @cached_property
    def _is_document(self) -> bool:
        """Whether JSON is one list, or in a `.json` file one object, and not one on each line."""
        with self._json_stream() as stream:
            filled = (line for line in _cut_lines(stream) if line.strip())
            first, second = next(filled, b""), next(filled, None)
        opening = first.lstrip()[:1]
        if opening not in ("[", b"[") and (opening not in ("{", b"{") or self.kind == ".jsonl"):
            return False
        return second is None or not _is_json(first)

    def _json(self) -> Iterator[Row | BadRow]:
        """JSON as a list, as an object with one list, or as lines; which, is seen from the content."""
        with self._json_stream() as stream:
            if not self._is_document:
                for number, line in enumerate(_cut_lines(stream), 1):
                    if line.strip():
                        yield self._line(line, Origin(self.shown, number))
                return
            content = stream.read(LARGEST_DOCUMENT + 1)
        if len(content) > LARGEST_DOCUMENT:
            raise DataError(
                f"{self.shown}: a JSON document of more than {LARGEST_DOCUMENT >> 20} MB. Write it as .jsonl, one "
                "object a line, which is read as a stream."
            )
        try:
            value = _loads(content)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.shown}, line {error.lineno}, column {error.colno}: is not JSON ({error.msg}). Mend it there."
            ) from None
        if isinstance(value, dict):
            lists = {key: item for key, item in value.items() if isinstance(item, list)}
            if len(lists) != 1:
                raise DataError(
                    f"{self.shown}: holds one JSON object with {'several lists' if lists else 'no list of rows'}: "
                    f"{', '.join(map(excerpt, lists or value))}. Rows are a list [{{...}}, {{...}}], alone or as the "
                    "one list of an object, or one object a line."
                )
            (value,) = lists.values()
        for number, item in enumerate(value, 1):
            yield _json_row(item, Origin(self.shown, number))

    def _line(self, line: str | bytes, origin: Origin) -> Row | BadRow:
        if len(line) > LONGEST_ROW:
            return BadRow(origin, f"the line is longer than {LONGEST_ROW >> 20} MB. Is it one record?")
        try:
            return _json_row(_loads(line), origin)
        except json.JSONDecodeError as error:
            return BadRow(origin, f"is not JSON ({error.msg}, column {error.colno}): {_excerpt(line)}")

    @cached_property
    def _dialect(self) -> _Dialect:
        with self._decoded("") as text:
            return _find_dialect(text.read(1 << 16), "\t" if self.kind == ".tsv" else ",")

    def _csv(self) -> Iterator[Row | BadRow]:
        csv.field_size_limit(LONGEST_ROW)
        with self._decoded("") as text:
            reader = self._dialect.reader(self._whole_lines(text))
            try:
                header = next((cells for cells in reader if any(cell.strip() for cell in cells)), None)
                if header is None:
                    return
                names = self._names(header)
                filled = (cells for cells in reader if cells)
                for number, cells in enumerate(filled, 1):
                    origin = Origin(self.shown, number)
                    if len(cells) == len(names):
                        yield Row(dict(zip(names, cells, strict=True)), origin)
                    else:
                        yield BadRow(
                            origin,
                            f"(line {reader.line_num}) has {len(cells)} cells where the header has {len(names)}.",
                        )
            except csv.Error as error:
                raise DataError(
                    f"{self.shown}, line {reader.line_num}: is not CSV ({error}). Close each quotation mark and double "
                    "those within a cell, or write the rows as .jsonl."
                ) from None

    def _names(self, header: Iterable[Any]) -> list[str]:
        """The names of columns. Raises `DataError` where one stands twice."""
        names = [str(name).strip() for name in header]
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise DataError(f"{self.shown}: the column {twice!r} stands twice in the header. Rename one.")
        return names

    @contextmanager
    def _seekable(self) -> Generator[IO[bytes]]:
        """The expanded bytes in a file that can be read from anywhere."""
        if self.member is None and self.path.suffix.lower() not in COMPRESSIONS:
            with self.path.open("rb") as file:
                yield file
        else:
            with self.open() as stream, tempfile.TemporaryFile() as file:
                shutil.copyfileobj(stream, file, CHUNK)
                file.seek(0)
                yield file

    def _table(self) -> Iterator[Row]:
        """Parquet, an Arrow stream, which is what `datasets` writes, or an Arrow file (Feather)."""
        pyarrow, parquet = _import("pyarrow", self.shown), _import("pyarrow.parquet", self.shown)
        number = 0
        with self._seekable() as file:
            try:
                if self.kind == ".parquet":
                    opened = parquet.ParquetFile(file)
                    schema, batches = opened.schema_arrow, opened.iter_batches(ROWS_AT_ONCE)
                elif file.read(6) == b"ARROW1":
                    opened = pyarrow.ipc.open_file(file)
                    schema, batches = opened.schema, map(opened.get_batch, range(opened.num_record_batches))
                else:
                    file.seek(0)
                    batches = pyarrow.ipc.open_stream(file)
                    schema = batches.schema
                self._names(schema.names)
                for batch in batches:
                    batch.validate(full=True)
                    for start in range(0, len(batch), ROWS_AT_ONCE):
                        for columns in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                            number += 1
                            yield Row(without_nulls(columns), Origin(self.shown, number))
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                where = f"behind row {number}, " if number else ""
                raise DataError(
                    f"{self.shown}: {where}cannot be read as {self.kind} ({_excerpt(str(error))}). Get it again."
                ) from None

    @cached_property
    def _workbook(self) -> Any:
        calamine = _import("python_calamine", self.shown)
        with self._seekable() as file:
            try:
                self._check_workbook(file)
                file.seek(0)
                return calamine.CalamineWorkbook.from_filelike(file)
            except (calamine.CalamineError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
                raise DataError(
                    f"{self.shown}: cannot be read as .xlsx ({error}). Save it anew as .xlsx, without a password."
                ) from None

    def _check_workbook(self, file: IO[bytes]) -> None:
        """Expands a workbook once, in passing: what reads it counts neither bytes nor cells."""
        left = max(EXPANSION_FREE, EXPANSION_LIMIT * file.seek(0, io.SEEK_END))
        archive = zipfile.ZipFile(file)
        for entry in archive.infolist():
            rows = columns = 0
            tail = b""
            with archive.open(entry) as member:
                while chunk := member.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise _too_large(self.shown)
                    for letters, digits in _CELL.findall(tail + chunk):
                        rows, columns = max(rows, int(digits)), max(columns, _column(letters))
                    if rows * columns > MOST_CELLS:
                        raise DataError(
                            f"{self.shown}: {entry.filename} reaches to row {rows} and column {columns}, more than "
                            "can be held. Delete what stands far out, or save the sheet as .csv."
                        )
                    tail = chunk[-256:]

    @cached_property
    def _sheets(self) -> list[str]:
        return list(self._workbook.sheet_names)

    def _xlsx(self) -> Iterator[Row]:
        sheet = self._workbook.get_sheet_by_name(self._sheets[0]).iter_rows()
        numbered = ((number, cells) for number, cells in enumerate(sheet, 1) if any(cell != "" for cell in cells))
        header = next(numbered, None)
        if header is None:
            return
        names = self._names(header[1])
        for number, cells in numbered:
            filled = {name: _cell(cell) for name, cell in zip(names, cells, strict=True) if name}
            yield Row(filled, Origin(self.shown, number))


def without_nulls(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of an Arrow table without the nulls in objects within them: there, all objects of a column have the keys
    of each, and one that an object did not have is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in columns.items()}


def _cell(value: Any) -> Any:
    """What a spreadsheet's cell holds, as a table of texts would: numbers, of which it knows only one kind, and dates
    as they are written."""
    if isinstance(value, bool | str):
        return value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class _Expanding(io.RawIOBase):
    """Expanded bytes, counted against a limit."""

    def __init__(self, stream: IO[bytes], shown: str, limit: int) -> None:
        self._stream, self._shown, self._left = stream, shown, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._shown)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _column(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + letter - ord("A") + 1
    return number


def _too_large(shown: str) -> DataError:
    return DataError(
        f"{shown}: expands to more than {EXPANSION_LIMIT} times its size, as no text does. If you trust it, unpack it "
        "first."
    )


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    escape: str | None = None
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL

    def reader(self, lines: Iterable[str]) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, escapechar=self.escape, quoting=self.quoting, strict=True)


def _find_dialect(sample: str, usual: str) -> _Dialect:
    """How the beginning of a file gives the most rows as wide as its header; the `usual` delimiter where several do."""
    delimiters = [usual, *(delimiter for delimiter in ",\t;|" if delimiter != usual)]
    dialects = [_Dialect(delimiter) for delimiter in delimiters]
    if '\\"' in sample:
        dialects += [_Dialect(delimiter, "\\") for delimiter in delimiters]
    dialects.append(_Dialect("\t", None, csv.QUOTE_NONE))

    def fit(dialect: _Dialect) -> tuple[int, int]:
        widths = []
        with suppress(csv.Error):  # not CSV, or cut within quotation marks
            widths += (len(row) for row in dialect.reader(io.StringIO(sample, newline="")) if row)
        width = widths[0] if widths else 0
        return (widths.count(width), width) if width > 1 or dialect.delimiter == usual else (0, 0)

    return max(dialects, key=fit)


def _settle_encoding(file: DataFile) -> tuple[str, str]:
    given = _known(file.wanted_encoding)
    with file._reading():
        with file.open() as stream:
            head = stream.read(1 << 16)
        chosen, note = given or "utf-8", ""
        if marked := next((name for mark, name in MARKS if head.startswith(mark)), None):
            chosen = marked
        elif given in (None, "utf-16"):
            chosen = _wide_latin(head) or ("utf-16-le" if given else "utf-8")
        if not chosen.startswith("utf-8"):
            note = f"read as {chosen}"
        hint = ""
        bad = _first_bad_byte(file, chosen)
        if bad is None:
            return chosen, note
        before, behind, line = _around(file, bad)
        if given is None and chosen == "utf-8" and not _damaged_utf8(before, behind):
            sample = _foreign_lines(before, behind, whole=bad <= len(before))
            guess = _wide_asian(head) or _east_asian(sample) or _alphabetic(sample)
            if guess in ALPHABETIC[1:]:
                # one alphabet's bytes are another's letters: a guess is good enough for a hint only
                hint = f" It may be {guess}."
            elif guess:
                words = ", ".join(f"“{word}”" for word in _foreign_words(sample, guess))
                note = f"read as {guess} (found out: {words}; data.encoding reads it otherwise)"
                chosen, bad = guess, _first_bad_byte(file, guess)
                if bad is None:
                    _check_guess(file, guess)
                    return chosen, note
                _, behind, line = _around(file, bad)
    where = f"offset {bad}" + ("" if chosen.startswith(("utf-16", "utf-32")) else f" (line {line})")
    what = (
        f"byte 0x{behind[:1].hex()} at {where} cannot be decoded"
        if behind
        else f"the file ends within a character at {where}"
    )
    name = "UTF-8" if chosen.startswith("utf-8") else chosen
    raise DataError(
        f"{file.shown}: is not {name}: {what}. Mend the file there, or give the encoding it was written in with "
        f"data.encoding.{hint}"
    )


def _known(encoding: str | None) -> str | None:
    if encoding is None:
        return None
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise DataError(f"data.encoding: {encoding!r} is no known encoding; try utf-8, gb18030, big5.") from None


def _first_bad_byte(file: DataFile, encoding: str) -> int | None:
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0
    with file.open() as stream:
        while True:
            chunk = stream.read(CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done + len(chunk) - len(error.object) + error.start
            except UnicodeError:  # of codecs that do not say where
                return done
            if not chunk:
                return None
            done += len(chunk)


def _around(file: DataFile, offset: int) -> tuple[bytes, bytes, int]:
    """Some bytes before and from `offset` on, and the number of its line."""
    before, line, left = b"", 1, offset
    with file.open() as stream:
        while left and (chunk := stream.read(min(left, CHUNK))):
            left -= len(chunk)
            line += chunk.count(b"\n")
            before = (before + chunk)[-SAMPLE:]
        return before, stream.read(SAMPLE), line


def _damaged_utf8(before: bytes, behind: bytes) -> bool:
    """Whether what is not ASCII is UTF-8 for the most part, or was up to the bad byte: no other encoding looks so."""
    if sum(character > "\x7f" for character in before.decode("utf-8", "ignore")) >= 8:
        return True
    characters = (before + behind).decode("utf-8", "surrogateescape")
    bad = sum("\udc80" <= character <= "\udcff" for character in characters)
    return sum(character > "\x7f" for character in characters) > 3 * bad


def _foreign_lines(before: bytes, behind: bytes, whole: bool) -> bytes:
    """The lines that are not ASCII, without what is cut at the ends."""
    lines = (before + behind).split(b"\n")
    lines = lines[not whole : len(lines) - (len(behind) == SAMPLE)] or lines
    return b"\n".join(line for line in lines if not line.isascii())


def _wide_latin(head: bytes) -> str | None:
    """UTF-16 without its mark: texts with Latin letters, digits or spaces have a zero in every other byte."""
    pairs = max(1, len(head) // 2)
    low, high = head[0::2].count(0) / pairs, head[1::2].count(0) / pairs
    if max(low, high) < 0.2 or min(low, high) > 0.02:
        return None
    return "utf-16-le" if high > low else "utf-16-be"


def _wide_asian(head: bytes) -> str | None:
    """UTF-16 without its mark: with the right order of bytes all characters are usual ones, with the other half."""
    if b"\0" not in head:  # at least line ends have one
        return None
    for name in ("utf-16-le", "utf-16-be"):
        text = head.decode(name, "replace")
        if len(_WIDE.findall(text)) > 0.95 * len(text):
            return name
    return None


def _east_asian(sample: bytes) -> str | None:
    """The encoding of `EAST_ASIAN` that makes usual characters of nearly all of `sample`."""

    def share(encoding: str) -> float:
        usual, telling = _usual(encoding)
        found = Counter(character for character in sample.decode(encoding, "replace") if character > "\x7f")
        total = sum(found.values())
        if not total or sum(found[character] for character in telling) < 0.1 * total:
            return 0
        return (
            sum(
                count
                * (
                    1
                    if character in usual
                    else 0.4
                    if "\u4e00" <= character <= "\u9fff"
                    else -1
                    if character == "\ufffd" or "\ue000" <= character <= "\uf8ff"
                    else 0
                )
                for character, count in found.items()
            )
            / total
        )

    best = max(EAST_ASIAN, key=share)
    return best if share(best) > 0.7 else None


@cache
def _usual(encoding: str) -> tuple[frozenset[str], frozenset[str]]:
    """The usual characters of an East Asian encoding, which stand together in its table, and those without which
    there is no text in it: with other encodings, the bytes of one language are usual characters of another."""
    table, leads = {
        "gb18030": ("gb2312", range(0xB0, 0xD8)),
        "big5hkscs": ("big5", range(0xA4, 0xC7)),
        "cp932": ("euc_jp", (0xA4, 0xA5, *range(0xB0, 0xD0))),
        "euc_jp": ("euc_jp", (0xA4, 0xA5, *range(0xB0, 0xD0))),
        "cp949": ("euc_kr", range(0xB0, 0xC9)),
    }[encoding]
    usual = frozenset(bytes((lead, trail)).decode(table, "ignore") for lead in leads for trail in range(0x40, 0xFF))
    kana = frozenset(map(chr, range(0x3041, 0x30FF)))
    telling = {"cp932": kana, "euc_jp": kana, "cp949": frozenset("이다는을에의가고하지로기도사리나은를서한")}
    return usual | PUNCTUATION, telling.get(encoding, usual)


def _alphabetic(sample: bytes) -> str | None:
    """The encoding of `ALPHABETIC` that charset-normalizer finds, if its words have capitals where words have them."""
    import charset_normalizer

    match = charset_normalizer.from_bytes(sample, cp_isolation=list(ALPHABETIC)).best()
    if match is None:
        return None
    text = sample.decode(match.encoding)
    encoding = "cp1252" if sample.decode("cp1252", "replace") == text else match.encoding
    words = [word for word in re.findall(r"[^\W\d_]+", text) if word in (word.lower(), word.upper(), word.capitalize())]
    good = sum(character > "\x7f" for word in words for character in word)
    good += sum(character in PUNCTUATION for character in text)
    return encoding if good >= 0.8 * sum(character > "\x7f" for character in text) else None


def _check_guess(file: DataFile, encoding: str) -> None:
    """Raises `DataError` for bytes that do decode, but to what is no text: damaged ones, and the UTF-8 of another file
    that was joined on, of which an alphabet decodes nearly all."""
    start = 0
    with file.open() as stream:
        for number, line in enumerate(_cut_lines(stream), 1):
            text = "" if line.isascii() else line.decode(encoding, "replace")
            if text and encoding in ALPHABETIC:
                with suppress(UnicodeDecodeError):
                    line.decode()
                    raise DataError(
                        f"{file.shown}, line {number}: is UTF-8, while other lines are {encoding}. Bring all to UTF-8, "
                        "or say with data.encoding what they are."
                    )
            if odd := _ODD.search(text):
                offset = start + len(text[: odd.start()].encode(encoding, "replace"))
                raise DataError(
                    f"{file.shown}: is {encoding} as it seems, but for U+{ord(odd[0]):04X} at offset {offset} (line "
                    f"{number}), which no text has. Mend the file there, or say with data.encoding what it is."
                )
            start += len(line)


def _foreign_words(sample: bytes, encoding: str, count: int = 2) -> list[str]:
    words = (word.strip(".,;:!?\"'()[]{}") for word in sample.decode(encoding, "replace").split())
    return list(dict.fromkeys(word[:12] for word in words if not word.isascii() and "\ufffd" not in word))[:count]


def _cut_lines(stream: Any) -> Iterator[Any]:
    """Lines of text or of bytes; one that is too long is cut a little behind the limit."""
    while line := stream.readline(LONGEST_ROW + 1):
        yield line
        if len(line) > LONGEST_ROW:
            while line and line[-1:] not in ("\n", b"\n"):
                line = stream.readline(CHUNK)


def _loads(content: str | bytes) -> Any:
    """JSON, also with NaN, as Python writes it. Raises `JSONDecodeError`."""
    try:
        return orjson.loads(content)
    except json.JSONDecodeError:
        if ("NaN" if isinstance(content, str) else b"NaN") not in content:  # ty: ignore[unsupported-operator]
            raise
        with suppress(ValueError, RecursionError):
            return json.loads(content)
        raise


def _is_json(line: str | bytes) -> bool:
    try:
        _loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _json_row(value: Any, origin: Origin) -> Row | BadRow:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return BadRow(origin, f"a row is a text or an object of columns, not {excerpt(value)}.")
    if _is_deeper(value, DEEPEST_ROW):
        return BadRow(origin, f"is nested more than {DEEPEST_ROW} deep: {excerpt(value)}")
    return Row(value, origin)


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner if isinstance(item, dict | list))


def _import(name: str, shown: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{shown}: reading this kind of file needs the package {name.partition('.')[0].replace('_', '-')}. "
            "Install it with: pip install 'finespun[tables]'"
        ) from None


class _Excerpt(reprlib.Repr):
    """A value in a few characters, however long or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 4, 8, 4, 4
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write one of more than 4,300 digits
        return super().repr_int(x, level) if x.bit_length() < 10_000 else "a number of thousands of digits"


def excerpt(value: Any, limit: int = 160) -> str:
    """`value` as Python writes it, cut to what a message can hold."""
    text = _Excerpt().repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _excerpt(line: str | bytes) -> str:
    text = line[:400].decode("utf-8", "replace") if isinstance(line, bytes) else line[:400]
    text = text.strip()
    return text if len(text) <= 80 else text[:77] + "..."
