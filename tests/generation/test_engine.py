"""Generation against transformers' own, and what streaming and stopping must never do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TypicalLogitsWarper

from architectures import architectures
from finespun.data.templates import Encoder
from finespun.errors import DataError, GenerationError
from finespun.generation import engine
from finespun.generation.engine import Engine, TokenLogprob, generate
from finespun.generation.runner import Reading, SingleRunner, SlotRunner, runner_for
from finespun.generation.sampling import Chooser, Guess
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel, compute_in
from finespun.models.prepacked import can_prepack
from reference import text_of
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
    texts = [text_of(encoder, transformers_greedy(tiny.model, prompt, 30, **options)) for prompt in ids]
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
    texts = [text_of(encoder, transformers_greedy(model.model, prompt, 20, pad_token_id=0)) for prompt in ids]
    assert [completions[0].text for completions in found] == texts


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(
    tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.8, seed=5)
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    together = generate(tiny, encoder, ids, sampling, samples=3)
    alone = [generate(tiny, encoder, [prompt], sampling, samples=3)[0] for prompt in ids]
    assert together == alone
    monkeypatch.setattr(engine, "SLOTS", 4)
    assert generate(tiny, encoder, ids, sampling, samples=3) == together
    assert len({completion.text for completion in together[0]}) == 3
    other = generate(tiny, encoder, ids, Sampling(max_new_tokens=8, temperature=0.8, seed=6), samples=3)
    assert other != together


@pytest.mark.parametrize(
    "chooser",
    [
        lambda number: Chooser(Sampling(temperature=1.0), prompt=[7, number]),
        lambda number: Chooser(Sampling(temperature=1.0), number),
        lambda number: Chooser(Sampling(temperature=1.0, seed=number)),
        lambda number: Chooser(Sampling(temperature=1.0, seed=number << 16)),
    ],
    ids=["prompts", "samples", "seeds", "large seeds"],
)
def test_texts_are_drawn_independently_of_one_another(chooser: Callable[[int], Chooser]) -> None:
    """The first tokens of many texts, where all tokens are as likely, follow that distribution."""
    drawn = Counter(chooser(number)([], [], torch.zeros(6)) for number in range(4000))
    assert chi_square_p([drawn[token] for token in range(6)], [1 / 6] * 6) > 1e-4


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
        drawn = Counter(choose([0], [], logits) for _ in range(4000))
        assert {token for token, p in enumerate(expected) if p == 0}.isdisjoint(drawn)
        assert chi_square_p([drawn[token] for token in range(6)], expected.tolist()) > 1e-4


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = Chooser(Sampling(temperature=1.0, top_p=0.75))
    assert {choose([0], [], logits) for _ in range(300)} == {0, 1}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, encoder: Encoder):
    """Makes the engine write a given text, token by token and then byte by byte, whatever the model says."""

    def write(text: str) -> list[int]:
        tokens = [*encoder.tokenizer(text)["input_ids"], encoder.tokenizer.eos_token_id]
        monkeypatch.setattr(Chooser, "takes_the_largest", False)
        monkeypatch.setattr(Chooser, "__call__", lambda self, prompt, new, logits, allowed: tokens[len(new)])
        return tokens

    return write


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab 你好🙂é.", min_size=1, max_size=20), limit=st.integers(1, 40))
@example(text="你好🙂", limit=8)
def test_a_text_that_the_limit_cuts_ends_with_a_whole_character(tiny, encoder, scripted, text: str, limit: int) -> None:
    tokens = scripted(text)[:-1]
    pieces: list[str] = []
    (completion,) = generate(
        *(tiny, encoder, [encoder.encode_prompt("a")], Sampling(max_new_tokens=limit)),
        on_text=lambda p, s, piece: pieces.append(piece),
    )[0]
    read = encoder.decode(tokens[:limit])
    whole = max((text[:end] for end in range(len(text) + 1) if read.startswith(text[:end])), key=len)
    assert (completion.text, "".join(pieces)) == (whole, whole)
    assert completion.completion_tokens == min(limit, len(tokens)), "half a character was written and counts"


def test_length_and_context_end_a_text(tiny: LoadedModel, encoder: Encoder, scripted) -> None:
    scripted("the old ferryman rowed over a slow river " * 20)
    (completion,) = generate(tiny, encoder, [encoder.encode_prompt("a")], Sampling(max_new_tokens=5))[0]
    assert (completion.finish_reason, completion.prompt_tokens, completion.completion_tokens) == ("length", 1, 5)
    (completion,) = generate(tiny, encoder, [encoder.encode_prompt("a")], Sampling(max_new_tokens=5000))[0]
    assert completion.completion_tokens == tiny.context_length - 1
    with pytest.raises(DataError, match="Prompt 2: The prompt has 128 tokens"):
        generate(tiny, encoder, [[5], [5] * 128], Sampling())


ARCHITECTURES = architectures(vocab_size=400, positions=128)


def random_prompts(count: int, longest: int) -> list[list[int]]:
    random = Random(0)
    return [[random.randrange(3, 400) for _ in range(random.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("random_model", ARCHITECTURES, indirect=True)
def test_greedy_tokens_equal_transformers_for(random_model: LoadedModel, count: int, small_tokenizer) -> None:
    """Read in pieces, continued beside others, with what others have read: each is what transformers writes alone."""
    encoder = Encoder(small_tokenizer, "raw")
    prompts = random_prompts(count, longest=40)
    prompts += [[*prompts[0], *prompt[:9]] for prompt in prompts[:5]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SLOTS", 7)
        patch.setattr(engine, "AT_ONCE", 50)
        found = generate(random_model, encoder, prompts, Sampling(max_new_tokens=12))
    for prompt, (completion,) in zip(prompts, found, strict=True):
        alone = transformers_greedy(random_model.model, prompt, 12, pad_token_id=0)
        ended = small_tokenizer.eos_token_id in alone
        assert completion.text == text_of(encoder, alone)
        assert completion.finish_reason == ("stop" if ended else "length")
    assert isinstance(runner_for(random_model), SingleRunner) == (random_model.base_name == "bloom")


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
def test_texts_do_not_depend_on_their_company_in_bfloat16(tiny: LoadedModel, encoder: Encoder) -> None:
    """To the bit: log-probabilities too, whatever was read together, in pieces, or copied from others."""
    compute_in(tiny.model, torch.bfloat16)
    prompts = random_prompts(40, longest=60)
    prompts += [[*prompts[0][:20], *prompt[:9]] for prompt in prompts[:9]]
    sampling = Sampling(max_new_tokens=25, temperature=1.0, logprobs=1)
    alone = [generate(tiny, encoder, [prompt], sampling)[0] for prompt in prompts]
    assert generate(tiny, encoder, prompts, sampling) == alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SLOTS", 5)
        patch.setattr(engine, "AT_ONCE", 30)
        assert generate(tiny, encoder, prompts, sampling) == alone


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
def test_nor_do_those_of_the_real_model(smollm2_shared: LoadedModel) -> None:
    """Its products are large enough for oneDNN to take a row alone in another way."""
    model = compute_in(deepcopy(smollm2_shared.model), torch.bfloat16)
    loaded = LoadedModel(model, smollm2_shared.tokenizer, smollm2_shared.base_name, smollm2_shared.base_path)
    encoder = Encoder(loaded.tokenizer)
    prompts = [encoder.encode_prompt(f"What is a {word}?") for word in ("ferry", "heron", "mill", "small boat", "江雪")]
    sampling = Sampling(max_new_tokens=20, logprobs=0)
    assert generate(loaded, encoder, prompts, sampling) == [
        generate(loaded, encoder, [prompt], sampling)[0] for prompt in prompts
    ]
    # what was asked before is in its slot; of its last token alone the attention is rounded in another way
    again = Engine(loaded, encoder)
    requests = []
    for _ in range(2):
        requests.append(again.add(encoder.encode_prompt("List three words that go with a heron."), sampling))
        while again.step():
            pass
    assert requests[0].result() == requests[1].result()


class Watched:
    """A runner that notes what it is asked to read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[Reading]] = []
        original = SlotRunner.logits

        def logits(runner: SlotRunner, readings: list[Reading]) -> list[torch.Tensor]:
            self.passes.append(readings)
            return original(runner, readings)

        patch.setattr(SlotRunner, "logits", logits)

    def tokens(self) -> int:
        return sum(len(reading.part.ids) for readings in self.passes for reading in readings)


def test_a_beginning_that_prompts_share_is_read_once(
    tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = random_prompts(1, 70)[0] * 70
    prompts = [[*shared[:70], 5 + number, 9] for number in range(6)]
    alone = [generate(tiny, encoder, [prompt], Sampling(max_new_tokens=4))[0] for prompt in prompts]
    watched = Watched(monkeypatch)
    assert generate(tiny, encoder, prompts, Sampling(max_new_tokens=4)) == alone
    assert watched.tokens() <= 70 + 6 * (2 + 4)
    watched.passes.clear()
    later = Engine(tiny, encoder)
    for prompt in prompts[:2]:  # one after the other has ended
        request = later.add(prompt, Sampling(max_new_tokens=4))
        while later.step():
            pass
        assert request.completion == alone[prompts.index(prompt)][0]
    assert watched.tokens() <= 72 + 4 + 2 + 4


def test_one_that_ends_makes_room_at_once(tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Engine(tiny, encoder, slots=2)
    watched = Watched(monkeypatch)
    requests = [few.add([7 + number, 8], Sampling(max_new_tokens=length)) for number, length in enumerate((2, 9, 3, 4))]
    while few.step():
        pass
    lengths = [request.completion.completion_tokens for request in requests if request.completion]
    assert lengths == [2, 9, 3, 4]
    assert len(watched.passes) == 9, "the three short ones took turns beside the long one"


def test_a_request_that_is_cancelled_frees_its_slot(tiny: LoadedModel, encoder: Encoder) -> None:
    few = Engine(tiny, encoder, slots=1)
    pieces: list[str] = []
    first = few.add([7, 8], Sampling(max_new_tokens=100), on_text=lambda text, logprobs: pieces.append(text))
    second, third = (few.add([9, number], Sampling(max_new_tokens=3)) for number in (10, 11))
    few.step()
    few.cancel(third)
    few.cancel(first)
    heard = len(pieces)
    while few.step():
        pass
    assert second.completion is not None
    assert second.completion == generate(tiny, encoder, [[9, 10]], Sampling(max_new_tokens=3))[0][0]
    assert (first.completion, third.completion) == (None, None)
    assert len(pieces) == heard


@pytest.mark.parametrize("random_model", ["bloom"], indirect=True)
def test_a_cache_that_may_have_forgotten_is_not_gone_back_in(random_model: LoadedModel, small_tokenizer) -> None:
    encoder = Encoder(small_tokenizer, "raw")
    prompts = [[7, 8, 9] * 5, [7, 8, 9] * 5]
    plain = generate(random_model, encoder, prompts, Sampling(max_new_tokens=12))
    assert generate(random_model, encoder, prompts, Sampling(max_new_tokens=12, draft_tokens=4)) == plain


def test_guesses_change_nothing_but_the_number_of_passes(
    tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that repeats itself, which a model that repeats itself continues."""
    watched = Watched(monkeypatch)
    prompts = [encoder.encode_prompt("heron mill boat " * 6), encoder.encode_prompt("the old ferryman"), [7]]
    plain = generate(tiny, encoder, prompts, Sampling(max_new_tokens=60))
    passes = len(watched.passes)
    watched.passes.clear()
    guessed = generate(tiny, encoder, prompts, Sampling(max_new_tokens=60, draft_tokens=5))
    assert guessed == plain
    assert len(watched.passes) < passes


def test_guessed_tokens_follow_the_models_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6)
    choose = Chooser(Sampling(temperature=1.0))
    for guess in (int(logits.argmax()), int(logits.argmin())):
        drawn = Counter(choose.verify(Guess(guess), [0], [], logits) for _ in range(4000))
        assert chi_square_p([drawn[token] for token in range(6)], logits.softmax(0).tolist()) > 1e-4


def test_logprobs_are_those_of_the_model(tiny: LoadedModel, encoder: Encoder) -> None:
    prompt = encoder.encode_prompt("the old ferryman")
    sampling = Sampling(max_new_tokens=8, temperature=0.7, logprobs=3, logit_bias={11: 4.0})
    heard: list[TokenLogprob] = []
    one = Engine(tiny, encoder)
    request = one.add(prompt, sampling, on_text=lambda text, logprobs: heard.extend(logprobs))
    while one.step():
        pass
    assert request.completion is not None
    assert request.completion.logprobs is not None
    ids = [token.id for token in request.completion.logprobs]
    assert text_of(encoder, ids) == request.completion.text
    assert list(request.completion.logprobs) == heard
    with torch.no_grad():
        logits = tiny.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for row, token in zip(expected, request.completion.logprobs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for _, i, _ in token.top] == row.topk(3).indices.tolist()
        assert [value for _, _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_penalties_and_biases() -> None:
    logits = torch.tensor([1.0, 1.2, 0.9, 0.0])
    stop = (3,)

    def chosen(new: list[int], **settings) -> int:
        return Chooser(Sampling(**settings), 0, stop)([1, 1], new, logits)

    assert chosen([]) == 1
    assert chosen([1], presence_penalty=0.25) == 0
    assert chosen([1, 1], frequency_penalty=0.15) == 0
    assert chosen([1], frequency_penalty=0.15) == 1, "once is not enough"
    assert chosen([], presence_penalty=2.0, frequency_penalty=2.0) == 1, "the prompt does not count"
    assert chosen([], logit_bias={2: 0.5}) == 2
    assert chosen([0, 1], no_repeat_ngram_size=2) == 2, "1 0 and, in the prompt, 1 1 are there already"
    logits[3] = 5.0
    assert chosen([]) == 3
    assert chosen([0], min_new_tokens=2) == 1
    assert chosen([0, 0], min_new_tokens=2) == 3


def test_typical_tokens_are_transformers_own() -> None:
    logits = torch.tensor([3.0, 2.5, 1.0, 0.5, -1.0])
    kept = TypicalLogitsWarper(0.6)(torch.tensor([[0]]), logits[None])[0].isfinite().nonzero().flatten().tolist()
    choose = Chooser(Sampling(temperature=1.0, typical_p=0.6))
    assert {choose([0], [], logits) for _ in range(300)} == set(kept)


def test_the_cache_grows_with_what_is_asked(tiny: LoadedModel, encoder: Encoder) -> None:
    """A longer request comes while others are being written."""
    growing = Engine(tiny, encoder)
    first = growing.add([7, 8], Sampling(max_new_tokens=20))
    growing.step()
    second = growing.add([9] * 60, Sampling(max_new_tokens=60))
    while growing.step():
        pass
    for request, prompt, length in ((first, [7, 8], 20), (second, [9] * 60, 60)):
        assert request.completion == generate(tiny, encoder, [prompt], Sampling(max_new_tokens=length))[0][0]


def test_what_does_not_fit_into_memory_waits(tiny: LoadedModel, encoder: Encoder) -> None:
    small = Engine(tiny, encoder)
    small._cache_tokens = 130
    prompts = [[7, 8], [9] * 100, [10, 11], [12]]
    lengths = (20, 20, 5, 90)
    requests = [
        small.add(prompt, Sampling(max_new_tokens=length)) for prompt, length in zip(prompts, lengths, strict=True)
    ]
    while small.step():
        assert len(small._slots) * small._capacity <= 130
    for request, prompt, length in zip(requests, prompts, lengths, strict=True):
        assert request.completion == generate(tiny, encoder, [prompt], Sampling(max_new_tokens=length))[0][0]


def test_beams_are_transformers_own(tiny: LoadedModel, encoder: Encoder) -> None:
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    settings = {"beams": 4, "length_penalty": 0.6, "no_repeat_ngram_size": 3}
    found = generate(tiny, encoder, ids, Sampling(max_new_tokens=12, **settings))
    options = {"num_beams": 4, "length_penalty": 0.6, "no_repeat_ngram_size": 3}
    texts = [text_of(encoder, transformers_greedy(tiny.model, prompt, 12, **options)) for prompt in ids]
    assert [completions[0].text for completions in found] == texts
    (stopped,) = generate(tiny, encoder, ids[:1], Sampling(max_new_tokens=12, **settings, stop=[texts[0][3:5]]))[0]
    assert (stopped.text, stopped.finish_reason) == (texts[0][: texts[0].index(texts[0][3:5])], "stop")
    with pytest.raises(GenerationError, match="does not know temperature, regex"):
        generate(tiny, encoder, ids, Sampling(beams=2, temperature=1.0, regex="a"))
    with pytest.raises(DataError, match="Prompt 2: The prompt has 200 tokens"):
        generate(tiny, encoder, [ids[0], [7] * 200], Sampling(beams=2))
    with pytest.raises(GenerationError, match="beams"):
        Engine(tiny, encoder).add(ids[0], Sampling(beams=2))


def test_the_best_of_several_is_the_likeliest(tiny: LoadedModel, encoder: Encoder) -> None:
    sampling = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    ids = [encoder.encode_prompt(prompt) for prompt in PROMPTS[:2]]
    found = generate(tiny, encoder, ids, Sampling(**sampling, best_of=5), samples=2)
    drawn = generate(tiny, encoder, ids, Sampling(**sampling, logprobs=0), samples=10)
    for best, all_ten in zip(found, drawn, strict=True):
        for one, five in zip(best, (all_ten[:5], all_ten[5:]), strict=True):
            assert one.text == max(five, key=lambda completion: completion.mean_logprob).text
            assert one.logprobs is None, "they were not asked for"
    with pytest.raises(GenerationError, match="best_of"):
        Engine(tiny, encoder).add(ids[0], Sampling(best_of=2))
