"""BLEU, chrF++ and TER are what sacrebleu prints; webnlg-bleu is what the challenge's scripts print."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from test_metrics import corpus, outputs_of

from finespun.evaluation.metrics import metrics_for
from finespun.evaluation.metrics.translation import Bleu, ChrfPlusPlus, Ter, WebnlgBleu, bleu_tokenizer


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("chinese", [False, True])
def test_scores_and_signatures_are_those_that_sacrebleu_prints(tmp_path: Path, references: int, chinese: bool) -> None:
    texts, others = corpus(60, references, chinese)
    texts[7] = ""
    (tmp_path / "out").write_text("\n".join(texts) + "\n", encoding="utf-8")
    files = []
    for number, stream in enumerate(zip(*others, strict=True)):
        files.append(tmp_path / f"ref{number}")
        files[-1].write_text("\n".join(stream) + "\n", encoding="utf-8")
    asian = ["--tokenize", "zh", "--ter-normalized", "--ter-asian-support"] if chinese else []
    command = [sys.executable, "-m", "sacrebleu", *files, "-i", tmp_path / "out", "-m", "bleu", "chrf", "ter"]
    said = subprocess.run(
        [*command, "--chrf-word-order", "2", "-w", "9", *asian], capture_output=True, text=True, check=True
    ).stdout
    printed = json.loads(said)
    metrics = metrics_for(None, ["BLEU", "chrF++", "TER"], True)
    for metric, theirs in zip(metrics, printed, strict=True):
        value = metric.measure(outputs_of(texts, others)).value()
        assert f"{value:.9f}" == f"{theirs['score']:.9f}", metric.name
        assert metric.signature == theirs["signature"]


@pytest.mark.parametrize(
    ("metric", "theirs"), [(Bleu("en"), BLEU()), (ChrfPlusPlus("en"), CHRF(word_order=2)), (Ter("en"), TER())]
)
def test_examples_may_have_different_numbers_of_references(metric: Bleu, theirs: BLEU) -> None:
    texts, others = corpus(30, 3)
    others = [references[: 1 + place % 3] for place, references in enumerate(others)]
    measured = metric.measure(outputs_of(texts, others))
    assert measured.value() == theirs.corpus_score(texts, list(zip_longest(*others))).score
    assert "nrefs:var" in metric.signature


@pytest.mark.parametrize(
    ("metric", "theirs"),
    [(Bleu("en"), BLEU(effective_order=True)), (ChrfPlusPlus("en"), CHRF(word_order=2)), (Ter("en"), TER())],
)
def test_the_score_of_an_example_is_sacrebleus_sentence_score(metric: Bleu, theirs: BLEU) -> None:
    texts, others = corpus(20, 2)
    texts[:2], others[:2] = ["", "heron"], [["A heron"], ["A heron", "heron"]]
    scores = metric.measure(outputs_of(texts, others)).per_example
    assert scores.tolist() == [
        pytest.approx(theirs.sentence_score(text, references).score)
        for text, references in zip(texts, others, strict=True)
    ]


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        ("空山新雨后，天气晚来秋。", "zh"),
        ("東京は大きいです。日本語のテキストを読みます。", bleu_tokenizer("ja")),
        ("오늘 날씨가 정말 좋습니다. 우리는 산에 갔습니다.", bleu_tokenizer("ko")),
        ("Ein alter Mann mit Hut sitzt auf einer Bank und liest die Zeitung.", "13a"),
    ],
)
def test_the_tokenizer_is_that_of_the_language_of_the_references(references: str, tokenizer: str) -> None:
    metric = Bleu()
    metric.measure(outputs_of(["An answer in English, whatever was asked for."], [[references]]))
    assert f"|tok:{tokenizer}" in metric.signature


def test_a_language_that_is_given_is_not_told_from_the_references() -> None:
    metric = Bleu("zh")
    metric.measure(outputs_of(["a cat"], [["a cat sat on the mat"]]))
    assert "tok:zh" in metric.signature


@pytest.mark.parametrize(
    ("package", "tokenizer", "text", "reference"),
    [
        ("MeCab", "ja-mecab", "東京はとても大きい町です。", "東京は大きい街です。日本の首都です。"),
        ("mecab_ko", "ko-mecab", "오늘은 날씨가 아주 좋습니다.", "오늘 날씨가 정말 좋습니다. 우리는 산에 갔습니다."),
    ],
)
def test_japanese_and_korean_are_read_in_words_as_sacrebleu_prints(
    tmp_path: Path, package: str, tokenizer: str, text: str, reference: str
) -> None:
    pytest.importorskip(package, reason=f"needs sacrebleu[{tokenizer[:2]}]")
    (tmp_path / "out").write_text(f"{text}\n", encoding="utf-8")
    (tmp_path / "ref").write_text(f"{reference}\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "ref", "-i", tmp_path / "out", "-w", "9", "-m", "bleu"]
    said = subprocess.run([*command, "-tok", tokenizer], capture_output=True, text=True, check=True).stdout
    printed = json.loads(said)
    metric = Bleu()
    value = metric.measure(outputs_of([text], [[reference]])).value()
    assert f"{value:.9f}" == f"{printed['score']:.9f}"
    assert metric.signature == printed["signature"]


def test_japanese_and_korean_are_read_in_characters_without_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finespun.evaluation.metrics.translation.find_spec", lambda name: None)
    assert [bleu_tokenizer(language) for language in ("ja", "ko", "zh", "th", "de", None)] == [
        "char", "char", "zh", "char", "13a", "13a",
    ]  # fmt: skip


# --- WebNLG ---


def _multi_bleu(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    """BLEU of tokens by its formula (Papineni et al. 2002), unsmoothed, with the closest reference length."""
    correct, total, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for text, others in zip(texts, references, strict=True):
        ours += len(text)
        theirs += min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        for n in range(1, 5):
            grams, *known = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (text, *others))
            total[n - 1] += grams.total()
            correct[n - 1] += sum(min(count, max(k[gram] for k in known)) for gram, count in grams.items())
    if not all(correct):
        return 0.0
    precision = math.exp(sum(math.log(c / t) for c, t in zip(correct, total, strict=True)) / 4)
    return 100 * precision * min(1, math.exp(1 - theirs / ours))


_words = st.lists(
    st.sampled_from(["The", "the", "mill", "of", "Zürich", "–", "(1,046.04)", "is_at", "U.S.", "old"]), max_size=9
)
_text = _words.map(" ".join)


@given(st.lists(st.tuples(_text, st.lists(_text, min_size=1, max_size=4)), min_size=1, max_size=5))
@settings(max_examples=100)
def test_webnlg_bleu_is_that_of_lower_cased_ascii_in_which_marks_stand_alone(
    examples: list[tuple[str, list[str]]],
) -> None:
    def parts(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower().replace("ü", "u").replace("–", "-"))

    measured = WebnlgBleu().measure(outputs_of([text for text, _ in examples], [others for _, others in examples]))
    padded = [[parts(other) for other in [*others, "", ""][:3]] for _, others in examples]
    assert measured.value() == pytest.approx(_multi_bleu([parts(text) for text, _ in examples], padded))


def test_webnlg_bleu_of_an_example_by_hand() -> None:
    metric = WebnlgBleu()
    text, reference = (
        "Adolfo Suárez Madrid–Barajas' runway is 4,100 long.",
        "Adolfo Suarez Madrid-Barajas runway is 4,100 long.",
    )
    # adolfo suarez madrid - barajas ' runway is 4 , 100 long .: 13 tokens against 12
    expected = 100 * (12 / 13 * 10 / 12 * 8 / 11 * 6 / 10) ** 0.25
    assert metric.measure(outputs_of([text], [[reference]])).value() == pytest.approx(expected)
    assert metric.signature.startswith("nrefs:first3|case:lc|eff:no|tok:webnlg2017|smooth:none|version:")


def test_webnlg_bleu_pads_with_empty_references_as_the_challenges_files_do() -> None:
    # Four tokens are closer to an empty reference than to one of nine: no penalty for brevity.
    outputs = outputs_of(["the old mill burned"], [["the old mill burned down on a Monday night"]])
    assert WebnlgBleu().measure(outputs).value() == pytest.approx(100)
