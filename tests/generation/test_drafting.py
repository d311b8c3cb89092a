"""A smaller model's guesses change how many passes there are, and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedTokenizerFast

from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation import drafting, engine
from finespun.generation.engine import Engine, generate
from finespun.generation.runner import SlotRunner, runner_for
from finespun.generation.sampling import Chooser
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel, load_model
from finespun.text_model import TextModel
from scipy_free import chi_square_p

PROMPTS = [[7, 8, 9] * 20, [10], [11, 12, 13, 14], [7, 8, 9] * 20 + [30], *([20 + number] for number in range(5))]


def random_llama(tokenizer: PreTrainedTokenizerFast, seed: int, vocabulary: int, std: float = 0.3) -> LoadedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return LoadedModel(model, tokenizer, "x", Path())


def passes_of(patch: pytest.MonkeyPatch, loaded: LoadedModel) -> list[int]:
    """Tokens of each pass through one model, from now on."""
    passes: list[int] = []
    original = SlotRunner.logits

    def logits(runner: SlotRunner, readings):
        if runner._model is loaded.causal_lm:
            passes.append(sum(len(reading.part.ids) for reading in readings))
        return original(runner, readings)

    patch.setattr(SlotRunner, "logits", logits)
    return passes


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "logit_bias": {0: -5.0}}, {"stop": ["a"]}])
def test_greedy_texts_do_not_change(
    tiny: LoadedModel, small_tokenizer, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the guesses are bad or good; read in pieces, in slots that others had before."""
    monkeypatch.setattr(drafting, "AT_ONCE", 30)
    monkeypatch.setattr(engine, "SLOTS", 3)
    encoder = Encoder(small_tokenizer, "raw")
    plain = generate(tiny, encoder, PROMPTS, Sampling(max_new_tokens=40, **options))
    for draft in (random_llama(small_tokenizer, 1, 400), random_llama(small_tokenizer, 1, 410)):
        guessed = Sampling(max_new_tokens=40, draft_tokens=3, **options)
        assert generate(tiny, encoder, PROMPTS, guessed, draft=draft) == plain


def test_a_draft_that_knows_the_text_saves_passes(
    tiny: LoadedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, twin = Encoder(tiny.tokenizer, "raw"), load_model(str(tiny_folder), "float32")
    sampling = Sampling(max_new_tokens=41, draft_tokens=3, logit_bias={0: -100.0})
    prompt = [7, 8, 9] * 20
    plain = generate(tiny, encoder, [prompt], sampling)
    runner_for(twin)  # which tries something out the first time
    passes, of_draft = passes_of(monkeypatch, tiny), passes_of(monkeypatch, twin)
    assert generate(tiny, encoder, [prompt], sampling, draft=twin) == plain
    assert [tokens for tokens in passes if tokens < 7] == [4] * 10, "each pass gave three guesses and one token more"
    assert sum(of_draft) <= 60 + 41, "it reads nothing twice"


def test_samples_follow_the_distribution_of_the_larger_model(small_tokenizer) -> None:
    """The second and third of the tokens, both guessed by another model, among eight that there are."""
    encoder = Encoder(small_tokenizer, "raw")
    target, draft = (random_llama(small_tokenizer, seed, 8, std=0.6) for seed in (1, 2))
    prompt, banned = [3, 4, 5], {0: -100.0}

    def odds(model: LoadedModel, ids: list[int]) -> torch.Tensor:
        logits = model.model(torch.tensor([ids])).logits[0, -1]
        logits[0] = -torch.inf
        return (logits.double() / 0.9).softmax(-1)

    expected = dict.fromkeys(product(range(1, 8), range(1, 8)), 0.0)
    of_draft = dict(expected)
    with torch.no_grad():
        for first in range(1, 8):
            second = odds(target, [*prompt, first])
            for one in range(1, 8):
                third = odds(target, [*prompt, first, one])
                of_second, of_third = odds(draft, [*prompt, first])[one], odds(draft, [*prompt, first, one])
                for two in range(1, 8):
                    first_odds = odds(target, prompt)[first]
                    expected[one, two] += float(first_odds * second[one] * third[two])
                    of_draft[one, two] += float(first_odds * of_second * of_third[two])
    sampling = Sampling(max_new_tokens=5, draft_tokens=2, temperature=0.9, logprobs=0, logit_bias=banned)
    (found,) = generate(target, encoder, [prompt], sampling, samples=3000, draft=draft)
    drawn = Counter((one.logprobs[1].id, one.logprobs[2].id) for one in found if one.logprobs)
    counts = [drawn[pair] for pair in expected]
    assert chi_square_p(counts, list(expected.values())) > 1e-3
    assert chi_square_p(counts, list(of_draft.values())) < 1e-6, "the two are far enough apart to be told apart"


def test_guesses_that_were_drawn_are_verified_by_their_odds() -> None:
    torch.manual_seed(0)
    logits, others = torch.randn(6), 2 * torch.randn(6)
    choose = Chooser(Sampling(temperature=1.0))
    drawn = Counter(choose.verify(choose.propose([0], [], others), [0], [], logits) for _ in range(6000))
    assert chi_square_p([drawn[token] for token in range(6)], logits.softmax(0).tolist()) > 1e-3
    same = [choose.propose([0], [], logits) for _ in range(200)]
    assert all(choose.verify(guess, [0], [], logits) == guess.token for guess in same)


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(tiny: LoadedModel, small_tokenizer) -> None:
    encoder, draft = Encoder(small_tokenizer, "raw"), random_llama(small_tokenizer, 1, 400)
    sampling = Sampling(max_new_tokens=10, draft_tokens=3, temperature=0.8, seed=5)
    together = generate(tiny, encoder, PROMPTS, sampling, samples=2, draft=draft)
    assert together == [generate(tiny, encoder, [prompt], sampling, samples=2, draft=draft)[0] for prompt in PROMPTS]


def test_a_draft_with_other_tokens_is_refused(tiny: LoadedModel, small_tokenizer) -> None:
    encoder = Encoder(small_tokenizer, "raw")
    other = random_llama(small_tokenizer, 1, 400)
    other.tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(GenerationError, match="draft: x has other tokens"):
        Engine(tiny, encoder, draft=other)
    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4)
    bloom = LoadedModel(AutoModelForCausalLM.from_config(config).eval(), small_tokenizer, "bloom", Path())
    with pytest.raises(GenerationError, match="bloom cannot take back"):
        Engine(tiny, encoder, draft=bloom)
    with pytest.raises(GenerationError, match="take no draft"):
        generate(tiny, encoder, [[7]], Sampling(beams=2), draft=random_llama(small_tokenizer, 1, 400))


def test_guesses_are_what_the_draft_writes_after_what_was_taken(
    tiny: LoadedModel, small_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last ones were wrong, and in a slot that another text had before."""
    encoder, (draft, twin) = Encoder(small_tokenizer, "raw"), (random_llama(small_tokenizer, 1, 400) for _ in range(2))
    twin.model.generation_config.eos_token_id = None
    monkeypatch.setattr(engine, "SLOTS", 2)
    original = drafting.Draft.propose
    proposed: list[list[int]] = []

    def propose(self, writing):
        found = original(self, writing)
        for (_, request, count), guesses in zip(writing, found, strict=True):
            ids, new = torch.tensor([request.ids]), [guess.token for guess in guesses]
            alone = twin.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
            assert new == alone[0, ids.shape[1] :].tolist()
            proposed.append(new)
        return found

    monkeypatch.setattr(drafting.Draft, "propose", propose)
    generate(tiny, encoder, PROMPTS[:5], Sampling(max_new_tokens=12, draft_tokens=3), draft=draft)
    assert len(proposed) > 20, "few guesses were right"


def test_a_draft_writes_no_further_than_its_context(
    tiny: LoadedModel, small_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, short = Encoder(small_tokenizer, "raw"), random_llama(small_tokenizer, 1, 400)
    short.causal_lm.config.max_position_embeddings = 16
    sampling = Sampling(max_new_tokens=40, logit_bias={0: -100.0})
    plain = generate(tiny, encoder, PROMPTS, sampling)
    runner_for(short)
    ends: list[int] = []
    original = SlotRunner.logits

    def logits(runner: SlotRunner, readings):
        if runner._model is short.causal_lm:
            ends.extend(reading.part.end for reading in readings)
        return original(runner, readings)

    monkeypatch.setattr(SlotRunner, "logits", logits)
    guessed = sampling.model_copy(update={"draft_tokens": 5})
    assert generate(tiny, encoder, PROMPTS, guessed, draft=short) == plain
    assert max(ends) == 16


def test_a_draft_is_named_in_python(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextModel.load(tiny_folder)
    plain = model.generate("the old ferryman", max_new_tokens=20)
    passes = passes_of(monkeypatch, model._loaded)
    assert model.generate("the old ferryman", max_new_tokens=20, draft=tiny_folder) == plain
    assert max(passes[1:]) == 5
    passes.clear()
    assert (
        model.generate("the old ferryman", max_new_tokens=20, draft=TextModel.load(tiny_folder), draft_tokens=2)
        == plain
    )
    assert max(passes[1:]) == 3
