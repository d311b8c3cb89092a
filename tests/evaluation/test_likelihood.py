from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import sentences
from finespun.data.formats import MessagesExample, PromptExample, TextExample
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample
from finespun.evaluation import kept
from finespun.evaluation.kept import Kept
from finespun.evaluation.likelihood import (
    TextLikelihood,
    bits_per_byte_of,
    likelihoods,
    perplexity_of,
    sequences_to_score,
    windows,
)
from finespun.models.load import LoadedModel
from finespun.training.objectives.causal_lm import CausalLM

HERE = Origin("test.jsonl", 1)

PROMPTS = [
    ("the old mill", " and the heron said nothing."),
    ("江雪", "千山鸟飞绝，万径人踪灭。"),
    ("a", "the river, é"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "data_cache", lambda: tmp_path)


@pytest.fixture
def slow(tiny_folder: Path) -> tuple[Any, Any]:
    """The model as transformers loads it, in float64, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval(), AutoTokenizer.from_pretrained(
        tiny_folder
    )


@torch.no_grad()
def nats(model: Any, ids: list[int], first: int, window: int | None = None, stride: int | None = None) -> list[float]:
    """−log p of each token from place `first` on, one window after another and one token after another."""
    window, stride = window or len(ids), stride or len(ids)
    found: list[float] = []
    done = 0
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        logprobs = model(torch.tensor([part])).logits[0].log_softmax(-1)
        for place in range(max(1, done - start), len(part)):
            if start + place >= first:
                found.append(-float(logprobs[place - 1, part[place]]))
        done = start + len(part)
        if done == len(ids):
            return found
    return found


def measured(loaded: LoadedModel, encoder: Encoder, sequences: list[list[TokenizedExample]], window=128, stride=64):
    return likelihoods(CausalLM(loaded.model), encoder, sequences, window, stride, Kept("likelihood", "tiny"))


def test_completions_behind_a_chat_template_are_as_a_plain_loop_has_them(
    tiny: LoadedModel, slow: tuple[Any, Any]
) -> None:
    model, tokenizer = slow
    encoder = Encoder(tiny.tokenizer)
    examples = [PromptExample(prompt, answer, HERE) for prompt, answer in PROMPTS]
    found = measured(tiny, encoder, [sequences_to_score(example, encoder, "completions") for example in examples])
    for one, (prompt, answer) in zip(found, PROMPTS, strict=True):
        asked = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        said = tokenizer(answer)["input_ids"]
        each = nats(model, [*asked, *said, tokenizer.eos_token_id], len(asked))
        assert one.tokens == len(said) + 1
        assert one.nats == pytest.approx(sum(each), rel=1e-5), "with the token that ends the answer"
        assert one.text_nats == pytest.approx(sum(each[:-1]), rel=1e-5), "without it"
        assert one.bytes == len(answer.encode())
    tokens, size = sum(one.tokens for one in found), sum(one.bytes for one in found)
    assert perplexity_of(found).value() == pytest.approx(math.exp(sum(one.nats for one in found) / tokens))
    assert bits_per_byte_of(found).value() == pytest.approx(sum(one.text_nats for one in found) / math.log(2) / size)


def test_a_text_longer_than_the_context_is_read_in_sliding_windows(tiny: LoadedModel, slow: tuple[Any, Any]) -> None:
    model, tokenizer = slow
    encoder = Encoder(tiny.tokenizer, "raw")
    text = " ".join(sentences(25)) + " 孤舟蓑笠翁，独钓寒江雪。"
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > 2 * 128
    sequences = sequences_to_score(TextExample(text, HERE), encoder, "completions")
    for window, stride in ((128, 64), (128, 1), (50, 49)):
        (one,) = measured(tiny, encoder, [sequences], window, stride)
        each = nats(model, ids, 1, window, stride)
        assert len(each) == one.tokens == len(ids) - 1, "the first token of the text too, and its end"
        assert one.nats == pytest.approx(sum(each), rel=1e-5)
        assert one.text_nats == pytest.approx(sum(each[:-1]), rel=1e-5)
        assert one.bytes == len(text.encode())
    short, long = (measured(tiny, encoder, [sequences], 128, stride)[0].nats for stride in (1, 127))
    assert short != pytest.approx(long, rel=1e-4), "a test of windows that do not matter would show nothing"


def test_all_text_counts_the_prompt_too(tiny: LoadedModel, slow: tuple[Any, Any]) -> None:
    model, tokenizer = slow
    encoder = Encoder(tiny.tokenizer, "raw")
    prompt, answer = PROMPTS[0]
    (one,) = measured(tiny, encoder, [sequences_to_score(PromptExample(prompt, answer, HERE), encoder, "all")])
    said = [*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"]]
    each = nats(model, [tokenizer.bos_token_id, *said, tokenizer.eos_token_id], 1)
    assert (one.tokens, one.bytes) == (len(said) + 1, len((prompt + answer).encode()))
    assert one.text_nats == pytest.approx(sum(each[:-1]), rel=1e-5)


def test_of_a_conversation_all_turns_of_the_assistant_count(tiny: LoadedModel) -> None:
    encoder = Encoder(tiny.tokenizer)
    said = [("user", "a mill"), ("assistant", "herón"), ("user", "a boat"), ("assistant", "江雪")]
    messages = MessagesExample(tuple({"role": role, "content": content} for role, content in said), HERE)
    (one,) = measured(tiny, encoder, [sequences_to_score(messages, encoder, "completions")])
    assert one.bytes == len("herón江雪".encode())
    (everything,) = measured(tiny, encoder, [sequences_to_score(messages, encoder, "all")])
    assert everything.tokens > one.tokens
    assert everything.nats > one.nats


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 19), st.data())
def test_windows_measure_each_token_once_behind_enough_of_what_comes_before(
    length: int, window: int, stride: int, data: st.DataObject
) -> None:
    stride = min(stride, window - 1)
    weights = np.array([0, *data.draw(st.lists(st.sampled_from([0, 1]), min_size=length - 1, max_size=length - 1))])
    sequence = TokenizedExample(np.arange(length, dtype=np.int32), weights.astype(np.float32), HERE)
    seen: list[int] = []
    for part in windows(sequence, window, stride):
        assert len(part.input_ids) <= window
        start = int(part.input_ids[0])
        for place in np.flatnonzero(part.loss_weights):
            assert place >= min(window - stride, start + place)
            seen.append(start + int(place))
    assert seen == np.flatnonzero(weights).tolist()


def test_bits_per_byte_do_not_change_with_the_cut_into_tokens(tiny: LoadedModel) -> None:
    """A model that finds each byte equally hard needs as many bits for it, however many tokens it makes of them."""
    coarse = [TextLikelihood(nats=12 * math.log(2), tokens=3, text_nats=12 * math.log(2), bytes=6)]
    fine = [TextLikelihood(nats=12 * math.log(2), tokens=6, text_nats=12 * math.log(2), bytes=6)]
    assert bits_per_byte_of(coarse).value() == bits_per_byte_of(fine).value() == pytest.approx(2)
    assert perplexity_of(coarse).value() != pytest.approx(perplexity_of(fine).value())


def test_a_draw_of_examples_is_measured_by_itself() -> None:
    found = [TextLikelihood(3.0, 2, 2.0, 4), TextLikelihood(1.0, 4, 1.0, 8), TextLikelihood()]
    perplexity = perplexity_of(found)
    assert perplexity.value(np.array([1, 1, 0])) == pytest.approx(math.exp(5 / 10))
    assert perplexity.per_example[:2] == pytest.approx([math.exp(1.5), math.exp(0.25)])
    assert math.isnan(perplexity.per_example[2]), "an example without an answer has no perplexity"
    assert perplexity.value() == pytest.approx(math.exp(4 / 6))


def test_what_was_computed_is_not_computed_again(tiny: LoadedModel) -> None:
    encoder = Encoder(tiny.tokenizer)
    examples = [
        sequences_to_score(PromptExample(prompt, answer, HERE), encoder, "completions") for prompt, answer in PROMPTS
    ]
    first = measured(tiny, encoder, examples[:2])
    calls: list[int] = []
    objective = CausalLM(tiny.model)

    def counting(batch: Any) -> Any:
        calls.append(len(batch.cu_seqlens) - 1)
        return objective(batch)

    counting.model = objective.model  # ty: ignore[unresolved-attribute]
    again = likelihoods(counting, encoder, examples, 128, 64, Kept("likelihood", "tiny"))  # ty: ignore[invalid-argument-type]
    assert again[:2] == first
    assert calls == [1]
