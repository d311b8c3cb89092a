"""What rows of each format become, and what is said of those that become nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARED
from finespun.data.formats import (
    DEEPEST,
    Example,
    ExampleReader,
    Format,
    Message,
    MessagesExample,
    PreferenceExample,
    PromptExample,
    RatedExample,
    TextExample,
    changed,
    detect,
    last_prompt,
    prompt_and_answer,
    prompt_of,
    shape_of,
    texts_of,
    words_of,
)
from finespun.data.readers import BadRow, DataFile, Origin, Row
from finespun.errors import DataError

HERE = Origin("f.jsonl", 3)


def read(row: dict[Any, Any], /, **options: Any) -> Example | BadRow:
    return ExampleReader(**options).read(Row(row, HERE))


def refused(row: dict[Any, Any], /, **options: Any) -> str:
    """Why a row is refused."""
    bad = read(row, **options)
    assert isinstance(bad, BadRow), bad
    assert bad.origin == HERE
    return bad.reason


def prompt(prompt: str, completion: str) -> PromptExample:
    return PromptExample(prompt, completion, HERE)


def talk(*messages: Message, tools: list[dict[str, Any]] | None = None) -> MessagesExample:
    return MessagesExample(messages, HERE, tools)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def bot(content: str, **more: Any) -> Message:
    return Message(role="assistant", content=content, **more)


WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}

ROWS: list[tuple[str, Format, dict[str, Any], Example]] = [
    # Raw text
    ("text", "text", {"text": " a tale\n"}, TextExample(" a tale\n", HERE)),
    ("c4", "text", {"text": "a page", "timestamp": "2019-04-25", "url": "http://x"}, TextExample("a page", HERE)),
    ("classification", "text", {"text": "great film", "label": 1}, TextExample("great film", HERE)),
    ("classification by a flag", "text", {"text": "great film", "label": True}, TextExample("great film", HERE)),
    # Prompt and completion
    ("prompt-completion", "prompt-completion", {"prompt": "2+2=", "completion": " 4"}, prompt("2+2=", " 4")),
    ("no prompt", "prompt-completion", {"prompt": "", "completion": "4"}, prompt("", "4")),
    (
        "a label that is no rating",
        "prompt-completion",
        {"prompt": "Win a car!", "completion": "junk", "label": "spam"},
        prompt("Win a car!", "junk"),
    ),
    (
        "a numbered label",
        "prompt-completion",
        {"prompt": "Win a car!", "completion": "junk", "label": 1},
        prompt("Win a car!", "junk"),
    ),
    (
        "TRL prompt-completion messages",
        "prompt-completion",
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "What color is the sky?"},
            ],
            "completion": [{"role": "assistant", "content": "It is blue."}],
        },
        talk(
            system("Be brief."),
            user("Hi"),
            bot("Hello", weight=0.0),
            user("What color is the sky?"),
            bot("It is blue."),
        ),
    ),
    (
        "messages and a text",
        "prompt-completion",
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"},
        talk(user("Hi"), bot("Hello")),
    ),
    (
        "a text and messages, with tools",
        "prompt-completion",
        {
            "prompt": "Rain?",
            "completion": [{"role": "assistant", "content": "No."}],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        talk(user("Rain?"), bot("No."), tools=[WEATHER_TOOL]),
    ),
    # Alpaca
    (
        "alpaca",
        "alpaca",
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        prompt("Add.\n2, 3", "5"),
    ),
    (
        "alpaca without input",
        "alpaca",
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        prompt("Say hi.", "hi"),
    ),
    (
        "alpaca, null input",
        "alpaca",
        {"instruction": "Say hi.", "input": None, "output": "hi"},
        prompt("Say hi.", "hi"),
    ),
    ("alpaca, input alone", "alpaca", {"instruction": "", "input": "hi", "output": "ho"}, prompt("hi", "ho")),
    (
        "alpaca as Stanford has it, with the whole text",
        "alpaca",
        {"instruction": "Add.", "input": "2, 3", "output": "5", "text": "Below is an instruction..."},
        prompt("Add.\n2, 3", "5"),
    ),
    (
        "Dolly",
        "alpaca",
        {"instruction": "When?", "context": "Virgin flew in 2000.", "response": "In 2000.", "category": "closed_qa"},
        prompt("When?\nVirgin flew in 2000.", "In 2000."),
    ),
    (
        "alpaca with system and history",
        "alpaca",
        {
            "instruction": "And 3?",
            "input": "",
            "output": "9",
            "system": "You square.",
            "history": [["2?", "4"], ("1?", "1")],
        },
        talk(system("You square."), user("2?"), bot("4"), user("1?"), bot("1"), user("And 3?"), bot("9")),
    ),
    (
        "alpaca with an empty history",
        "alpaca",
        {"instruction": "3?", "output": "9", "system": "", "history": []},
        prompt("3?", "9"),
    ),
    (
        "alpaca with null history and a system",
        "alpaca",
        {"instruction": "3?", "output": "9", "system": "You square.", "history": None},
        talk(system("You square."), user("3?"), bot("9")),
    ),
    (
        "alpaca in a table",
        "alpaca",
        {"instruction": "3?", "output": "9", "history": "", "system": ""},
        prompt("3?", "9"),
    ),
    # ShareGPT
    (
        "ShareGPT",
        "sharegpt",
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "See you"},
            ],
        },
        talk(user("Hi"), bot("Hello"), user("Bye"), bot("See you")),
    ),
    (
        "LLaMA-Factory ShareGPT with tools as JSON",
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Weather in Zürich?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Zürich"}}'},
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear."},
            ],
            "system": "You help.",
            "tools": json.dumps([WEATHER], ensure_ascii=False),
        },
        talk(
            system("You help."),
            user("Weather in Zürich?"),
            bot("", tool_calls=[CALL]),
            Message(role="tool", content='{"sky": "clear"}'),
            bot("Clear."),
            tools=[WEATHER_TOOL],
        ),
    ),
    (
        "two calls at once, arguments as JSON in JSON",
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Zürich, twice"},
                {
                    "from": "function_call",
                    "value": '[{"name": "get_weather", "arguments": "{\\"city\\": \\"Zürich\\"}"}, '
                    '{"name": "now", "arguments": {}}]',
                },
            ],
            "tools": "",
        },
        talk(
            user("Zürich, twice"),
            bot("", tool_calls=[CALL, {"type": "function", "function": {"name": "now", "arguments": {}}}]),
        ),
    ),
    (
        "ShareGPT with role and content",
        "sharegpt",
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        talk(user("Hi"), bot("Hello")),
    ),
    (
        "ShareGPT that starts with the assistant and repeats a role",
        "sharegpt",
        {
            "conversations": [
                {"from": "chatgpt", "value": "Welcome"},
                {"from": "human", "value": "Hi"},
                {"from": "human", "value": "Anyone?"},
                {"from": "bard", "value": "Yes"},
            ]
        },
        talk(bot("Welcome"), user("Hi"), user("Anyone?"), bot("Yes")),
    ),
    # OpenAI chat
    (
        "OpenAI fine-tuning with weights",
        "chat",
        {
            "messages": [
                {"role": "system", "content": "Marv is sarcastic."},
                {"role": "user", "content": "What's the capital of France?"},
                {"role": "assistant", "content": "Paris", "weight": 0},
                {"role": "user", "content": "Can you be more sarcastic?"},
                {"role": "assistant", "content": "Paris, as if everyone doesn't know.", "weight": 1},
            ]
        },
        talk(
            system("Marv is sarcastic."),
            user("What's the capital of France?"),
            bot("Paris", weight=0.0),
            user("Can you be more sarcastic?"),
            bot("Paris, as if everyone doesn't know.", weight=1.0),
        ),
    ),
    (
        "OpenAI fine-tuning with tool calls",
        "chat",
        {
            "messages": [
                {"role": "user", "content": "Weather in Zürich?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Z\\u00fcrich"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "clear"},
                {"role": "assistant", "content": "Clear."},
            ],
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": WEATHER}],
        },
        talk(
            user("Weather in Zürich?"),
            bot("", tool_calls=[{**CALL, "id": "call_1"}]),
            Message(role="tool", content="clear", tool_call_id="call_1", name="get_weather"),
            bot("Clear."),
            tools=[WEATHER_TOOL],
        ),
    ),
    (
        "OpenAI's function_call of old",
        "chat",
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}},
                {"role": "function", "name": "get_weather", "content": "clear"},
                {"role": "assistant", "content": "Clear."},
            ]
        },
        talk(
            user("Weather?"),
            bot("", tool_calls=[CALL]),
            Message(role="tool", content="clear", name="get_weather"),
            bot("Clear."),
        ),
    ),
    (
        "content in parts, developer for system",
        "chat",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you"}]},
                {"role": "assistant", "content": ["Hi"]},
            ]
        },
        talk(system("Be brief."), user("Hello, you"), bot("Hi")),
    ),
    (
        "whether a turn is trained, as other tools write it",
        "chat",
        {
            "messages": [
                {"role": "user", "content": "hi", "train": False},
                {"role": "assistant", "content": "Hm.", "loss": False},
                {"role": "user", "content": "well?"},
                {"role": "assistant", "content": "Hello!", "training": True},
            ]
        },
        talk(user("hi"), bot("Hm.", weight=0.0), user("well?"), bot("Hello!", weight=1.0)),
    ),
    (
        "LLaMA-Factory parts with loss weights",
        "chat",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "hi"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "Hello!"}], "loss_weight": 0.5},
            ]
        },
        talk(user("hi"), bot("Hello!", weight=0.5)),
    ),
    (
        "columns of Arrow, where every message has every field",
        "chat",
        {
            "messages": [
                {"role": "user", "content": "Hi", "tool_calls": None, "name": None, "weight": None},
                {"role": "assistant", "content": "Hello", "tool_calls": [], "tool_call_id": None, "weight": None},
            ],
            "tools": None,
        },
        talk(user("Hi"), bot("Hello")),
    ),
    (
        "a thought",
        "chat",
        {
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "4", "reasoning_content": "2 and 2 is 4."},
            ]
        },
        talk(user("2+2?"), bot("4", reasoning_content="2 and 2 is 4.")),
    ),
    (
        "UltraChat, whose prompt is repeated",
        "chat",
        {
            "prompt": "Hi",
            "prompt_id": "f0e3",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        },
        talk(user("Hi"), bot("Hello")),
    ),
    (
        "ms-swift's tool roles, with a system column and tools as JSON",
        "chat",
        {
            "system": "You help.",
            "tools": json.dumps([WEATHER_TOOL]),
            "messages": [
                {"role": "user", "content": "Weather in Zürich?"},
                {"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "Zürich"}}'},
                {"role": "tool_response", "content": "clear"},
                {"role": "assistant", "content": "Clear."},
            ],
        },
        talk(
            system("You help."),
            user("Weather in Zürich?"),
            bot("", tool_calls=[CALL]),
            Message(role="tool", content="clear"),
            bot("Clear."),
            tools=[WEATHER_TOOL],
        ),
    ),
    # Questions
    (
        "GSM8K",
        "question-answer",
        {"question": "Natalia sold 48/2?", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
        prompt("Natalia sold 48/2?", "48/2 = <<48/2=24>>24\n#### 24"),
    ),
    (
        "a question on a context",
        "question-answer",
        {"context": "The sky is blue.", "question": "Color?", "answer": "Blue"},
        prompt("The sky is blue.\n\nColor?", "Blue"),
    ),
    # Translation
    ("source and target", "translation", {"source": "house", "target": "Haus"}, prompt("house", "Haus")),
    ("OPUS", "translation", {"id": "0", "translation": {"en": "house", "de": "Haus"}}, prompt("house", "Haus")),
    # Summaries
    (
        "CNN/DailyMail",
        "summarization",
        {"article": "LONDON (CNN) -- It rained.", "highlights": "Rain.", "id": "42c0"},
        prompt("LONDON (CNN) -- It rained.", "Rain."),
    ),
    (
        "SAMSum",
        "summarization",
        {"id": "1", "dialogue": "Amanda: cookies?\r\nJerry: Sure!", "summary": "Cookies."},
        prompt("Amanda: cookies?\r\nJerry: Sure!", "Cookies."),
    ),
    ("XSum", "summarization", {"document": "It rained.", "summary": "Rain.", "id": "3"}, prompt("It rained.", "Rain.")),
    (
        "BillSum",
        "summarization",
        {"text": "SECTION 1.", "summary": "A law.", "title": "An act"},
        prompt("SECTION 1.", "A law."),
    ),
    # Preference
    (
        "HH-RLHF",
        "preference",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A pun?\n\nAssistant: I can try. Lettuce.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A pun?\n\nAssistant: I can not.",
        },
        PreferenceExample(
            "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A pun?\n\nAssistant:",
            " I can try. Lettuce.",
            " I can not.",
            HERE,
        ),
    ),
    (
        "TRL with a prompt",
        "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        PreferenceExample("The sky is", " blue.", " green.", HERE),
    ),
    (
        "TRL with an implicit prompt",
        "preference",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        PreferenceExample("The sky is ", "blue.", "black.", HERE),
    ),
    (
        "an implicit prompt to a line's end, one answer the beginning of the other",
        "preference",
        {"chosen": "Q: 你好吗？\n好", "rejected": "Q: 你好吗？\n好的"},
        PreferenceExample("Q: 你好吗？\n", "好", "好的", HERE),
    ),
    (
        "TRL messages with a prompt",
        "preference",
        {
            "prompt": [{"role": "user", "content": "Color?"}],
            "chosen": [{"role": "assistant", "content": "Blue."}],
            "rejected": [{"role": "assistant", "content": "Green."}],
        },
        PreferenceExample((user("Color?"),), (bot("Blue."),), (bot("Green."),), HERE),
    ),
    (
        "TRL messages with an implicit prompt",
        "preference",
        {
            "chosen": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Blue."}],
            "rejected": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Green."}],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        PreferenceExample((user("Color?"),), (bot("Blue."),), (bot("Green."),), HERE),
    ),
    (
        "UltraFeedback binarized: a prompt that the answers repeat",
        "preference",
        {
            "prompt": "Color?",
            "prompt_id": "a1",
            "chosen": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Blue."}],
            "rejected": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Green."}],
            "messages": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Blue."}],
        },
        PreferenceExample((user("Color?"),), (bot("Blue."),), (bot("Green."),), HERE),
    ),
    (
        "a prompt that the answers repeat behind a system message, in several turns",
        "preference",
        {
            "prompt": "Color?",
            "chosen": [
                {"role": "system", "content": "Look."},
                {"role": "user", "content": "Color?"},
                {"role": "assistant", "content": "Of what?"},
                {"role": "user", "content": "The sky."},
                {"role": "assistant", "content": "Blue."},
            ],
            "rejected": [
                {"role": "system", "content": "Look."},
                {"role": "user", "content": "Color?"},
                {"role": "assistant", "content": "Of what?"},
                {"role": "user", "content": "The sky."},
                {"role": "assistant", "content": "Green."},
            ],
        },
        PreferenceExample(
            (system("Look."), user("Color?"), bot("Of what?", weight=0.0), user("The sky.")),
            (bot("Blue."),),
            (bot("Green."),),
            HERE,
        ),
    ),
    (
        "LLaMA-Factory ShareGPT preference",
        "preference",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Color?"},
            ],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        PreferenceExample(
            (user("Hi"), bot("Hello", weight=0.0), user("Color?")), (bot("Blue."),), (bot("Green."),), HERE
        ),
    ),
    (
        "LLaMA-Factory Alpaca preference",
        "preference",
        {"instruction": "Name it.", "input": "sky", "chosen": "blue", "rejected": "green"},
        PreferenceExample("Name it.\nsky", "blue", "green", HERE),
    ),
    (
        "Orca DPO pairs: a system and a question, answers that begin alike",
        "preference",
        {"system": "Look.", "question": "Color?", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        PreferenceExample(
            (system("Look."), user("Color?")), (bot("The sky is blue."),), (bot("The sky is green."),), HERE
        ),
    ),
    (
        "Orca DPO pairs without a system",
        "preference",
        {"system": "", "question": "Color?", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        PreferenceExample("Color?", "The sky is blue.", "The sky is green.", HERE),
    ),
    # KTO
    (
        "KTO of TRL",
        "rated",
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        RatedExample(prompt("The sky is", " blue."), True),
    ),
    (
        "KTO of TRL, messages",
        "rated",
        {
            "prompt": [{"role": "user", "content": "Color?"}],
            "completion": [{"role": "assistant", "content": "Green."}],
            "label": False,
        },
        RatedExample(talk(user("Color?"), bot("Green.")), False),
    ),
    (
        "KTO of LLaMA-Factory",
        "rated",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ooh"}], "label": False},
        RatedExample(talk(user("Hi"), bot("Ooh")), False),
    ),
    (
        "KTO of LLaMA-Factory, Alpaca",
        "rated",
        {"instruction": "Say hi.", "input": "", "output": "hi", "kto_tag": True},
        RatedExample(prompt("Say hi.", "hi"), True),
    ),
    (
        "KTO, ShareGPT",
        "rated",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "kto_tag": False},
        RatedExample(talk(user("Hi"), bot("Ho")), False),
    ),
]


@pytest.mark.parametrize(("format", "columns", "example"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_row_of_each_format(format: Format, columns: dict[str, Any], example: Example) -> None:  # noqa: A002
    reader = ExampleReader()
    assert reader.read(Row(columns, HERE)) == example
    assert reader.format == format
    assert reader.shape == shape_of(example)
    assert read(columns, format=format) == example


def test_every_format_is_in_the_table() -> None:
    assert {row[1] for row in ROWS} == set(get_args(Format))


def test_a_translation_is_from_the_first_language_into_the_second() -> None:
    assert read({"translation": {"de": "Haus", "en": "house"}}) == prompt("Haus", "house")


def test_an_example_keeps_nothing_of_the_row_that_can_be_changed_later() -> None:
    row = {
        "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]}],
        "tools": [WEATHER],
    }
    example = read(row)
    row["messages"][0]["tool_calls"][0]["arguments"]["a"].append(2)
    row["tools"].clear()
    assert example == talk(
        bot("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}]),
        tools=[WEATHER_TOOL],
    )


# Real files


@pytest.mark.parametrize(
    ("file", "rows", "format", "kinds", "unused"),
    [
        ("formats/alpaca_en.json", 300, "alpaca", {PromptExample}, []),
        ("formats/alpaca_zh.json", 150, "alpaca", {PromptExample}, []),
        ("formats/identity.json", 91, "alpaca", {PromptExample}, []),
        ("formats/sharegpt_tools.json", 60, "sharegpt", {MessagesExample}, []),
        ("formats/messages_parts.jsonl", 100, "chat", {MessagesExample}, []),
        ("formats/preference.json", 100, "preference", {PreferenceExample}, []),
        ("formats/kto.json", 100, "rated", {RatedExample}, []),
        ("formats/c4_demo.jsonl", 150, "text", {TextExample}, []),
        ("formats/wiki.txt", 6, "text", {TextExample}, []),
        ("webnlg/train.jsonl", 18_025, "prompt-completion", {PromptExample}, []),
        ("multi30k/train.en-de.jsonl", 29_000, "prompt-completion", {PromptExample}, []),
        ("dialogsum/train_small.jsonl", 500, "summarization", {PromptExample}, ["topic"]),
        ("tang/poems.jsonl", 4_003, "text", {TextExample}, ["title", "author"]),
    ],
)
def test_real_files_are_read_without_options(
    file: str,
    rows: int,
    format: Format,  # noqa: A002
    kinds: set[type],
    unused: list[str],
) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not here")
    reader = ExampleReader()
    examples = [row if isinstance(row, BadRow) else reader.read(row) for row in DataFile(path, path.name).rows()]
    assert [example for example in examples if isinstance(example, BadRow)] == []
    assert len(examples) == rows
    assert list(reader.first) == [format]
    assert {type(example) for example in examples} == kinds
    assert list(reader.unused) == unused
    reader.refuse_mixture()


def shared_rows(file: str) -> Iterator[tuple[dict[str, Any], Example]]:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not here")
    reader = ExampleReader()
    for row in json.loads(path.read_text(encoding="utf-8")):
        example = reader.read(Row(row, HERE))
        assert not isinstance(example, BadRow)
        yield row, example


def test_a_real_conversation_with_tools() -> None:
    calls = 0
    for row, example in shared_rows("formats/sharegpt_tools.json"):
        assert isinstance(example, MessagesExample)
        assert [tool["function"] for tool in example.tools or []] == json.loads(row["tools"])
        for turn, message in zip(row["conversations"], example.messages, strict=True):
            if turn["from"] == "function_call":
                calls += 1
                (call,) = message["tool_calls"]
                assert call["function"] == json.loads(turn["value"])
                assert (message["role"], message["content"]) == ("assistant", "")
            else:
                assert message["role"] == {"human": "user", "gpt": "assistant", "observation": "tool"}[turn["from"]]
                assert message["content"] == turn["value"]
    assert calls == 44


def test_real_preferences_keep_their_prompts_and_answers() -> None:
    for row, example in shared_rows("formats/preference.json"):
        assert isinstance(example, PreferenceExample)
        assert [message["content"] for message in example.prompt] == [turn["value"] for turn in row["conversations"]]
        assert all(message.get("weight") == 0 for message in example.prompt if message["role"] == "assistant")
        assert example.chosen == (bot(row["chosen"]["value"]),)
        assert example.rejected == (bot(row["rejected"]["value"]),)


def test_real_ratings() -> None:
    labels = Counter(
        example.label for _, example in shared_rows("formats/kto.json") if isinstance(example, RatedExample)
    )
    assert labels == {True: 54, False: 46}


# Refusals


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Ho"}
AND = {"prompt": "Color?"}


def calling(call: Any) -> dict[str, Any]:
    return chat(ASK, {"role": "assistant", "content": "", "tool_calls": [call]})


def function(arguments: Any) -> dict[str, Any]:
    return calling({"function": {"name": "f", "arguments": arguments}})


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        # Columns
        ({}, "has columns of no known format: none. Known are `text`; "),
        ({"a": 1, "b c": 2}, "has columns of no known format: 'a', 'b c'. Known are `text`; `prompt` and `completion`; "),
        ({"a": 1}, "data.columns gives columns such names; data.template makes texts of any."),
        # Texts
        ({"text": None}, "`text` is None, not a text."),
        ({"text": 7}, "`text` is 7, not a text."),
        ({"text": ["a"]}, "`text` is ['a'], not a text."),
        ({"text": " \n"}, "`text` is empty."),
        ({"text": "ab\0c"}, r"holds a NUL character at 2: 'ab\x00c'. The file is damaged or no text."),
        ({"text": "ä\ud800"}, r"holds half a character (lone surrogate '\ud800') at 1, which no file can."),
        ({"text\ud800": "a"}, r"has columns of no known format: 'text\ud800'"),
        # Prompt and completion
        ({"prompt": 5, "completion": "x"}, "`prompt` is 5, not a text or a list of messages."),
        ({"prompt": None, "completion": "x"}, "`prompt` is None, not a text or a list of messages."),
        ({"prompt": "x", "completion": float("nan")}, "`completion` is nan, not a text or a list of messages."),
        (
            {"prompt": "x", "completion": " "},
            "`completion` is empty, so there is nothing to learn from this row; fill it or remove the row.",
        ),
        ({"prompt": [], "completion": "x"}, "`prompt` is [], not a list of messages."),
        ({"prompt": "x", "completion": [ASK]}, "`completion` holds a message that is not the assistant's."),
        ({"prompt": [ASK], "completion": ""}, "`completion` is empty, so there is nothing to learn"),
        ({"prompt": [ASK], "completion": [{"role": "assistant", "content": " "}]}, "message 2, the assistant's, is empty."),
        (
            {"prompt": "x", "completion": [{**SAY, "weight": 0}]},
            "has the weight 0 on all assistant messages, so there is nothing to learn from this row.",
        ),
        (
            {"prompt": [ASK, SAY], "completion": [{**SAY, "weight": 0}]},
            "has the weight 0 on all assistant messages",
        ),
        # Alpaca
        ({"instruction": None, "output": "x"}, "`instruction` is None, not a text."),
        ({"instruction": "x", "input": 3, "output": "y"}, "`input` is 3, not a text."),
        ({"instruction": "x", "response": None}, "`response` is None, not a text."),
        ({"instruction": "x", "output": ""}, "`output` is empty, so there is nothing to learn from this row"),
        ({"instruction": "x", "output": "y", "system": 1}, "`system` is 1, not a text."),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "`history` is [['a']]; it should be a list of [said, answered].",
        ),
        ({"instruction": "x", "output": "y", "history": "a"}, "`history` is 'a'; it should be a list of"),
        ({"instruction": "x", "output": "y", "history": 0}, "`history` is 0; it should be a list of"),
        ({"instruction": "x", "output": "y", "history": [["a", None]]}, "`history` is [['a', None]]; it should be"),
        ({"instruction": "x", "output": "y", "history": [["a", ""]]}, "message 2, the assistant's, is empty."),
        # Conversations
        ({"messages": []}, "`messages` is [], not a list of messages."),
        ({"messages": "Hi"}, "`messages` is 'Hi', not a list of messages."),
        ({"messages": ASK}, "`messages` is {'content': 'Hi', 'role': 'user'}, not a list of messages."),
        ({"conversations": None}, "`conversations` is None, not a list of messages."),
        (chat("Hi"), "message 1 is 'Hi'; it needs a `role` and a `content` that is a text."),
        (chat({"content": "Hi"}), "message 1 has the role None; known are system, developer, user, human, assistant, gpt"),
        (chat(ASK, {"role": "robot", "content": "Hi"}), "message 2 has the role 'robot'; known are system, "),
        (chat({"role": ["user"], "content": "Hi"}), "message 1 has the role ['user']; known are "),
        (chat(ASK, {"role": "assistant", "content": None}), "message 2 has the content None; it needs a `role` and a `content`"),
        (chat({"role": "user", "content": 5}, SAY), "message 1 has the content 5; it needs"),
        (chat({"role": "user"}, SAY), "message 1 has the content None"),
        (chat(ASK, {"role": "assistant", "content": ""}), "message 2, the assistant's, is empty."),
        (chat(ASK), "has no assistant message, so there is nothing to learn from this row."),
        (chat(ASK, SAY, {"role": "system", "content": "Be brief."}), "message 3 is a system message; it belongs first."),
        (
            chat({"role": "system", "content": "Be brief."}, ASK, SAY, system="Be long."),
            "has a system message and a column `system`; one of them is needed.",
        ),
        (
            chat(ASK, {"role": "assistant", "content": ""}, system="Be long."),
            "message 2, the assistant's, is empty.",  # counted as in the file
        ),
        (chat(ASK, {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}), "message 2 has a part {'image_url'"),
        (chat({"role": "user", "content": [{"type": "text", "text": None}]}, SAY), "message 1 has a part {'text': None"),
        (chat({"role": "user", "content": [7]}, SAY), "message 1 has a part 7; only text can be trained."),
        (chat(ASK, {**SAY, "content": "a\0"}), "holds a NUL character at 1"),
        (chat(ASK, {**SAY, "reasoning_content": "a\ud800"}), "holds half a character (lone surrogate"),
        (chat(ASK, {**SAY, "reasoning_content": 5}), "message 2 has the `reasoning_content` 5, not a text."),
        (chat(ASK, SAY, {"role": "tool", "content": "x", "tool_call_id": 7}), "message 3 has the `tool_call_id` 7, not a text."),
        (chat({**ASK, "name": "A\0"}, SAY), "holds a NUL character at 1"),
        # Weights
        (chat(ASK, {**SAY, "weight": 0}), "has the weight 0 on all assistant messages, so there is nothing to learn"),
        (chat(ASK, {**SAY, "weight": -1}), "message 2 has the weight -1; it should be 0, or from 0.001 to 1000."),
        (chat(ASK, {**SAY, "weight": "1"}), "message 2 has the weight '1'; it should be"),
        (chat(ASK, {**SAY, "weight": True}), "message 2 has the weight True; it should be"),
        (chat(ASK, {**SAY, "weight": float("nan")}), "message 2 has the weight nan; it should be"),
        (chat(ASK, {**SAY, "weight": float("inf")}), "message 2 has the weight inf; it should be"),
        (chat(ASK, {**SAY, "weight": 10**400}), "message 2 has the weight 1000000"),
        (chat(ASK, {**SAY, "weight": 1e-50}), "message 2 has the weight 1e-50; it should be"),
        (chat(ASK, {**SAY, "loss": 1}), "message 2 has the loss 1; it should be true or false."),
        (chat({**ASK, "train": True}, SAY), "message 1 is the user's and has the weight"),
        (
            chat({**ASK, "weight": 1}, SAY),
            "message 1 is the user's and has the weight 1; only the assistant's words are trained.",
        ),
        # Tools
        (function("{city:"), "message 2 should hold JSON, but holds '{city:' ("),
        (function(""), "message 2 should hold JSON, but holds '' ("),
        (function("[1]"), "message 2 calls with the arguments [1]; they should be a JSON object."),
        (function(None), "message 2 calls with the arguments None; they should be a JSON object."),
        (function({"a": "x\0"}), "holds a NUL character at 1"),
        (function({"a\ud800": 1}), "holds half a character (lone surrogate"),
        (function({1: 2}), "message 2, in its tool call, holds {1: 2}, which is not JSON."),
        (function({"a": {3}}), "message 2, in its tool call, holds {3}, which is not JSON."),
        (function({"a": float("nan")}), "message 2, in its tool call, holds nan, which is not JSON."),
        (calling({"name": "f"}), "message 2 calls {'name': 'f'}; a call needs a `name` and `arguments`."),
        (calling({"function": {"arguments": "{}"}}), "message 2 calls {'function': {'arguments': '{}'}}; a call needs"),
        (calling("f()"), "message 2 calls 'f()'; a call needs a `name` and `arguments`."),
        (calling({"function": "f"}), "message 2 calls {'function': 'f'}; a call needs a `name` and `arguments`."),
        (calling({"id": 1, "function": {"name": "f", "arguments": {}}}), "message 2 calls with the `id` 1, not a text."),
        (
            chat({**ASK, "tool_calls": [{"name": "f", "arguments": {}}]}, SAY),
            "message 1 has tool calls [{'arguments': {}, 'name': 'f'}], which only a list in the assistant's message can be.",
        ),
        (chat(ASK, {**SAY, "tool_calls": "f()"}), "message 2 has tool calls 'f()', which only a list"),
        (chat(ASK, {**SAY, "tool_calls": False}), "message 2 has tool calls False, which only a list"),
        (chat(ASK, {**SAY, "function_call": "auto"}), "message 2 calls {'function': 'auto'}; a call needs"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f()"}]},
            "message 2 should hold JSON, but holds 'f()' (",
        ),
        ({"conversations": [{"from": "function_call", "value": None}]}, "message 1 should hold JSON, but holds None ("),
        ({"conversations": [{"from": "function_call", "value": "null"}]}, "message 1 calls None; a call needs"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "message 1, the assistant's, is empty."),
        (chat(ASK, SAY, tools="[{]"), "`tools` should hold JSON, but holds '[{]' ("),
        (chat(ASK, SAY, tools=5), "`tools` is 5; it should be a list of functions with name and parameters."),
        (chat(ASK, SAY, tools=WEATHER_TOOL), "`tools` is {'function': {"),
        (chat(ASK, SAY, tools=["f"]), "`tools` is ['f']; it should be a list of functions"),
        (chat(ASK, SAY, tools=[{"function": "f"}]), "`tools` is [{'function': 'f'}]; it should be a list of functions"),
        (chat(ASK, SAY, tools=[{"parameters": {}}]), "`tools` is [{'parameters': {}}]; it should be a list of functions"),
        (chat(ASK, SAY, tools=[{"name": "f", "description": "\0"}]), "holds a NUL character at 0"),
        # Pairs
        ({"question": "x", "answer": None}, "`answer` is None, not a text."),
        ({"question": "x", "answer": ""}, "`answer` is empty, so there is nothing to learn"),
        ({"question": "x", "answer": True}, "`answer` is True, not a text."),
        ({"question": "x", "answer": "y", "context": []}, "`context` is [], not a text."),
        ({"source": "x", "target": 3}, "`target` is 3, not a text."),
        ({"source": "x", "target": ""}, "`target` is empty"),
        ({"translation": "Haus"}, "`translation` is 'Haus'; it should hold a text in each of two languages."),
        ({"translation": {"en": "a", "de": "b", "fr": "c"}}, "`translation` is {'de': 'b', 'en': 'a', 'fr': 'c'}; it should"),
        ({"translation": {"en": "a", "de": None}}, "`de` is None, not a text."),
        ({"translation": {"en": "a", "de": ""}}, "`de` is empty, so there is nothing to learn"),
        ({"translation": {"en": "a", "\ud800": 5}}, r"`\ud800` is 5, not a text."),
        ({"document": 1, "summary": "x"}, "`document` is 1, not a text."),
        ({"article": "x", "highlights": " "}, "`highlights` is empty"),
        # Preferences
        ({**AND, "chosen": 5, "rejected": "x"}, "`chosen` is 5, not a text or a list of messages."),
        ({**AND, "chosen": "x", "rejected": None}, "`rejected` is None, not a text or a list of messages."),
        ({**AND, "chosen": "x", "rejected": [SAY]}, "one of `chosen` and `rejected` is a text, the other is messages."),
        ({**AND, "chosen": "x", "rejected": "x"}, "`chosen` and `rejected` are the same."),
        ({**AND, "chosen": [SAY], "rejected": [SAY]}, "`chosen` and `rejected` are the same."),
        ({**AND, "chosen": "x", "rejected": ""}, "`rejected` is empty, so there is nothing to learn"),
        ({"prompt": 5, "chosen": "x", "rejected": "y"}, "`prompt` is 5, not a text or a list of messages."),
        (
            {"chosen": "Yes.", "rejected": "No."},
            "has no prompt: `chosen` and `rejected` begin differently. If a column holds it, name it with data.columns.prompt.",
        ),
        ({"chosen": "Yes", "rejected": "Yesterday"}, "has no prompt: `chosen` and `rejected` begin differently."),
        ({"chosen": "Q? Yes", "rejected": "Q? "}, "`rejected` is empty behind what both answers begin with."),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Bye\n\nAssistant: Bye",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No",
            },
            "`chosen` differs before the last question, so part of the answer is the human's.",
        ),
        ({"chosen": [SAY], "rejected": [{**SAY, "content": "Hu"}]}, "has no prompt: `chosen` and `rejected` begin differently."),
        (
            {"chosen": [{"role": "user", "content": "a"}, SAY], "rejected": [ASK, SAY]},
            "has no prompt: `chosen` and `rejected` begin differently.",
        ),
        ({"chosen": [ASK, SAY, ASK, SAY], "rejected": [ASK, SAY]}, "`chosen` has no answer of the assistant's behind the prompt."),
        ({"chosen": [ASK, SAY], "rejected": [ASK]}, "`rejected` has no answer of the assistant's behind the prompt."),
        (
            {**AND, "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "Hu"}]},
            "`chosen` and `rejected` are conversations that do not both begin with the prompt.",
        ),
        ({**AND, "chosen": [SAY], "rejected": [ASK]}, "`rejected` has no answer of the assistant's behind the prompt."),
        ({**AND, "chosen": [SAY], "rejected": [{**SAY, "content": ""}]}, "with `rejected`, message 2, the assistant's, is empty."),
        (
            {"prompt": [ASK, SAY, ASK], "chosen": [{**SAY, "weight": 0}], "rejected": [{**SAY, "content": "Hu"}]},
            "with `chosen`, has the weight 0 on all assistant messages, so there is nothing to learn from this row.",
        ),
        ({"question": 5, "chosen": "x", "rejected": "y"}, "`question` is 5, not a text or a list of messages."),
        ({"instruction": "a", "input": 5, "chosen": "x", "rejected": "y"}, "`input` is 5, not a text."),
        ({"instruction": "", "input": None, "chosen": "x", "rejected": "y"}, "has no prompt"),
        # Ratings
        ({"prompt": "x", "completion": "", "label": True}, "`completion` is empty, so there is nothing to learn"),
        ({"instruction": "x", "output": "y", "label": None, "kto_tag": True}, "`label` is None; it should be true or false."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(columns: dict[str, Any], said: str) -> None:
    assert refused(columns).startswith(said) or said in refused(columns)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("text", "has no column `text`; it has 'a', 'b'."),
        ("prompt-completion", "has no column `prompt`; it has 'a', 'b'."),
        ("alpaca", "has no column `instruction`; it has 'a', 'b'."),
        ("sharegpt", "has no column `conversations`; it has 'a', 'b'."),
        ("chat", "has no column `messages`; it has 'a', 'b'."),
        ("question-answer", "has no column `question`; it has 'a', 'b'."),
        ("translation", "has no column `source`; it has 'a', 'b'."),
        ("summarization", "has no column `document` or `article` or `dialogue` or `text`; it has 'a', 'b'."),
        ("preference", "has no column `chosen`; it has 'a', 'b'."),
        ("rated", "has no column `label` or `kto_tag`; it has 'a', 'b'."),
    ],
)
def test_a_format_that_is_set_names_the_missing_column(format: Format, said: str) -> None:  # noqa: A002
    assert refused({"a": "x", "b": "y"}, format=format) == said


def test_a_rating_beside_no_prompt() -> None:
    assert refused({"text": "x", "label": True}, format="rated") == "is rated, but has no prompt."
    assert refused({"prompt": "x", "completion": "y", "label": 1}, format="rated") == (
        "`label` is 1; it should be true or false."
    )
    assert refused({"label": False}, format="rated") == "has no column `prompt`; it has 'label'."


def test_a_format_that_is_set_is_not_looked_for() -> None:
    both = {"text": "a tale", "prompt": "p", "completion": "c"}
    assert read(both) == prompt("p", "c")
    assert read(both, format="text") == TextExample("a tale", HERE)


# Several rows


def test_mixed_formats_are_refused_with_a_row_of_each() -> None:
    reader = ExampleReader()
    reader.read(Row({"prompt": "p", "completion": "c"}, Origin("a.jsonl", 1)))
    reader.refuse_mixture()
    for row in range(2, 5):
        reader.read(Row({"text": f"tale {row}" * 99}, Origin("b.jsonl", row)))
    reader.read(Row(chat(ASK, SAY), Origin("c.jsonl", 9)))
    with pytest.raises(DataError) as error:
        reader.refuse_mixture()
    first, *rows = str(error.value).splitlines()
    assert first == "The rows have different formats; train them apart, or bring them into one. Found:"
    assert rows[0] == "  prompt-completion: a.jsonl, row 1: {'completion': 'c', 'prompt': 'p'}"
    assert rows[1].startswith("  text: b.jsonl, row 2: {'text': 'tale 2tale")
    assert rows[2].startswith("  chat: c.jsonl, row 9: {'messages': [{")
    assert max(map(len, rows)) < 220


def test_a_rating_that_some_rows_lack_is_a_mixture() -> None:
    reader = ExampleReader()
    for label in ({"label": True}, {}):
        reader.read(Row({"prompt": "p", "completion": "c", **label}, HERE))
    with pytest.raises(DataError, match=r"rated: .*\n.*prompt-completion: "):
        reader.refuse_mixture()


def test_texts_and_messages_of_one_format_go_together() -> None:
    reader = ExampleReader()
    assert isinstance(reader.read(Row({"instruction": "a", "output": "b"}, HERE)), PromptExample)
    assert reader.shape == "prompt+completion"
    assert isinstance(reader.read(Row({"instruction": "a", "output": "b", "system": "s"}, HERE)), MessagesExample)
    assert isinstance(reader.read(Row({"instruction": "a", "output": "b"}, HERE)), PromptExample)
    assert (reader.shape, reader.format) == ("messages", "alpaca")
    reader.refuse_mixture()


def test_bad_rows_leave_no_shape() -> None:
    reader = ExampleReader()
    reader.read(Row({"text": ""}, HERE))
    assert reader.shapes == set()
    assert (reader.shape, reader.format) == ("text", "text")


@pytest.mark.parametrize(
    ("columns", "unused"),
    [
        ({"text": "a", "title": "b", "n": 1}, ["title", "n"]),
        ({"prompt": "a", "completion": "b", "tools": [], "label": "spam"}, ["tools", "label"]),
        ({"prompt": "a", "completion": [SAY], "tools": []}, []),
        ({"instruction": "a", "output": "b", "text": "c", "response": "d"}, ["text", "response"]),
        (chat(ASK, SAY, prompt="p", system=None), ["prompt"]),
        ({"document": "a", "text": "b", "summary": "c"}, ["text"]),
        ({"translation": {"a": "x", "b": "y"}, "source": "opus"}, ["source"]),
        ({"prompt": "a", "question": "q", "chosen": "b", "rejected": "c", "tools": []}, ["question", "tools"]),
        ({"prompt": "a", "completion": "b", "label": True, "id": 3}, ["id"]),
        ({"question": "a", "answer": "b", "label": True, "id": 3}, ["label", "id"]),
        ({"text": "a", 5: "b", "\ud800": "c"}, ["5", r"\ud800"]),
    ],
)
def test_columns_that_nothing_is_made_of_are_named(columns: dict[Any, Any], unused: list[str]) -> None:
    reader = ExampleReader()
    assert not isinstance(reader.read(Row(columns, HERE)), BadRow)
    assert list(reader.unused) == unused


def test_a_rating_of_another_format_uses_its_columns() -> None:
    reader = ExampleReader("rated")
    assert reader.read(Row({"question": "a", "answer": "b", "label": True}, HERE)) == RatedExample(
        prompt("a", "b"), True
    )
    assert list(reader.unused) == []


# Column mapping


@pytest.mark.parametrize(
    ("columns", "mapping", "example"),
    [
        ({"ask": "a", "reply": "b"}, {"prompt": "ask", "completion": "reply"}, prompt("a", "b")),
        ({"body": "a", "text": "summary"}, {"text": "body"}, TextExample("a", HERE)),
        ({"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"}, prompt("b", "a")),
        ({"de": "Haus", "en": "house"}, {"source": "en", "target": "de"}, prompt("house", "Haus")),
        ({"text": "a", "answer": "b"}, {"prompt": "text", "completion": "answer"}, prompt("a", "b")),
        ({"turns": [ASK, SAY]}, {"messages": "turns"}, talk(user("Hi"), bot("Ho"))),
        ({"q": "a"}, {"prompt": "q", "completion": "q"}, prompt("a", "a")),
        (
            {"query": "Color?", "chosen": "It is blue", "rejected": "It is red"},
            {"prompt": "query"},
            PreferenceExample("Color?", "It is blue", "It is red", HERE),
        ),
    ],
)
def test_columns_are_renamed(columns: dict[str, Any], mapping: dict[str, str], example: Example) -> None:
    assert read(columns, columns=mapping) == example


def test_a_renamed_column_that_is_missing() -> None:
    assert refused({"ask": "a", "reply": "b"}, columns={"prompt": "ask", "completion": "answer"}) == (
        "has no column 'answer', which data.columns names; it has 'ask', 'reply'."
    )


def test_renamed_columns_are_not_unused() -> None:
    reader = ExampleReader(columns={"text": "body"})
    reader.read(Row({"body": "a", "id": 1}, HERE))
    assert list(reader.unused) == ["id"]


# Templates


def test_a_template_takes_the_place_of_a_format() -> None:
    reader = ExampleReader(template={"prompt": "Poem: {{ title }}\n", "completion": "{{ lines | join('\\n') }}"})
    row = Row({"title": "Snow", "lines": ["a", "b"], "text": "not used"}, HERE)
    assert reader.read(row) == prompt("Poem: Snow\n", "a\nb")
    assert (reader.format, reader.shape) == ("template", "prompt+completion")
    reader.refuse_mixture()


def test_a_template_of_a_text() -> None:
    template = {"text": "{% if year > 1900 %}{{ year }}: {% endif %}{{ body or 'nothing' }}, {{ 1.5 }} {{ true }}"}
    assert read({"year": 1999, "body": None}, template=template) == TextExample("1999: nothing, 1.5 True", HERE)


def test_a_template_goes_over_renamed_columns() -> None:
    assert read({"a": "x"}, template={"text": "{{ b }}"}, columns={"b": "a"}) == TextExample("x", HERE)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ titel }}", "the template cannot be filled ('titel' is undefined); the row has 'title', 'none', 'list'."),
        ("{{ title.x.y }}", "the template cannot be filled ("),
        ("{{ title / 2 }}", "the template cannot be filled ("),
        ("{{ 1 / 0 }}", "the template cannot be filled (division by zero)"),
        ("{{ none_ }}", "the template cannot be filled ("),
        ("{{ title.__class__.__mro__ }}", "the template cannot be filled (access to attribute"),
        ("{{ none }}", "the template cannot be filled (None is no text; `or`, join and tojson can make one)"),
        ("{{ list }}", "the template cannot be filled (['a', 1] is no text; `or`, join and tojson can make one)"),
        ("{{ list | map('upper') }}", "is no text; `or`, join and tojson can make one)"),
        ("{{ {'a': title} }}", "is no text; `or`, join and tojson can make one)"),
        ("{{ missing }}", "the template cannot be filled ("),
        ("  {{ '' }}\n", "`text` is empty."),
        ("{{ '\\x00' }}", "holds a NUL character at 0"),
    ],
)
def test_a_template_that_cannot_be_filled(template: str, said: str) -> None:
    row = {"title": "Snow", "none": None, "list": ["a", 1]}
    assert said in refused(row, template={"text": template})


def test_a_template_does_not_write_a_missing_number() -> None:
    assert "(nan is no text" in refused({"n": float("nan")}, template={"text": "{{ n }}"})


def test_an_empty_completion_of_a_template() -> None:
    said = refused({"a": " "}, template={"prompt": "x", "completion": "{{ a }}"})
    assert said.startswith("`completion` is empty, so there is nothing to learn")


@pytest.mark.parametrize("source", ["{{ title", "a\n{% if %}", "{{ title | no_such_filter }}"])
def test_a_template_that_is_none_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError, match=r"^data\.template\.completion, line \d: "):
        ExampleReader(template={"prompt": "x", "completion": source})


# Anything else

deep: Any = "x"
deep_columns: Any = {}
for _ in range(5_000):
    deep = [deep]
    deep_columns = {"function": deep_columns, "name": "f", "arguments": deep_columns}

ODD = (
    *(None, True, False, 0, -1, 10**400, 1e-300, float("nan"), float("inf"), b"bytes", object(), (), ("a", "b"), {3}),
    *("", " ", "a\0", "ä\udfff", "x" * 10_000, "[" * 2000, '{"a": ' * 900, '{"name": "f", "arguments": {}}'),
    *([], [None], [[]], ["a"], {}, {1: 2}, {"role": "user", "content": None}, [{"name": "f", "arguments": {"\0": 1}}]),
    *(np.array(["a", "b"]), np.array([{"role": "user", "content": "a"}, None]), np.float64(1), np.bool_(True)),
    *(deep, deep_columns),
)


texts = st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=3)
known = st.sampled_from(
    [
        *("", " ", "a", "Hi there", "\n\nHuman: a\n\nAssistant: b", "x" * 10_000),
        *("user", "assistant", "system", "human", "gpt", "function_call", "tool", "text"),
        *('{"name": "f", "arguments": {}}', '[{"name": "f", "arguments": "{}"}]', "[" * 2000, '{"a": ' * 900),
    ]
)
odd = st.sampled_from(ODD[:-2])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | known
keys = known | st.sampled_from(
    [
        *("role", "content", "from", "value", "type", "tool_calls", "function", "name", "arguments", "id"),
        *("weight", "loss_weight", "reasoning_content", "tool_call_id"),
    ]
)
values = st.recursive(
    scalars | odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | texts, inner, max_size=4),
    max_leaves=12,
)
near_calls = st.fixed_dictionaries({}, optional={"name": texts | values, "arguments": values, "id": values}) | values
near_messages = (
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "function_call", "robot"])},
        optional={
            "content": known
            | texts
            | values
            | st.lists(st.fixed_dictionaries({"type": known, "text": known | values})),
            "tool_calls": st.lists(near_calls | st.fixed_dictionaries({"function": near_calls}), max_size=2) | values,
            "function_call": near_calls,
            "weight": st.sampled_from([0, 1, 0.5, None]) | values,
            "reasoning_content": texts | values,
            "name": texts | values,
        },
    )
    | values
)
cells = known | texts | st.lists(near_messages, max_size=4) | near_messages | st.booleans() | values
columns_of: dict[Format, list[str]] = {
    "text": ["text"],
    "prompt-completion": ["prompt", "completion", "tools"],
    "alpaca": ["instruction", "input", "output", "response", "context", "system", "history"],
    "sharegpt": ["conversations", "system", "tools"],
    "chat": ["messages", "system", "tools"],
    "question-answer": ["question", "answer", "context"],
    "translation": ["translation", "source", "target"],
    "summarization": ["document", "article", "dialogue", "text", "summary", "highlights"],
    "preference": ["chosen", "rejected", "prompt", "messages", "conversations", "question", "instruction", "system"],
    "rated": ["label", "kto_tag", "prompt", "completion", "messages", "conversations", "instruction", "output"],
}


def test_every_format_is_tried_with_anything() -> None:
    assert set(columns_of) == set(get_args(Format))


def check(example: Example | BadRow, reader: ExampleReader) -> None:
    """A row gave an example that can be trained, or a reason that can be printed."""
    ", ".join(reader.unused).encode()
    if isinstance(example, BadRow):
        assert type(example.reason) is str
        assert 0 < len(example.reason) < 2000
        example.reason.encode()
        return
    said = list(texts_of(example))
    for text in [*said, *prompt_and_answer(example)]:
        assert type(text) is str
        text.encode()
        assert "\0" not in text
    inner = example.example if isinstance(example, RatedExample) else example
    conversations = []
    match inner:
        case TextExample(text):
            assert text.strip()
        case PromptExample(_, completion):
            assert completion.strip()
        case MessagesExample(messages):
            conversations.append(messages)
        case PreferenceExample(_, chosen, rejected):
            assert chosen != rejected
            for part in (chosen, rejected):
                assert part.strip() if isinstance(part, str) else conversations.append(part) is None
    for messages in conversations:
        json.dumps(messages, ensure_ascii=False, allow_nan=False).encode()
        answers = [message for message in messages if message["role"] == "assistant"]
        assert all(message["content"].strip() or message.get("tool_calls") for message in answers)
        assert any(message.get("weight", 1.0) > 0 for message in answers)
        assert "".join(words_of(answers)).strip()
    if isinstance(inner, MessagesExample) and inner.tools:
        assert all(isinstance(tool["function"]["name"], str) for tool in inner.tools)
        json.dumps(inner.tools, allow_nan=False)


@pytest.mark.parametrize("format", get_args(Format))
@settings(max_examples=20)
@given(data=st.data(), wanted=st.booleans())
def test_nothing_in_a_column_ends_in_a_traceback(format: Format, data: st.DataObject, wanted: bool) -> None:  # noqa: A002
    columns = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(columns_of[format], cells)))
    reader = ExampleReader(format if wanted else None)
    check(reader.read(Row(columns, HERE)), reader)
    reader.refuse_mixture()


@settings(max_examples=20)
@given(columns=st.dictionaries(texts | st.sampled_from(["text", "prompt", "completion", 5, None]), cells, max_size=4))
def test_no_columns_end_in_a_traceback(columns: dict[Any, Any]) -> None:
    for options in ({}, {"template": {"text": "{{ text }}"}}, {"columns": {"text": "prompt"}}):
        reader = ExampleReader(**options)
        check(reader.read(Row(columns, HERE)), reader)


@settings(max_examples=50)
@given(
    conversation=st.lists(near_messages, min_size=1, max_size=4),
    tools=st.none() | st.lists(near_calls | st.fixed_dictionaries({"function": near_calls}), max_size=2) | values,
)
def test_nothing_in_a_message_ends_in_a_traceback(conversation: list[Any], tools: Any) -> None:
    reader = ExampleReader()
    check(reader.read(Row({"messages": conversation, "tools": tools}, HERE)), reader)


def spoiled(value: Any, odd: Any) -> Iterator[Any]:
    """`value` with each of its parts in turn replaced by `odd`."""
    yield odd
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: item for name, item in value.items() if name != key}
            for other in spoiled(part, odd):
                yield {**value, key: other}
    elif isinstance(value, list):
        for at, part in enumerate(value):
            for other in spoiled(part, odd):
                yield [*value[:at], other, *value[at + 1 :]]


@pytest.mark.parametrize("format", get_args(Format))
def test_a_row_that_is_spoiled_in_one_place_ends_in_no_traceback(format: Format) -> None:  # noqa: A002
    examples = 0
    for odd in ODD:
        for columns in (columns for _, name, columns, _ in ROWS if name == format):
            for row in spoiled(columns, odd):
                if row is not odd:
                    reader = ExampleReader(format)
                    example = reader.read(Row(row, HERE))
                    check(example, reader)
                    examples += not isinstance(example, BadRow)
    assert examples


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "row",
    [
        lambda value: function({"a": value}),
        lambda value: function(json.dumps({"a": value})),
        lambda value: chat(ASK, SAY, tools=[{"name": "f", "parameters": value}]),
        lambda value: chat(ASK, SAY, tools=json.dumps([{"name": "f", "parameters": value}])),
        lambda value: {"conversations": [{"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": value}})}]},
    ],
    ids=["arguments", "arguments as JSON", "tools", "tools as JSON", "function_call"],
)  # fmt: skip
def test_tools_may_be_nested_but_not_without_end(row: Callable[[Any], dict[str, Any]]) -> None:
    example = read(row(nested(DEEPEST - 5)))
    assert isinstance(example, MessagesExample)
    assert '{"a": {"a": ' in "".join(texts_of(example))
    assert refused(row(nested(DEEPEST + 5))).endswith(f", which lies deeper than {DEEPEST} levels.")


# Parts of examples

TEXT = TextExample("a tale", HERE)
PROMPT = prompt("ask", "reply")
TALK = talk(
    system("be"),
    user("ask"),
    bot("", tool_calls=[CALL], reasoning_content="hm"),
    Message(role="tool", content="clear"),
    bot("reply", weight=0.5),
    tools=[WEATHER_TOOL],
)
TEXT_PAIR = PreferenceExample("ask", "good", "bad", HERE)
TALK_PAIR = PreferenceExample((system("be"), user("ask")), (bot("good"),), (bot("bad"),), HERE)
RATED = RatedExample(PROMPT, False)
CALLED = '[{"name": "get_weather", "arguments": {"city": "Zürich"}}]'


@pytest.mark.parametrize(
    ("example", "said", "asked", "answered"),
    [
        (TEXT, ["a tale"], "", "a tale"),
        (PROMPT, ["ask", "reply"], "ask", "reply"),
        (
            TALK,
            ["be", "ask", "hm", "", CALLED, "clear", "reply", json.dumps([WEATHER_TOOL])],
            "be\nask\nclear",
            f"hm\n\n{CALLED}\nreply",
        ),
        (TEXT_PAIR, ["ask", "good", "bad"], "ask", "good"),
        (TALK_PAIR, ["be", "ask", "good", "bad"], "be\nask", "good"),
        (RATED, ["ask", "reply"], "ask", "reply"),
    ],
)
def test_what_an_example_says(example: Example, said: list[str], asked: str, answered: str) -> None:
    assert list(texts_of(example)) == said
    assert prompt_and_answer(example) == (asked, answered)
    assert example.origin == HERE


@pytest.mark.parametrize(
    ("example", "result"),
    [
        (TEXT, TextExample("A TALE", HERE)),
        (PROMPT, prompt("ASK", "REPLY")),
        (
            TALK,
            talk(
                system("BE"),
                user("ASK"),
                bot("", tool_calls=[CALL], reasoning_content="HM"),
                Message(role="tool", content="CLEAR"),
                bot("REPLY", weight=0.5),
                tools=[WEATHER_TOOL],
            ),
        ),
        (TEXT_PAIR, PreferenceExample("ASK", "GOOD", "BAD", HERE)),
        (TALK_PAIR, PreferenceExample((system("BE"), user("ASK")), (bot("GOOD"),), (bot("BAD"),), HERE)),
        (RATED, RatedExample(prompt("ASK", "REPLY"), False)),
    ],
)
def test_every_text_of_an_example_can_be_changed(example: Example, result: Example) -> None:
    assert changed(example, str.upper) == result
    assert changed(example, lambda text: text) == example


def test_a_plain_text_is_divided_behind_its_first_line() -> None:
    poem = "江雪\n千山鸟飞绝，\n万径人踪灭。"
    asked = prompt_of(TextExample(poem, Origin("a.txt", 1)))
    assert (asked.prompt, asked.reference) == ("江雪\n", poem[3:])
    one_line = "a river that nobody had crossed in a hundred years ran past the mill\n"
    asked = prompt_of(TextExample(one_line, Origin("a.txt", 1)))
    assert asked.prompt + asked.reference == one_line
    assert asked.prompt == "a river that nobody had crossed in a hundred years ran past"


def test_the_last_prompt_of_a_conversation() -> None:
    assert last_prompt(TALK.messages) == (list(TALK.messages[:4]), "reply")
    assert last_prompt([*TALK.messages, user("more")]) == (list(TALK.messages[:4]), "reply")


def test_shapes() -> None:
    examples = (TEXT, PROMPT, TALK, TEXT_PAIR, TALK_PAIR, RATED)
    assert [shape_of(example) for example in examples] == [
        *("text", "prompt+completion", "messages", "preference", "preference", "rated")
    ]


@pytest.mark.parametrize(
    "columns", [{}, {"prompt": 1}, {"chosen": 1}, {"instruction": 1}, {"label": True}, {"answer": 1}]
)
def test_half_a_format_is_none(columns: dict[str, Any]) -> None:
    assert detect(columns) is None


MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The ferryman."}]


@pytest.mark.parametrize(
    ("columns", "unfolded"),
    [
        ({"messages": json.dumps(MESSAGES)}, {"messages": MESSAGES}),
        ({"prompt": json.dumps(MESSAGES[:1]), "completion": json.dumps(MESSAGES[1:])}, {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}),
        ({"prompt": "a", "completion": "b", "label": " TRUE"}, {"prompt": "a", "completion": "b", "label": True}),
        ({"translation": '{"en": "snow", "de": "Schnee"}'}, {"translation": {"en": "snow", "de": "Schnee"}}),
    ],
)  # fmt: skip
def test_what_a_table_holds_as_text_is_what_it_stands_for(columns: dict[str, Any], unfolded: dict[str, Any]) -> None:
    assert ExampleReader().read(Row(columns, HERE)) == ExampleReader().read(Row(unfolded, HERE))


@pytest.mark.parametrize(
    "answer",
    ['[{"name": "look", "arguments": {}}]', '{"role": "user", "content": "x"}', "[]", "[1, 2]", '[{"role": "user"}]', "[broken"],
)  # fmt: skip
def test_json_that_is_no_messages_is_the_text_that_it_is(answer: str) -> None:
    assert ExampleReader().read(Row({"prompt": "Write JSON.", "completion": answer}, HERE)).completion == answer


def test_a_template_sees_what_stands_in_the_file() -> None:
    reader = ExampleReader(template={"text": "{{ messages }}"})
    assert reader.read(Row({"messages": json.dumps(MESSAGES)}, HERE)).text == json.dumps(MESSAGES)
