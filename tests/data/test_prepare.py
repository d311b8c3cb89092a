"""From rows to token ids: what is kept, what is left out and why, what is found again."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import sentences
from finespun.data import prepare
from finespun.data.packing import micro_batches, step_indices
from finespun.data.prepare import Tokens, encode_texts
from finespun.data.readers import BadRow, Origin
from finespun.data.templates import Encoder, TokenizedExample
from finespun.data.texts import HELD_OUT, LEFT_OUT, TRAIN, Texts, read_texts
from finespun.data.tokens import Share, TokenStore, TokenWriter
from finespun.errors import DataError
from finespun.recipe import CleanRecipe, DataRecipe
from reference import tokenized


def prepared(recipe: DataRecipe, tokenizer: PreTrainedTokenizerFast) -> tuple[Texts, Tokens]:
    texts = read_texts(recipe)
    return texts, encode_texts(texts, Encoder(tokenizer), recipe, 128)


def dropped(tokens: Tokens) -> list[dict]:
    return [json.loads(line) for line in (tokens.folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]


def test_kept_and_left_out_are_what_was_read_and_each_has_its_reason(small_tokenizer) -> None:
    good = [{"prompt": f"the {i}", "completion": f"old ferryman {i}"} for i in range(6)]
    items = [
        *good,
        good[0],  # 7
        {"prompt": "the", "completion": 5},  # 8
        {"prompt": "the", "completion": "secret river"},  # 9
        {"prompt": "the", "completion": "x"},  # 10
        {"prompt": "the <|im_end|>", "completion": "mill and heron"},  # 11: the template cannot show it
        {"prompt": "the", "completion": "river " * 200},  # 12
        {"prompt": "the old", "completion": "half \ud800 a character"},  # 13
    ]
    recipe = DataRecipe(
        validation=0.0,
        on_bad_row="skip",
        too_long="skip",
        clean=CleanRecipe(deduplicate="exact", min_characters=3, drop_matching="secret"),
    )
    texts = read_texts(recipe, items)
    tokens = encode_texts(texts, Encoder(small_tokenizer), recipe, 128)
    reasons = {line["row"]: line["reason"] for line in dropped(tokens)}
    assert set(reasons) == {7, 8, 9, 10, 11, 12, 13}
    assert "says the same as" in reasons[7]
    assert reasons[7].endswith("row 1")
    for row, said in ((8, "not a text"), (9, "drop_matching"), (10, "min_characters"), (11, "im_end"), (12, "tokens")):
        assert said in reasons[row]
    assert len(tokens.train) + tokens.dropped == len(texts.judged.sides) == 13
    assert {example.origin.row for example in tokens.train} == {1, 2, 3, 4, 5, 6}
    assert [line["columns"] for line in dropped(tokens)] == items[6:]


def test_near_duplicates_are_left_out(small_tokenizer, write_jsonl) -> None:
    long = " ".join(f"word{i}" for i in range(60))
    path = write_jsonl({"text": long}, {"text": long + " more"}, {"text": " ".join(sentences(8))})
    texts = read_texts(DataRecipe(source=[str(path)], validation=0.0, clean=CleanRecipe(deduplicate="near")))
    assert texts.judged.sides.tolist() == [TRAIN, LEFT_OUT, TRAIN]
    assert "nearly the same as" in texts.judged.reasons[1]


def test_mended_texts_are_judged_again(write_jsonl) -> None:
    path = write_jsonl(
        {"prompt": "a", "completion": "cafÃ©"},
        {"prompt": "b", "completion": "\u200b"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ufeff"}]},
    )
    recipe = DataRecipe(
        source=[str(path)], validation=0.0, on_bad_row="skip", format=None, clean=CleanRecipe(fix_encoding=True)
    )
    with pytest.raises(DataError, match="different formats"):
        read_texts(recipe)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    texts = read_texts(recipe)
    ((_, example),) = texts.examples(TRAIN)
    assert example.completion == "café"
    assert "nothing to learn" in texts.judged.reasons[1]


def test_a_group_stands_on_one_side(write_jsonl) -> None:
    path = write_jsonl(
        *[{"text": f"{text} {n}", "author": i} for i, text in enumerate(sentences(30)) for n in range(4)]
    )
    texts = read_texts(DataRecipe(source=[str(path)], validation=0.3, group_by="author"))
    sides = texts.judged.sides.reshape(30, 4)
    assert (sides == sides[:, :1]).all()
    assert {TRAIN, HELD_OUT} == set(texts.judged.sides.tolist())


def test_what_is_held_out_and_trained_alike_is_said(write_jsonl, tmp_path: Path) -> None:
    train = write_jsonl({"prompt": "a", "completion": "b c"}, {"prompt": "d", "completion": "e f"})
    held = write_jsonl({"prompt": "a", "completion": "b c"}, {"prompt": "d", "completion": "g h"}, name="held.jsonl")
    notes = "\n".join(read_texts(DataRecipe(source=[str(train)], validation=[str(held)])).notes)
    assert "1 of 2 held-out examples are also trained" in notes
    assert "2 of 2 held-out prompts are also trained" in notes


def test_the_same_data_is_tokenized_once_and_changed_data_anew(
    small_tokenizer, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"cache {i}", "completion": text} for i, text in enumerate(sentences(9))]
    calls = Counter()
    write = prepare._write_tokens
    monkeypatch.setattr(prepare, "_write_tokens", lambda *given: (calls.update(["written"]), write(*given)))

    def ids(**settings) -> list[list[int]]:
        _, tokens = prepared(DataRecipe(source=[str(path)], validation=0.2, **settings), small_tokenizer)
        return [example.input_ids.tolist() for example in tokens.train]

    path = write_jsonl(*rows)
    first = ids()
    assert ids() == first
    assert calls["written"] == 1
    assert ids(max_length=100) == first
    assert calls["written"] == 2
    path = write_jsonl(*rows[:-1], {"prompt": "changed", "completion": "and not the same"})
    assert ids() != first
    assert calls["written"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_in_processes_the_same_is_made_in_the_same_order(small_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {"prompt": f"the {n}", "completion": "odd <|im_end|>" if n % 50 == 0 else text}
        for n, text in enumerate(sentences(400))
    ]
    recipe = DataRecipe(validation=0.0, on_bad_row="skip")
    texts, encoder = read_texts(recipe, items), Encoder(small_tokenizer)

    def made() -> list[tuple]:
        return [
            (number, str(bad) if isinstance(bad, BadRow) else [each.input_ids.tolist() for each in bad])
            for number, _, _, bad in prepare.encoded(texts, encoder)
        ]

    inline = made()
    started = []
    pool = prepare.ProcessPoolExecutor
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda *more: (started.append(more[0]), pool(*more))[1])
    monkeypatch.setattr(prepare, "FEWEST_FOR_PROCESSES", 0)
    monkeypatch.setattr(prepare, "BATCH_EXAMPLES", 30)
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert made() == inline
    assert started == [3]
    assert sum(isinstance(said, str) for _, said in inline) == 8


weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12)


@given(examples=st.lists(weights, max_size=8), vocabulary=st.sampled_from([300, 100_000]))
def test_a_store_gives_back_what_was_written(tmp_path_factory, examples: list[list[float]], vocabulary: int) -> None:
    written = [
        tokenized([(7 * i + j) % vocabulary for j in range(len(each))], [0.0, *each[1:]], Origin(f"f{i % 2}", i))
        for i, each in enumerate(examples)
    ]
    folder = tmp_path_factory.mktemp("store") / "tokens"
    with TokenWriter(folder, vocabulary) as writer:
        writer.begin_source()
        writer.add(written)
    store = TokenStore(folder)
    assert len(store) == len(written)
    for read, example in zip(store, written, strict=True):
        assert read.input_ids.tolist() == example.input_ids.tolist()
        assert read.loss_weights.tolist() == example.loss_weights.tolist()
        assert read.origin == example.origin
    assert store.lengths.tolist() == [len(each) for each in examples]
    assert store.trained.tolist() == [example.trained_tokens for example in written]


def test_weights_decide_how_much_of_each_source_an_epoch_has(small_tokenizer, write_jsonl) -> None:
    few = write_jsonl(*[{"text": f"few {text}"} for text in sentences(10)], name="few.jsonl")
    many = write_jsonl(*[{"text": f"many {text}"} for text in sentences(30)], name="many.jsonl")
    recipe = DataRecipe(source=[f"{few}:0.75", f"{many}:0.25"], validation=0.0)
    _, tokens = prepared(recipe, small_tokenizer)
    assert tokens.mixture == [Share(0, 10, 30), Share(10, 40, 10)]
    steps = step_indices(len(tokens.train), 8, seed=3, mixture=tokens.mixture)
    epochs = [[index for _ in range(5) for index in next(steps)] for _ in range(3)]
    for epoch in epochs:
        assert sum(index < 10 for index in epoch) == 30
        assert set(Counter(index for index in epoch if index < 10).values()) == {3}
    assert sorted(index for epoch in epochs for index in epoch if index >= 10) == list(range(10, 40))
    resumed = step_indices(len(tokens.train), 8, seed=3, start=7, mixture=tokens.mixture)
    again = step_indices(len(tokens.train), 8, seed=3, mixture=tokens.mixture)
    assert [next(again) for _ in range(9)][7:] == [next(resumed) for _ in range(2)]


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_hold_98_percent_of_what_they_may(seed: int) -> None:
    """Lengths as those of WebNLG: 86 tokens on average; and some as long as a batch."""
    lengths = np.random.default_rng(seed).gamma(4, 86 / 4, 1000).astype(int) + 2
    lengths[:5] = 2048
    examples = [TokenizedExample(np.zeros(n, np.int32), np.zeros(n, np.float32), Origin("t", n)) for n in lengths]
    groups = micro_batches(examples, 2048)
    sizes = [sum(len(example.input_ids) for example in group) for group in groups]
    assert max(sizes) <= 2048
    assert sum(sizes) == lengths.sum()
    assert sum(sizes[:-1]) >= 0.98 * 2048 * (len(sizes) - 1)
    assert len({id(example) for group in groups for example in group}) == len(examples)
