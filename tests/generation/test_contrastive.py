"""Contrastive search against a slow one, written from the paper, that reads each candidate's text from its beginning."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import finespun
from finespun.data.templates import Encoder
from finespun.errors import GenerationError, RecipeError
from finespun.generation import search
from finespun.generation.engine import Engine, generate
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from reference import text_of


@pytest.fixture
def encoder(tiny: LoadedModel) -> Encoder:
    return Encoder(tiny.tokenizer, "raw")


@pytest.fixture
def prompts() -> list[list[int]]:
    random = Random(2)
    return [[random.randrange(3, 400) for _ in range(random.randint(1, 20))] for _ in range(7)]


@torch.inference_mode()
def contrastive(model: Any, prompt: list[int], sampling: Sampling, ends: set[int]) -> list[int]:
    """(1 - α) p(v | x) - α max cos(h(v), h(x_j)), in float64 (Su et al. 2022, equation 5)."""
    new: list[int] = []
    penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    while len(new) < sampling.max_new_tokens:
        ids = torch.tensor([[*prompt, *new]])
        probabilities = penalty(ids, model(ids).logits[:, -1])[0].softmax(-1)
        candidates = probabilities.argsort(descending=True)[: sampling.top_k]
        texts = torch.tensor([[*prompt, *new, token] for token in candidates.tolist()])
        states = model(texts, output_hidden_states=True).hidden_states[-1]
        likeness = torch.cosine_similarity(states[:, :-1], states[:, -1:], dim=-1).amax(-1)
        alpha = sampling.contrastive_alpha
        best = ((1 - alpha) * probabilities[candidates] - alpha * likeness).argmax()
        new.append(int(candidates[best]))
        if new[-1] in ends:
            break
    return new


@pytest.mark.parametrize("settings", [{"top_k": 4, "contrastive_alpha": 0.6}, {"top_k": 7, "contrastive_alpha": 0.3}])
@pytest.mark.parametrize("random_model", ["llama", "gpt2", "gemma3", "opt"], indirect=True)
def test_tokens_are_those_of_the_paper(
    random_model: LoadedModel, prompts: list[list[int]], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some prompts wait for others, and are read in pieces; texts end at some tokens."""
    encoder = Encoder(random_model.tokenizer, "raw")
    encoder.stop_ids = (*encoder.stop_ids, *range(3, 20))
    monkeypatch.setattr(search, "SLOTS", 15)
    monkeypatch.setattr(search, "AT_ONCE", 8)
    sampling = Sampling(max_new_tokens=12, repetition_penalty=1.2, **settings)
    found = generate(random_model, encoder, prompts, sampling)
    slow = deepcopy(random_model.model).double()
    greedy = generate(random_model, encoder, prompts, Sampling(max_new_tokens=12, repetition_penalty=1.2))
    for prompt, (completion,) in zip(prompts, found, strict=True):
        ids = contrastive(slow, prompt, sampling, set(encoder.stop_ids))
        ended = ids[-1] in encoder.stop_ids
        assert completion.text == text_of(encoder, ids)
        assert completion.finish_reason == ("stop" if ended else "length")
    assert found != greedy


def test_a_pretrained_model_stops_repeating_itself(smollm2_shared: LoadedModel) -> None:
    encoder = Encoder(smollm2_shared.tokenizer, "raw")
    prompts = [encoder.encode_prompt(text) for text in ("The sea. The sea. The sea.", "Once upon a time")]
    sampling = Sampling(max_new_tokens=8, top_k=4, contrastive_alpha=0.6)
    found = generate(smollm2_shared, encoder, prompts, sampling)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        ids = contrastive(smollm2_shared.model, prompt, sampling, set(encoder.stop_ids))
        assert completion.text == encoder.decode(ids, skip_special_tokens=True)
    greedy = generate(smollm2_shared, encoder, prompts[:1], Sampling(max_new_tokens=8))[0][0].text
    assert "The sea" in greedy
    assert "The sea" not in found[0][0].text


def test_one_candidate_is_greedy(tiny: LoadedModel, encoder: Encoder, prompts: list[list[int]]) -> None:
    one = Sampling(max_new_tokens=12, top_k=1, contrastive_alpha=0.9)
    assert generate(tiny, encoder, prompts, one) == generate(tiny, encoder, prompts, Sampling(max_new_tokens=12))


def test_texts_are_streamed_and_end_as_others(tiny: LoadedModel, encoder: Encoder, prompts: list[list[int]]) -> None:
    settings = {"max_new_tokens": 20, "top_k": 3, "contrastive_alpha": 0.5}
    ((plain,),) = generate(tiny, encoder, prompts[:1], Sampling(**settings))
    assert plain.completion_tokens == 20
    pieces: list[str] = []
    ended = []
    sampling = Sampling(**settings, stop=[plain.text[9:12]])
    ((stopped,),) = generate(
        *(tiny, encoder, prompts[:1], sampling),
        on_text=lambda prompt, sample, text: pieces.append(text),
        on_end=lambda prompt, sample, completion: ended.append(completion),
    )
    assert stopped.text == plain.text[: plain.text.index(plain.text[9:12])]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < 20
    assert len(pieces) > 1
    assert "".join(pieces) == stopped.text
    assert ended == [stopped]


def test_candidates_are_what_a_constraint_allows(tiny: LoadedModel, encoder: Encoder, prompts: list[list[int]]) -> None:
    sampling = Sampling(max_new_tokens=20, top_k=5, contrastive_alpha=0.6, choices=["a heron", "a mill", "the boat"])
    texts = {completion.text for (completion,) in generate(tiny, encoder, prompts, sampling)}
    assert texts <= {"a heron", "a mill", "the boat"}


@pytest.mark.parametrize("random_model", ["bloom"], indirect=True)
def test_what_contrastive_search_cannot_be(
    random_model: LoadedModel, tiny: LoadedModel, encoder: Encoder, tiny_folder: Path
) -> None:
    sampling = Sampling(top_k=4, contrastive_alpha=0.6)
    with pytest.raises(GenerationError, match="bloom cannot take back"):
        generate(random_model, encoder, [[7]], sampling)
    with pytest.raises(GenerationError, match="gives one text"):
        generate(tiny, encoder, [[7]], sampling, samples=2)
    with pytest.raises(GenerationError, match="take no draft"):
        generate(tiny, encoder, [[7]], sampling, draft=tiny)
    with pytest.raises(GenerationError, match="does not know logprobs, temperature"):
        generate(tiny, encoder, [[7]], sampling.model_copy(update={"temperature": 1.0, "logprobs": 2}))
    with pytest.raises(GenerationError, match="contrastive_alpha: is for prompts"):
        Engine(tiny, encoder).add([7], sampling)
    with pytest.raises(RecipeError, match=r"`contrastive_alpha` needs `top_k`.* 4 for example"):
        finespun.load(tiny_folder).generate("a", contrastive_alpha=0.6)
