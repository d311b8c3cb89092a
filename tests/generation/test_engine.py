"""Generation against transformers' own, and what streaming and stopping must never do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from finespun.data.templates import Encoder
from finespun.errors import DataError
from finespun.generation import engine
from finespun.generation.engine import generate
from finespun.generation.sampling import Chooser
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from scipy_free import chi_square_p

PROMPTS = ["the old ferryman", "a", "over the slow river and said nothing at all, 江雪", "heron mill boat " * 6, "mill"]


@pytest.fixture
def encoder(tiny: LoadedModel) -> Encoder:
    return Encoder(tiny.tokenizer, "raw")


def transformers_greedy(model, ids: list[int], new: int, **options) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, attention_mask=torch.ones(1, len(ids)), **options
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}])
def test_greedy_tokens_of_a_batch_equal_transformers_one_by_one(
    tiny: LoadedModel, encoder: Encoder, options: dict
) -> None:
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    found = generate(tiny, encoder, ids, Sampling(max_new_tokens=30, **options))
    texts = [encoder.decode(transformers_greedy(tiny.model, prompt, 30, **options)) for prompt in ids]
    assert [completions[0].text for completions in found] == texts
    assert len(set(texts)) > 2


def test_absolute_positions_count_real_tokens_only(small_tokenizer) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=len(small_tokenizer),
        n_positions=128,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = LoadedModel(GPT2LMHeadModel(config).eval(), small_tokenizer, "x", None)
    encoder = Encoder(small_tokenizer, "raw")
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    found = generate(model, encoder, ids, Sampling(max_new_tokens=20))
    texts = [encoder.decode(transformers_greedy(model.model, prompt, 20, pad_token_id=0)) for prompt in ids]
    assert [completions[0].text for completions in found] == texts


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(
    tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.8, seed=5)
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    together = generate(tiny, encoder, ids, sampling, samples=3)
    alone = [generate(tiny, encoder, [prompt], sampling, samples=3)[0] for prompt in ids]
    assert together == alone
    monkeypatch.setattr(engine, "BATCH", 4)
    assert generate(tiny, encoder, ids, sampling, samples=3) == together
    assert len({completion.text for completion in together[0]}) == 3
    other = generate(tiny, encoder, ids, Sampling(max_new_tokens=8, temperature=0.8, seed=6), samples=3)
    assert other != together


def test_samples_follow_the_models_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6)
    for sampling, expected in (
        (Sampling(temperature=1.0), logits.softmax(0)),
        (Sampling(temperature=0.5), (logits / 0.5).softmax(0)),
        (
            Sampling(temperature=1.0, top_k=3),
            logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf).softmax(0),
        ),
        (
            Sampling(temperature=1.0, min_p=0.15),
            logits.masked_fill(logits.softmax(0) < 0.15 * logits.softmax(0).max(), -torch.inf).softmax(0),
        ),
    ):
        choose = Chooser(sampling)
        drawn = Counter(choose([0], logits) for _ in range(4000))
        assert {token for token, p in enumerate(expected) if p == 0}.isdisjoint(drawn)
        assert chi_square_p([drawn[token] for token in range(6)], expected.tolist()) > 1e-4


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = Chooser(Sampling(temperature=1.0, top_p=0.75))
    assert {choose([0], logits) for _ in range(300)} == {0, 1}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, encoder: Encoder):
    """Makes the engine write a given text, token by token and then byte by byte, whatever the model says."""

    def write(text: str) -> list[int]:
        tokens = [*encoder.tokenizer(text)["input_ids"], encoder.tokenizer.eos_token_id]
        monkeypatch.setattr(Chooser, "__call__", lambda self, ids, logits: tokens[len(ids) - 1])
        return tokens

    return write


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("ab 你好🙂é.", min_size=1, max_size=20),
    stops=st.lists(st.text("ab 你🙂.", min_size=1, max_size=3), max_size=2),
)
@example(text="a🙂a", stops=["🙂", "a🙂a"])
def test_streamed_pieces_make_up_the_text_without_stop_strings_or_half_characters(
    tiny, encoder, scripted, text: str, stops: list[str]
) -> None:
    tokens = scripted(text)[:-1]
    pieces: list[str] = []
    start = encoder.encode_prompt("a")
    assert len(start) == 1
    (completion,) = generate(
        tiny,
        encoder,
        [start],
        Sampling(max_new_tokens=100, stop=stops),
        on_text=lambda p, s, piece: pieces.append(piece),
    )[0]
    # writing ends with the first token that completes a stop string; a longer one that began before is never written
    written = [encoder.decode(tokens[:count]) for count in range(1, len(tokens) + 1)]
    found = [[part.find(stop) for stop in stops if stop in part] for part in written]
    cut = min(next(filter(None, found), [len(text)]))
    assert completion.text == text[:cut]
    assert completion.finish_reason == "stop"
    assert "".join(pieces) == completion.text
    assert not any("\ufffd" in piece for piece in pieces)


def test_length_and_context_end_a_text(tiny: LoadedModel, encoder: Encoder, scripted) -> None:
    scripted("the old ferryman rowed over a slow river " * 20)
    (completion,) = generate(tiny, encoder, [encoder.encode_prompt("a")], Sampling(max_new_tokens=5))[0]
    assert (completion.finish_reason, completion.prompt_tokens, completion.completion_tokens) == ("length", 1, 5)
    (completion,) = generate(tiny, encoder, [encoder.encode_prompt("a")], Sampling(max_new_tokens=5000))[0]
    assert completion.completion_tokens == tiny.context_length - 1
    with pytest.raises(DataError, match="Prompt 2 has 128 tokens"):
        generate(tiny, encoder, [[5], [5] * 128], Sampling())
