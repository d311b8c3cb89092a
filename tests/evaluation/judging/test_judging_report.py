"""Results for people, for programs and for training."""

from __future__ import annotations

import csv
import json
import re

import pytest
from studies import MODELS, answer_all, make_study, prefer

from finespun.data.formats import ExampleReader, PreferenceExample
from finespun.data.sources import open_sources, rows_of
from finespun.errors import DataError, RecipeError
from finespun.evaluation.judging.analysis import Results, analyse
from finespun.evaluation.judging.answers import Answer, Span
from finespun.evaluation.judging.report import (
    export_judgements,
    export_preferences,
    result_lines,
    write_results,
)

pytest.importorskip("choix")
pytest.importorskip("krippendorff")


@pytest.fixture
def judged(tmp_path) -> Results:
    """Two people who prefer the first model to the second, for Chinese texts too."""
    study = make_study(
        tmp_path,
        9,
        annotators=2,
        text=lambda model, row: f"秋风吹落叶，{'寒雁过江南' if model else '灯前夜已阑'} <{row}>",
    )

    def say(who: int, at: int) -> Answer:
        kind = study.annotators[who].tasks[at].kind
        answer = prefer(study, who, at, 0)
        return Answer(
            answer.choice, comment='好，\n"better"' if kind == "real" else "", spans=(Span(1, 2, 5),), seconds=3.5
        )

    return analyse(study, answer_all(study, say), draws=50)


def test_all_answers_as_jsonl(judged, tmp_path):
    assert export_judgements(judged, tmp_path / "out" / "all.jsonl") == 30
    rows = [json.loads(line) for line in (tmp_path / "out" / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    real = [row for row in rows if row["kind"] == "real"]
    assert len(real) == 18
    for row in real:
        preferred = row["models"][0 if row["choice"] == "first" else 1]
        assert preferred == [MODELS[0]]
        (error,) = row["errors"]
        assert error["text"] == row["texts"][1][2:5]
        assert error["models"] == row["models"][1]
        assert row["seconds"] == 3.5
    assert {row["kind"] for row in rows} == {"practice", "real", "known", "repeated"}


def test_all_answers_as_csv(judged, tmp_path):
    file = tmp_path / "all.csv"
    export_judgements(judged, file)
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")  # or a spreadsheet spoils the Chinese
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 30
    real = next(row for row in rows if row["kind"] == "real")
    assert real["comment"] == '好，\n"better"'
    assert "秋风吹落叶" in real["text 1"]
    assert {real["models 1"], real["models 2"]} == set(MODELS[:2])
    with pytest.raises(RecipeError, match=r"\.jsonl or \.csv"):
        export_judgements(judged, tmp_path / "all.xlsx")


def test_judged_pairs_are_read_as_preference_data(judged, tmp_path):
    file = tmp_path / "preferences.jsonl"
    assert export_preferences(judged, file) == 9
    reader = ExampleReader()
    examples = [reader.read(row) for source in open_sources([str(file)]) for row in rows_of(source)]
    assert all(isinstance(example, PreferenceExample) for example in examples)
    for example in examples:
        assert "灯前夜已阑" in example.chosen
        assert "寒雁过江南" in example.rejected
        assert example.prompt.startswith("Write line")
    with pytest.raises(RecipeError, match=r"\.jsonl"):
        export_preferences(judged, tmp_path / "preferences.csv")


def test_conversations_are_read_as_preference_data(tmp_path):
    study = make_study(tmp_path, 2, annotators=1, practice=0, known=0)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for item in study.items:
        object.__setattr__(item, "prompt", asked)
    results = analyse(study, answer_all(study, lambda who, at: prefer(study, who, at, 0)), draws=5)
    export_preferences(results, tmp_path / "p.jsonl")
    reader = ExampleReader()
    examples = [reader.read(row) for source in open_sources([str(tmp_path / "p.jsonl")]) for row in rows_of(source)]
    assert [len(example.prompt) for example in examples] == [2, 2]
    assert examples[0].chosen[0]["role"] == "assistant"


def test_nothing_judged_is_nothing_to_train_on(tmp_path):
    results = analyse(make_study(tmp_path), [], draws=5)
    with pytest.raises(DataError, match="nothing to train on"):
        export_preferences(results, tmp_path / "p.jsonl")
    assert "Nothing is compared yet." in result_lines(results)[0]


def test_what_is_told(judged, tmp_path):
    told = "\n".join(result_lines(judged))
    assert f"People prefer {MODELS[0]}." in told
    assert "18 judgements of 9 items by 2 annotators" in told
    assert f"{MODELS[0]} over {MODELS[1]}: 100.0 % [82.4, 100.0] of 18 preferences" in told
    assert "known answers 2 of 2 right" in told

    page = tmp_path / "results.html"
    write_results(judged, page)
    html = page.read_text(encoding="utf-8")
    assert "&lt;3&gt;" in html
    assert "<3>" not in html
    assert "秋风吹落叶" in html
    assert not re.search(r'(src|href)="(?!#)', html)  # it needs nothing else
    assert "/a/" not in html  # no links in what is passed on


def test_every_method_has_its_page(tmp_path):
    for method in ("pairs", "ranking", "rating"):
        study = make_study(tmp_path / method, 4, MODELS, method=method, annotators=2)

        def say(who: int, at: int, study=study, method=method) -> Answer:
            places = len(study.annotators[who].tasks[at].order)
            match method:
                case "pairs":
                    return Answer(choice="bad")
                case "ranking":
                    return Answer(ranking=tuple(range(places)))
            return Answer(marks={one.name: 3 for one in study.criteria})

        results = analyse(study, answer_all(study, say), draws=20)
        write_results(results, tmp_path / f"{method}.html")
        assert MODELS[2] in (tmp_path / f"{method}.html").read_text(encoding="utf-8")
        assert len(result_lines(results)) > 5
