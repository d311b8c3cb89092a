"""Each kind of file, compressed or not, in any encoding, whole or damaged: rows as they were, or one plain refusal."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import random
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from finespun.data import readers
from finespun.data.readers import COMPRESSIONS, KINDS, BadRow, DataFile, Row, excerpt
from finespun.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COLUMNS = [
    {"prompt": "Who rows?", "completion": "The ferryman,\nslowly."},
    {"prompt": "江雪", "completion": '独钓"寒江雪" 🙂'},
    {"prompt": "a; b", "completion": "c,\td"},
]
TEXTS = ["The ferryman rows.", "独钓寒江雪 🙂", "Nobody speaks; nothing moves."]


def _csv(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(COLUMNS)
    return stream.getvalue().encode()


def _table(write: Callable[[pa.Table, Any], None]) -> bytes:
    stream = io.BytesIO()
    write(pa.Table.from_pylist(COLUMNS), stream)
    return stream.getvalue()


def _stream(table: pa.Table, stream: Any) -> None:
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


def _xlsx() -> bytes:
    book = openpyxl.Workbook()
    book.active.append(["prompt", "completion"])
    for row in COLUMNS:
        book.active.append(list(row.values()))
    book.create_sheet("notes").append(["not read"])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


CONTENT: dict[str, bytes] = {
    ".txt": "\n".join(TEXTS).encode(),
    ".md": b"# Title\n\nOne document.\n",
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in COLUMNS).encode(),
    ".json": json.dumps(COLUMNS, indent=1).encode(),
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".parquet": _table(lambda table, stream: parquet.write_table(table, stream)),
    ".arrow": _table(_stream),
    ".xlsx": _xlsx(),
}
EXPECTED: dict[str, list[dict[str, str]]] = dict.fromkeys(KINDS, COLUMNS) | {
    ".txt": [{"text": text} for text in TEXTS],
    ".md": [{"text": "# Title\n\nOne document."}],
}
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}

assert set(CONTENT) == set(KINDS)
assert set(COMPRESS) == set(COMPRESSIONS)


def put(path: Path, content: bytes | str, **options: Any) -> DataFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataFile(path, path.name, **options)


def rows(file: DataFile) -> list[dict[str, Any]]:
    found = list(file.rows())
    assert not [row for row in found if isinstance(row, BadRow)]
    return [dict(row.columns) for row in found]


@pytest.mark.parametrize("packing", ["", *COMPRESSIONS, ".zip"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_rows_in_each_packing(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"data{kind}{packing}"
    if packing == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"inner{kind}", CONTENT[kind])
        file = DataFile(path, "data.zip/inner", f"inner{kind}")
    else:
        file = put(path, COMPRESS.get(packing, bytes)(CONTENT[kind]))
    for _ in range(2):  # a file is read again and again
        assert rows(file) == EXPECTED[kind]
    first = 2 if kind == ".xlsx" else 1  # as the spreadsheet counts
    assert [row.origin.row for row in file.rows()] == list(range(first, first + len(EXPECTED[kind])))


def test_feather_and_lines_in_a_json_file_and_an_object_with_one_list(tmp_path: Path) -> None:
    stream = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist(COLUMNS), stream)
    assert rows(put(tmp_path / "a.arrow", stream.getvalue())) == COLUMNS
    assert rows(put(tmp_path / "lines.json", CONTENT[".jsonl"])) == COLUMNS
    assert rows(put(tmp_path / "object.json", json.dumps({"version": 1, "data": COLUMNS}))) == COLUMNS
    lone = {"messages": [{"role": "user", "content": "x"}]}
    assert rows(put(tmp_path / "lone.jsonl", json.dumps(lone))) == [lone], "one row, not one for each message"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found_out_and_said(tmp_path: Path, delimiter: str) -> None:
    file = put(tmp_path / "a.csv", b"\xef\xbb\xbf" + _csv(delimiter))
    assert rows(file) == COLUMNS
    assert (repr(delimiter) in file.how()) == (delimiter != ",")


PROSE = {
    "zh": "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n",
    "zht": "這個問題非常複雜，我們需要更多時間。\n臺灣的天氣很熱，請多喝水。\n",
    "ja": "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n",
    "fr": "Le café était fermé à cause de la neige.\nOù êtes-vous né ? Ça va très bien.\n",
}


@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        ("zh", "gb18030"),
        ("zh", "utf-16"),
        ("zht", "big5"),
        ("ja", "shift_jis"),
        ("ja", "euc_jp"),
        ("fr", "latin-1"),
        ("fr", "utf-16"),
        ("fr", "utf-16-le"),
    ],
)
def test_encodings_are_found_out_and_said(tmp_path: Path, language: str, encoding: str, lines: int) -> None:
    text = "".join(PROSE[language].splitlines(keepends=True)[:lines])
    file = put(tmp_path / "a.txt", text.encode(encoding))
    assert [row["text"] for row in rows(file)] == text.splitlines()
    assert "read as" in file.how()
    row = {"text": text}
    encoded = json.dumps(row, ensure_ascii=False).encode(encoding)
    assert rows(put(tmp_path / "a.jsonl", encoded)) == [row]
    given = put(tmp_path / "b.jsonl", encoded, wanted_encoding=encoding)
    assert rows(given) == [row]


def test_another_alphabet_is_named_but_not_read_unasked(tmp_path: Path) -> None:
    text = "Мой дядя самых честных правил, когда не в шутку занемог.\n"
    with pytest.raises(DataError, match=r"data.encoding. It may be cp1251"):
        list(put(tmp_path / "a.txt", text.encode("cp1251")).rows())
    assert rows(put(tmp_path / "b.txt", text.encode("cp1251"), wanted_encoding="cp1251")) == [{"text": text.rstrip()}]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_a_damaged_byte_is_refused_with_its_offset_and_never_filled_in(tmp_path: Path, encoding: str) -> None:
    whole = (PROSE["zh"] * 20).encode(encoding)
    at = len(PROSE["zh"].splitlines()[0].encode(encoding)) + 1
    with pytest.raises(DataError, match=rf"a.txt: is not .*offset {at} \(line 2\)"):
        list(put(tmp_path / "a.txt", whole[:at] + b"\xff" + whole[at:]).rows())


@pytest.mark.parametrize("packing", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, packing: str) -> None:
    content = COMPRESS[packing](
        CONTENT[kind] if kind == ".parquet" else random.Random(0).randbytes(20_000).hex().encode()
    )
    with pytest.raises(DataError, match=f"data{kind}{packing}"):
        list(put(tmp_path / f"data{kind}{packing}", content[: len(content) // 2]).rows())


@pytest.mark.parametrize("packing", [*COMPRESSIONS, ".zip"])
def test_a_bomb_is_refused(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "EXPANSION_FREE", 1 << 20)
    bomb = b'{"text": "' + b"a" * (8 << 20) + b'"}'
    path = tmp_path / f"a.jsonl{packing}"
    if packing == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", bomb)
        file = DataFile(path, path.name, "a.jsonl")
    else:
        file = put(path, COMPRESS[packing](bomb))
    with pytest.raises(DataError, match="expands to more than 200 times"):
        list(file.rows())


def test_a_line_that_is_too_long_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    monkeypatch.setattr(readers, "CHUNK", 300)
    long = json.dumps({"text": "a" * 5000})
    bad, good = put(tmp_path / "a.jsonl", long + '\n{"text": "b"}\n').rows()
    assert isinstance(bad, BadRow)
    assert bad.origin.row == 1
    assert isinstance(good, Row)
    assert (good.columns, good.origin.row) == ({"text": "b"}, 2)
    with pytest.raises(DataError, match="line 1: is longer"):
        list(put(tmp_path / "a.txt", "a" * 5000).rows())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,text\na,b\n", "'text' stands twice in the header"),
        ("a.csv", 'text,more\n"a,b\nc,d\n', "is not CSV"),
        ("a.json", '{"a": [1], "b": [2]}', "several lists"),
        ("a.json", "[" * 10_000 + "]" * 10_000, "is not JSON"),
        ("a.json", '[{"text": "a"}', "is not JSON"),
        ("a.docx", "x", "files of this kind are not read"),
        ("a.zst", "x", "files of this kind are not read"),
        ("a.parquet", "no table", "cannot be read as .parquet"),
        ("a.xlsx", "no sheet", "cannot be read as .xlsx"),
        ("a.jsonl", " \n", "the file is empty"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        list(put(tmp_path / name, content).rows())
    assert name in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "\\ud800"}',
        "[1]",
        "{" * 3,
        '{"text": "half',
        "[" * 10_000 + "]" * 10_000,
        '{"a": ' * 500 + "1" + "}" * 500,
    ],
)
def test_lines_that_are_no_rows_are_bad_rows_where_they_stand(tmp_path: Path, line: str) -> None:
    first, bad, last = put(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n').rows()
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadRow)
    assert bad.origin == ("a.jsonl", 2)


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", '{"text": "a"}\n')
    assert len(rows(file)) == 1
    file.path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="has changed"):
        list(file.rows())


def test_a_value_of_any_size_and_depth_is_shown_in_a_line() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (10**5000, deep, "a" * 10_000, {"a": deep}):
        assert len(excerpt(value)) <= 160


def _mutated(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 5))
            case 2:
                del data[at : at + chance.randint(1, 9)]
            case _:
                del data[at:]
    return bytes(data)


def _fuzz(folder: Path, rounds: int, seed: int) -> int:
    """Reads mutated files of every kind and packing; anything but rows and a `DataError` comes out of it. Returns how
    many could still be read."""
    chance = random.Random(seed)
    read = 0
    for kind in KINDS:
        for packing in ("", ".gz", ".zst"):
            path = folder / f"a{kind}{packing}"
            for _ in range(rounds):
                content = COMPRESS.get(packing, bytes)(CONTENT[kind])
                file = put(path, _mutated(content, chance))
                try:
                    found = list(file.rows())
                    file.how()
                except DataError:
                    continue
                read += 1
                assert found
                assert "\ufffd" not in repr([row.columns for row in found if isinstance(row, Row)])
    return read


def test_no_damage_ends_in_a_traceback(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, 40, seed=0) > 50


@pytest.mark.slow
def test_no_damage_ends_in_a_traceback_however_often_it_is_tried(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, 800, seed=1) > 1000


def test_keys_that_an_object_of_a_table_does_not_have_are_not_there(tmp_path: Path) -> None:
    """Arrow gives all objects of a column the keys of each, and null where one had none."""
    rows = [
        {"calls": [{"name": "a", "arguments": {"city": "Rome"}}], "other": None},
        {"calls": [{"name": "b", "arguments": {"n": 2}}], "other": "x"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (first, second) = DataFile(tmp_path / "t.parquet", "t").rows()
    assert [first.columns, second.columns] == rows


def test_numbers_and_dates_of_a_spreadsheet_are_read_as_they_are_written(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["whole", "part", "day", "flag", "text"])
    book.active.append([1999, 2.5, datetime.date(2026, 11, 25), True, "4.0"])
    book.save(tmp_path / "t.xlsx")
    (row,) = DataFile(tmp_path / "t.xlsx", "t").rows()
    assert list(row.columns.values()) == ["1999", "2.5", "2026-11-25", True, "4.0"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_line_of_200_mb_is_refused_and_not_held(tmp_path: Path, name: str) -> None:
    start, end = {"a.txt": ("", ""), "a.csv": ('text\n"', '"\n')}.get(name, ('{"text": "', '"}\n'))
    with (tmp_path / name).open("w", encoding="utf-8") as file:
        file.write(start)
        for _ in range(200):
            file.write("word " * 200_000)
        file.write(end)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="longer than 64 MB"):
            raise_bad(DataFile(tmp_path / name, name).rows())
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 400e6


def raise_bad(rows: Iterable[Row | BadRow]) -> None:
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(str(row))
