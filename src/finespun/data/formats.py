"""Rows → Examples. Knows the formats that texts come in; knows nothing of models or tokens.

The format is read off the columns' names, or given, and must be the same for all rows. Whatever the format, an example
has one of three shapes: a text; a prompt and its completion; messages, in which the assistant's are to be learned.
Preference data has two answers to one prompt, rated data one answer and whether it is good.

Formats and their columns (others are not used, and named):

    text               text
    prompt-completion  prompt, completion: texts, or lists of messages
    alpaca             instruction, output (or response); input (or context), system, history: [[said, answered], ...]
    sharegpt           conversations: [{from, value}, ...]; system, tools
    chat               messages: [{role, content, ...}, ...] as OpenAI has them; system, tools
    question-answer    question, answer; context
    translation        source, target; or translation: {language: text, language: text}
    summarization      document (article, dialogue, text), summary (highlights)
    preference         chosen, rejected; prompt (or messages, conversations, question, instruction and input), or none:
                       what both begin with; system
    rated              label: true or false, beside any of prompt-completion, alpaca, sharegpt, chat (KTO)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import jinja2
import jinja2.meta
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finespun.data.readers import BadRow, Origin, Row, excerpt
from finespun.errors import DataError
from finespun.recipe import Format

Shape = Literal["text", "prompt+completion", "messages", "preference", "rated"]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that a speaker goes by, and the role of a chat template that each is."""


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it. `weight` is the assistant's loss weight; 1 if absent."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[float]


Tools = list[dict[str, Any]]

DEEPEST = 64
"""Levels of the arguments of a tool call and of a tool's schema; templates are written in recursive functions."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text that is trained from its first token to its end."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt, which is context, and a completion, which is trained."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class MessagesExample:
    """A conversation in which the assistant's words are trained; `tools` are what it may call, as JSON schemas."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt with an answer that people prefer and one that they do not: texts, or messages all three."""

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class RatedExample:
    """An answer and whether it is a good one (KTO, Ethayarajh et al. 2024)."""

    example: PromptExample | MessagesExample
    label: bool

    @property
    def origin(self) -> Origin:
        return self.example.origin


Trainable = TextExample | PromptExample | MessagesExample
Example = Trainable | PreferenceExample | RatedExample


class _Unusable(Exception):
    """Why a row is no example."""


class _Columns(dict[str, Any]):
    """The columns of a row, which remember those that were read."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


class ExampleReader:
    """Makes examples of rows, one after another, and remembers what formats they had.

    `columns` renames columns first, `{"prompt": "ask"}` making `prompt` of `ask`; `template` maps `text`, or `prompt`
    and `completion`, to Jinja templates over a row's columns and takes the place of a format. `mend` is what each text
    is put through.
    """

    def __init__(
        self,
        format: Format | None = None,  # noqa: A002  # the recipe's word
        columns: Mapping[str, str] | None = None,
        template: Mapping[str, str] | None = None,
        mend: Callable[[str], str] | None = None,
    ) -> None:
        self.mend = mend
        self.wanted = format
        self.columns = columns or {}
        self.fill = _template(template) if template else None
        self.first: dict[Format, Row] = {}
        """The first row of each format that was met."""
        self.shapes: set[Shape] = set()
        self.unused: dict[str, None] = {}
        """Columns that no example was made of."""

    def read(self, row: Row) -> Example | BadRow:
        """The example that `row` is, or why it is none."""
        try:
            columns = self._renamed(row.columns)
            if self.fill:
                example: Example = self.fill(columns, row.origin)
            else:
                columns = _unfolded(columns)
                found = self.wanted or detect(columns)
                if found is None:
                    raise _Unusable(
                        f"has columns of no known format: {', '.join(map(repr, columns)) or 'none'}. Known are `text`; "
                        "`prompt` and `completion`; `messages`; `conversations`; `instruction` and `output`; and more. "
                        "data.columns gives columns such names; data.template makes texts of any."
                    )
                self.first.setdefault(found, row)
                columns = _Columns(columns)
                example = _READERS[found](columns, row.origin)
                self.unused |= {_printable(name): None for name in columns if name not in columns.used}
            if self.mend:
                example = changed(example, self.mend)
                if not all(answer.strip() for answer in _answers(example)):
                    raise _Unusable("holds nothing to learn once its damage is mended: an answer is empty.")
            for text in texts_of(example):
                _check_text(text)
        except _Unusable as why:
            return BadRow(row.origin, _printable(why))
        self.shapes.add(shape_of(example))
        return example

    @property
    def shape(self) -> Shape:
        """The shape of all examples so far: messages, where only some of them are conversations."""
        return "messages" if "messages" in self.shapes else next(iter(self.shapes), "text")

    @property
    def format(self) -> str:
        """What was understood, in a word."""
        return "template" if self.fill else next(iter(self.first), "text")

    def refuse_mixture(self) -> None:
        """Raises `DataError`, with one row of each, if rows of several formats were met."""
        if len(self.first) > 1:
            found = "\n".join(
                f"  {name}: {row.origin}: {excerpt(dict(row.columns))}" for name, row in self.first.items()
            )
            raise DataError(
                f"The rows have different formats; train them apart, or bring them into one. Found:\n{found}"
            )

    def _renamed(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.columns:
            return columns
        if missing := [name for name in self.columns.values() if name not in columns]:
            raise _Unusable(
                f"has no column {missing[0]!r}, which data.columns names; it has {', '.join(map(repr, columns))}."
            )
        taken = set(self.columns.values()) | set(self.columns)
        return {key: value for key, value in columns.items() if key not in taken} | {
            new: columns[old] for new, old in self.columns.items()
        }


_FOLDED = {"messages", "conversations", "history", "translation"}
_LABELS = {"label", "kto_tag"}
_UNFOLDED = {*_FOLDED, *_LABELS, "prompt", "completion", "chosen", "rejected"}


def _unfolded(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a table has to hold as a text, since its cells hold nothing else: lists and objects as JSON, and true and
    false. Where a column may be a text as well, only messages are taken for more than that."""
    found: dict[str, Any] = {}
    for name in _UNFOLDED & columns.keys():
        value = columns[name]
        if not isinstance(value, str):
            continue
        if name in _LABELS:
            if (word := value.strip().lower()) in ("true", "false"):
                found[name] = word == "true"
        elif value.lstrip()[:1] in ("[", "{"):
            with contextlib.suppress(json.JSONDecodeError):
                read = orjson.loads(value)
                if name in _FOLDED or _are_messages(read):
                    found[name] = read
    return {**columns, **found} if found else columns


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Mapping)
            and ("role" in item or "from" in item)
            and bool({"content", "value", "tool_calls", "function_call"} & item.keys())
            for item in value
        )
    )


def detect(columns: Mapping[str, Any]) -> Format | None:
    """The format whose columns a row has, by the order in which one format's columns are another's with more."""
    has = columns.keys()
    if {"chosen", "rejected"} <= has:
        return "preference"
    answered = (
        {"prompt", "completion"} <= has
        or "messages" in has
        or "conversations" in has
        or ("instruction" in has and _ANSWERS & has)
    )
    if answered and (isinstance(columns.get("label"), bool) or isinstance(columns.get("kto_tag"), bool)):
        return "rated"
    if "messages" in has:
        return "chat"
    if "conversations" in has:
        return "sharegpt"
    if {"prompt", "completion"} <= has:
        return "prompt-completion"
    if "instruction" in has and _ANSWERS & has:
        return "alpaca"
    if "question" in has and "answer" in has:
        return "question-answer"
    if "translation" in has or {"source", "target"} <= has:
        return "translation"
    if _SUMMARIES & has and _DOCUMENTS & has:
        return "summarization"
    return "text" if "text" in has else None


def shape_of(example: Example) -> Shape:
    """The shape of one example."""
    match example:
        case TextExample():
            return "text"
        case PromptExample():
            return "prompt+completion"
        case MessagesExample():
            return "messages"
        case PreferenceExample():
            return "preference"
        case RatedExample():
            return "rated"


def texts_of(example: Example) -> Iterator[str]:
    """All that an example says, piece by piece."""
    match example:
        case TextExample(text):
            yield text
        case PromptExample(prompt, completion):
            yield from (prompt, completion)
        case MessagesExample(messages, _, tools):
            yield from words_of(messages)
            if tools:
                yield json.dumps(tools, ensure_ascii=False)
        case PreferenceExample(prompt, chosen, rejected):
            for part in (prompt, chosen, rejected):
                yield from [part] if isinstance(part, str) else words_of(part)
        case RatedExample(inner):
            yield from texts_of(inner)


def prompt_and_answer(example: Example) -> tuple[str, str]:
    """What is context and what is learned, each as one text, for looking at."""
    match example:
        case TextExample(text):
            return "", text
        case PromptExample(prompt, completion):
            return prompt, completion
        case MessagesExample(messages):
            sides: tuple[list[str], list[str]] = ([], [])
            for message in messages:
                sides[message["role"] == "assistant"].extend(words_of([message]))
            return "\n".join(sides[0]), "\n".join(sides[1])
        case PreferenceExample(prompt, chosen):
            asked, answered = (
                part if isinstance(part, str) else "\n".join(words_of(part)) for part in (prompt, chosen)
            )
            return asked, answered
        case RatedExample(inner):
            return prompt_and_answer(inner)


def _answers(example: Example) -> Iterator[str]:
    """Each text that is to be learned, by itself."""
    match example:
        case TextExample(text):
            yield text
        case PromptExample(_, completion):
            yield completion
        case MessagesExample(messages):
            yield from ("\n".join(words_of([message])) for message in messages if message["role"] == "assistant")
        case PreferenceExample(_, chosen, rejected):
            yield from (part if isinstance(part, str) else "\n".join(words_of(part)) for part in (chosen, rejected))
        case RatedExample(inner):
            yield from _answers(inner)


def changed(example: Example, change: Callable[[str], str]) -> Example:
    """`example` with each of its texts put through `change`."""

    def turn(messages: Iterable[Message]) -> tuple[Message, ...]:
        said = ("content", "reasoning_content")
        return tuple(
            {**message, **{key: change(message[key]) for key in said if key in message}} for message in messages
        )

    match example:
        case TextExample(text):
            return replace(example, text=change(text))
        case PromptExample(prompt, completion):
            return replace(example, prompt=change(prompt), completion=change(completion))
        case MessagesExample(messages):
            return replace(example, messages=turn(messages))
        case PreferenceExample(prompt, chosen, rejected):
            parts = [change(part) if isinstance(part, str) else turn(part) for part in (prompt, chosen, rejected)]
            return PreferenceExample(*parts, example.origin)
        case RatedExample(inner):
            return replace(example, example=changed(inner, change))


def words_of(messages: Iterable[Message]) -> Iterator[str]:
    """All that is said in `messages`, and thought, and called."""
    for message in messages:
        if thought := message.get("reasoning_content"):
            yield thought
        yield message["content"]
        if calls := message.get("tool_calls"):
            yield json.dumps([call["function"] for call in calls], ensure_ascii=False)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise _Unusable(
            f"holds a NUL character at {text.index(chr(0))}: {excerpt(text)}. The file is damaged or no text."
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Unusable(
                f"holds half a character (lone surrogate {text[error.start]!r}) at {error.start}, which no file can."
            ) from None


def _printable(words: Any) -> str:
    return str(words).encode("utf-8", "backslashreplace").decode()


def _column(columns: Mapping[str, Any], *names: str) -> str:
    """The first of `names` that is a column."""
    name = next((name for name in names if name in columns), None)
    if name is None:
        raise _Unusable(
            f"has no column {' or '.join(f'`{name}`' for name in names)}; it has {', '.join(map(repr, columns))}."
        )
    return name


def _text_in(columns: Mapping[str, Any], *names: str, empty: bool = True) -> str:
    """The text in the first of the columns `names` that is there."""
    name = _column(columns, *names)
    value = columns[name]
    if not isinstance(value, str):
        raise _Unusable(f"`{name}` is {excerpt(value)}, not a text.")
    if not empty and not value.strip():
        learn = "" if name == "text" else ", so there is nothing to learn from this row; fill it or remove the row"
        raise _Unusable(f"`{name}` is empty{learn}.")
    return value


def _optional(columns: Mapping[str, Any], *names: str) -> str:
    """As `_text_in`, and an empty text where there is none or a null."""
    name = next((name for name in names if columns.get(name) is not None), None)
    return "" if name is None else _text_in(columns, name)


def _read_text(columns: Mapping[str, Any], origin: Origin) -> Example:
    return TextExample(_text_in(columns, "text", empty=False), origin)


def _read_prompt(columns: Mapping[str, Any], origin: Origin) -> PromptExample | MessagesExample:
    prompt, completion = _said(columns, "prompt"), _said(columns, "completion", empty=False)
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptExample(prompt, completion, origin)
    said = _turns(completion, "assistant")
    if any(message["role"] != "assistant" for message in said):
        raise _Unusable("`completion` holds a message that is not the assistant's.")
    return _conversation([*_context(_turns(prompt, "user")), *said], origin, _tools(columns))


def _read_alpaca(columns: Mapping[str, Any], origin: Origin) -> PromptExample | MessagesExample:
    asked = _text_in(columns, "instruction")
    if more := _optional(columns, "input", "context"):
        asked = f"{asked}\n{more}" if asked else more
    answer = _text_in(columns, "output", "response", empty=False)
    system, history = _optional(columns, "system"), columns.get("history")
    if isinstance(history, str | None) and not history:
        history = []
    if not isinstance(history, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(part, str) for part in turn)
        for turn in history
    ):
        raise _Unusable(f"`history` is {excerpt(history)}; it should be a list of [said, answered].")
    if not system and not history:
        return PromptExample(asked, answer, origin)
    messages: list[Message] = []
    for said, answered in [*history, (asked, answer)]:
        messages += [Message(role="user", content=said), Message(role="assistant", content=answered)]
    return _conversation(messages, origin, None, system)


def _read_sharegpt(columns: Mapping[str, Any], origin: Origin) -> MessagesExample:
    return _read_conversation(columns, "conversations", origin)


def _read_chat(columns: Mapping[str, Any], origin: Origin) -> MessagesExample:
    return _read_conversation(columns, "messages", origin)


def _read_conversation(columns: Mapping[str, Any], name: str, origin: Origin) -> MessagesExample:
    messages = _messages(columns[_column(columns, name)], name)
    return _conversation(messages, origin, _tools(columns), _optional(columns, "system"))


def _read_question(columns: Mapping[str, Any], origin: Origin) -> Example:
    asked = _text_in(columns, "question")
    if context := _optional(columns, "context"):
        asked = f"{context}\n\n{asked}"
    return PromptExample(asked, _text_in(columns, "answer", empty=False), origin)


def _read_translation(columns: Mapping[str, Any], origin: Origin) -> Example:
    if "translation" not in columns:
        return PromptExample(_text_in(columns, "source"), _text_in(columns, "target", empty=False), origin)
    pair = columns["translation"]
    if not isinstance(pair, Mapping) or len(pair) != 2:
        raise _Unusable(f"`translation` is {excerpt(pair)}; it should hold a text in each of two languages.")
    source, target = pair
    return PromptExample(_text_in(pair, source), _text_in(pair, target, empty=False), origin)


def _read_summary(columns: Mapping[str, Any], origin: Origin) -> Example:
    return PromptExample(
        _text_in(columns, "document", "article", "dialogue", "text"),
        _text_in(columns, "summary", "highlights", empty=False),
        origin,
    )


def _read_preference(columns: Mapping[str, Any], origin: Origin) -> PreferenceExample:
    chosen, rejected = _said(columns, "chosen", empty=False), _said(columns, "rejected", empty=False)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Unusable("one of `chosen` and `rejected` is a text, the other is messages.")
    if chosen == rejected:
        raise _Unusable("`chosen` and `rejected` are the same.")
    given, system = _question(columns), _optional(columns, "system")
    prompt, chosen, rejected = _common_beginning(chosen, rejected) if given is None else (given, chosen, rejected)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and not system:
        return PreferenceExample(prompt, chosen, rejected, origin)
    asked, answers = _turns(prompt, "user"), [_turns(chosen, "assistant"), _turns(rejected, "assistant")]
    if given is not None and all(answer[0]["role"] != "assistant" for answer in answers):  # they repeat the prompt
        begun, *answers = _common_beginning(*answers)
        if any(message not in begun for message in asked):
            raise _Unusable("`chosen` and `rejected` are conversations that do not both begin with the prompt.")
        asked = begun
    asked = _context(_opened(system, asked))
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            raise _Unusable(f"`{name}` has no answer of the assistant's behind the prompt.")
        try:
            _conversation([*asked, *answer], origin)
        except _Unusable as why:
            raise _Unusable(f"with `{name}`, {why}") from None
    return PreferenceExample(tuple(asked), tuple(answers[0]), tuple(answers[1]), origin)


def _question(columns: Mapping[str, Any]) -> str | list[Message] | None:
    """What is answered, if there is a column of it."""
    for name in ("prompt", "messages", "conversations", "question"):
        if columns.get(name) is not None:
            return _said(columns, name)
    if "instruction" in columns or "input" in columns:
        return "\n".join(filter(None, [_optional(columns, "instruction"), _optional(columns, "input")])) or None
    return None


def _common_beginning(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both answers begin with, and the rest of each; of texts up to the last turn of an assistant, where they are
    dialogues as HH-RLHF has them, or else up to a line's or a word's end."""
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str):
        dialogue = "\n\nAssistant:" in chosen[:length]
        marks = ("\n\nAssistant:",) if dialogue else (" ", "\n")
        length = max(chosen.rfind(mark, 0, length) + len(mark) for mark in marks)
        for name, rest in (("chosen", chosen[length:]), ("rejected", rejected[length:])):
            if not rest.strip():
                raise _Unusable(f"`{name}` is empty behind what both answers begin with.")
            if dialogue and "\n\nHuman:" in rest:
                raise _Unusable(f"`{name}` differs before the last question, so part of the answer is the human's.")
    if not (chosen[:length].strip() if isinstance(chosen, str) else length):
        raise _Unusable(
            "has no prompt: `chosen` and `rejected` begin differently. If a column holds it, name it with "
            "data.columns.prompt."
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _read_rated(columns: Mapping[str, Any], origin: Origin) -> RatedExample:
    name = _column(columns, "label", "kto_tag")
    label = columns[name]
    if not isinstance(label, bool):
        raise _Unusable(f"`{name}` is {excerpt(label)}; it should be true or false.")
    inner = detect({key: value for key, value in columns.items() if key not in ("label", "kto_tag")})
    example = _READERS[inner or "prompt-completion"](columns, origin)
    if not isinstance(example, PromptExample | MessagesExample):
        raise _Unusable("is rated, but has no prompt.")
    return RatedExample(example, label)


def _said(columns: Mapping[str, Any], name: str, empty: bool = True) -> str | list[Message]:
    """A text, or messages, or one alone."""
    value = columns[_column(columns, name)]
    if isinstance(value, str):
        return _text_in(columns, name, empty=empty)
    if not isinstance(value, list | Mapping):
        raise _Unusable(f"`{name}` is {excerpt(value)}, not a text or a list of messages.")
    return _messages([value] if isinstance(value, Mapping) else value, name)


def _turns(said: str | list[Message], role: str) -> list[Message]:
    return [Message(role=role, content=said)] if isinstance(said, str) else said


def _context(messages: Iterable[Message]) -> list[Message]:
    """`messages` with what the assistant said in them as context, which is not trained."""
    return [{**message, "weight": 0.0} if message["role"] == "assistant" else message for message in messages]


def _opened(system: str, messages: list[Message]) -> list[Message]:
    """`messages` behind what the column of that name has the system say."""
    if system and messages[0]["role"] == "system":
        raise _Unusable("has a system message and a column `system`; one of them is needed.")
    return [Message(role="system", content=system), *messages] if system else messages


def _conversation(
    messages: list[Message], origin: Origin, tools: Tools | None = None, system: str = ""
) -> MessagesExample:
    """The structure that every template needs; what each accepts beyond it is seen when it renders."""
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise _Unusable(f"message {number}, the assistant's, is empty.")
        if message["role"] == "system" and number > 1:
            raise _Unusable(f"message {number} is a system message; it belongs first.")
    if not any(message["role"] == "assistant" for message in messages):
        raise _Unusable("has no assistant message, so there is nothing to learn from this row.")
    if not any(message["role"] == "assistant" and message.get("weight", 1.0) for message in messages):
        raise _Unusable("has the weight 0 on all assistant messages, so there is nothing to learn from this row.")
    return MessagesExample(tuple(_opened(system, messages)), origin, tools)


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Unusable(f"`{column}` is {excerpt(value)}, not a list of messages.")
    return [_message(message, f"message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise _Unusable(f"{where} is {excerpt(message)}; it needs a `role` and a `content` that is a text.")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _Unusable(f"{where} has the role {excerpt(said)}; known are {', '.join(ROLES)}.")
    content = message["content"] if "content" in message else message.get("value")
    calls = message.get("tool_calls")
    if calls is None and (call := message.get("function_call")) is not None:
        calls = [{"function": call}]
    if said in ("function_call", "tool_call"):
        calls, content = _json_in(content, where), ""
        calls = calls if isinstance(calls, list) else [calls]
    calls = [] if calls is None else calls
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise _Unusable(
            f"{where} has tool calls {excerpt(calls)}, which only a list in the assistant's message can be."
        )
    read = Message(role=role, content="" if content is None and calls else _content(content, where))
    if calls:
        read["tool_calls"] = [_call(call, where) for call in calls]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, str):
                raise _Unusable(f"{where} has the `{key}` {excerpt(value)}, not a text.")
            _check_text(value)
            read[key] = value
    weight = _weight(message, where)
    if weight is not None:
        if role == "assistant":
            read["weight"] = float(weight)
        elif weight:
            raise _Unusable(
                f"{where} is the {role}'s and has the weight {weight:g}; only the assistant's words are trained."
            )
    return read


def _weight(message: Mapping[str, Any], where: str) -> float | None:
    """The loss weight that a message gives itself: a number as OpenAI's `weight`, or whether it is trained, under the
    names that other tools have for it."""
    for key in ("weight", "loss_weight", "loss", "train", "training"):
        if (weight := message.get(key)) is not None:
            switch = key in ("loss", "train", "training")
            number = isinstance(weight, int | float) and isinstance(weight, bool) == switch
            if not number or (weight and not 1e-3 <= weight <= 1e3):
                wanted = "true or false" if switch else "0, or from 0.001 to 1000"
                raise _Unusable(f"{where} has the {key} {excerpt(weight)}; it should be {wanted}.")
            return float(weight)
    return None


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):
        parts = []
        for part in content:
            is_text = isinstance(part, Mapping) and isinstance(kind := part.get("type"), str) and kind == "text"
            text = part.get("text", part.get("value")) if is_text else part
            if not isinstance(text, str):
                raise _Unusable(f"{where} has a part {excerpt(part)}; only text can be trained.")
            parts.append(text)
        return "".join(parts)
    if not isinstance(content, str):
        raise _Unusable(
            f"{where} has the content {excerpt(content)}; it needs a `role` and a `content` that is a text."
        )
    return content


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if _names_function(call) else {}
    if "arguments" not in function:
        raise _Unusable(f"{where} calls {excerpt(call)}; a call needs a `name` and `arguments`.")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _json_in(arguments, where)
    if not isinstance(arguments, Mapping):
        raise _Unusable(f"{where} calls with the arguments {excerpt(arguments)}; they should be a JSON object.")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if (given := call.get("id")) is not None:
        if not isinstance(given, str):
            raise _Unusable(f"{where} calls with the `id` {excerpt(given)}, not a text.")
        read["id"] = given
    return _plain(read, f"{where}, in its tool call,")


def _tools(columns: Mapping[str, Any]) -> Tools | None:
    tools = columns.get("tools")
    if isinstance(tools, str):
        tools = _json_in(tools, "`tools`") if tools.strip() else None
    if tools is None:
        return None
    read = _plain(tools, "`tools`")
    if not isinstance(read, list) or not all(_names_function(tool) for tool in read):
        raise _Unusable(f"`tools` is {excerpt(tools)}; it should be a list of functions with name and parameters.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in read] or None


def _names_function(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` if JSON can hold it and templates can write it, in plain types."""
    if isinstance(value, str):
        _check_text(value)
        return value
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= 1e300):
        return value
    if depth < DEEPEST and isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if depth < DEEPEST and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_plain(key, where): _plain(item, where, depth + 1) for key, item in value.items()}
    why = f"lies deeper than {DEEPEST} levels" if depth >= DEEPEST else "is not JSON"
    raise _Unusable(f"{where} holds {excerpt(value)}, which {why}.")


def _json_in(text: Any, where: str) -> Any:
    try:
        return orjson.loads(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise _Unusable(f"{where} should hold JSON, but holds {excerpt(text)} ({error}).") from None


def _filled_in(value: Any) -> Any:
    """`value`, unless Python's own way to write it would come into the text."""
    if isinstance(value, str | jinja2.Undefined):
        return value
    if value is None or isinstance(value, Iterable) or value != value:
        raise _Unusable(f"{excerpt(value)} is no text; `or`, join and tojson can make one")
    return value


def _template(template: Mapping[str, str]) -> Callable[[Mapping[str, Any], Origin], Example]:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_filled_in
    )
    compiled = {}
    for name, source in template.items():
        try:
            compiled[name] = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template.{name}, line {error.lineno}: {error.message}") from None

    def fill(columns: Mapping[str, Any], origin: Origin) -> Example:
        try:
            filled = {name: piece.render(columns) for name, piece in compiled.items()}
        except Exception as error:  # a template can raise anything that the expression in it can
            raise _Unusable(
                f"the template cannot be filled ({error}); the row has {', '.join(map(repr, columns))}."
            ) from None
        return _read_text(filled, origin) if "text" in filled else _read_prompt(filled, origin)

    return fill


def answer_columns(template: Mapping[str, str]) -> set[str]:
    """The columns that only the completion of a template is made of; none for a template of whole texts."""
    prompt, completion = (
        jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template.get(part, "")))
        for part in ("prompt", "completion")
    )
    return completion - prompt


_ANSWERS = {"output", "response"}
_SUMMARIES = {"summary", "highlights"}
_DOCUMENTS = {"document", "article", "dialogue", "text"}

_READERS: dict[Format, Callable[[Mapping[str, Any], Origin], Any]] = {
    "text": _read_text,
    "prompt-completion": _read_prompt,
    "alpaca": _read_alpaca,
    "sharegpt": _read_sharegpt,
    "chat": _read_chat,
    "question-answer": _read_question,
    "translation": _read_translation,
    "summarization": _read_summary,
    "preference": _read_preference,
    "rated": _read_rated,
}


class Asked(NamedTuple):
    """What stands before a text to be written, that text, and the tools it may call."""

    prompt: str | list[Message]
    reference: str
    tools: Tools | None = None


LONGEST_TITLE = 80
"""Characters of a first line that a plain text is prompted with, such as the title of a poem, its end included."""


def prompt_of(example: Example) -> Asked:
    """What to show a model at work on `example` with.

    A plain text is divided behind its first line, or where that is long, in its first 60 characters.
    """
    match example:
        case PromptExample(prompt, completion):
            return Asked(prompt, completion)
        case MessagesExample(messages, _, tools):
            return Asked(*last_prompt(messages), tools)
        case TextExample(text):
            first_line = text.find("\n") + 1
            titled = 0 < first_line <= LONGEST_TITLE and text[first_line:].strip()
            at = first_line if titled else text.rfind(" ", 1, 60)
            at = at if at > 0 else min(20, len(text) // 2)
            return Asked(text[:at], text[at:])
        case RatedExample(inner):
            return prompt_of(inner)
        case PreferenceExample(prompt, chosen):
            asked = prompt if isinstance(prompt, str) else list(prompt)
            return Asked(asked, chosen if isinstance(chosen, str) else "\n".join(words_of(chosen)))


def last_prompt(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """A conversation before the assistant's last turn, and that turn's words."""
    last = max(position for position, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last]), messages[last]["content"]
