from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finespun.data.formats import TextExample
from finespun.data.sources import Origin
from finespun.data.split import hold_out
from finespun.errors import DataError


def examples(texts: list[str]) -> list[TextExample]:
    return [TextExample(text, Origin("t", number)) for number, text in enumerate(texts)]


@given(
    texts=st.lists(st.text(min_size=1), min_size=2, max_size=60),
    more=st.lists(st.text(min_size=1), max_size=30),
    share=st.floats(0.01, 0.9),
)
def test_order_additions_and_duplicates_move_nothing(texts: list[str], more: list[str], share: float) -> None:
    if len(set(texts)) < 2:
        with pytest.raises(DataError, match="cannot be split"):
            hold_out(examples(texts), share)
        return
    train, held = hold_out(examples(texts), share)
    assert sorted([*train, *held], key=lambda example: example.origin.row) == examples(texts)
    assert train
    assert held
    sides = {example.text: "held" for example in held} | {example.text: "train" for example in train}
    assert not {example.text for example in train} & {example.text for example in held}
    backwards = hold_out(examples(texts[::-1]), share)
    assert {example.text for example in backwards[1]} == {example.text for example in held}
    if len(held) > 1 and len(train) > 1:
        again = hold_out(examples(texts + more), share)
        assert all(sides.get(example.text, "train") == "train" for example in again[0])
        assert all(sides.get(example.text, "held") == "held" for example in again[1])


def test_the_share_is_about_what_was_asked() -> None:
    _, held = hold_out(examples([str(number) for number in range(5000)]), 0.1)
    assert 430 < len(held) < 570  # three standard deviations of a binomial


def test_a_share_of_nothing_holds_nothing_out() -> None:
    train, held = hold_out(examples(["a", "b"]), 0)
    assert (len(train), held) == (2, [])
