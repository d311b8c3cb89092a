"""What a name stands for: files, folders, patterns, archives, data sets, standard input; and what is said where nothing
stands behind it."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from finespun.data.readers import BadRow, Documents, Row
from finespun.data.sources import (
    MemoryRows,
    absolute,
    builtin_sets,
    open_sources,
    read_standard_input,
    rows_of,
)
from finespun.data.texts import TRAIN, read_texts
from finespun.errors import DataError
from finespun.recipe import DataRecipe


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


# Names. Each file holds its own name as its only text, so that it can be seen which were read.


def put(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("inner.txt", f"{name}/inner.txt")
        else:
            path.write_text(json.dumps({"text": name}) if path.suffix == ".jsonl" else name, encoding="utf-8")


def found(*names: str) -> list[tuple[list[str], float | None]]:
    """The texts and the weight of each source, as `read_texts` finds them."""
    sources = open_sources(absolute(names))
    return [([row.columns["text"] for row in rows_of(source)], source.weight) for source in sources]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("letters/*.txt", ["letters/a.txt", "letters/b.txt"]),
        ("letters/**/*.txt", ["letters/a.txt", "letters/b.txt", "letters/old/c.txt", "letters/old/older/d.txt"]),
        ("**/c.txt", ["letters/old/c.txt"]),
        ("letters/*/*.txt", ["letters/old/c.txt"]),
        ("letters/[bx].txt", ["letters/b.txt"]),
        ("letters/?.txt", ["letters/a.txt", "letters/b.txt"]),
        ("*.jsonl", ["stories.jsonl"]),
        ("letters/.*.txt", ["letters/.hidden.txt"]),
        ("letters/.hidden.txt", ["letters/.hidden.txt"]),
        ("*/*.zip", ["letters/e.zip/inner.txt"]),
        ("letters/../letters/a.txt", ["letters/a.txt"]),
    ],
)
def test_a_pattern_gives_the_files_it_matches(in_tmp: Path, pattern: str, files: list[str]) -> None:
    put("letters/b.txt", "letters/a.txt", "letters/old/c.txt", "letters/old/older/d.txt", "letters/e.zip")
    put("letters/.hidden.txt", "stories.jsonl", "notes.docx")
    assert found(pattern) == found(f"{in_tmp}/{pattern}") == [(files, None)]


NAMES = [
    "a,b.jsonl",
    "a, b.jsonl",
    "x:1.jsonl",
    "x:0.7",  # a folder
    "with space.jsonl",
    "draft [2].jsonl",
    "draft [a-z]*.jsonl",
    "why?.jsonl",
    "江雪，唐.jsonl",
    'it\'s a "quote" & more #1 = 100%.jsonl',
    "folder, with: all [of] it/deep.jsonl",
    "-.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_there_is_that_file_with_and_without_a_weight(in_tmp: Path, name: str) -> None:
    put(text := name if name.endswith(".jsonl") else f"{name}/in.jsonl")
    put("a", "b.jsonl", "x", "draft 2.jsonl", "draft b1.jsonl", "whyx.jsonl", "other.txt")  # what else it might mean
    assert found(name) == found(f"{in_tmp}/{name}") == [([text], None)]
    assert found(f"{name}:0.7", "other.txt:.3") == [([text], 0.7), (["other.txt"], 0.3)]
    assert found(f"{name}:2") == [([text], 2.0)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["stories.jsonl, letters/*.txt"], [(["stories.jsonl"], None), (["letters/a.txt", "letters/b.txt"], None)]),
        (
            ["stories.jsonl:0.7, letters/*.txt:0.3"],
            [(["stories.jsonl"], 0.7), (["letters/a.txt", "letters/b.txt"], 0.3)],
        ),
        (["stories.jsonl:3,letters:1,"], [(["stories.jsonl"], 3.0), (["letters/a.txt", "letters/b.txt"], 1.0)]),
        (["stories.jsonl:1.", "books.zip/inner.txt:.5"], [(["stories.jsonl"], 1.0), (["books.zip/inner.txt"], 0.5)]),
        (["stories.jsonl", "stories.jsonl"], [(["stories.jsonl"], None)] * 2),
    ],
)
def test_several_in_one_and_their_weights(in_tmp: Path, names: list[str], expected: list) -> None:
    put("stories.jsonl", "letters/a.txt", "letters/b.txt", "books.zip")
    assert found(*names) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["stories.jsonl:0.7", "letters"], "letters: has no weight while .*stories.jsonl has one; give one to each"),
        (["stories.jsonl, letters:0.3"], "stories.jsonl: has no weight while .*letters has one"),
        (["stories.jsonl:0", "letters:1"], "weight 0 takes no part; leave it out"),
        (["stories.jsonl:0.0"], "weight 0 takes no part; leave it out"),
        (["stories.jsonl:-1"], "stories.jsonl:-1: there is no such file"),
        (["stories.jsonl:70%"], "stories.jsonl:70%: there is no such file"),
        (["nothing.jsonl"], "nothing.jsonl: there is no such file or folder.*fables"),
        (["stories.jsonl, nothing.jsonl:1"], "nothing.jsonl: there is no such file"),
        (["letters/*.csv"], r"letters/\*.csv: no file matches this pattern"),
        (["*ers"], r"\*ers: no file matches"),  # a folder, which a pattern does not mean
        (["**/z*.txt"], "no file matches this pattern"),
        (["drafts"], "drafts: the folder holds no .txt, .md, .jsonl"),
        (["empty"], "empty: the folder holds no .txt"),
        (["drafts/*"], "drafts/notes.docx: files of this kind are not read"),
        (["drafts/notes.docx"], "drafts/notes.docx: files of this kind are not read"),
        (["-"], "-: there is no such file"),  # standard input is another's to read, and has no path
    ],
)
def test_names_behind_which_nothing_stands(in_tmp: Path, names: list[str], said: str) -> None:
    put("stories.jsonl", "letters/a.txt", "drafts/notes.docx")
    Path("empty").mkdir()
    with pytest.raises(DataError, match=said):
        found(*names)


def test_a_folder_leaves_out_hidden_files_and_what_describes_it(in_tmp: Path) -> None:
    put("set/b.txt", "set/in/a.jsonl", "set/c.zip", "set/.hidden.txt", "set/README.md", "set/readme.txt")
    put("set/notes.docx", "set/readme too.txt")
    assert found("set") == found("set/") == [(["set/b.txt", "set/c.zip/inner.txt", "set/in/a.jsonl", "set/readme too.txt"], None)]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read(in_tmp: Path) -> None:
    put("set/a.txt", "set/locked/b.txt")
    Path("set/locked").chmod(0)
    try:
        with pytest.raises(DataError, match=r"set/locked: the folder cannot be read \(Permission denied\)"):
            found("set")
    finally:
        Path("set/locked").chmod(0o700)


@pytest.mark.parametrize("name", ["~/stories.jsonl", "~/s*.jsonl", "~/books.zip/*.txt", "~/a,b.jsonl", "~/letters"])
def test_a_tilde_is_the_home_folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    monkeypatch.setenv("USERPROFILE", str(in_tmp))
    put("stories.jsonl", "books.zip", "a,b.jsonl", "letters/a.txt")
    (elsewhere := in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    bare, weighted = found(name), found(f"{name}:0.5")
    assert bare[0][0]
    assert weighted == [(bare[0][0], 0.5)]
    monkeypatch.chdir(in_tmp)
    assert found(name.removeprefix("~/")) == bare


# Archives

MEMBERS = {
    "m.jsonl": b'{"text": "m.jsonl"}',
    "a.txt": b"a.txt",
    "in/c.txt": b"in/c.txt",
    "in/deep/d.txt": b"in/deep/d.txt",
    "in/t.csv.gz": gzip.compress(b"text\nin/t.csv.gz\n", mtime=0),
    "draft [1].txt": b"draft [1].txt",
    "w:0.5.txt": b"w:0.5.txt",
    "江雪.txt": "江雪.txt".encode(),
    "notes.docx": b"not read",
    "in.zip": b"not read",
    "__MACOSX/._a.txt": b"not a text",
}
READABLE = [name for name in MEMBERS if not name.startswith("__MACOSX") and name not in ("notes.docx", "in.zip")]


@pytest.fixture
def books(in_tmp: Path) -> None:
    for name in ("books.zip", "CAPITALS.ZIP"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.mkdir("in")
            for member, content in MEMBERS.items():
                archive.writestr(member, content)


@pytest.mark.usefixtures("books")
@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("books.zip", READABLE),
        ("books.zip/m.jsonl", ["m.jsonl"]),
        ("books.zip/in/deep/d.txt", ["in/deep/d.txt"]),
        ("books.zip/*.jsonl", ["m.jsonl"]),
        ("books.zip/*.txt", [name for name in READABLE if name.endswith(".txt")]),
        ("books.zip/in/*.txt", ["in/c.txt", "in/deep/d.txt"]),
        ("books.zip/in/*.csv.gz", ["in/t.csv.gz"]),
        ("books.zip/*/d.txt", ["in/deep/d.txt"]),
        ("books.zip/[am].*", ["m.jsonl", "a.txt"]),
        ("books.zip/draft [1].txt", ["draft [1].txt"]),
        ("books.zip/江雪.txt", ["江雪.txt"]),
        ("books.zip/w:0.5.txt", ["w:0.5.txt"]),
        ("CAPITALS.ZIP/a.txt", ["a.txt"]),
        ("CAPITALS.ZIP", READABLE),
    ],
)
def test_members_of_an_archive(name: str, members: list[str]) -> None:
    assert found(name) == [(members, None)]
    assert found(f"{name}:0.5", "books.zip/a.txt:2") == [(members, 0.5), (["a.txt"], 2.0)]


@pytest.mark.usefixtures("books")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("books.zip/b.txt", "books.zip holds no such file; it holds m.jsonl, a.txt, in/c.txt"),
        ("books.zip/A.TXT", "books.zip holds no such file"),
        ("books.zip/*.parquet", "books.zip holds no such file"),
        ("books.zip/notes.docx", "books.zip/notes.docx: files of this kind are not read"),
        ("books.zip/*", "books.zip/notes.docx: files of this kind are not read"),
        ("books.zip/in.zip", "books.zip/in.zip: files of this kind are not read"),
        ("none.zip", "none.zip: the archive holds no .txt, .md"),
        ("damaged.zip", "damaged.zip: cannot be opened as a zip archive"),
        ("damaged.zip/a.txt", "damaged.zip: cannot be opened as a zip archive"),
        ("other.zip/a.txt", "other.zip/a.txt: there is no such file"),
    ],
)
def test_members_that_an_archive_does_not_hold(name: str, said: str) -> None:
    with zipfile.ZipFile("none.zip", "w") as archive:
        archive.writestr("notes.docx", "not read")
    Path("damaged.zip").write_text("not an archive")
    with pytest.raises(DataError, match=said):
        found(name)


# Data sets


@pytest.fixture
def data_set(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a folder that the package `datasets` reads, without a network, and gives its path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")

    def write(card: str = "", **files: list[str]) -> str:
        folder = in_tmp / "set"
        folder.mkdir(exist_ok=True)
        for name, texts in files.items():
            rows = [{"text": text} for text in texts]
            if name.endswith("_parquet"):
                parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name.removesuffix('_parquet')}.parquet")
            else:
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if card:
            (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n# A set\n")
        return str(folder)

    return write


POEMS_AND_TALES = """\
- config_name: poems
  data_files: poems.jsonl
- config_name: tales
  data_files:
  - split: train
    path: tales.jsonl
  - split: held
    path: held.jsonl
"""


@pytest.mark.parametrize("kind", ["", "_parquet"])
@pytest.mark.parametrize(
    ("split", "texts", "weight"),
    [
        ("", ["a", "b"], None),
        (":train", ["a", "b"], None),
        (":test", ["c"], None),
        (":train[:1]", ["a"], None),
        (":train+test", ["a", "b", "c"], None),
        (":0.5", ["a", "b"], 0.5),
        (":test:2", ["c"], 2.0),
    ],
)
def test_splits_of_a_data_set(
    data_set: Callable[..., str], kind: str, split: str, texts: list[str], weight: float | None
) -> None:
    folder = data_set(**{f"train{kind}": ["a", "b"], f"test{kind}": ["c"]})
    assert found(f"hf:{folder}{split}") == [(texts, weight)]
    assert found(f"hf:set{split}") == [(texts, weight)], "a folder from here"


@pytest.mark.parametrize(
    ("config", "texts"), [("[poems]", ["p"]), ("[tales]", ["t"]), ("[tales]:train", ["t"]), ("[tales]:held", ["h"])]
)
def test_configurations_of_a_data_set(data_set: Callable[..., str], config: str, texts: list[str]) -> None:
    folder = data_set(POEMS_AND_TALES, poems=["p"], tales=["t"], held=["h"])
    assert found(f"hf:{folder}{config}") == [(texts, None)]
    (source,) = open_sources([f"hf:{folder}{config}"])
    split = "" if ":" in config else ":train"
    assert [str(row.origin) for row in rows_of(source)] == [f"hf:{folder}{config}{split}, row 1"]


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("[poems]:held", "Unknown split .held.*'train'"),
        ("[letters]", "'letters' not found. Available: .*'poems', 'tales'"),
        ("", "(?s)Config name is missing.*'poems', 'tales'"),
        ("/nowhere", "Couldn't find any data file at .*nowhere"),
    ],
)
def test_parts_that_a_data_set_does_not_have(data_set: Callable[..., str], spelled: str, said: str) -> None:
    name = f"hf:{data_set(POEMS_AND_TALES, poems=['p'], tales=['t'], held=['h'])}{spelled}"
    with pytest.raises(DataError, match=said) as error:
        read_texts(DataRecipe(source=[name]))
    assert str(error.value).startswith(f"{name}{'' if ':' in spelled else ':train'}: cannot be loaded: ")


@pytest.mark.parametrize("name", ["hf:", "hf:[x]", "hf:a[b", "hf:a[]", "hf:a]", "hf:a[b]c"])
def test_a_data_set_that_is_spelled_wrongly(name: str) -> None:
    with pytest.raises(DataError, match=r"is named hf:NAME, hf:NAME\[CONFIG\] or hf:NAME\[CONFIG\]:SPLIT"):
        found(name)


def test_a_data_set_that_changes_is_read_anew(data_set: Callable[..., str]) -> None:
    def texts() -> list[str]:
        read = read_texts(DataRecipe(source=["hf:set"], validation=0.0))
        return [example.text for _, example in read.examples(TRAIN)]

    data_set(train=["a", "b"])
    assert texts() == texts() == ["a", "b"]
    data_set(train=["c"])
    assert texts() == ["c"]


def test_a_row_of_a_data_set_that_cannot_be_decoded(data_set: Callable[..., str]) -> None:
    picture = pytest.importorskip("PIL.Image", reason="pictures are decoded by the package pillow")
    data_set(metadata=[])
    picture.new("RGB", (2, 2)).save("set/good.png")
    Path("set/bad.png").write_bytes(b"no picture")
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("good", "bad")]
    Path("set/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="set:train: cannot be read behind row 1: cannot identify image file"):
        read_texts(DataRecipe(source=["hf:set"], validation=0.0))


@pytest.mark.parametrize(
    ("name", "package", "said"),
    [
        ("hf:set", "datasets", "set:train: data sets of the hub need the package datasets"),
        ("a.parquet", "pyarrow", "a.parquet: reading this kind of file needs the package pyarrow"),
        ("a.arrow", "pyarrow", "a.arrow: reading this kind of file needs the package pyarrow"),
        ("a.xlsx", "python_calamine", "a.xlsx: reading this kind of file needs the package python-calamine"),
    ],
)
def test_a_package_that_is_missing_is_named(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, said: str
) -> None:
    put("set/train.jsonl", "a.parquet", "a.arrow", "a.xlsx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"{said}.*pip install 'finespun\\[tables\\]'"):
        read_texts(DataRecipe(source=[name], validation=0.0))


# Standard input


class Piped:
    """A standard input that gives bytes."""

    def __init__(self, content: bytes | None) -> None:
        self.buffer = io.BytesIO(content or b"")
        self.isatty = lambda: content is None


@pytest.mark.parametrize(
    ("content", "options", "rows"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n', {}, [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]),
        (b' \n[{"text": "a"},\n {"text": "b"}]', {}, [{"text": "a"}, {"text": "b"}]),
        (b'\xef\xbb\xbf{"text": "a"}', {}, [{"text": "a"}]),
        (b"One text.\n\nTwo\ntexts.\n", {}, [{"text": "One text."}, {"text": "Two\ntexts."}]),
        (b"[a stage direction]\nA line.\n", {"documents": "files"}, [{"text": "[a stage direction]\nA line."}]),
        ("白日依山尽，黄河入海流。\n".encode("gb18030"), {}, [{"text": "白日依山尽，黄河入海流。"}]),
        ("Мой дядя\n".encode("cp1251"), {"encoding": "cp1251"}, [{"text": "Мой дядя"}]),
        (b"prompt,completion\na,b\n", {"documents": "lines"}, [{"text": "prompt,completion"}, {"text": "a,b"}]),
    ],
)  # fmt: skip
def test_what_is_piped_in(
    monkeypatch: pytest.MonkeyPatch, content: bytes, options: dict[str, Any], rows: list[dict[str, str]]
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(content))
    assert read_standard_input(**options) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "nothing is piped in"),
        (b"", "standard input: the file is empty"),
        (b'{"text": "a"}\n{bad\n', "standard input, row 2: is not JSON"),
        (b"[a stage direction]\nA line.\n", "standard input, line 1, column 2: is not JSON"),
        (gzip.compress(b"a text", mtime=0), "standard input: is not UTF-8"),
    ],
)
def test_what_cannot_be_piped_in(monkeypatch: pytest.MonkeyPatch, content: bytes | None, said: str) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(content))
    with pytest.raises(DataError, match=said):
        read_standard_input()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'' names no data"),
        (" , ", "names no data"),
        ("~nobody-of-this-name/x.jsonl", "~nobody-of-this-name/x.jsonl: "),
        ("a long text " * 50, "there is no such file or folder"),
    ],
)
def test_a_name_that_can_be_none(in_tmp: Path, name: str, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        open_sources(absolute([name]))


def shown(name: str) -> list[str]:
    (source,) = open_sources([name])
    return [part.shown for part in source.parts]


def test_a_hidden_folder_is_left_out_and_a_copy_in_it_not_trained_twice(in_tmp: Path) -> None:
    put("nb/a.txt", "nb/.ipynb_checkpoints/a.txt", "nb/sub/.hidden/b.txt", "nb/sub/b.txt")
    assert shown("nb") == ["nb/a.txt", "nb/sub/b.txt"]


def test_an_archive_is_read_as_a_folder_and_an_exact_name_is_that_member(in_tmp: Path) -> None:
    with zipfile.ZipFile("a.zip", "w") as archive:
        for member in ("README.md", ".hidden.txt", "x/.git/y.txt", "draft [1].txt", "draft 1.txt"):
            archive.writestr(member, "a text")
    assert shown("a.zip") == ["a.zip/draft [1].txt", "a.zip/draft 1.txt"]
    assert shown("a.zip/draft [1].txt") == ["a.zip/draft [1].txt"]
    assert shown("a.zip/README.md") == ["a.zip/README.md"]


def test_a_data_set_in_a_folder_is_named_by_its_whole_path(in_tmp: Path) -> None:
    put("set/train.jsonl")
    assert absolute(["hf:set:train"]) == [f"hf:{in_tmp}/set:train"]
    assert absolute(["hf:somebody/set[en]:train"]) == ["hf:somebody/set[en]:train"]
