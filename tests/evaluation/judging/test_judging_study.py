"""Outputs become a study, or are refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from studies import MODELS, make_study, text_of, write_outputs

from finespun.errors import DataError, RecipeError
from finespun.evaluation.judging.criteria import find_criteria
from finespun.evaluation.judging.settings import StudySettings
from finespun.evaluation.judging.study import create_study, name_models


def test_each_pair_of_models_is_compared_on_each_example(tmp_path):
    study = make_study(tmp_path, 5, MODELS, annotators=3)
    real = [item for item in study.items if not item.known]
    compared = Counter(tuple(candidate.models for candidate in item.candidates) for item in real)
    assert compared == {((0,), (1,)): 5, ((0,), (2,)): 5, ((1,), (2,)): 5}
    assert study.models == MODELS
    for item in real:
        assert [candidate.text for candidate in item.candidates] == [
            text_of(candidate.models[0], item.example) for candidate in item.candidates
        ]


def test_tokens_are_long_and_different_each_time(tmp_path):
    one, other = (make_study(tmp_path, annotators=4) for _ in range(2))
    tokens = [person.token for study in (one, other) for person in study.annotators] + [one.admin, other.admin]
    assert len(set(tokens)) == 10
    assert all(len(token) >= 32 for token in tokens)
    assert [person.tasks for person in one.annotators] == [person.tasks for person in other.annotators]


def test_models_that_wrote_the_same_are_judged_as_one(tmp_path):
    def text(model: int, row: int) -> str:
        return text_of(0 if row == 0 or (row == 1 and model < 2) else model, row)

    study = make_study(tmp_path, 3, MODELS, text, practice=0, known=0)
    by_example = {row: [item for item in study.items if item.example == row] for row in range(3)}
    assert not by_example[0]  # all the same: nobody is asked
    assert [[one.models for one in item.candidates] for item in by_example[1]] == [[(0, 1), (2,)]]
    assert len(by_example[2]) == 3
    assert study.same_text == ((0, 1, 2), (0, 2, 1), (1, 2, 1))


def test_the_texts_of_an_example_are_rated_by_the_same_people(tmp_path):
    study = make_study(tmp_path, 10, MODELS, method="rating", annotators=4)
    for person in study.annotators:
        seen = Counter(study.items[task.item].example for task in person.tasks if task.kind == "real")
        assert set(seen.values()) == {3}


def test_references_make_known_answers_before_outputs(tmp_path):
    sources = write_outputs(tmp_path)
    for source in sources:
        file = tmp_path / source / "outputs.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[4]["references"] = ["one two three four five six seven"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = create_study(sources, StudySettings(examples=1, practice=6, known=6))
    known = [item for item in study.items if item.known]
    assert len(known) == 12
    assert any(item.candidates[0].text == "one two three four five six seven" for item in known)
    for item in known:
        better, worse = (candidate.text for candidate in item.candidates)
        assert better != worse
        assert sorted(better.split()) == sorted(worse.split())


def test_own_known_items(tmp_path, write_jsonl):
    file = write_jsonl({"prompt": "Two and two?", "better": "Four.", "worse": "Fish.", "why": "It is four."})
    study = make_study(tmp_path, known_items=file, practice=1, known=1)
    known = [item for item in study.items if item.known]
    assert [(item.known, item.why) for item in known] == [("given", "It is four.")]
    assert [candidate.text for candidate in known[0].candidates] == ["Four.", "Fish."]
    assert [task.kind for task in study.annotators[0].tasks].count("known") == 1


def test_a_bad_known_item_is_named(tmp_path, write_jsonl):
    file = write_jsonl({"prompt": "?", "better": "a", "worse": "b"}, {"prompt": "?", "better": "a"})
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: should have the texts `better` and `worse`"):
        make_study(tmp_path, known_items=file)


def test_line_ends_are_as_a_browser_has_them(tmp_path):
    study = make_study(tmp_path, 1, text=lambda model, row: f"one\r\ntwo\rthree\0 {model}", practice=0, known=0)
    assert study.items[0].candidates[0].text == "one\ntwo\nthree\ufffd 0"


def test_different_prompts_are_refused_with_the_difference(tmp_path):
    sources = write_outputs(tmp_path)
    file = tmp_path / MODELS[1] / "outputs.jsonl"
    file.write_text(file.read_text().replace("Write line 3.", "Write verse 3."))
    with pytest.raises(DataError, match=r"Example 3 .*“Write line 3\.”.*“Write verse 3\.”"):
        create_study(sources, StudySettings())
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(DataError, match="has 12 outputs, badger-base has 10"):
        create_study(sources, StudySettings())


def test_what_cannot_be_judged_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: has no outputs"):
        create_study([str(tmp_path / "nowhere"), str(tmp_path)], StudySettings())
    with pytest.raises(RecipeError, match="outputs of two models"):
        create_study(write_outputs(tmp_path)[:1], StudySettings())
    with pytest.raises(DataError, match="same texts"):
        make_study(tmp_path, text=lambda model, row: f"the same {row}")
    create_study(write_outputs(tmp_path)[:1], StudySettings(method="rating"))  # one alone can be rated


def test_names_tell_models_apart(tmp_path):
    assert name_models(["runs/a/evaluations/test", "runs/b/evaluations/test"]) == (
        "a/evaluations/test",
        "b/evaluations/test",
    )
    assert name_models(["poems=runs/a", "runs/b/outputs.jsonl"]) == ("poems", "b")
    with pytest.raises(RecipeError, match="given twice"):
        name_models(["runs/a", "runs/a/outputs.jsonl"])


def test_criteria_of_ones_own(tmp_path):
    file = tmp_path / "criteria.yaml"
    file.write_text("wit:\n  question: How witty is it?\n  points: [dull, so-so, witty]\n", encoding="utf-8")
    assert [one.name for one in find_criteria([], file)] == ["wit"]
    assert [len(one.points) for one in find_criteria(["wit", "style"], file)] == [3, 5]
    assert [one.name for one in find_criteria([], None)] == ["fluency", "adequacy", "coherence", "style"]
    with pytest.raises(RecipeError, match="did you mean fluency"):
        find_criteria(["fluencey"], None)
    file.write_text("wit:\n  question: How witty is it?\n  points: [dull]\n")
    with pytest.raises(RecipeError, match="wit: `points` should be a list of 2 to 9"):
        find_criteria([], file)
