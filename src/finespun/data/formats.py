"""Rows → Examples. Knows the shapes that texts come in; knows nothing of models or tokens.

The shape is read off the columns' names and must be the same for all rows: `text`; `prompt` and `completion`;
`messages`, a list of `{"role": "system" | "user" | "assistant", "content": "..."}`. A Jinja template makes either of
the first two from any columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finespun.data.sources import Origin, Row, raise_all
from finespun.errors import DataError

Shape = Literal["text", "prompt+completion", "messages"]

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TextExample:
    """A text that is trained from its first token to its end."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class PromptExample:
    """A prompt, which is context, and a completion, which is trained."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True)
class MessagesExample:
    """A conversation in which the assistant's words are trained."""

    messages: tuple[Message, ...]
    origin: Origin


Example = TextExample | PromptExample | MessagesExample


def examples_from_rows(rows: Sequence[Row], template: Mapping[str, str] | None = None) -> tuple[list[Example], Shape]:
    """Examples of one shape from `rows`, and the shape.

    `template` maps `text`, or `prompt` and `completion`, to Jinja templates over a row's columns. Raises `DataError`
    for rows without the needed columns, rows of different shapes, values that are not text, and empty completions.
    """
    if template:
        rows = _render(rows, template)
    shape = _shape_of(rows)
    read = {"text": _text, "prompt+completion": _prompt, "messages": _messages}[shape]
    examples: list[Example] = []
    faults: list[str] = []
    for row in rows:
        result = read(row)
        if isinstance(result, str):
            faults.append(f"{row.origin}: {result}")
        else:
            examples.append(result)
    raise_all(faults)
    return examples, shape


def _detect(columns: Mapping[str, Any]) -> Shape | None:
    if "messages" in columns:
        return "messages"
    if "prompt" in columns and "completion" in columns:
        return "prompt+completion"
    return "text" if "text" in columns else None


def _shape_of(rows: Sequence[Row]) -> Shape:
    first: dict[Shape, Row] = {}
    faults = []
    for row in rows:
        shape = _detect(row.columns)
        if shape is None:
            has = ", ".join(map(repr, row.columns)) or "nothing"
            faults.append(
                f"{row.origin}: has neither `text`, nor `prompt` and `completion`, nor `messages`; it has {has}."
            )
        else:
            first.setdefault(shape, row)
    raise_all(faults, "Rename the columns, or build the texts with data.template.prompt and data.template.completion.")
    if len(first) > 1:
        found = "\n".join(f"  {shape}: {row.origin}: {_shorten(dict(row.columns))}" for shape, row in first.items())
        raise DataError(f"The rows have different shapes; train them apart, or bring them into one. Found:\n{found}")
    return next(iter(first))


def _text(row: Row) -> TextExample | str:
    text = row.columns["text"]
    if not isinstance(text, str):
        return f"`text` is {_shorten(text)}, not a text."
    return TextExample(text, row.origin) if text.strip() else "`text` is empty."


def _prompt(row: Row) -> PromptExample | str:
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            return f"`{name}` is {_shorten(value)}, not a text."
    if not completion.strip():
        return "`completion` is empty, so there is nothing to learn from this row; fill it or remove the row."
    return PromptExample(prompt, completion, row.origin)


def _messages(row: Row) -> MessagesExample | str:
    messages = row.columns["messages"]
    if not isinstance(messages, list) or not messages:
        return f"`messages` is {_shorten(messages)}, not a list of messages."
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"message {number} is {_shorten(message)}; it needs a `role` and a `content` that is a text."
        if message.get("role") not in ROLES:
            return f"message {number} has the role {message.get('role')!r}; known are {', '.join(ROLES)}."
        if message["role"] == "assistant" and not message["content"].strip():
            return f"message {number}, the assistant's, is empty."
        if message["role"] == "system" and number > 1:
            return f"message {number} is a system message; it belongs first."
    if not any(message["role"] == "assistant" for message in messages):
        return "has no assistant message, so there is nothing to learn from this row."
    return MessagesExample(tuple(Message(role=m["role"], content=m["content"]) for m in messages), row.origin)


def _render(rows: Sequence[Row], template: Mapping[str, str]) -> list[Row]:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    compiled = {}
    for name, source in template.items():
        try:
            compiled[name] = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template.{name}, line {error.lineno}: {error.message}") from None
    rendered: list[Row] = []
    faults: list[str] = []
    for row in rows:
        try:
            rendered.append(Row({name: piece.render(row.columns) for name, piece in compiled.items()}, row.origin))
        except Exception as error:  # a template can raise anything that the expression in it can
            faults.append(
                f"{row.origin}: the template cannot be filled ({error}); the row has "
                f"{', '.join(map(repr, row.columns))}."
            )
    raise_all(faults)
    return rendered


def _shorten(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
