"""What holds of every metric, and which are chosen."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.errors import DataError, RecipeError
from finespun.evaluation.metrics import METRICS, Metric, Novelty, load_metric, metrics_for
from finespun.evaluation.metrics.base import common_language, tokens
from finespun.evaluation.outputs import Output

SENTENCES = (
    "The old ferryman, who had said nothing at all, rowed us over the slow river. Rain fell on the mill; a heron "
    "rose from the reeds and flew away! Was it the same bird that we had seen on Monday, the 3rd of May? "
    "Don't ask: nobody knows. The boat cost 12.50 and the mill was not for sale"
)
ENGLISH = SENTENCES.split()
CHINESE = "床前明月光疑是地上霜举头望明月低头思故乡空山新雨后天气晚来秋。，白日依山尽"

# METEOR needs data that may not be there.
NAMES = [name for name in METRICS if name != "METEOR"]


def outputs_of(texts: Sequence[str], references: Sequence[Sequence[str]] | None = None) -> list[Output]:
    """An output for each text, every third of them cut at the limit."""
    references = references or [()] * len(texts)
    return [
        Output(
            place,
            f"test.jsonl, row {place + 1}",
            "Go on:",
            tuple(others),
            text,
            "length" if place % 3 == 2 else "stop",
            len(text) // 3,
        )
        for place, (text, others) in enumerate(zip(texts, references, strict=True))
    ]


def corpus(count: int, references: int, chinese: bool = False, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Texts like their references, which have some words in another place or not at all."""
    chance = random.Random(seed)
    between = "" if chinese else " "

    def changed(words: list[str]) -> str:
        words = [word for word in words if chance.random() > 0.15]
        for _ in range(2):
            words.insert(chance.randrange(len(words) + 1), chance.choice(CHINESE if chinese else ENGLISH))
        return between.join(words)

    originals = [
        (list(CHINESE) if chinese else ENGLISH)[start : start + chance.randint(5, 20)]
        for start in (chance.randrange(20) for _ in range(count))
    ]
    return [changed(each) for each in originals], [[changed(each) for _ in range(references)] for each in originals]


texts = st.one_of(
    st.lists(st.sampled_from(["the", "The", "a", "cat", "sat.", "on,", "mat", "é", "3.5", "!", "\n"]), max_size=14).map(
        " ".join
    ),
    st.text(st.sampled_from("床前明月光，。"), max_size=14),
)
examples = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


@given(examples, st.data())
@settings(max_examples=30)
def test_a_draw_is_scored_as_its_outputs_alone(drawn: list[tuple[str, list[str]]], data: st.DataObject) -> None:
    outputs = outputs_of([text for text, _ in drawn], [references for _, references in drawn])
    places = st.integers(0, len(outputs) - 1)
    metrics = metrics_for("en", NAMES, True) + Novelty(["The cat sat on a mat", "床前明月光"]).metrics
    for metric in metrics:
        # Places that are drawn twice are no others of themselves in self-BLEU, which has a test of its own.
        draw = np.array(data.draw(st.lists(places, min_size=1, max_size=8, unique=metric.name == "self-BLEU")))
        again = metric.measure([outputs[place] for place in draw])
        assert metric.measure(outputs).value(draw) == pytest.approx(again.value(), abs=1e-9), metric.name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("written", "references"),
    [
        ([""], [["A cat sat."]]),
        (["", "A cat."], [["A cat sat."], ["A cat.", "One cat."]]),
        (["A cat."], [[""]]),
        ([""], [[""]]),
        (["\n \n"], [["A cat"]]),
        (["。"], [["，"]]),
        (["A cat sat on the mat."] * 5, [["A cat sat on the mat."]] * 5),
        (["床前明月光"], [["床前看月光"]]),
    ],
)
def test_a_score_is_a_finite_number_for_whatever_was_written(
    name: str, written: list[str], references: list[list[str]]
) -> None:
    metric = metrics_for(None, [name], True)[0]
    measured = metric.measure(outputs_of(written, references))
    assert math.isfinite(measured.value())
    assert math.isfinite(measured.value(np.zeros(3, int)))
    assert metric.signature
    if measured.per_example is not None:
        assert measured.per_example.shape == (len(written),)
        assert np.isfinite(measured.per_example).all()


@pytest.mark.parametrize(("name", "best", "worst"), [
    ("BLEU", 100, 0), ("chrF++", 100, 0), ("TER", 0, 100), ("webnlg-bleu", 100, 0), ("ROUGE-1", 1, 0), ("ROUGE-2", 1, 0),
    ("ROUGE-L", 1, 0), ("ROUGE-Lsum-mean", 1, 0), ("exact-match", 100, 0), ("token-F1", 100, 0),
])  # fmt: skip
def test_the_reference_itself_scores_best_and_nothing_worst(name: str, best: float, worst: float) -> None:
    metric = metrics_for(None, [name], True)[0]
    reference = ["A heron rose from the reeds and flew away."]
    assert metric.measure(outputs_of(reference, [reference])).value() == pytest.approx(best)
    assert metric.measure(outputs_of([""], [reference])).value() == pytest.approx(worst)
    assert metric.better == ("higher" if best > worst else "lower")


@pytest.mark.parametrize("name", [name for name in NAMES if METRICS[name](None).needs_references])
def test_examples_without_references_are_refused_with_the_first_of_them(name: str) -> None:
    outputs = outputs_of(["a", "b", "c"], [["a"], [], []])
    with pytest.raises(DataError, match=r"2 of 3 examples have none \(the first: test.jsonl, row 2\).*distinct-2"):
        METRICS[name](None).measure(outputs)
    with pytest.raises(DataError, match=rf"{name.replace('+', '.')}: needs references.*distinct-1"):
        metrics_for(None, [name], has_references=False)


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="no outputs"):
        METRICS[name](None).measure([])


def test_by_default_what_the_examples_allow_is_measured() -> None:
    without = [metric.name for metric in metrics_for("en", None, has_references=False)]
    assert without == ["distinct-1", "distinct-2", "distinct-3", "rep-4", "loops", "length", "ended"]
    with_references = [metric.name for metric in metrics_for("en", None, has_references=True)]
    assert with_references == ["BLEU", "chrF++", "ROUGE-1", "ROUGE-2", "ROUGE-L", *without]


def test_names_are_known_in_any_case_and_measured_once() -> None:
    assert [metric.name for metric in metrics_for(None, ["bleu", "Rouge-L", "chrf++", "bleu"], True)] == [
        "BLEU",
        "ROUGE-L",
        "chrF++",
    ]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no metric 'ROGUE-L'.*Did you mean ROUGE-L\?"):
        metrics_for(None, ["ROGUE-L"], True)
    with pytest.raises(RecipeError, match=r"no metric 'perplexity'.*"):
        metrics_for(None, ["perplexity"], True)
    with pytest.raises(RecipeError, match="BERTScore reads texts with a model of your choice"):
        metrics_for(None, ["bertscore"], True)


@pytest.mark.parametrize(("name", "package"), [("BERTScore:roberta-large", "bert_score"), ("MAUVE:gpt2", "mauve")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finespun.evaluation.metrics.base.find_spec", lambda name: None)
    metric = metrics_for(None, [name], True)[0]
    with pytest.raises(
        RecipeError, match=rf"needs the package {package}: pip install 'finespun\[{metric.name.lower()}\]'"
    ):
        metric.measure(outputs_of(["a"], [["a"]]))


def test_the_language_is_that_of_most_texts_however_short() -> None:
    assert common_language(CHINESE[start : start + 5] for start in range(30)) == "zh"
    assert common_language(ENGLISH) == "en"
    assert (
        common_language([" ".join(ENGLISH)] * 3 + ["Der alte Fährmann sagte kein Wort und ruderte über den Fluss."])
        == "en"
    )
    assert common_language(["12", "7"]) is None
    assert common_language([*["12 7 3.5 " * 40] * 3, SENTENCES]) == "en", "those that cannot be told do not vote"


def test_a_language_is_a_code_with_or_without_a_region() -> None:
    metric = metrics_for("zh-TW", ["BLEU"], True)[0]
    metric.measure(outputs_of(["a"], [["a"]]))
    assert "tok:zh" in metric.signature
    with pytest.raises(RecipeError, match="'Chinese' is no code of ISO 639-1"):
        metrics_for("Chinese", None, True)


def test_tokens_are_words_and_marks_in_any_script() -> None:
    assert tokens("Don't stop—Zoë's 3,5 €!") == ["don", "'", "t", "stop", "—", "zoë", "'", "s", "3", ",", "5", "€", "!"]
    assert tokens("明月光。OK？") == ["明", "月", "光", "。", "ok", "？"]
    assert tokens("हिन्दी और Привет") == ["हिन्दी", "और", "привет"], "vowel signs belong to their words"
    assert tokens(" \n\t ") == []


# --- A person's own metric ---


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # loading adds to it
    return tmp_path


def test_an_own_metric_is_found_in_the_current_folder(own: Path) -> None:
    (own / "own_lines.py").write_text(
        "def lines(output, references):\n    return output.count('\\n') + len(references)\n"
        "def wrong(output, references):\n    return 1.0\nwrong.better = 'lower'\n"
    )
    metric: Metric = metrics_for("en", ["own_lines:lines"], True)[0]
    measured = metric.measure(outputs_of(["a\nb", "c"], [["x"], ["y", "z"]]))
    assert measured.per_example is not None
    assert measured.per_example.tolist() == [2, 2]
    assert measured.value(np.array([0])) == 2
    assert (metric.name, metric.better, metric.needs_references) == ("own_lines:lines", "higher", False)
    assert load_metric("own_lines:wrong").better == "lower"


def test_the_signature_of_an_own_metric_changes_with_its_file(own: Path) -> None:
    (own / "own_signed.py").write_text("def one(output, references): return 1\n")
    before = load_metric("own_signed:one").signature
    (own / "own_signed.py").write_text("def one(output, references): return 2\n")
    assert load_metric("own_signed:one").signature != before


def test_a_failing_own_metric_says_where_in_the_data_and_where_in_its_file(own: Path) -> None:
    (own / "own_failing.py").write_text(
        "import statistics\n"
        "def first(output, references):\n    return len(output.split()[0])\n"
        "def deep(output, references):\n    return statistics.mean(map(len, output.split()))\n"
    )
    with pytest.raises(DataError, match=r"row 2: IndexError: list index out of range \(.*own_failing.py, line 3\)"):
        load_metric("own_failing:first").measure(outputs_of(["a", " "]))
    with pytest.raises(DataError, match=r"row 2: StatisticsError: .* \(.*own_failing.py, line 5\)"):
        load_metric("own_failing:deep").measure(outputs_of(["a", " "]))


@pytest.mark.parametrize(
    ("number", "given_back"), list(enumerate(["float('nan')", "float('inf')", "None", "'0.5'", "[1.0]"]))
)
def test_what_is_no_finite_number_is_refused(own: Path, number: int, given_back: str) -> None:
    name = f"own_no_number_{number}"
    (own / f"{name}.py").write_text(f"def score(output, references):\n    return {given_back}\n")
    with pytest.raises(DataError, match="row 1, and should give a finite number"):
        load_metric(f"{name}:score").measure(outputs_of(["a"]))


@pytest.mark.parametrize(("written", "score"), [("np.float32(0.5)", 0.5), ("True", 1), ("np.bool(0)", 0), ("3", 3)])
def test_numbers_of_any_kind_are_taken(own: Path, written: str, score: float) -> None:
    name = f"own_number_{written.translate(str.maketrans('.()', '___'))}"
    (own / f"{name}.py").write_text(f"import numpy as np\ndef score(output, references):\n    return {written}\n")
    assert load_metric(f"{name}:score").measure(outputs_of(["a"])).value() == score


def test_what_cannot_be_loaded_is_refused_with_the_reason(own: Path) -> None:
    (own / "own_broken.py").write_text("import nowhere_to_be_found\n")
    (own / "own_syntax.py").write_text("def f(:\n")
    (own / "own_named.py").write_text("def rhymes(output, references): return 1\nrhymes.better = 'up'\n")
    for name, said in {
        "own_absent:f": "no module own_absent: looked for own_absent.py in",
        "own_broken:f": "own_broken needs the module nowhere_to_be_found",
        "own_syntax:f": "cannot be loaded: SyntaxError",
        "own_named:rhyme": r"no function rhyme. Did you mean rhymes\?",
        "own_named:": "write module:function",
        "own_named:rhymes": "`better` should be",
    }.items():
        with pytest.raises(RecipeError, match=said):
            load_metric(name)
