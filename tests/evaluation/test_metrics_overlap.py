"""ROUGE and METEOR are what rouge-score and nltk compute; exact match and F1 what SQuAD defines."""

from __future__ import annotations

import csv
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from test_metrics import corpus, outputs_of

from finespun.errors import RecipeError
from finespun.evaluation.metrics import metrics_for
from finespun.evaluation.metrics.overlap import ExactMatch, Meteor, Rouge, TokenF1, answer_tokens

KINDS = ["1", "2", "L", "Lsum"]


def test_rouge_is_what_rouge_score_writes(tmp_path: Path) -> None:
    texts, others = corpus(40, 1)
    texts[3] = ""
    (tmp_path / "out").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "ref").write_text("\n".join(references[0] for references in others), encoding="utf-8")
    subprocess.run(
        [
            sys.executable, "-m", "rouge_score.rouge", f"--target_filepattern={tmp_path / 'ref'}",
            f"--prediction_filepattern={tmp_path / 'out'}", f"--output_filename={tmp_path / 'scores.csv'}",
            "--aggregate=false", "--rouge_types=rouge1,rouge2,rougeL,rougeLsum",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    for kind in KINDS:
        measured = metrics_for(None, [f"ROUGE-{kind}"], True)[0].measure(outputs_of(texts, others))
        assert measured.per_example is not None
        theirs = [float(row[f"rouge{kind}-F"]) for row in rows]
        assert [f"{score:.6f}" for score in measured.per_example] == [f"{score:.6f}" for score in theirs]
        assert measured.value() == pytest.approx(np.mean(theirs), abs=1e-6)


def test_its_mean_is_what_rouge_scores_aggregator_resamples() -> None:
    texts, others = corpus(60, 1)
    scorer, aggregator = RougeScorer(["rougeL"]), BootstrapAggregator()
    for text, references in zip(texts, others, strict=True):
        aggregator.add_scores(scorer.score(references[0], text))
    np.random.seed(0)
    theirs = aggregator.aggregate()["rougeL"]
    ours = Rouge("L", "en").measure(outputs_of(texts, others)).value()
    assert theirs.low.fmeasure < ours < theirs.high.fmeasure
    assert ours == pytest.approx(theirs.mid.fmeasure, abs=0.003), "the aggregator's is a median of resampled means"


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_references_the_best_or_the_mean(kind: str) -> None:
    texts, others = corpus(20, 3)
    others[4] = others[4][:1]
    best, mean = metrics_for("en", [f"ROUGE-{kind}", f"ROUGE-{kind}-mean"], True)
    scorer = RougeScorer([f"rouge{kind}"])
    for place, (text, references) in enumerate(zip(texts, others, strict=True)):
        one = [outputs_of([text], [references])[0]]
        assert best.measure(one).value() == scorer.score_multi(references, text)[f"rouge{kind}"].fmeasure, place
        scores = [scorer.score(reference, text)[f"rouge{kind}"].fmeasure for reference in references]
        assert mean.measure(one).value() == pytest.approx(sum(scores) / len(scores))
    assert "refs:best" in best.signature
    assert "refs:mean" in mean.signature


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_is_read_in_characters(kind: str) -> None:
    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return [character for character in text if character not in "，。 \n"]

    texts, others = corpus(20, 2, chinese=True)
    metric = Rouge(kind)
    measured = metric.measure(outputs_of(texts, others))
    scorer = RougeScorer([f"rouge{kind}"], tokenizer=Characters())
    theirs = [
        scorer.score_multi(references, text)[f"rouge{kind}"].fmeasure
        for text, references in zip(texts, others, strict=True)
    ]
    assert measured.per_example.tolist() == theirs
    assert "tok:units" in metric.signature


@pytest.mark.parametrize(
    ("language", "text", "reference", "score"),
    [
        (None, "床前明月光", "床前看月光", 4 / 5),
        (None, "Старый паромщик молча перевёз нас", "Старый паромщик перевёз нас через реку", 2 * 4 / 11),
        ("de", "Öl und Übung", "ol und ubung", 1 / 3),
        ("en", "Zoë and Chloé", "Zo and Chlo", 1.0),
    ],
)
def test_letters_beyond_ascii_count_outside_english(
    language: str | None, text: str, reference: str, score: float
) -> None:
    assert Rouge("1", language).measure(outputs_of([text], [[reference]])).value() == pytest.approx(score)


def test_lsum_takes_lines_as_sentences() -> None:
    metric = Rouge("Lsum", "en")
    outputs = outputs_of(["flew away\nthe heron rose"], [["the heron rose\nflew away"]])
    assert metric.measure(outputs).value() == 1
    assert Rouge("L", "en").measure(outputs).value() < 1
    assert "sentences:lines" in metric.signature


# --- METEOR ---


class _Lemma(SimpleNamespace):
    def name(self) -> str:
        return self.word


def _synsets(word: str) -> list[SimpleNamespace]:
    groups = [{"boat", "ship"}, {"slow", "sluggish"}]
    return [
        SimpleNamespace(lemmas=lambda group=group: [_Lemma(word=other) for other in sorted(group)])
        for group in groups
        if word in group
    ]


def test_meteor_is_nltks_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from nltk.translate.meteor_score import meteor_score

    thesaurus = SimpleNamespace(synsets=_synsets)
    monkeypatch.setattr("nltk.corpus.wordnet", thesaurus)
    texts = ["The ship, sluggish, crossed rivers.", "", "nothing alike"]
    others = [["The boat, slow, crossed the river.", "A ship."], ["A boat."], ["The boat."]]
    metric = Meteor()
    measured = metric.measure(outputs_of(texts, others))
    assert measured.per_example is not None
    words = [["The", "ship", ",", "sluggish", ",", "crossed", "rivers", "."], [], ["nothing", "alike"]]
    their_words = [
        [["The", "boat", ",", "slow", ",", "crossed", "the", "river", "."], ["A", "ship", "."]],
        [["A", "boat", "."]],
        [["The", "boat", "."]],
    ]
    theirs = [meteor_score(ref, out, wordnet=thesaurus) for ref, out in zip(their_words, words, strict=True)]
    assert measured.per_example.tolist() == theirs
    assert theirs[0] > 0.5
    assert theirs[1:] == [0, 0]
    assert "wordnet" in metric.signature


@pytest.mark.parametrize("error", [LookupError, FileNotFoundError], ids=["all of it", "a file of it"])
def test_meteor_without_the_data_of_wordnet_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def absent(word: str) -> None:
        raise error(word)

    monkeypatch.setattr("nltk.corpus.wordnet", SimpleNamespace(synsets=absent))
    with pytest.raises(RecipeError, match=r"needs the data of WordNet.*nltk.downloader wordnet"):
        Meteor().measure(outputs_of(["a"], [["a"]]))


def test_meteor_is_refused_for_another_language() -> None:
    with pytest.raises(RecipeError, match="METEOR knows the synonyms of English only, and the language is zh"):
        metrics_for("zh", ["METEOR"], True)


# --- SQuAD ---


def _normalized(text: str) -> str:
    """SQuAD's definition: lower case, no punctuation, no articles, one space between words."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(
    *[
        st.lists(st.sampled_from(["The", "a", "An", "cat", "U.S.", "don't", "É", "—", "3,5", "?"]), max_size=6).map(
            " ".join
        )
    ]
    * 2
)
def test_exact_match_and_f1_are_squads(text: str, reference: str) -> None:
    ours, theirs = _normalized(text).split(), _normalized(reference).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    f1 = 2 * shared / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs)
    outputs = outputs_of([text], [[reference]])
    assert TokenF1().measure(outputs).value() == pytest.approx(100 * f1)
    assert ExactMatch().measure(outputs).value() == 100 * (_normalized(text) == _normalized(reference))


def test_chinese_answers_are_compared_in_characters_without_punctuation() -> None:
    assert answer_tokens("《静夜思》，李白") == list("静夜思李白")
    outputs = outputs_of(["北京市", "北京。"], [["北京"], ["上海", "北京"]])
    assert TokenF1().measure(outputs).per_example.tolist() == pytest.approx([80, 100])
    assert ExactMatch().measure(outputs).per_example.tolist() == [0, 100]
