"""What outputs share with training texts, against a plain search for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import outputs_of

from finespun.errors import DataError
from finespun.evaluation.metrics import Novelty

words = st.lists(st.sampled_from("abc"), max_size=15)


def _stands_in(run: list[str], texts: list[list[str]]) -> bool:
    return any(text[i : i + len(run)] == run for text in texts for i in range(len(text) - len(run) + 1))


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
@settings(max_examples=200)
def test_it_finds_what_a_plain_search_finds(training: list[list[str]], written: list[list[str]]) -> None:
    training = [*training, ["d"]]
    found = Novelty(map(" ".join, training)).look_up([" ".join(each) for each in written])
    for place, text in enumerate(written):
        grams = [text[i : i + 4] for i in range(len(text) - 3)]
        assert found.ngrams[place] == len(grams)
        assert found.found[place] == sum(_stands_in(gram, training) for gram in grams)
        runs = [
            end - i
            for i in range(len(text))
            for end in range(i + 1, len(text) + 1)
            if _stands_in(text[i:end], training)
        ]
        assert found.longest[place] == max(runs, default=0)


def test_both_numbers_of_an_example_by_hand() -> None:
    novelty = Novelty(
        ["The old ferryman rowed over a slow river.", "He said nothing at all.", "床前明月光，疑是地上霜。"]
    )
    copied, longest = novelty.metrics
    outputs = outputs_of(["An old ferryman ROWED over: a bridge", "he said nothing", "", "看床前明月光疑是"])
    measured = copied.measure(outputs)
    assert measured.per_example is not None
    # "old ferryman rowed over a" holds 2 of 4 4-grams, three words none; of 5 Chinese ones 4 stand there, across the comma
    assert measured.per_example.tolist() == pytest.approx([2 / 4, 0, 0, 4 / 5])
    assert measured.value() == pytest.approx(6 / 9), "over all 4-grams, not over outputs"
    assert measured.value(np.array([0, 0, 1])) == 0.5
    runs = longest.measure(outputs)
    assert runs.per_example is not None
    assert runs.per_example.tolist() == [5, 3, 0, 7]
    assert runs.value() == 15 / 4
    assert (copied.name, longest.name, copied.better) == ("copied-4", "longest-copy", None)
    assert "training texts:3" in copied.signature


def test_a_run_does_not_go_on_from_one_training_text_to_the_next() -> None:
    found = Novelty(["a b c", "d e f"]).look_up(["a b c d e f"])
    assert (found.longest.tolist(), found.found.tolist()) == ([3], [0])


def test_a_whole_long_text_is_found() -> None:
    long = [f"w{place}" for place in range(700)]
    found = Novelty([" ".join(long), "other words"]).look_up(["x " + " ".join(long[100:]) + " y"])
    assert found.longest.tolist() == [600]


def test_training_texts_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="no words in the training texts"):
        Novelty(["", "…"])
