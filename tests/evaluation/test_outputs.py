from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finespun.errors import DataError
from finespun.evaluation.outputs import Output, output_line, read_outputs

LINE = {
    "index": 1,
    "origin": "test.jsonl, row 2",
    "prompt": "江雪",
    "references": ["千山鸟飞绝"],
    "output": "万径人踪灭",
    "finish_reason": "stop",
    "output_tokens": 9,
}

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(texts, st.lists(texts, max_size=3), st.booleans()), min_size=1, max_size=4))
def test_what_is_written_is_read_back(rows: list[tuple[str, list[str], bool]]) -> None:
    outputs = [
        Output(
            index,
            f"test.jsonl, row {index + 1}",
            [{"role": "user", "content": text}] if messages else text,
            tuple(references),
            text + "\u2028\u0085\r\n",
            "length",
            3,
        )
        for index, (text, references, messages) in enumerate(rows)
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outputs.jsonl"
        file.write_text("".join(output_line(output) + "\n" for output in outputs), encoding="utf-8", newline="\n")
        assert read_outputs(file) == outputs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": None}, "`output`"),
        ({"references": "千山鸟飞绝"}, "`references`"),
        ({"finish_reason": "stopped"}, "`finish_reason`"),
        ({"output_tokens": -1}, "`output_tokens`"),
        ({"prompt": [{"role": "user"}]}, "`prompt`"),
        ({"prompt": []}, "`prompt`"),
        ({"index": 2}, "index 2 where 1 should be"),
        ({"outputs": "x"}, "unknown key `outputs`; did you mean `output`"),
    ],
)
def test_a_line_edited_by_hand_is_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"
    file.write_text(
        json.dumps(LINE | {"index": 0}) + "\n" + json.dumps(LINE | change) + "\n", encoding="utf-8", newline="\n"
    )
    with pytest.raises(DataError) as caught:
        read_outputs(file)
    assert f"{file}, line 2: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ['{"index": 0', "", "[1]\n"])
def test_what_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"outputs\.jsonl, line 1: "):
        read_outputs(file)


def test_a_line_that_was_removed_shows(tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"
    file.write_text("".join(json.dumps(LINE | {"index": index}) + "\n" for index in (0, 2)), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: has the index 2 where 1 should be"):
        read_outputs(file)


def test_a_file_that_is_not_there_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file.*finespun evaluate"):
        read_outputs(tmp_path / "outputs.jsonl")
