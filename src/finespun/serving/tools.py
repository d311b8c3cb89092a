"""Calls of tools in what a model writes → OpenAI's `tool_calls`.

Two ways of writing them are known: each call as JSON between `<tool_call>` and `</tool_call>` (Hermes, Qwen, SmolLM2),
and the whole answer as JSON (Llama 3.1's `{"name", "parameters"}`, Mistral's `[{"name", "arguments"}]`, whose special
tokens are gone from the text by then). What looks like a call but is not JSON, or names no tool that was given, stays
text: nothing a model wrote is lost.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finespun.serving.errors import ApiError

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class WrittenCall(NamedTuple):
    """A call as a model wrote it; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCallParser:
    """Takes a text piece by piece and gives words and calls; however the text is cut, they are the same in the end.

    `names` are the tools that may be called, `tagged` says which of the two ways the template has.
    """

    def __init__(self, names: Sequence[str], tagged: bool) -> None:
        self._names = frozenset(names)
        self._tagged = tagged
        self._rest = ""
        self._words_only = False

    def feed(self, text: str) -> list[str | WrittenCall]:
        """What is certain after `text`: neither the beginning of a tag nor white space that may stand before one."""
        self._rest += text
        if not self._tagged:
            begun = self._rest.lstrip()
            self._words_only = self._words_only or (bool(begun) and begun[0] not in "{[")
            return self._words(len(self._rest)) if self._words_only else []
        found: list[str | WrittenCall] = []
        while (start := self._rest.find(OPEN)) >= 0 and (end := self._rest.find(CLOSE, start)) >= 0:
            found += self._call(start, end, end + len(CLOSE))
        certain = start if start >= 0 else len(self._rest) - _begun(self._rest, OPEN)
        return found + self._words(len(self._rest[:certain].rstrip()))

    def finish(self) -> list[str | WrittenCall]:
        """What is left at the end of the text: a last call may lack its closing tag, which can be a stop string."""
        start = self._rest.find(OPEN) if self._tagged else 0
        if start >= 0 and not self._words_only:
            return self._call(start, len(self._rest), len(self._rest))
        return self._words(len(self._rest))

    def _call(self, start: int, end: int, after: int) -> list[str | WrittenCall]:
        """Takes all through `after` off the text, with the call or calls that stand between `start` and `end`."""
        calls = self._read(self._rest[start:end].removeprefix(OPEN))
        if not calls:
            return self._words(after)
        words: list[str | WrittenCall] = [*self._words(len(self._rest[:start].rstrip()))]
        self._rest = self._rest[after - len(words[0]) :] if words else self._rest[after:]
        return [*words, *calls]

    def _words(self, end: int) -> list[str | WrittenCall]:
        words, self._rest = self._rest[:end], self._rest[end:]
        return [words] if words else []

    def _read(self, text: str) -> list[WrittenCall]:
        """The calls that `text` is; none if it is anything else."""
        try:
            value = json.loads(text.strip().removeprefix("[TOOL_CALLS]"))
        except (ValueError, RecursionError):
            return []
        calls = []
        for call in value if isinstance(value, list) else [value]:
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            name = call.get("name") if isinstance(call, dict) else None
            if not isinstance(arguments, dict) or not isinstance(name, str) or name not in self._names:
                return []
            calls.append(WrittenCall(name, json.dumps(arguments, ensure_ascii=False)))
        return calls


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)


def new_call_id() -> str:
    """Nine letters and digits, as Mistral's templates ask for."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def calls_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of a call of one of `tools`, as it stands between the tags. Raises `ApiError` where two tools define
    the same name in `$defs` in different ways."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters: dict[str, Any] = dict(function.get("parameters") or {"type": "object"})
        for section in ("$defs", "definitions"):
            if not isinstance(parameters.get(section), dict):
                continue
            for name, schema in parameters.pop(section).items():
                if definitions.setdefault(section, {}).setdefault(name, schema) != schema:
                    raise ApiError(400, f"Two tools define {name!r} in {section}, and not as the same.", param="tools")
        call = {"name": {"const": function["name"]}, "arguments": parameters}
        calls.append({"type": "object", "properties": call, "required": list(call), "additionalProperties": False})
    return {"anyOf": calls, **definitions}
