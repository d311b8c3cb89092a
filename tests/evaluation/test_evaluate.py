from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finespun
from conftest import sentences
from finespun.data.templates import Encoder
from finespun.errors import DataError, RecipeError, RunError
from finespun.evaluation import evaluate as evaluation
from finespun.evaluation import kept
from finespun.evaluation.evaluate import evaluate
from finespun.evaluation.examples import read_examples
from finespun.evaluation.outputs import read_outputs
from finespun.evaluation.settings import EvaluationData, EvaluationSettings
from finespun.generation.engine import Completion
from finespun.generation.settings import Sampling
from finespun.models.load import load_model
from finespun.recipe import DataRecipe
from finespun.runs import RunFolder

ROWS = [{"ask": sentence[:20], "answer": sentence[20:]} for sentence in sentences(24)]
TEST = [{"ask": sentence[:16], "answer": sentence[16:] + " 雪"} for sentence in sentences(40)[24:34]]
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps on prompts and answers whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    model = finespun.finetune(
        model=str(tiny_folder),
        data={"source": [str(data)], "columns": {"prompt": "ask", "completion": "answer"}, "validation": 0.25},
        out=str(folder / "run"),
        method="lora",
        max_steps=2,
        batch_size=4,
        learning_rate=3e-2,
        samples={"count": 0},
        quiet=True,
    )
    assert model.run
    return model.run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, with nothing evaluated."""
    monkeypatch.setattr(kept, "data_cache", lambda: tmp_path / "cache")
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "manifest.json"):
        (copy / name).write_bytes((trained / name).read_bytes())
    (copy / "model").symlink_to(trained / "model")
    return copy


def in_file(file: Path) -> EvaluationData:
    return EvaluationData(source=[str(file)])


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def metric(folder: Path, name: str) -> dict[str, Any]:
    return next(metric for metric in summary_of(folder)["metrics"] if metric["name"] == name)


def test_an_evaluation_holds_outputs_scores_and_summary(run: Path, write_jsonl: Callable[..., Path]) -> None:
    folder = evaluate(run, in_file(write_jsonl(*TEST, name="unseen.test.jsonl")), sampling=SHORT)
    assert folder == run / "evaluations" / "unseen"
    outputs = read_outputs(folder / "outputs.jsonl")
    written = finespun.load(run).generate([row["ask"] for row in TEST], max_new_tokens=8)
    assert [output.text for output in outputs] == written
    assert [output.references for output in outputs] == [(row["answer"],) for row in TEST]
    assert outputs[3].origin.endswith("unseen.test.jsonl, row 4")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in scores] == list(range(len(TEST)))
    for name in ("perplexity", "bits per byte", "chrF++", "length", "copied-4"):
        found = metric(folder, name)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["signature"]
        assert all(name in line["scores"] for line in scores)
    assert summary_of(folder)["settings"]["generation"] == {"max_new_tokens": 8}


def test_perplexity_is_that_of_the_run_s_own_validation(run: Path, trained: Path) -> None:
    """The same rows give the same figure in both places."""
    from finespun.data.texts import HELD_OUT, read_texts

    texts = read_texts(RunFolder(run).recipe().data)
    held = [ROWS[texts.judged.places[number].row - 1] for number, _ in texts.examples(HELD_OUT)]
    folder = evaluate(run, held, EvaluationSettings(metrics=["length"]), SHORT)
    recorded = RunFolder(trained).manifest()["results"]["perplexity_after"]["value"]
    assert metric(folder, "perplexity")["value"] == pytest.approx(recorded, rel=1e-5)
    assert summary_of(folder)["leakage"]["trained"] == [], "held-out rows were not trained"


def test_rows_of_one_prompt_are_references_to_it(run: Path) -> None:
    rows = [
        {"ask": "the mill", "answer": "stood."},
        {"ask": "江雪", "answer": "千山鸟飞绝"},
        {"ask": "the mill", "answer": "fell."},
        {"ask": "the mill", "answer": "stood."},
        {"prompt": "a boat", "references": ["sank", "sailed"]},
        {"messages": [{"role": "user", "content": "a boat"}], "references": ["drifted"]},
    ]
    folder = evaluate(run, rows, sampling=SHORT)
    outputs = read_outputs(folder / "outputs.jsonl")
    assert [(output.prompt, output.references) for output in outputs] == [
        ("the mill", ("stood.", "fell.")),
        ("江雪", ("千山鸟飞绝",)),
        ("a boat", ("sank", "sailed")),
        ([{"role": "user", "content": "a boat"}], ("drifted",)),
    ]
    assert summary_of(folder)["data"] | {"files": None} == {"files": None, "rows": 6, "examples": 4}


def test_rows_without_an_answer_are_prompts(run: Path) -> None:
    rows = [
        {"ask": "the mill"},
        {"prompt": "a boat", "references": []},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    folder = evaluate(run, rows, sampling=SHORT)
    assert [output.references for output in read_outputs(folder / "outputs.jsonl")] == [(), (), ()]
    names = [metric["name"] for metric in summary_of(folder)["metrics"]]
    assert "rep-4" in names
    assert not {"BLEU", "chrF++", "perplexity"} & {*names}


def test_references_stand_where_the_format_or_the_template_has_the_answer(write_jsonl: Callable[..., Path]) -> None:
    def read(*rows: dict[str, Any], **recipe: Any) -> list[tuple[Any, list[str]]]:
        file = write_jsonl(*rows, name=f"{len(str(recipe))}.jsonl")
        found = read_examples(EvaluationData(source=[str(file)]), DataRecipe(**recipe)).examples
        return [(example.prompt, example.references) for example in found]

    summed = read({"document": "Long ago.", "references": ["Once.", "Then."]})
    trained = read({"document": "Long ago.", "summary": "Once."}, {"document": "Long ago.", "summary": "Then."})
    assert summed == trained
    template = {"prompt": "{{ triple | replace('_', ' ') }} is", "completion": "{{ sentence | upper }}"}
    rows = {"triple": "A_B", "references": ["x", "y"]}, {"triple": "C_D"}, {"triple": "E", "sentence": "z"}
    found = read(*rows, template=template)
    assert found == [("A B is", ["X", "Y"]), ("C D is", []), ("E is", ["Z"])]


def test_a_metric_that_needs_references_is_refused_without_them(run: Path, write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl(TEST[0], {"ask": "the mill"}, name="some.jsonl")
    with pytest.raises(
        DataError, match=r"chrF\+\+: needs references, and 1 of 2 examples have none: .*some.jsonl, row 2"
    ):
        evaluate(run, in_file(file), EvaluationSettings(metrics=["chrF++,length"]), SHORT)
    assert not (run / "evaluations").exists(), "it is refused before anything is written"
    folder = evaluate(run, in_file(file), sampling=SHORT)
    assert "1 of 2 examples have no reference" in summary_of(folder)["notes"][0]


def test_bad_rows_are_named(run: Path, write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl(TEST[0], {"question": "x"}, {"prompt": "x", "references": "y"}, name="bad.jsonl")
    with pytest.raises(DataError) as caught:
        evaluate(run, in_file(file))
    assert "bad.jsonl, row 2: has no column 'ask'" in str(caught.value)
    assert "bad.jsonl, row 3: has `references` that are not a list of texts" in str(caught.value)
    with pytest.raises(DataError, match=r"long.jsonl, row 2: The prompt has \d+ tokens and the model's context 128"):
        evaluate(run, in_file(write_jsonl(TEST[0], {"ask": "heron " * 200, "answer": "x"}, name="long.jsonl")))


@pytest.mark.parametrize(
    "sampling", [SHORT, Sampling(max_new_tokens=8, temperature=1.0, seed=3), Sampling(max_new_tokens=8, beams=2)]
)
def test_interrupted_and_continued_is_as_uninterrupted(
    run: Path, tmp_path: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(run, TEST, sampling=sampling, name="whole")
    monkeypatch.setattr(kept, "data_cache", lambda: tmp_path / "another cache")
    monkeypatch.setattr(kept, "TOGETHER", 3)
    added: list[str] = []
    add = kept.Kept.add

    def interrupted(self: kept.Kept, key: str, value: Any) -> None:
        if len(added) in (4, 13):  # while texts are written, and while their likelihood is measured
            added.append("")
            raise KeyboardInterrupt
        added.append(key)
        add(self, key, value)

    monkeypatch.setattr(kept.Kept, "add", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, TEST, sampling=sampling, name="parts")
        assert not (run / "evaluations" / "parts").exists(), "an evaluation is there whole or not at all"
    for file in (tmp_path / "another cache" / "evaluations").iterdir():
        with file.open("a", encoding="utf-8") as torn:
            torn.write('["torn", ["half of a li')
    parts = evaluate(run, TEST, sampling=sampling, name="parts")
    keys = [key for key in added if key]
    assert len(keys) == len({*keys}) == 2 * len(TEST), "nothing is computed twice"
    for name in ("outputs.jsonl", "scores.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert summary_of(parts)["metrics"] == summary_of(whole)["metrics"]


def test_a_killed_process_loses_only_what_it_was_writing(run: Path, write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl(*TEST)
    code = (
        "import os, signal, sys\n"
        "from finespun.evaluation import kept\n"
        "from finespun.evaluation.evaluate import evaluate\n"
        "from finespun.evaluation.settings import EvaluationData\n"
        "from finespun.generation.settings import Sampling\n"
        "add, added = kept.Kept.add, []\n"
        "def killing(self, key, value):\n"
        "    if len(added) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    added.append(add(self, key, value))\n"
        "kept.Kept.add = killing\n"
        "kept.data_cache = lambda: kept.Path(sys.argv[3])\n"
        "evaluate(sys.argv[1], EvaluationData(source=[sys.argv[2]]), sampling=Sampling(max_new_tokens=8))\n"
    )
    cache = kept.data_cache()
    done = subprocess.run([sys.executable, "-c", code, run, file, cache])
    assert done.returncode == -signal.SIGKILL
    (kept_file,) = (cache / "evaluations").iterdir()
    before = kept_file.read_bytes()
    assert before.count(b"\n") == 4
    folder = evaluate(run, in_file(file), sampling=SHORT)
    assert kept_file.read_bytes().startswith(before)
    assert kept_file.read_bytes().count(b"\n") == len(TEST), "the other process's texts were not written again"
    written = finespun.load(run).generate([row["ask"] for row in TEST], max_new_tokens=8)
    assert [output.text for output in read_outputs(folder / "outputs.jsonl")] == written


def test_rows_that_were_trained_are_named_and_left_out_on_request(run: Path, write_jsonl: Callable[..., Path]) -> None:
    from finespun.data.texts import TRAIN, read_texts

    texts = read_texts(RunFolder(run).recipe().data)
    seen = next(ROWS[texts.judged.places[number].row - 1] for number, _ in texts.examples(TRAIN))
    file = write_jsonl(TEST[0], seen, seen | {"answer": "another"}, TEST[1], name="mixed.jsonl")
    folder = evaluate(run, in_file(file), sampling=SHORT)
    assert [origin.endswith("mixed.jsonl, row 2") for origin in summary_of(folder)["leakage"]["trained"]] == [True]
    assert "1 of 3 examples were trained" in summary_of(folder)["notes"][0]
    other = [seen | {"answer": "another"}, {"ask": seen["ask"] + " "}]
    asked = evaluate(run, other, sampling=SHORT, name="asked")
    assert summary_of(asked)["leakage"]["trained"] == []
    assert "1 of 2 prompts were trained with other answers" in summary_of(asked)["notes"][0]
    bare = evaluate(run, [{"ask": seen["ask"]}], sampling=SHORT, name="bare")
    assert summary_of(bare)["leakage"]["trained"] == ["data, row 1"]
    left = evaluate(run, in_file(file), EvaluationSettings(exclude_trained=True), SHORT, name="clean")
    assert [output.prompt for output in read_outputs(left / "outputs.jsonl")] == [row["ask"] for row in TEST[:2]]
    with pytest.raises(DataError, match="All examples of the test data were trained"):
        evaluate(run, [seen], EvaluationSettings(exclude_trained=True), SHORT, name="none")


def test_training_data_that_is_gone_or_changed_is_said(run: Path, tmp_path: Path) -> None:
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (source,) = RunFolder(run).recipe().data.source or []
    (run / "recipe.yaml").write_text(recipe.replace(source, str(tmp_path / "gone.jsonl")), encoding="utf-8")
    folder = evaluate(run, TEST, sampling=SHORT)
    assert "training data cannot be read any more" in summary_of(folder)["leakage"]["missing"]
    assert "copied-4" not in [metric["name"] for metric in summary_of(folder)["metrics"]]
    with pytest.raises(DataError, match=r"copied-4: cannot be measured, for the training data cannot be read"):
        evaluate(run, TEST, EvaluationSettings(metrics=["copied-4"]), SHORT, name="novel")
    (tmp_path / "gone.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n", encoding="utf-8")
    changed = evaluate(run, TEST, sampling=SHORT, name="changed")
    assert "training data was changed since the run" in summary_of(changed)["leakage"]["missing"]


def test_another_evaluation_of_the_same_name_is_refused_with_the_difference(run: Path) -> None:
    folder = evaluate(run, TEST, sampling=SHORT)
    before = summary_of(folder)
    with pytest.raises(RunError, match=r"generation.max_new_tokens 8 → 9; generation.temperature not set → 0.5"):
        evaluate(run, TEST, sampling=Sampling(max_new_tokens=9, temperature=0.5))
    with pytest.raises(RunError, match=r"already holds another evaluation: test data \w+ → \w+\."):
        evaluate(run, TEST[:4], sampling=SHORT)
    assert summary_of(evaluate(run, TEST, sampling=SHORT))["metrics"] == before["metrics"], "the same again is no other"


def test_a_folder_with_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="holds no evaluation"):
        evaluate(run, TEST, sampling=SHORT, out=other)
    with pytest.raises(RecipeError, match="should be the name of a folder"):
        evaluate(run, TEST, sampling=SHORT, name="../other")


@pytest.mark.parametrize("edited", ["output", "gone"])
def test_outputs_edited_by_hand_are_not_written_over(run: Path, edited: str) -> None:
    folder = evaluate(run, TEST, sampling=SHORT)
    lines = (folder / "outputs.jsonl").read_text(encoding="utf-8").split("\n")
    lines[2:3] = [json.dumps(json.loads(lines[2]) | {"output": "better"})] if edited == "output" else []
    (folder / "outputs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"outputs\.jsonl, line 3: is not what the model wrote"):
        evaluate(run, TEST, sampling=SHORT)
    (folder / "summary.json").write_text('{"model": "x"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"summary\.json: is not as it was written"):
        evaluate(run, TEST, sampling=SHORT)


def test_empty_outputs_and_loops_are_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", " \n", "the mill " * 9, "江雪" * 9, *sentences(6)]
    completions = [Completion(text, "length" if "mill the" in text else "stop", 5, len(text)) for text in texts]
    monkeypatch.setattr(evaluation, "write_all", lambda *arguments: completions)
    folder = evaluate(run, TEST, EvaluationSettings(likelihood="off"))
    notes = summary_of(folder)["notes"]
    assert [note.split(":")[0] for note in notes] == [
        "2 of 10 outputs are empty",
        "1 of 10 outputs did not end by themselves and were cut",
        "2 of 10 outputs end in a loop",
    ]
    assert notes[2].endswith("data, rows 3, 4")
    assert metric(folder, "loops")["value"] == 0.2
    assert "perplexity" not in [metric["name"] for metric in summary_of(folder)["metrics"]]


def test_the_base_is_evaluated_on_the_same_and_the_difference_has_its_paired_interval(
    run: Path, tiny_folder: Path
) -> None:
    folder = evaluate(run, TEST, sampling=SHORT, base=True)
    summary, below = summary_of(folder), folder / "base"
    written = finespun.load(tiny_folder).generate([row["ask"] for row in TEST], max_new_tokens=8)
    assert [output.text for output in read_outputs(below / "outputs.jsonl")] == written
    assert [output.text for output in read_outputs(folder / "outputs.jsonl")] != written, "two models are measured"
    assert summary["base"]["metrics"] == summary_of(below)["metrics"]
    (ahead,) = (difference for difference in summary["base"]["differences"] if difference["name"] == "perplexity")
    mine, its = metric(folder, "perplexity"), metric(below, "perplexity")
    assert ahead["value"] == pytest.approx(mine["value"] - its["value"])
    apart = (mine["high"] - mine["low"]) + (its["high"] - its["low"])
    assert ahead["high"] - ahead["low"] < 0.9 * apart, "pairs say more than two intervals"
    again = evaluate(run, TEST, sampling=SHORT)
    assert summary_of(again)["base"] == summary["base"], "what was found of the base stays"


def test_bits_per_byte_of_chinese_count_its_utf8_bytes(run: Path) -> None:
    rows = [
        {"ask": "江雪", "answer": "千山鸟飞绝，万径人踪灭。"},
        {"ask": "登鹳雀楼", "answer": "白日依山尽，黄河入海流。"},
    ]
    folder = evaluate(run, rows, EvaluationSettings(metrics=["length"]), SHORT)
    loaded = load_model(str(run), "float32", torch.device("cpu"))
    encoder = Encoder(loaded.tokenizer)
    bits = size = 0.0
    for row in rows:
        prompt, answer = encoder.encode_prompt(row["ask"]), loaded.tokenizer(row["answer"])["input_ids"]
        with torch.no_grad():
            logprobs = loaded.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        bits -= sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)) / np.log(2)
        size += len(row["answer"].encode())
    assert size == 72
    assert metric(folder, "bits per byte")["value"] == pytest.approx(bits / size, rel=1e-4)


def test_the_report_holds_everything_and_loads_nothing(run: Path) -> None:
    rows = [{"ask": f"江雪 {number} <b>", "answer": f"千山鸟飞绝 {number}"} for number in range(12)]
    page = (evaluate(run, rows, sampling=SHORT, base=True) / "report.html").read_text(encoding="utf-8")
    for text in (
        "千山鸟飞绝 7",
        "江雪 7 &lt;b&gt;",
        "Best by chrF++",
        "Worst by chrF++",
        "bits per byte",
        "nrefs:",
        "95&nbsp;%",
    ):
        assert text in page
    assert "<b>" not in page
    assert {*re.findall(r"(?:src|href)=.", page)} == {'href="'}
    assert {target[0] for target in re.findall(r'href="([^"]*)"', page)} == {"#"}, "only places in the page itself"
    assert "http" not in re.sub(r"http-equiv", "", page)


def test_one_example_gives_no_interval(run: Path) -> None:
    folder = evaluate(run, TEST[:1], sampling=SHORT)
    assert metric(folder, "perplexity")["low"] is None
    assert "no interval" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_limit_takes_the_first_examples_and_their_outputs_serve_later(run: Path) -> None:
    evaluate(run, TEST, EvaluationSettings(limit=3), SHORT, name="some")
    (file,) = (kept.data_cache() / "evaluations").glob("outputs-*")
    assert file.read_bytes().count(b"\n") == 3
    folder = evaluate(run, TEST, EvaluationSettings(metrics=["length"]), SHORT, name="all")
    assert file.read_bytes().count(b"\n") == len(TEST)
    assert len(read_outputs(folder / "outputs.jsonl")) == len(TEST)


def test_plain_texts_are_not_held_against_how_they_happen_to_go_on(tiny_folder: Path, in_tmp: Path) -> None:
    Path("poems.txt").write_text("江雪\n千山鸟飞绝\n\n登鹳雀楼\n白日依山尽\n", encoding="utf-8")
    data = EvaluationData(source=["poems.txt"])
    with pytest.raises(RunError, match="--out"):
        evaluate(tiny_folder, data, sampling=SHORT)
    folder = evaluate(tiny_folder, data, sampling=SHORT, out="found")
    names = [metric["name"] for metric in summary_of(folder)["metrics"]]
    assert "bits per byte" in names
    assert "BLEU" not in names
    first = read_outputs(folder / "outputs.jsonl")[0]
    assert (first.prompt, first.references) == ("江雪\n", ("千山鸟飞绝",))
    loaded = load_model(str(tiny_folder))
    prompt = loaded.tokenizer("江雪\n")["input_ids"]
    ids = loaded.model.generate(torch.tensor([prompt]).to(loaded.device), max_new_tokens=8, do_sample=False)[0]
    assert first.text == loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), "no chat is made of it"
    named = evaluate(tiny_folder, data, EvaluationSettings(metrics=["chrF++"]), SHORT, out="named")
    assert metric(named, "chrF++")["value"] >= 0
