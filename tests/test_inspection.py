"""Looking at data from the command line: check, show and select, on real data with the real default model's tokenizer."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import SHARED, sentences
from finespun import inspection
from finespun.cli import main
from finespun.data.readers import BadRow
from finespun.errors import DataError, ModelNotFound
from finespun.recipe import DataRecipe, Recipe

CHAT = [
    {"role": "system", "content": "You ferry."},
    {"role": "user", "content": "Who rows?"},
    {"role": "assistant", "content": "The old ferryman."},
    {"role": "user", "content": "渡口在哪里？"},
    {"role": "assistant", "content": "在江边。", "weight": 0.5},
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_check_says_what_it_found_on_terminal_and_page(
    write_jsonl: Callable[..., Path], in_tmp: Path, smollm2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(
        *[{"prompt": f"Say {n}.", "completion": text} for n, text in enumerate(sentences(30))],
        {"prompt": "Broken", "completion": None},
        {"prompt": "Say where.", "completion": "Write to ada@lovelace.org, she knows it."},
        name="pairs.jsonl",
    )
    code, out, err = run(capsys, "data", "check", str(path))
    assert code == 1
    assert "32 rows, format prompt-completion" in out
    assert re.search(r"tokens, \d+ % of them trained; an example has \d+ in the median", out)
    assert "Stops training: 1 of 32 (3.1 %) rows that cannot be used" in out
    assert "pairs.jsonl, row 31: `completion` is None" in out
    assert "texts with an e-mail address" in out
    assert "ada@lovelace.org" not in out
    assert out.rstrip().endswith("Training would refuse this data as it is.\nPage: pairs.check.html")
    page = Path("pairs.check.html").read_text(encoding="utf-8")
    assert "Training would refuse this data as it is." in page
    assert "ada@lovelace.org" not in page
    assert err == ""

    code, out, _ = run(capsys, "data", "check", str(path), "--quiet", "--data.clean.drop-matching", "Broken|ada@")
    assert (code, out) == (1, "")  # what cannot be used cannot be looked into either
    good = write_jsonl(*[{"text": text} for text in sentences(30)], name="good.jsonl")
    assert run(capsys, "data", "check", str(good), "--page", "pages/good.html")[0] == 0
    assert Path("pages/good.html").exists()


def test_check_takes_a_recipe_and_is_the_check_of_its_run(
    tiny_folder: Path, write_jsonl: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(*[{"ask": f"Say {n}.", "say": text} for n, text in enumerate(sentences(20))], name="own.jsonl")
    Path("recipe.yaml").write_text(
        f"model: {tiny_folder}\ndata:\n  source: own.jsonl\n  columns: {{prompt: ask, completion: say}}\n"
        "  max_length: 20\n",
        encoding="utf-8",
    )
    code, out, _ = run(capsys, "data", "check", "recipe.yaml")
    assert code == 1
    assert "Stops training: 20 of 20 (100 %) examples longer than data.max_length" in out
    code, out, _ = run(capsys, "data", "check", "recipe.yaml", "--data.too-long", "cut")
    assert code == 0
    code, _, err = run(capsys, "data", "check", "recipe.yaml", "own.jsonl")
    assert code == 2
    assert "give it alone" in err


def test_training_says_that_a_file_changed_since_its_check(
    tiny_folder: Path, write_jsonl: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(*[{"text": text} for text in sentences(12)], name="texts.jsonl")
    run(capsys, "data", "check", str(path), "--model", str(tiny_folder))
    write_jsonl(*[{"text": text} for text in sentences(13)], name="texts.jsonl")
    run(capsys, "train", "--model", str(tiny_folder), "--data", str(path), "--out", "r", "--training.max-steps", "1")
    code, _, err = run(
        capsys, "train", "--model", str(tiny_folder), "--data", str(path), "--out", "s", "--training.max-steps", "1"
    )
    assert code == 0
    assert "texts.jsonl has changed since it was checked" in err


@pytest.mark.parametrize(
    "arguments", [["data", "check"], ["data", "show"], ["data", "select", "--keep", "1", "--like", "x"]]
)
def test_a_missing_file_is_a_message(capsys: pytest.CaptureFixture[str], in_tmp: Path, arguments: list[str]) -> None:
    code, _, err = run(capsys, *arguments[:2], "nothing.jsonl", *arguments[2:])
    assert code == 2
    assert "there is no such file" in err


def test_shown_pieces_are_the_tokens_that_carry_loss(
    write_jsonl: Callable[..., Path], in_tmp: Path, smollm2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl({"messages": CHAT}, name="chat.jsonl")
    code, out, _ = run(capsys, "data", "show", str(path))
    assert code == 0
    head, *lines = out.splitlines()
    assert re.fullmatch(r"--- .*chat\.jsonl, row 1: \d+ tokens, \d+ trained", head)
    assert "\n".join(lines).strip() == (
        "<|im_start|>system\nYou ferry.<|im_end|>\n<|im_start|>user\nWho rows?<|im_end|>\n<|im_start|>assistant\n"
        "⟦The old ferryman.<|im_end|>⟧\n<|im_start|>user\n渡口在哪里？<|im_end|>\n<|im_start|>assistant\n"
        "⟦在江边。<|im_end|>⟧ weight 0.5"
    )
    code, out, _ = run(capsys, "data", "show", str(path), "--data.train-on", "last")
    assert out.count("⟦") == 1


def test_what_is_piped_in_is_looked_at(
    in_tmp: Path, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = "".join(json.dumps({"text": text}) + "\n" for text in sentences(12)).encode()
    line = [sys.executable, "-m", "finespun", "data", "check", "-", "--model", "smollm2-135m"]
    assert b"12 rows, format text" in subprocess.run(line, input=piped, capture_output=True, check=True).stdout
    assert Path("standard input.check.html").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    assert "data, row 1:" in run(capsys, "data", "show", "-", "--model", "smollm2-135m")[1]


def test_show_has_two_colours_on_a_terminal(write_jsonl: Callable[..., Path], smollm2_folder: Path) -> None:
    path = write_jsonl({"prompt": "Who rows?", "completion": "The ferryman."})
    reader, writer = pty.openpty()
    colours = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "finespun", "data", "show", str(path)]
    subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=True, env=colours)
    text = os.read(reader, 10_000).decode().replace("\r\n", "\n")
    trained = re.findall(r"\x1b\[30;102m(.*?)\x1b\[0m", text)
    assert trained == ["The ferryman.<|im_end|>"]
    assert "\x1b[36mWho rows?<|im_end|>" in text
    assert "⟦" not in text


def test_a_text_in_characters_of_several_tokens_is_shown_whole(smollm2_folder: Path, write_jsonl) -> None:
    (shown,) = inspection.show(Recipe.parse({"data": {"source": [str(write_jsonl({"text": "鸿雁来宾。"}))]}}))
    assert shown.pieces == [("鸿雁来宾。<|im_end|>", 1.0)]
    assert shown.trained_tokens == shown.tokens - 1


def test_show_finds_a_row_and_says_why_another_cannot_be(
    smollm2_folder: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": text} for n, text in enumerate(sentences(5))]
    path = write_jsonl(*rows, {"prompt": "x", "completion": 3})
    recipe = Recipe.parse({"data": {"source": [str(path)]}})
    (third,) = inspection.show(recipe, row=3)
    assert rows[2]["completion"] in third.pieces[1][0]
    (bad,) = inspection.show(recipe, row=6)
    assert isinstance(bad, BadRow)
    assert len(list(inspection.show(recipe, count=4))) == 4
    with pytest.raises(DataError, match="no row 9; the data has 6 rows"):
        list(inspection.show(recipe, row=9))


def test_selection_takes_the_rows_of_the_target_s_kind(
    write_jsonl: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SHARED.is_dir():
        pytest.skip("the corpora lie in ../shared/data, which is not here")
    webnlg = [
        json.loads(line) for line in (SHARED / "webnlg/train.jsonl").read_text(encoding="utf-8").splitlines()[:1500]
    ]
    dialogues = [
        json.loads(line) for line in (SHARED / "dialogsum/train_small.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    talks = [{"prompt": row["document"], "completion": row["summary"]} for row in dialogues]
    pool = write_jsonl(*webnlg, *talks[:400], {"prompt": "bad", "completion": 1}, name="pool.jsonl")
    like = write_jsonl(*talks[400:], name="like.jsonl")
    code, out, _ = run(capsys, "data", "select", str(pool), "--like", str(like), "--keep", "200")
    assert code == 0
    kept = [json.loads(line) for line in Path("selected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 200
    assert sum(row in talks for row in kept) >= 0.95 * 200
    whole, chance, selected = map(float, re.search(r"nats\): ([\d.]+) .*, ([\d.]+) .*, ([\d.]+) ", out).groups())
    assert selected < whole < chance
    code, _, err = run(capsys, "data", "select", str(pool), "--like", str(like), "--keep", "200")
    assert code == 2
    assert "is there already" in err


def test_a_target_of_no_known_format_is_said(write_jsonl: Callable[..., Path], in_tmp: Path) -> None:
    pool = write_jsonl({"text": "a"}, name="pool.jsonl")
    odd = write_jsonl({"document": "a", "references": ["b"]}, name="odd.jsonl")
    with pytest.raises(
        DataError, match=r"(?s)Not one row can be used.*odd.jsonl, row 1: has columns of no known format"
    ):
        inspection.select_rows(DataRecipe(source=[str(pool)]), [str(odd)], 1, Path("out.jsonl"))
    assert not Path("out.jsonl").exists()


def test_a_pool_is_cleaned_as_told_and_what_is_passed_over_is_counted(
    write_jsonl: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text} for text in sentences(12)]
    pool = write_jsonl(*rows, {"text": 5}, {"text": "secret " + rows[0]["text"]}, name="pool.jsonl")
    like = write_jsonl(*rows[:4], name="like.jsonl")
    options = ["--like", str(like), "--keep", "10", "--data.clean.drop-matching", "secret"]
    code, out, _ = run(capsys, "data", "select", str(pool), *options)
    assert code == 0
    assert "10 of 12 rows selected" in out
    assert "2 rows of the pool cannot be used or are left out by its cleaning" in out
    assert "secret" not in Path("selected.jsonl").read_text(encoding="utf-8")


def test_without_the_default_model_texts_are_looked_at_alone_and_a_named_one_must_be_there(
    write_jsonl: Callable[..., Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(name: str, **options: object) -> None:
        raise ModelNotFound(f"The model {name!r} was not found.")

    monkeypatch.setattr("finespun.models.catalog.locate", nowhere)
    path = write_jsonl(*[{"text": text} for text in sentences(12)])
    code, out, _ = run(capsys, "data", "check", str(path))
    assert code == 0
    assert " characters, 100 % of them trained" in out
    assert "smollm2-135m is not on this machine" in out
    assert "Data check for" not in Path("data.check.html").read_text(encoding="utf-8")
    code, _, err = run(capsys, "data", "check", str(path), "--model", "smollm2-135m")
    assert code == 2
    assert "was not found" in err


def test_a_limit_beyond_the_context_is_refused_as_in_training(
    tiny_folder: Path, write_jsonl: Callable[..., Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(*[{"text": text} for text in sentences(12)])
    code, _, err = run(capsys, "data", "check", str(path), "--model", str(tiny_folder), "--data.max-length", "500")
    assert code == 2
    assert "longer than the model's context of 128 tokens" in err


def test_where_there_is_no_terminal_progress_is_lines(
    tiny_folder: Path, write_jsonl: Callable[..., Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("finespun.training.progress.Reporter.LINE_EVERY", 0.0)
    path = write_jsonl(*[{"text": text} for text in sentences(12)])
    command = ["data", "check", str(path), "--model", str(tiny_folder)]
    assert "checking: 0 of 12 rows" in run(capsys, *command)[2]
    assert run(capsys, *command, "--quiet")[1:] == ("", "")
