from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finespun.data.formats import PromptExample, TextExample
from finespun.data.readers import Origin
from finespun.data.split import content_hash, hold_out, key_hash
from finespun.errors import DataError


def held(texts: list[str], share: float) -> set[str]:
    """The texts that are held out."""
    sides = hold_out(np.array([key_hash(text) for text in texts], dtype=np.uint64), share)
    assert len(sides) == len(texts)
    found = {text for text, side in zip(texts, sides, strict=True) if side}
    assert not found & {text for text, side in zip(texts, sides, strict=True) if not side}, "a duplicate on both sides"
    return found


@given(
    texts=st.lists(st.text(min_size=1), min_size=2, max_size=60),
    more=st.lists(st.text(min_size=1), max_size=30),
    share=st.floats(0.01, 0.9),
)
def test_order_additions_and_duplicates_move_nothing(texts: list[str], more: list[str], share: float) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    more = [text.encode("utf-8", "replace").decode() for text in more]
    if len(set(texts)) < 2:
        with pytest.raises(DataError, match="cannot be split"):
            held(texts, share)
        return
    out = held(texts, share)
    assert out
    assert set(texts) - out
    assert held(texts[::-1], share) == out
    if len(out) > 1 and len(set(texts) - out) > 1:
        assert held(texts + more, share) & set(texts) == out


def test_the_share_is_about_what_was_asked() -> None:
    assert (
        430 < len(held([str(number) for number in range(5000)], 0.1)) < 570
    )  # three standard deviations of a binomial


def test_a_share_of_nothing_holds_nothing_out() -> None:
    assert held(["a", "b"], 0) == set()


def test_the_hash_is_of_what_an_example_says_and_not_of_where_it_stands() -> None:
    here, there = Origin("a", 1), Origin("b", 2)
    assert content_hash(TextExample("x", here)) == content_hash(TextExample("x", there))
    assert content_hash(PromptExample("ab", "c", here)) != content_hash(PromptExample("a", "bc", here))
    assert key_hash("x") == int(hashlib.sha256(b"x").hexdigest()[:16], 16)
