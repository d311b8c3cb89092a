"""Beam search against transformers' own; diverse beam search against a slow one, written from the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

import finespun
from finespun.data.templates import Encoder
from finespun.errors import GenerationError, RecipeError
from finespun.generation import search
from finespun.generation.beams import beam_search
from finespun.generation.engine import generate
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from reference import text_of

PROMPTS = ["the old ferryman", "a", "over the slow river and said nothing at all, 江雪", "heron mill boat " * 6, "mill"]


@pytest.fixture
def encoder(tiny: LoadedModel) -> Encoder:
    return with_ends(tiny.tokenizer, 30)


def with_ends(tokenizer: Any, count: int) -> Encoder:
    """One that lets texts end at so many tokens, so that random models end some."""
    encoder = Encoder(tokenizer, "raw")
    encoder.stop_ids = (*encoder.stop_ids, *Random(0).sample(range(3, 400), count))
    return encoder


def ids_of(loaded: LoadedModel, encoder: Encoder, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1):
    """The ids of the `count` best continuations of each prompt, an end with them."""
    asked = [(prompt, min(sampling.max_new_tokens, loaded.context_length - len(prompt))) for prompt in prompts]
    found: dict[int, list[list[int]]] = {}
    beam_search(loaded, encoder, asked, sampling, count, cache_tokens=10**6, on_end=found.__setitem__)
    return [found[number] for number in range(len(prompts))]


def transformers_beams(
    model: Any, encoder: Encoder, prompt: list[int], sampling: Sampling, count: int = 1
) -> list[list[int]]:
    options = {
        "num_beams": sampling.beams,
        "num_return_sequences": count,
        "length_penalty": sampling.length_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size or 0,
        "min_new_tokens": sampling.min_new_tokens or None,
        "eos_token_id": list(encoder.stop_ids),
        "pad_token_id": 0,
    }
    made = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, **options
    )
    found = []
    for row in made[:, len(prompt) :].tolist():
        end = next((place for place, token in enumerate(row) if token in encoder.stop_ids), len(row) - 1)
        found.append(row[: end + 1])
    return found


@given(
    st.fixed_dictionaries(
        {
            "beams": st.integers(2, 7),
            "max_new_tokens": st.integers(1, 14),
            "length_penalty": st.sampled_from([-1.5, 0.0, 0.6, 1.0, 3.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.6, 0.7]),
            "no_repeat_ngram_size": st.sampled_from([None, None, 1, 2]),
            "min_new_tokens": st.sampled_from([0, 0, 3]),
        }
    ),
    st.sampled_from([0, 1, 30, 150]),
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_beams_are_those_of_transformers(tiny: LoadedModel, given_settings: dict[str, Any], ends: int) -> None:
    encoder = with_ends(tiny.tokenizer, ends)
    sampling = Sampling(**given_settings)
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS[:4]]
    found = ids_of(tiny, encoder, prompts, sampling, 2)
    assert found == [transformers_beams(tiny.model, encoder, prompt, sampling, 2) for prompt in prompts]


def test_texts_end_in_different_ways(tiny: LoadedModel) -> None:
    """What the test above rests on."""
    encoder = with_ends(tiny.tokenizer, 150)
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    lengths, ends = set(), set()
    for penalty in (-1.5, 0.0, 1.0, 3.0):
        sampling = Sampling(beams=4, max_new_tokens=14, length_penalty=penalty)
        texts = [ids for of_prompt in ids_of(tiny, encoder, prompts, sampling, 2) for ids in of_prompt]
        lengths |= {len(ids) for ids in texts}
        ends |= {ids[-1] in encoder.stop_ids for ids in texts}
    assert len(lengths) > 3
    assert ends == {True, False}


@pytest.mark.parametrize("random_model", ["gpt2", "gemma3", "qwen3", "bloom"], indirect=True)
def test_beams_of_other_architectures(random_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some prompts wait for others, and are read in pieces."""
    encoder = with_ends(random_model.tokenizer, 30)
    random = Random(1)
    prompts = [[random.randrange(3, 400) for _ in range(random.randint(1, 20))] for _ in range(9)]
    monkeypatch.setattr(search, "SLOTS", 7)
    monkeypatch.setattr(search, "AT_ONCE", 8)
    sampling = Sampling(beams=3, max_new_tokens=9, length_penalty=0.5)
    found = ids_of(random_model, encoder, prompts, sampling, 2)
    assert found == [transformers_beams(random_model.model, encoder, prompt, sampling, 2) for prompt in prompts]


def test_beams_of_a_pretrained_model(smollm2_shared: LoadedModel) -> None:
    encoder = Encoder(smollm2_shared.tokenizer, "raw")
    prompts = [encoder.encode_prompt(text) for text in ("The lighthouse keeper", "江雪")]
    sampling = Sampling(beams=4, max_new_tokens=8, no_repeat_ngram_size=3)
    found = ids_of(smollm2_shared, encoder, prompts, sampling)
    assert found == [transformers_beams(smollm2_shared.model, encoder, prompt, sampling) for prompt in prompts]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_beams_begin_behind_a_soft_prompt(tiny: LoadedModel, encoder: Encoder, kind: Any) -> None:
    torch.manual_seed(0)
    tiny.model = get_peft_model(tiny.model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        for parameter in tiny.model.prompt_encoder.parameters():
            parameter.normal_()
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS[:3]]
    sampling = Sampling(beams=3, max_new_tokens=8)
    found = ids_of(tiny, encoder, prompts, sampling)
    assert found == [transformers_beams(tiny.model, encoder, prompt, sampling) for prompt in prompts]


@torch.inference_mode()
def diverse_beams(model: Any, stop_ids: Sequence[int], prompt: list[int], sampling: Sampling) -> list[list[int]]:
    """The texts of all groups, the best first: beam search in each group, in which a token's log-probability is less by
    the penalty for each beam of earlier groups that has just taken it. Each text is read from its beginning."""
    size = sampling.beams // sampling.beam_groups
    running = [[(0.0, [])] for _ in range(sampling.beam_groups)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in running]
    for length in range(1, sampling.max_new_tokens + 1):
        now: Counter[int] = Counter()
        for group, beams in enumerate(running):
            if not beams:
                continue
            candidates = []
            for total, ids in beams:
                scores = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].log_softmax(-1)
                for token, count in now.items():
                    scores[token] -= sampling.diversity_penalty * count
                candidates += [(total + score, [*ids, token]) for token, score in enumerate(scores.tolist())]
            candidates.sort(reverse=True)
            last = length == sampling.max_new_tokens
            ending = [one for one in candidates[:size] if last or one[1][-1] in stop_ids]
            going_on = [one for one in candidates if one[1][-1] not in stop_ids][:size]
            texts = [*finished[group], *((score / length**sampling.length_penalty, ids) for score, ids in ending)]
            finished[group] = sorted(texts, reverse=True)[:size]
            worst = finished[group][-1][0] if len(finished[group]) == size else float("-inf")
            hopeless = going_on[0][0] / length**sampling.length_penalty <= worst
            running[group] = [] if hopeless or last else going_on
            now.update(ids[-1] for _, ids in going_on)
    return [ids for _, ids in sorted((text for group in finished for text in group), reverse=True)]


@pytest.mark.parametrize(
    ("beams", "groups", "penalty", "length_penalty", "ends"),
    [(6, 3, 0.5, 1.0, 30), (4, 4, 2.0, 0.0, 30), (6, 2, 0.9, 2.0, 60), (4, 2, 0.2, 0.7, 150), (3, 1, 0.5, 1.0, 30)],
)
def test_diverse_beams_are_those_of_the_paper(
    tiny: LoadedModel, beams: int, groups: int, penalty: float, length_penalty: float, ends: int
) -> None:
    encoder = with_ends(tiny.tokenizer, ends)
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS[:3]]
    sampling = Sampling(
        beams=beams,
        beam_groups=groups,
        diversity_penalty=penalty,
        length_penalty=length_penalty,
        max_new_tokens=9,
    )
    found = ids_of(tiny, encoder, prompts, sampling, beams)
    assert found == [diverse_beams(tiny.model, encoder.stop_ids, prompt, sampling) for prompt in prompts]


def test_groups_differ_as_much_as_they_are_told_to(tiny: LoadedModel) -> None:
    encoder = Encoder(tiny.tokenizer, "raw")
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    of_penalty = {}
    for penalty in (0.0, 100.0):
        sampling = Sampling(beams=4, beam_groups=4, diversity_penalty=penalty, max_new_tokens=8, min_new_tokens=8)
        of_penalty[penalty] = ids_of(tiny, encoder, prompts, sampling, 4)
    assert all(len({tuple(ids) for ids in texts}) == 1 for texts in of_penalty[0.0]), "all groups do the same"
    for texts in of_penalty[100.0]:
        assert all(len(set(tokens)) == 4 for tokens in zip(*texts, strict=False)), "no token twice in a place"


def test_several_of_the_best(tiny: LoadedModel, encoder: Encoder) -> None:
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    sampling = Sampling(beams=4, max_new_tokens=12)
    heard: dict[tuple[int, int], str] = {}
    ended = []
    found = generate(
        *(tiny, encoder, prompts, sampling, 3),
        on_text=lambda prompt, sample, text: heard.update({(prompt, sample): heard.get((prompt, sample), "") + text}),
        on_end=lambda prompt, sample, completion: ended.append((prompt, sample)),
    )
    for number, (completions, texts) in enumerate(zip(found, ids_of(tiny, encoder, prompts, sampling, 3), strict=True)):
        for sample, (completion, ids) in enumerate(zip(completions, texts, strict=True)):
            stopped = ids[-1] in encoder.stop_ids
            assert (completion.text, completion.completion_tokens) == (text_of(encoder, ids), len(ids) - stopped)
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert heard.get((number, sample), "") == completion.text
    assert sorted(ended) == [(prompt, sample) for prompt in range(len(PROMPTS)) for sample in range(3)]


@pytest.mark.parametrize("random_model", ["bloom"], indirect=True)
def test_what_beams_cannot_be(
    random_model: LoadedModel, tiny: LoadedModel, encoder: Encoder, tiny_folder: Path
) -> None:
    with pytest.raises(GenerationError, match="4 beams end in as many texts, not in 5"):
        generate(tiny, encoder, [[7]], Sampling(beams=4), samples=5)
    with pytest.raises(GenerationError, match="beam_groups: bloom cannot take back"):
        generate(random_model, encoder, [[7]], Sampling(beams=4, beam_groups=2))
    with pytest.raises(GenerationError, match="does not know contrastive_alpha"):
        generate(tiny, encoder, [[7]], Sampling(beams=4, top_k=4, contrastive_alpha=0.6))
    with pytest.raises(RecipeError, match="`beam_groups` should be a number that divides the number of beams, 4"):
        finespun.load(tiny_folder).generate("a", beams=4, beam_groups=3)
    with pytest.raises(RecipeError, match=r"`beam_groups` should be .* beams, 1"):
        finespun.load(tiny_folder).generate("a", beam_groups=3)
