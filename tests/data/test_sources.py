from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finespun.data.readers import BadRow, Documents, Row
from finespun.data.sources import MemoryRows, builtin_sets, open_sources, rows_of
from finespun.errors import DataError


def read(path: Path, documents: Documents | None = None) -> list[Row]:
    """All rows of a file, each of them usable."""
    (source,) = open_sources([str(path)], documents=documents)
    rows = list(rows_of(source))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return rows


@pytest.mark.parametrize(
    ("text", "documents", "expected"),
    [
        ("one\ntwo\nthree\n", None, ["one", "two", "three"]),
        ("a\nb\n\nc\n\n\n d\n", None, ["a\nb", "c", " d"]),
        ("a\nb\n\nc", "lines", ["a", "b", "c"]),
        ("a\nb\n\nc\n", "files", ["a\nb\n\nc"]),
        ("\n\na\nb\n\n", None, ["a", "b"]),
        ("a\r\nb\r\n\r\nc\r\n", None, ["a\nb", "c"]),
    ],
)
def test_documents_of_a_text_file(tmp_path: Path, text: str, documents, expected: list[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    assert [row.columns["text"] for row in read(path, documents)] == expected
    how = open_sources([str(path)], documents=documents)[0].parts[0].how()
    assert ("data.documents" in how) == (documents is None), "a choice that was made for the person is printed"


def test_rows_know_the_line_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\nb\n\n\nc\n")
    assert [row.origin.row for row in read(tmp_path / "t.txt")] == [1, 5]
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [str(row.origin) for row in read(tmp_path / "t.jsonl")] == [
        f"{tmp_path / 't.jsonl'}, row {n}" for n in (1, 3)
    ]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


@given(rows=st.lists(st.fixed_dictionaries({"prompt": cells, "completion": cells}), min_size=1))
def test_jsonl_and_json_give_back_any_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        assert [row.columns for row in read(folder / name)] == rows


def test_csv_keeps_quoted_newlines_commas_and_chinese(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('\ufeffprompt,completion\n"a, ""b""\nc",江雪\n'.encode())
    assert [dict(row.columns) for row in read(tmp_path / "t.csv")] == [{"prompt": 'a, "b"\nc', "completion": "江雪"}]


def test_a_folder_gives_its_files_in_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "notes.docx", "c/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [part.path.name for part in open_sources([str(tmp_path)])[0].parts] == ["a.jsonl", "b.txt", "d.csv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        open_sources([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("items", "said"), [([], "the list is empty"), (["a", 5], "data, row 2: an item is a text or a dict")]
)
def test_lists_that_are_no_data(items: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(MemoryRows(items).rows())


def test_the_fables_are_as_promised() -> None:
    fables = builtin_sets()["fables"]
    train, validation = (read(path) for path in (fables.train, fables.validation))
    rows = [row.columns for row in (*train, *validation)]
    assert len(rows) >= 240
    for row in rows:
        assert set(row) == {"title", "fable", "moral"}
        assert 80 <= len(row["fable"].split()) <= 150, row["title"]
        assert row["moral"].endswith("."), row["title"]
        assert ". " not in row["moral"], row["title"]
    for key in ("title", "fable", "moral"):
        assert len({row[key].lower() for row in rows}) == len(rows), f"two have the same {key}"
    openings = {" ".join(row["fable"].split()[:6]) for row in rows}
    assert len(openings) == len(rows)
    assert not {row["title"] for row in rows[: len(train)]} & {row["title"] for row in rows[len(train) :]}
