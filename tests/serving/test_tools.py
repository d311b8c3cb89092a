from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finespun.serving.errors import ApiError
from finespun.serving.tools import ToolCallParser, WrittenCall, calls_schema, new_call_id


def parsed(pieces: list[str], tagged: bool = True) -> list[str | WrittenCall]:
    parser = ToolCallParser(["depth", "ferry"], tagged)
    found = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    joined: list[str | WrittenCall] = []
    for part in found:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


DEPTH = WrittenCall("depth", '{"river": "江"}')
FERRY = WrittenCall("ferry", "{}")
ONE = '<tool_call>\n{"name": "depth", "arguments": {"river": "江"}}\n</tool_call>'
TWO = '<tool_call>{"name": "ferry", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the old mill", ["the old mill"]),
        (ONE, [DEPTH]),
        (f"I look.\n\n{ONE}\n{TWO}", ["I look.", DEPTH, FERRY]),
        (f"{ONE} and then", [DEPTH, " and then"]),
        (ONE.removesuffix("</tool_call>"), [DEPTH]),
        ("a < b <tool", ["a < b <tool"]),
        ("words \n ", ["words \n "]),
        ('x <tool_call>{"name": "depth"', ['x <tool_call>{"name": "depth"']),
        ("<tool_call>none</tool_call>", ["<tool_call>none</tool_call>"]),
        ('a <tool_call>{"name": "other", "arguments": {}}</tool_call>', ['a <tool_call>{"name": "other", "arguments": {}}</tool_call>']),
        ('<tool_call>{"name": ["depth"], "arguments": {}}</tool_call>', ['<tool_call>{"name": ["depth"], "arguments": {}}</tool_call>']),
        ('<tool_call>{"name": "depth", "arguments": 1}</tool_call>' + ONE, ['<tool_call>{"name": "depth", "arguments": 1}</tool_call>', DEPTH]),
        ("<tool_call>" + "[" * 5000, ["<tool_call>" + "[" * 5000]),
        ("", []),
    ],
)  # fmt: skip
def test_calls_between_tags(text: str, expected: list[str | WrittenCall]) -> None:
    assert parsed([text]) == expected
    assert parsed(list(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "depth", "parameters": {"river": "江"}}', [DEPTH]),
        (' [{"name": "depth", "arguments": {"river": "江"}}, {"name": "ferry", "arguments": {}}]', [DEPTH, FERRY]),
        ('[TOOL_CALLS] [{"name": "ferry", "arguments": {}}]', [FERRY]),
        ('{"name": "other", "parameters": {}}', ['{"name": "other", "parameters": {}}']),
        ("{x}", ["{x}"]),
        ('Well. {"name": "ferry", "parameters": {}}', ['Well. {"name": "ferry", "parameters": {}}']),
        ("", []),
        ("  ", ["  "]),
    ],
)
def test_a_call_that_is_the_whole_answer(text: str, expected: list[str | WrittenCall]) -> None:
    assert parsed([text], tagged=False) == expected
    assert parsed(list(text), tagged=False) == expected


def test_words_are_shown_as_they_come() -> None:
    parser = ToolCallParser(["depth"], tagged=True)
    assert parser.feed("the old ") == ["the old"]
    assert parser.feed("mill <tool") == [" mill"]
    assert parser.feed("box") == [" <toolbox"]
    whole = ToolCallParser(["depth"], tagged=False)
    assert whole.feed("the old ") == ["the old "]


@given(
    st.lists(st.sampled_from([ONE, TWO, "<tool_call>", "</tool_call>", " ", "\n", "a", "{", "江", "<"]), max_size=6),
    st.booleans(),
    st.data(),
)
def test_what_is_found_does_not_depend_on_how_a_text_is_cut(
    parts: list[str], tagged: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed([text], tagged)
    assert parsed(pieces, tagged) == whole
    if not any(isinstance(part, WrittenCall) for part in whole):
        assert "".join(whole) == text


def test_ids_are_such_as_mistrals_templates_take() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
    assert all(len(call) == 9 and call.isalnum() for call in (new_call_id() for _ in range(100)))


def tool(name: str, **parameters: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_the_schema_of_calls_takes_definitions_along() -> None:
    river = {"type": "string"}
    schema = calls_schema([
        tool("depth", type="object", properties={"at": {"$ref": "#/$defs/river"}}, **{"$defs": {"river": river}}),
        tool("ferry", type="object", **{"$defs": {"river": river}}),
        {"type": "function", "function": {"name": "bare"}},
    ])  # fmt: skip
    assert schema["$defs"] == {"river": river}
    assert "$defs" not in json.dumps(schema["anyOf"][1])
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["depth", "ferry", "bare"]
    assert schema["anyOf"][2]["properties"]["arguments"] == {"type": "object"}
    with pytest.raises(ApiError, match="'river'"):
        calls_schema([tool("a", **{"$defs": {"river": river}}), tool("b", **{"$defs": {"river": {}}})])
    assert calls_schema([tool("a", **{"$defs": [1]})])["anyOf"][0]["properties"]["arguments"] == {"$defs": [1]}
