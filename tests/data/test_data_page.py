"""docs/data.md says what is read: each cell of its tables, each option and each command in it is tried here."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import shlex
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import openpyxl
import pyarrow as pa
import pytest
import yaml
from pyarrow import feather, parquet

from finespun.cli import _spelled_out, app
from finespun.data.formats import Example, RatedExample
from finespun.data.readers import COMPRESSIONS, KINDS, Origin
from finespun.data.texts import TRAIN, read_texts
from finespun.errors import DataError
from finespun.recipe import CleanRecipe, DataRecipe, Format, TemplateRecipe

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")

Rows = list[dict[str, Any]]


def table(heading: str) -> list[dict[str, str]]:
    """The first table below a heading of the page, each row by the names of its columns."""
    section = re.split(r"^##+ ", PAGE.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    header, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


# What goes into which kind of file


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}

ROWS: dict[str, Rows] = {
    "`text`": [
        {"text": "The ferryman rows."},
        {"text": "独钓寒江雪 🙂"},
        {"text": 'Nobody speaks; "nothing" moves, at all.'},
    ],
    "`prompt-completion`": [
        {"prompt": "Who rows?", "completion": " The ferryman,\nslowly."},
        {"prompt": "江雪", "completion": '独钓"寒江雪" 🙂'},
        {"prompt": "2+2?", "completion": "4"},
    ],
    "`prompt-completion` with messages": [
        {"prompt": [user("Hi")], "completion": [bot("Ho")]},
        {"prompt": [SYSTEM, user("Hi"), bot("Ho"), user("江雪?")], "completion": [bot("雪")]},
    ],
    "`alpaca`": [
        {"instruction": "Add.", "input": "2, 3", "output": "5", "system": ""},
        {"instruction": "Say hi.", "input": "", "output": "hi", "system": ""},
        {"instruction": "翻译", "input": "雪", "output": "snow", "system": "You translate."},
    ],
    "`alpaca` with history": [
        {"instruction": "And 3?", "input": "", "output": "9", "history": [["1?", "1"], ["2?", "4"]]},
        {"instruction": "Say hi.", "input": "", "output": "hi", "history": []},
    ],
    "`sharegpt`": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be kind."},
        {
            "conversations": [
                {"from": "human", "value": "Weather in Zürich?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Zürich"}}'},
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear."},
            ],
            "tools": json.dumps([WEATHER]),
        },
    ],
    "`chat`": [
        {"messages": [user("Hi"), bot("Ho")]},
        {"messages": [SYSTEM, user("江雪?"), bot("雪", weight=0), user("More"), bot("独钓寒江雪", weight=1)]},
        {
            "messages": [
                user("Weather in Zürich?"),
                bot(None, tool_calls=[CALL]),
                {"role": "tool", "tool_call_id": "call_1", "content": "clear"},
                bot("Clear."),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ],
    "`question-answer`": [
        {"context": "The sky is blue.", "question": "Color?", "answer": "Blue"},
        {"context": "", "question": "谁？", "answer": "鹭"},
    ],
    "`translation`": [{"source": "house", "target": "Haus"}, {"source": "snow", "target": "雪"}],
    "`translation` in one column": [
        {"translation": {"en": "house", "de": "Haus"}},
        {"translation": {"en": "snow", "de": "Schnee"}},
    ],
    "`summarization`": [
        {"document": "It rained.\nA lot.", "summary": "Rain."},
        {"document": "雪下了。", "summary": "雪"},
    ],
    "`preference`": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": "雪", "chosen": "白", "rejected": "黑"},
    ],
    "`preference` with messages": [
        {"prompt": [user("Color?")], "chosen": [bot("Blue.")], "rejected": [bot("Green.")]},
        {"prompt": [SYSTEM, user("雪?")], "chosen": [bot("白")], "rejected": [bot("黑")]},
    ],
    "`rated`": [
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        {"prompt": "雪", "completion": "黑", "label": False},
    ],
    "`rated` with messages": [
        {"messages": [user("Hi"), bot("Ooh")], "label": False},
        {"messages": [user("Hi"), bot("Ho")], "label": True},
    ],
}


def format_of(name: str) -> Format:
    return name.split("`")[1]  # ty: ignore[invalid-return-type]


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def cells(rows: Rows) -> list[list[Any]]:
    """One value a cell, as a person would have it: what is no text, truth or number goes in as JSON."""
    return [
        [
            json.dumps(value, ensure_ascii=False) if isinstance(value := row.get(name, ""), list | dict) else value
            for name in names(rows)
        ]
        for row in rows
    ]


def arrow(rows: Rows) -> pa.Table:
    return pa.table({name: [row.get(name) for row in rows] for name in names(rows)})


def write_csv(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([names(rows), *cells(rows)])


def write_xlsx(path: Path, rows: Rows) -> None:
    book = openpyxl.Workbook()
    for row in [names(rows), *cells(rows)]:
        book.active.append(row)
    book.save(path)


def write_arrow(path: Path, rows: Rows) -> None:
    table = arrow(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_txt(path: Path, rows: Rows) -> None:
    texts = [row["text"] if list(row) == ["text"] else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(texts), encoding="utf-8")


def one_file(name: str, write: Callable[[Path, Rows], object]) -> Callable[[Path, Rows], list[list[str]]]:
    def sources(folder: Path, rows: Rows) -> list[list[str]]:
        write(folder / name, rows)
        return [[str(folder / name)]]

    return sources


def arrow_files(folder: Path, rows: Rows) -> list[list[str]]:
    """A stream, as `datasets` writes it, and a file (Feather)."""
    write_arrow(folder / "stream.arrow", rows)
    feather.write_feather(arrow(rows), str(folder / "file.arrow"))
    return [[str(folder / "stream.arrow")], [str(folder / "file.arrow")]]


def one_document_a_file(folder: Path, rows: Rows) -> list[list[str]]:
    for number, row in enumerate(rows):
        write_txt(folder / f"{number}.md", [row])
    return [[str(folder)]]


def compressed(folder: Path, rows: Rows) -> list[list[str]]:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
    for ending in COMPRESSIONS:
        (folder / f"data.jsonl{ending}").write_bytes(pack[ending](jsonl(rows)))
    return [[str(folder / f"data.jsonl{ending}")] for ending in COMPRESSIONS]


def zipped(folder: Path, rows: Rows) -> list[list[str]]:
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/data.jsonl", jsonl(rows))
        archive.writestr("inner/notes.docx", "not read")
    return [[f"{folder}/data.zip{member}"] for member in ("", "/inner/data.jsonl", "/*.jsonl")]


def data_set(folder: Path, rows: Rows) -> list[list[str]]:
    (folder / "train.jsonl").write_bytes(jsonl(rows))
    return [[f"hf:{folder}"]]


WRITE: dict[str, Callable[[Path, Rows], list[list[str]]]] = {
    ".jsonl": one_file("data.jsonl", lambda path, rows: path.write_bytes(jsonl(rows))),
    ".json": one_file("data.json", lambda path, rows: path.write_text(json.dumps(rows, indent=1))),
    ".csv": one_file("data.csv", lambda path, rows: write_csv(path, rows, ",")),
    ".tsv": one_file("data.tsv", lambda path, rows: write_csv(path, rows, "\t")),
    ".xlsx": one_file("data.xlsx", write_xlsx),
    ".parquet": one_file("data.parquet", lambda path, rows: parquet.write_table(arrow(rows), path)),
    ".arrow": arrow_files,
    ".txt": one_file("data.txt", write_txt),
    ".md": one_document_a_file,
    "compressed": compressed,
    ".zip": zipped,
    "hf:": data_set,
}
"""Writes rows in a kind of file, and gives the sources that name them: each by itself has all rows."""

FITS = table("Formats and kinds of files")
CELLS = [(row["format"], kind, row[kind]) for row in FITS for kind in row if kind != "format"]


def content(example: Example) -> Any:
    """An example wherever it stands."""
    if isinstance(example, RatedExample):
        return content(example.example), example.label
    return replace(example, origin=Origin("", 0))


def read(source: list[str], format: Format | None = None) -> tuple[str, str, list[Any]]:  # noqa: A002
    """The format, the shape and the examples of a source."""
    texts = read_texts(DataRecipe(source=source, validation=0.0, format=format))
    return (
        texts.judged.format,
        texts.judged.shape,
        [content(example) for _, example in texts.examples(TRAIN)],
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, list[Any]]]:
    """What the rows of each format are in a `.jsonl`."""
    folder = tmp_path_factory.mktemp("expected")
    for number, rows in enumerate(ROWS.values()):
        (folder / f"{number}.jsonl").write_bytes(jsonl(rows))
    return {name: read([str(folder / f"{number}.jsonl")]) for number, name in enumerate(ROWS)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; what `datasets` keeps lies beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_the_table_has_all_formats_and_all_kinds() -> None:
    assert [row["format"] for row in FITS] == list(ROWS)
    assert {format_of(name) for name in ROWS} == set(get_args(Format))
    assert set(FITS[0]) == {"format", *KINDS, "compressed", ".zip", "hf:"}
    assert {said for _, _, said in CELLS} == {"yes", "no"}


@pytest.mark.parametrize(("name", "kind"), [cell[:2] for cell in CELLS if cell[2] == "yes"])
def test_yes_in_the_table(folder: Path, expected: dict[str, Any], name: str, kind: str) -> None:
    for source in WRITE[kind](folder, ROWS[name]):
        found, shape, examples = read(source)
        assert found == format_of(name)
        assert len(examples) == len(ROWS[name])
        assert (found, shape, examples) == expected[name]


@pytest.mark.parametrize(("name", "kind"), [cell[:2] for cell in CELLS if cell[2] == "no"])
def test_no_in_the_table(folder: Path, name: str, kind: str) -> None:
    """A text is a text, whatever stands in it; asked for another format, it is none."""
    assert kind in (".txt", ".md")
    (source,) = WRITE[kind](folder, ROWS[name])
    with pytest.raises(DataError, match=r"has no column .*it has 'text'"):
        read(source, format_of(name))


# The rest of the page

FORMATS = table("Formats")


def test_the_table_of_formats_has_all() -> None:
    assert [format_of(row["format"]) for row in FORMATS] == list(get_args(Format))


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row["format"])
def test_the_example_of_a_format_is_one(tmp_path: Path, row: dict[str, str]) -> None:
    columns = json.loads(row["example"].strip("`"))
    (tmp_path / "data.jsonl").write_bytes(jsonl([columns]))
    found, shape, examples = read([str(tmp_path / "data.jsonl")])
    assert (found, shape) == (format_of(row["format"]), row["shape"].split(",")[0])
    assert len(examples) == 1


def test_all_kinds_of_files_have_their_line() -> None:
    kinds = [kind for row in table("Kinds of files") for kind in re.findall(r"`(\.\w+)`", row["kind"])]
    assert sorted(kinds) == sorted(KINDS)


def test_all_options_of_the_page_are_some_and_none_is_missing() -> None:
    parts = {"clean": CleanRecipe, "template": TemplateRecipe}
    known = {name for name in DataRecipe.model_fields if name not in parts}
    known |= {f"{part}.{name}" for part, section in parts.items() for name in section.model_fields}
    named = {name.replace("-", "_") for name in re.findall(r"(?:--|`)data\.([a-z_-]+(?:\.[a-z_-]+)?)", PAGE)}
    named = {"columns" if name.startswith("columns.") else name for name in named} - {*parts, "jsonl"}
    assert named == known


@pytest.mark.parametrize("line", re.findall(r"^\$ (?:\S+ \| )?finespun ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE))
def test_a_command_of_the_page_is_one(line: str) -> None:
    arguments = shlex.split(line.replace("\\\n", " "))
    app.parse_args(_spelled_out(arguments), exit_on_error=False, print_error=False)


def test_the_recipe_of_the_page_is_one() -> None:
    (code,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipe = DataRecipe(**yaml.safe_load(code)["data"])
    assert recipe.source == ["letters.csv"]
    assert recipe.group_by == "author"
