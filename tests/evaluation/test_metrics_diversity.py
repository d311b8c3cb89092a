"""Scores without references, against their definitions computed plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from test_metrics import corpus, outputs_of

from finespun.evaluation.metrics.base import tokens
from finespun.evaluation.metrics.diversity import (
    Distinct,
    Ended,
    Length,
    Loops,
    Repetition,
    SelfBleu,
    ends_in_loop,
)

few_words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@given(st.lists(few_words, min_size=1, max_size=6), st.integers(1, 3))
def test_distinct_is_the_share_of_different_ngrams(texts: list[str], n: int) -> None:
    grams = [tuple(text.split()[i : i + n]) for text in texts for i in range(len(text.split()) - n + 1)]
    expected = len(set(grams)) / len(grams) if grams else 0
    assert Distinct(n).measure(outputs_of(texts)).value() == pytest.approx(expected)


def test_distinct_counts_chinese_by_characters_and_without_case() -> None:
    assert Distinct(1).measure(outputs_of(["明月明月"])).value() == 0.5
    assert Distinct(2).measure(outputs_of(["The cat the Cat"])).value() == pytest.approx(2 / 3)


def _self_bleu(texts: list[str], places: list[int]) -> float:
    scorer = BLEU(tokenize="none", effective_order=True)
    words = [" ".join(tokens(text)) for text in texts]
    scores = [
        scorer.sentence_score(words[place], [words[other] for other in sorted(set(places)) if other != place]).score
        for place in places
    ]
    return sum(scores) / len(scores)


@given(st.lists(few_words, min_size=2, max_size=6), st.data())
@settings(max_examples=100)
def test_self_bleu_is_the_mean_sentence_bleu_against_all_others(texts: list[str], data: st.DataObject) -> None:
    measured = SelfBleu().measure(outputs_of(texts))
    assert measured.value() == pytest.approx(_self_bleu(texts, list(range(len(texts)))))
    draw = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=2, max_size=8).filter(lambda d: len(set(d)) > 1))
    assert measured.value(np.array(draw)) == pytest.approx(_self_bleu(texts, draw))


def test_self_bleu_of_real_sentences_of_two_scripts() -> None:
    texts = corpus(25, 1)[0] + corpus(25, 1, chinese=True)[0]
    value = SelfBleu().measure(outputs_of(texts)).value()
    assert value == pytest.approx(_self_bleu(texts, list(range(50))))
    assert 20 < value < 90


def test_self_bleu_of_alike_and_of_lone_outputs() -> None:
    assert SelfBleu().measure(outputs_of(["a cat sat on the mat"] * 3)).value() == pytest.approx(100)
    lone = SelfBleu().measure(outputs_of(["a cat sat on the mat", "a dog"]))
    assert SelfBleu().measure(outputs_of(["a cat sat on the mat"])).value() == 0
    assert lone.value(np.array([0, 0, 0])) == 0, "an output drawn three times is not alike others"


def test_rep_4_is_the_mean_share_of_repeated_4_grams() -> None:
    # a b c d a b c d: 5 4-grams, 4 of them different; a text of three words has none
    measured = Repetition().measure(outputs_of(["a b c d a b c d", "a b c", "a b c d e"]))
    assert measured.per_example.tolist() == pytest.approx([1 / 5, 0, 0])
    assert measured.value() == pytest.approx(1 / 15)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("It was late. " + "I don't know. " * 5, True),
        ("It was late. " + "I don't know. " * 5 + "I don't", True),
        ("It was late. " + "I don't know. " * 2, False),
        ("I don't know. " * 5 + "But then she came in, and all was well again at last, as it had been before.", False),
        ("Ha ha ha ha!", False),
        ("Stop" + "!" * 40, True),
        ("床前明月光，" * 4, True),
        ("床前明月" * 3, True),
        ("床前明月" * 2 + "床前明", False),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", False),
        ("", False),
        ("the " * 11, False),
        ("the " * 12, True),
    ],
)
def test_a_loop_is_what_is_said_three_times_at_the_end(text: str, loops: bool) -> None:
    assert Loops().measure(outputs_of([text])).value() == loops


@given(st.lists(st.sampled_from("ab"), max_size=30))
@settings(max_examples=300)
def test_loops_are_found_whatever_their_period(words: list[str]) -> None:
    def plainly() -> bool:
        for length in range(12, len(words) + 1):
            end = words[-length:]
            if any(end[period:] == end[:-period] for period in range(1, length // 3 + 1)):
                return True
        return False

    assert ends_in_loop(words) == plainly()


def test_length_and_ended() -> None:
    outputs = outputs_of(["a" * 30, "b" * 60, "c" * 90])  # the third was cut
    assert Length().measure(outputs).value() == 20
    assert Ended().measure(outputs).value() == pytest.approx(2 / 3)
    assert Ended().measure(outputs).value(np.array([2, 2, 0, 2])) == 0.25
