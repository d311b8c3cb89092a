"""Tools through OpenAI's client, with a template of Qwen's kind and an engine that writes what a test tells it to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import FakeEngine, fake, running

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
DEPTH = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "How deep a river is.",
        "parameters": {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]},
    },
}
FERRY = {"type": "function", "function": {"name": "ferry"}}
QUESTION = [{"role": "user", "content": "How deep is the old river?"}]
CALL = '{"name": "depth", "arguments": {"river": "the old"}}'
TAGGED = ["I ", "look.\n", "\n<tool", "_call>\n", CALL[:20], CALL[20:], "\n</tool", "_call>"]


@pytest.fixture
def qwen(small_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    return tokenizer


def ask(client: openai.OpenAI, stream: bool = False, **options: Any) -> tuple[str, list[tuple[str, Any]], str]:
    """Words, calls, and why it ended."""
    made = client.chat.completions.create(
        model="m", **{"messages": QUESTION, "tools": [DEPTH, FERRY]} | options, stream=stream
    )
    if not stream:
        (choice,) = made.choices
        calls = choice.message.tool_calls or []
        return (
            choice.message.content or "",
            [(call.function.name, json.loads(call.function.arguments)) for call in calls],
            choice.finish_reason,
        )
    words, calls, reason = "", {}, None
    for chunk in made:
        choice = chunk.choices[0]
        words += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + call.function.name, arguments + call.function.arguments)
        reason = choice.finish_reason or reason
    return words, [(name, json.loads(arguments)) for name, arguments in calls.values()], reason


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_apart_from_words(qwen: Any, stream: bool) -> None:
    load, engines = fake(qwen, lambda prompt: list(TAGGED), tagged=True, context=1000)
    with running(load) as server:
        client = server.client()
        assert ask(client, stream) == ("I look.", [("depth", {"river": "the old"})], "tool_calls")
        assert '"name": "ferry"' in engines[0].prompts[-1]
        assert ask(client, stream, tool_choice="none")[1:] == ([], "stop")
        assert "ferry" not in engines[0].prompts[-1]
        assert ask(client, stream, tools=[FERRY]) == ("".join(TAGGED), [], "stop")
        assert ask(client, stream, max_tokens=3) == ("I look.\n\n<tool", [], "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_required(qwen: Any, stream: bool) -> None:
    """The text then keeps to a schema, and begins behind the tag."""
    load, engines = fake(qwen, lambda prompt: [CALL[:9], CALL[9:]], tagged=True, context=1000)
    with running(load) as server:
        client = server.client()
        assert ask(client, stream, tool_choice="required") == ("", [("depth", {"river": "the old"})], "tool_calls")
        assert engines[0].prompts[-1].endswith("<tool_call>\n")
        names = [one["properties"]["name"]["const"] for one in engines[0].samplings[-1].json_schema["anyOf"]]
        assert names == ["depth", "ferry"]
        named = {"type": "function", "function": {"name": "depth"}}
        assert ask(client, stream, tool_choice=named)[1] == [("depth", {"river": "the old"})]
        assert len(engines[0].samplings[-1].json_schema["anyOf"]) == 1
        assert ask(client, stream, parallel_tool_calls=False)[2] == "stop"
        assert engines[0].samplings[-1].stop == ["</tool_call>"]


def test_what_a_tool_said_goes_back_into_the_conversation(qwen: Any) -> None:
    load, engines = fake(qwen, lambda prompt: list(TAGGED), tagged=True, context=1000)
    with running(load) as server:
        client = server.client()
        first = client.chat.completions.create(model="m", messages=QUESTION, tools=[DEPTH]).choices[0].message
        said = {"role": "tool", "content": "four feet", "tool_call_id": first.tool_calls[0].id}
        ask(client, messages=[*QUESTION, first, said])
    prompt = engines[0].prompts[-1]
    assert f"I look.\n<tool_call>\n{CALL}\n</tool_call>" in prompt
    assert "<tool_response>\nfour feet\n</tool_response>" in prompt


def test_a_template_whose_calls_are_the_whole_answer(small_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = (TEMPLATES / "llama-3.1.jinja").read_text(encoding="utf-8")
    written = ['{"name": "depth", ', '"parameters": {"river": "the old"}}']
    load, _ = fake(tokenizer, lambda prompt: list(written), context=1000)
    with running(load) as server:
        for stream in (False, True):
            assert ask(server.client(), stream) == ("", [("depth", {"river": "the old"})], "tool_calls")
        with pytest.raises(openai.BadRequestError, match="can be required only"):
            ask(server.client(), tool_choice="required")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": openai.omit, "tool_choice": "required"}, "needs `tools`"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among the tools"),
        ({"response_format": {"type": "json_object"}}, "cannot call"),
        ({"messages": [*QUESTION, {"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "depth", "arguments": "{}"}}]}]}, "Only the assistant"),
        ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "depth", "arguments": "{"}}]}]}, "not JSON"),
        ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "depth", "arguments": "[]"}}]}]}, "a JSON object"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "beginning or end of a turn"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(qwen: Any, options: dict[str, Any], message: str) -> None:
    load, _ = fake(qwen, lambda prompt: ["a"], tagged=True, context=1000)
    with running(load) as server, pytest.raises(openai.BadRequestError, match=message):
        ask(server.client(), **options)


def test_a_model_without_tools_says_so(small_tokenizer: Any) -> None:
    load, _ = fake(small_tokenizer, lambda prompt: ["a"])
    with running(load) as server, pytest.raises(openai.BadRequestError, match="knows no tools"):
        ask(server.client())


def test_an_engine_sees_the_prompt_of_the_library(qwen: Any) -> None:
    """The fake engine is worth something only if it is asked as the real one is."""
    load, engines = fake(qwen, lambda prompt: ["a"], tagged=True, context=1000)
    with running(load) as server:
        ask(server.client(), tools=openai.omit)
    assert isinstance(engines[0], FakeEngine)
    assert engines[0].prompts[-1] == qwen.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
