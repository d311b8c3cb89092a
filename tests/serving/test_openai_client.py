"""What OpenAI's own client gets, from the real engine: the texts that the library writes, whole and as streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import Running, running

import finespun
from finespun.data.templates import Encoder
from finespun.generation.engine import Engine
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel

PROMPTS = ["the old ferryman", "a heron at the mill", "江雪", "x" * 30]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Running]:
    with running(sources={"tiny": str(tiny_folder)}, slots=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(client: openai.OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=user(text), **{"max_tokens": 12} | options)


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12} | options)


def streamed_chat(client: openai.OpenAI, text: str, **options: Any) -> tuple[list[str], list[str | None], list[Any]]:
    """Texts, reasons and log-probabilities by index."""
    count = options.get("n", 1)
    texts, reasons, logprobs = [""] * count, [None] * count, [[] for _ in range(count)]
    for chunk in chat(client, text, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    return texts, reasons, logprobs


def test_a_chat_is_what_the_library_writes(client: openai.OpenAI, tiny_folder: Path) -> None:
    written = finespun.load(tiny_folder).complete([user(prompt) for prompt in PROMPTS], max_new_tokens=12)
    for prompt, (expected,) in zip(PROMPTS, written, strict=True):
        answer = chat(client, prompt)
        assert answer.object == "chat.completion"
        assert answer.model == "tiny"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == expected.completion_tokens
        assert answer.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens


def test_a_completion_continues_the_text_without_a_template(client: openai.OpenAI, tiny: LoadedModel) -> None:
    raw = Encoder(tiny.tokenizer, "raw")
    engine = Engine(tiny, raw)
    requests = [engine.add(raw.encode_prompt(prompt), Sampling(max_new_tokens=12)) for prompt in PROMPTS]
    while engine.step():
        pass
    expected = [request.completion.text for request in requests]
    assert [complete(client, prompt).choices[0].text for prompt in PROMPTS] == expected
    together = complete(client, PROMPTS)
    assert [choice.text for choice in together.choices] == expected
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert together.usage.prompt_tokens == sum(len(raw.encode_prompt(prompt)) for prompt in PROMPTS)
    ids = [raw.encode_prompt(prompt) for prompt in PROMPTS]
    assert [choice.text for choice in complete(client, ids).choices] == expected
    assert complete(client, ids[0]).choices[0].text == expected[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"temperature": 1.5, "seed": 3, "top_p": 0.9, "max_tokens": 40},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"stop": ["e", "a"]},
        {"presence_penalty": 1.0, "frequency_penalty": -1.0, "max_tokens": 30},
    ],
    ids=str,
)
def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = chat(client, "the old mill", **options)
    texts, reasons, logprobs = streamed_chat(client, "the old mill", **options)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    if options.get("logprobs"):
        for streamed, choice in zip(logprobs, whole.choices, strict=True):
            assert [(one.token, one.logprob) for one in streamed] == [
                (one.token, pytest.approx(one.logprob, abs=1e-4)) for one in choice.logprobs.content
            ]
    plain = {name: value for name, value in options.items() if name not in ("logprobs", "top_logprobs")}
    raw = complete(client, "the old mill", **plain, logprobs=1)
    pieces, tokens = [""] * len(raw.choices), [[] for _ in raw.choices]
    for chunk in complete(client, "the old mill", **plain, logprobs=1, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    assert pieces == [choice.text for choice in raw.choices]
    assert tokens == [
        list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)) for choice in raw.choices
    ]


def test_a_seed_gives_the_same_text_and_no_seed_another(client: openai.OpenAI) -> None:
    def sample(**options: Any) -> str:
        return chat(client, "a mill", temperature=2.0, max_tokens=20, **options).choices[0].message.content

    assert sample(seed=5) == sample(seed=5)
    assert sample(seed=-5) == sample(seed=-5)
    assert len({sample(seed=5), sample(seed=6), sample(), sample()}) == 4
    several = chat(client, "a mill", temperature=2.0, max_tokens=20, n=3, seed=5).choices
    assert len({choice.message.content for choice in several}) == 3


def test_usage_comes_last_where_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = chat(client, "the river", n=2)
    *chunks, last = chat(client, "the river", n=2, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    assert {chunk.usage for chunk in chunks} == {None}
    assert {chunk.id for chunk in chunks} == {last.id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_logprobs_are_those_of_the_distribution(client: openai.OpenAI) -> None:
    tokens = chat(client, "the river", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        alternatives = [one.logprob for one in token.top_logprobs]
        assert alternatives == sorted(alternatives, reverse=True)
        assert len(alternatives) == 3
        assert token.logprob == pytest.approx(alternatives[0], abs=1e-5)  # greedy
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    assert chat(client, "the river").choices[0].logprobs is None
    assert chat(client, "the river", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_bias_rules_tokens_in_and_out(client: openai.OpenAI, small_tokenizer: Any) -> None:
    q, z = (str(small_tokenizer(letter)["input_ids"][0]) for letter in "qz")

    def written(**bias: float) -> str:
        return complete(client, "the", logit_bias={q: bias["q"], z: bias["z"]}, max_tokens=5).choices[0].text

    assert written(q=100, z=50) == "qqqqq"
    assert written(q=-100, z=50) == "zzzzz"


def test_stop_strings_end_a_text_and_are_not_in_it(client: openai.OpenAI) -> None:
    drawn = {"max_tokens": 30, "temperature": 1.0, "seed": 1}
    text = complete(client, "the old", **drawn).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = complete(client, "the old", **drawn, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["Aare", "Rhine"]}, "deep": {"type": "boolean"}},
        "required": ["river", "deep"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema, "strict": True}}
    for seed in range(5):
        answer = chat(client, "a river", response_format=wanted, temperature=1.0, seed=seed, max_tokens=100).choices[0]
        assert answer.finish_reason == "stop"
        assert json.loads(answer.message.content).keys() == {"river", "deep"}
    answer = chat(client, "a river", response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        json.loads(answer.message.content)
    picked = complete(client, "a", extra_body={"choices": ["heron", "boat"]}).choices[0].text
    assert picked in ("heron", "boat")
    assert complete(client, "a", extra_body={"regex": "[0-9]{3}"}).choices[0].text.isdecimal()


@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_cannot_be_is_refused(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?s)regex.*unclosed"):
        complete(client, "a", extra_body={"regex": "[0-9"}, stream=stream)
    with pytest.raises(openai.BadRequestError, match="regex and choices exclude each other"):
        complete(client, "a", extra_body={"regex": "a", "choices": ["a"]}, stream=stream)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid type"):
        chat(client, "a", response_format=wanted, stream=stream)


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("a/b")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_the_asynchronous_client_gets_the_same(server: Running, client: openai.OpenAI) -> None:
    expected = [chat(client, prompt).choices[0].message.content for prompt in PROMPTS]

    async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        made = await client.chat.completions.create(model="tiny", messages=user(prompt), max_tokens=12, stream=stream)
        if not stream:
            return made.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(
                *[ask(client, prompt, stream) for stream in (False, True) for prompt in PROMPTS]
            )

    assert asyncio.run(all_at_once()) == [*expected, *expected]


def test_an_answer_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    first = chat(client, "the old mill").choices[0].message
    messages = [{"role": "developer", "content": "be kind"}, *user("the old mill"), first, *user("and then?")]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert second.usage.prompt_tokens > len(first.content) / 4
    parts = [{"role": "user", "content": [{"type": "text", "text": "the old"}, {"type": "text", "text": " mill"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_tokens=12)
    assert again.choices[0].message.content == first.content


def test_each_model_answers_to_its_name(tiny_folder: Path, smollm2_folder: Path) -> None:
    with running(sources={"tiny": str(tiny_folder), "org/smol": str(smollm2_folder)}) as server:
        client = server.client()
        question = user("What is the capital of France?")
        small = client.chat.completions.create(model="org/smol", messages=question, max_tokens=8).choices[0].message
        assert "Paris" in small.content
        assert finespun.load(smollm2_folder).generate([question], max_new_tokens=8) == [small.content]
        assert client.models.retrieve("org/smol").id == "org/smol"
        assert client.chat.completions.create(model="tiny", messages=question, max_tokens=8).model == "tiny"
