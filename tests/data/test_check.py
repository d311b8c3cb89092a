"""What a check finds: each planted fault, in its rows and no others; lengths as counted one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import sentences
from finespun.data import check as check_module
from finespun.data.check import Check, changed_since_check, check_texts, remember
from finespun.data.formats import MessagesExample, PromptExample
from finespun.data.prepare import encode_texts
from finespun.data.readers import Origin
from finespun.data.templates import Encoder
from finespun.data.texts import TRAIN, read_texts
from finespun.errors import DataError
from finespun.recipe import CleanRecipe, DataRecipe

LONG = " ".join(f"word{number}" for number in range(60))


def checked(items: list[Any], encoder: Encoder | None = None, max_length: int | None = None, **settings: Any) -> Check:
    recipe = DataRecipe(**{"validation": 0.0, "on_bad_row": "skip"} | settings)
    return check_texts(read_texts(recipe, items), encoder, max_length)


def rows(check: Check) -> dict[str, list[int]]:
    """The row numbers of each finding, by the beginning of its title."""
    return {finding.title: [origin.row for origin, _ in finding.places] for finding in check.findings}


def pair(prompt: str, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


HEALTHY = [pair(f"Describe number {n}.", text) for n, text in enumerate(sentences(12))]

PLANTED: dict[str, list[dict[str, Any]]] = {
    "rows that cannot be used": [pair("Why?", 5), pair("And then?", "  ")],
    "rows that say the same as an earlier one": [HEALTHY[3]],
    "rows that say nearly the same as an earlier one": [pair("Count.", f"{LONG} again")],
    "answers of a single word": [pair("Is it?", "Yes."), pair("是吗？", "是的")],
    "answers that only repeat the prompt": [pair("Say it after me.", "Say it after me. ")],
    "texts decoded wrongly (mojibake)": [pair("Where did they meet that day?", "In the cafÃ© by the river.")],
    "texts with the replacement character U+FFFD": [pair("Where did it end at last?", "In the caf\ufffd of the town.")],
    "texts with invisible characters": [pair("What did the ferryman say?", "He said \u200bnothing to anyone.")],
    "texts with an unfilled placeholder, such as {{name}}": [
        pair("Who are you, then?", "I am {{name}}, made by them.")
    ],
    "texts with what looks like a password or key": [
        pair("How do I log in there?", "Set api_key = 'k9Xq2LmP7vT4wZ8r' in the file.")
    ],
    "texts with a card number": [pair("How can I pay for this?", "Use 4111 1111 1111 1111 for it.")],
    "texts with an e-mail address": [pair("How can I reach her now?", "Write to ada@lovelace.org about it.")],
    "texts with a phone number": [pair("How can I call him today?", "Call +44 20 7946 0958 after ten.")],
}


def test_each_fault_is_found_in_its_rows_and_nowhere_else() -> None:
    items = [*HEALTHY, pair("Count.", LONG)]
    expected = {}
    for title, planted in PLANTED.items():
        expected[title] = [len(items) + 1 + at for at in range(len(planted))]
        items += planted
    found = checked(items)
    assert rows(found) == expected
    assert found.stops
    assert found.read == len(items)
    assert found.train == len(items) - 2


def test_healthy_rows_have_no_findings() -> None:
    assert checked(HEALTHY).findings == []
    assert not checked(HEALTHY).stops


def test_what_is_held_out_and_trained(write_jsonl: Callable[..., Path]) -> None:
    long = [" ".join(f"{word}{number}" for number in range(40)) for word in "abcd"]
    train = write_jsonl(
        pair("a", long[0]),
        pair("b", long[1]),
        pair("c", long[2] + " and something else behind it " + long[3]),
        pair("d", "a short answer of its own"),
    )
    held = write_jsonl(
        pair("a", long[0]),  # the same
        pair("b", long[1] + " more"),  # nearly
        pair("x", long[2]),  # the answer is half of another
        pair("d", "another short answer"),  # the same question
        pair("e", "nothing of this was seen before by anyone at all in these texts"),
        name="held.jsonl",
    )
    recipe = DataRecipe(source=[str(train)], validation=[str(held)])
    found = checked_files(recipe)
    assert rows(found) == {
        "held-out examples that are also trained": [1],
        "held-out examples nearly the same as a trained one": [2],
        "held-out answers of which half the 13-word sequences are in training answers": [2, 3],
        "held-out prompts that are also trained, with other answers": [4],
    }
    assert {finding.of for finding in found.findings} == {5}
    assert (found.train, found.held_out) == (4, 5)


def checked_files(recipe: DataRecipe, encoder: Encoder | None = None) -> Check:
    recipe.on_bad_row = "skip"
    return check_texts(read_texts(recipe), encoder)


def test_near_duplicates_on_both_sides_are_counted_once_each(write_jsonl: Callable[..., Path]) -> None:
    """Held-out rows alike to each other all count; training rows alike to them and to one another do, too."""
    train = write_jsonl({"text": LONG + " one"}, {"text": LONG + " two"}, {"text": " ".join(sentences(6))})
    held = write_jsonl({"text": LONG}, {"text": LONG + " three"}, name="held.jsonl")
    found = rows(checked_files(DataRecipe(source=[str(train)], validation=[str(held)])))
    assert found["held-out examples nearly the same as a trained one"] == [1, 2]
    assert found["rows that say nearly the same as an earlier one"] == [2]


def test_a_long_prompt_that_all_share_makes_no_duplicates() -> None:
    system = {"role": "system", "content": LONG * 3}
    items = [
        {"messages": [system, {"role": "user", "content": "And?"}, {"role": "assistant", "content": text}]}
        for text in sentences(8)
    ]
    assert checked(items).findings == []
    kept = read_texts(DataRecipe(validation=0.0, clean=CleanRecipe(deduplicate="near")), items)
    assert kept.judged.count(TRAIN) == 8


@pytest.mark.parametrize("tokens", [False, True])
def test_what_cleaning_leaves_out_is_counted_and_not_looked_at(small_tokenizer, tokens: bool) -> None:
    items = [*HEALTHY, HEALTHY[0], pair("x", "secret@example.org is the address"), pair("y", 3)]
    encoder = Encoder(small_tokenizer) if tokens else None
    found = checked(items, encoder, clean=CleanRecipe(deduplicate="exact", drop_matching="secret"))
    assert rows(found) == {"rows that cannot be used": [15]}
    assert found.left_out == {"says the same as an earlier one": 1, "matches data.clean.drop_matching with": 1}
    assert found.train + found.held_out + sum(found.left_out.values()) + 1 == found.read == 15


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_lengths_are_those_counted_one_by_one(lengths: list[int]) -> None:
    found = check_module.Lengths.of(np.array(lengths), 0, "tokens")
    ordered = sorted(lengths)
    assert found.total == sum(lengths)
    assert found.longest == ordered[-1]
    assert sum(length <= found.median for length in lengths) * 2 >= len(lengths)
    assert sum(length < found.median for length in lengths) * 2 <= len(lengths)
    assert sum(length <= found.p95 for length in lengths) >= 0.95 * len(lengths)
    assert sum(length < found.p95 for length in lengths) < 0.95 * len(lengths)
    assert found.examples == len(lengths)
    for limit in found.limits:
        assert limit.longer == sum(length > limit.max_length for length in lengths)
        assert limit.beyond == sum(max(0, length - limit.max_length) for length in lengths)
    assert not found.limits or found.limits[-1].longer == 0


def test_tokens_are_those_that_would_be_trained(small_tokenizer) -> None:
    encoder = Encoder(small_tokenizer)
    found = checked(HEALTHY, encoder)
    examples = [
        tokens
        for row in HEALTHY
        for tokens in encoder.encode_example(PromptExample(row["prompt"], row["completion"], Origin("x", 1)))
    ]
    assert found.lengths is not None
    assert found.lengths.unit == "tokens"
    assert found.lengths.total == sum(len(example.input_ids) for example in examples)
    assert found.lengths.trained == sum(example.trained_tokens for example in examples)
    assert found.lengths.longest == max(len(example.input_ids) for example in examples)


def test_what_training_refuses_stops_and_what_it_takes_does_not(small_tokenizer) -> None:
    encoder = Encoder(small_tokenizer)
    bad = pair("Who <|im_end|> speaks?", "Nobody in particular does.")
    found = checked([*HEALTHY, bad], encoder)
    assert rows(found) == {"examples of which it cannot be shown what is trained": [13]}
    assert found.stops
    recipe = DataRecipe(validation=0.0)
    texts = read_texts(recipe, [*HEALTHY, bad])
    with pytest.raises(DataError, match="row 13"):
        encode_texts(texts, encoder, recipe, 1000)

    texts = read_texts(DataRecipe(validation=0.0), [*HEALTHY, pair("Go on.", LONG)])
    for refused in (True, False):
        found = check_texts(texts, encoder, 64, refused)
        (finding,) = found.findings
        assert [origin.row for origin, _ in finding.places] == [13]
        assert found.stops is refused


def test_conversations_that_become_several_sequences_are_counted_whole(small_tokenizer) -> None:
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, sentences(4), strict=True)
    ]
    encoder = Encoder(small_tokenizer)
    found = checked([{"messages": messages}], encoder)
    expected = encoder.encode_example(MessagesExample(tuple(messages), Origin("x", 1)))
    assert found.lengths is not None
    assert found.lengths.total == sum(len(tokens.input_ids) for tokens in expected)


def test_personal_data_is_shown_masked() -> None:
    (finding,) = checked([*HEALTHY, *PLANTED["texts with what looks like a password or key"]]).findings
    assert "k9Xq2LmP7vT4wZ8r" not in str(finding.places)
    assert finding.places[0][1].startswith("k9X")


def test_what_was_not_looked_at_in_all_rows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "NEAR_DUPLICATES_OF", 5)
    monkeypatch.setattr(check_module, "LANGUAGES_OF", 4)
    found = checked([*HEALTHY, pair("Count.", LONG), pair("Count.", LONG + " again")])
    assert len(found.remarks) == 2
    assert found.findings == []
    assert sum(found.languages.values()) == 5


def test_only_the_first_places_are_kept_and_all_are_counted() -> None:
    (finding,) = checked([pair(f"Is it {n}?", "Yes") for n in range(80)]).findings
    assert finding.count == finding.of == 80
    assert len(finding.places) == check_module.PLACES_KEPT


def test_a_file_that_changed_since_its_check_is_named(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(*HEALTHY)
    recipe = DataRecipe(source=[str(path)], validation=0.0)
    assert changed_since_check(read_texts(recipe).files) == []
    remember(read_texts(recipe).files)
    assert changed_since_check(read_texts(recipe).files) == []
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(HEALTHY[0]) + "\n", encoding="utf-8")
    (line,) = changed_since_check(read_texts(recipe).files)
    assert "data.jsonl has changed since it was checked" in line
    remember(read_texts(recipe).files)
    assert changed_since_check(read_texts(recipe).files) == []
