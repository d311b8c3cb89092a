"""What a backend writes → OpenAI's responses, whole or as chunks of a stream; both come from the same pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from pydantic import BaseModel

from finespun.generation.engine import Completion, TokenLogprob
from finespun.serving.errors import as_api_error
from finespun.serving.protocol import (
    AnsweredMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    ContentLogprob,
    Delta,
    FunctionCall,
    TextCompletion,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from finespun.serving.requests import Asked
from finespun.serving.service import Answer, ClientGone
from finespun.serving.tools import OPEN, ToolCallParser, WrittenCall, new_call_id
from finespun.serving.worker import Piece

LEAST_LOGPROB = -9999.0
"""What stands for the log-probability of the impossible, which JSON cannot write."""


class ChatText:
    """One text of a chat in the making: words and calls, in the order in which they come."""

    def __init__(self, asked: Asked, tagged: bool) -> None:
        self.calls: list[ToolCall] = []
        self._parser = ToolCallParser(asked.tools, tagged) if asked.tools else None
        if self._parser and asked.forced:
            self._parser.feed(OPEN)

    def feed(self, text: str) -> list[Delta]:
        found = self._parser.feed(text) if self._parser else [text] if text else []
        return [self._delta(part) for part in found]

    def finish(self) -> list[Delta]:
        return [self._delta(part) for part in self._parser.finish()] if self._parser else []

    def reason(self, completion: Completion) -> Any:
        return "tool_calls" if self.calls and completion.finish_reason == "stop" else completion.finish_reason

    def _delta(self, part: str | WrittenCall) -> Delta:
        if isinstance(part, str):
            return Delta(content=part)
        call = ToolCall(id=new_call_id(), function=FunctionCall(name=part.name, arguments=part.arguments))
        self.calls.append(call)
        index = len(self.calls) - 1
        return Delta(tool_calls=[ToolCallDelta(index=index, id=call.id, type="function", function=call.function)])


async def whole_chat(answer: Answer, asked: Asked) -> ChatCompletion:
    """The answer to a chat request that is not streamed, once all its texts have ended."""
    choices = []
    for index, completion in enumerate(await _completions(answer)):
        text = ChatText(asked, answer.model.tagged_calls)
        deltas = [*text.feed(completion.text), *text.finish()]
        content = "".join(delta.content or "" for delta in deltas)
        message = AnsweredMessage(
            content=None if text.calls and not content else content, tool_calls=text.calls or None
        )
        logprobs = None if completion.logprobs is None else _chat_logprobs(completion.logprobs)
        choices.append(
            ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=text.reason(completion))
        )
    return ChatCompletion(choices=choices, usage=answer.usage(), **_head("chatcmpl", answer))


async def chat_chunks(answer: Answer, asked: Asked, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream, which ends with [DONE] even where something went wrong on the way."""
    head = {**_head("chatcmpl", answer), "object": "chat.completion.chunk"}
    texts = [ChatText(asked, answer.model.tagged_calls) for _ in range(answer.count)]
    told = [0] * answer.count  # tokens whose log-probabilities were sent

    def chunk(index: int, delta: Delta, logprobs: ChatLogprobs | None = None, reason: Any = None) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return _event(head, [choice], usage)

    async def chunks() -> AsyncIterator[bytes]:
        for index in range(answer.count):
            yield chunk(index, Delta(role="assistant", content=""))
        async for index, event in answer.events():
            text = texts[index]
            deltas = text.finish() if isinstance(event, Completion) else text.feed(event.text)
            logprobs = _news(event, told[index])
            told[index] += len(logprobs)
            if logprobs:
                first = deltas.pop(0) if deltas else Delta(content="")
                yield chunk(index, first, _chat_logprobs(logprobs))
            for delta in deltas:
                yield chunk(index, delta)
            if isinstance(event, Completion):
                yield chunk(index, Delta(), reason=text.reason(event))

    async for data in _stream(answer, chunks(), head, usage):
        yield data


async def whole_completion(answer: Answer) -> TextCompletion:
    """The answer to a completion request that is not streamed, once all its texts have ended."""
    choices = [
        CompletionChoice(
            index=index,
            text=completion.text,
            logprobs=None if completion.logprobs is None else _completion_logprobs(completion.logprobs, 0),
            finish_reason=completion.finish_reason,
        )
        for index, completion in enumerate(await _completions(answer))
    ]
    return TextCompletion(choices=choices, usage=answer.usage(), **_head("cmpl", answer))


async def completion_chunks(answer: Answer, usage: bool) -> AsyncIterator[bytes]:
    """As `chat_chunks`."""
    head = {**_head("cmpl", answer), "object": "text_completion"}
    told = [0] * answer.count  # tokens whose log-probabilities were sent
    offset = [0] * answer.count  # where in the text the next token begins

    async def chunks() -> AsyncIterator[bytes]:
        async for index, event in answer.events():
            tokens = _news(event, told[index])
            logprobs = _completion_logprobs(tokens, offset[index]) if tokens else None
            told[index] += len(tokens)
            offset[index] += sum(len(token.token) for token in tokens)
            text, reason = ("", event.finish_reason) if isinstance(event, Completion) else (event.text, None)
            choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
            yield _event(head, [choice], usage)

    async for data in _stream(answer, chunks(), head, usage):
        yield data


async def _completions(answer: Answer) -> list[Completion]:
    ended: dict[int, Completion] = {}
    async for index, event in answer.events():
        if isinstance(event, Completion):
            ended[index] = event
    return [ended[index] for index in range(answer.count)]


async def _stream(
    answer: Answer, chunks: AsyncIterator[bytes], head: dict[str, Any], usage: bool
) -> AsyncIterator[bytes]:
    try:
        async for data in chunks:
            yield data
        if usage:
            yield _event(head, [], usage=False, last=answer.usage())
    except ClientGone:
        return
    except Exception as error:
        yield b"data: " + as_api_error(error).response().body + b"\n\n"
    yield b"data: [DONE]\n\n"


def _event(head: dict[str, Any], choices: Sequence[BaseModel], usage: bool, last: Usage | None = None) -> bytes:
    """One event of a stream. With `usage`, each says that the counts are still to come."""
    chunk = {**head, "choices": [choice.model_dump(exclude_unset=True) for choice in choices]}
    if usage or last:
        chunk["usage"] = last.model_dump() if last else None
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _news(event: Piece | Completion, told: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities that come with `event`: with the end of a text those that came with no piece of it."""
    return (event.logprobs or ())[told if isinstance(event, Completion) else 0 :]


def _head(prefix: str, answer: Answer) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": answer.model.name}


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    content = [
        ContentLogprob(
            **_token(token.token, token.logprob),
            top_logprobs=[TopLogprob(**_token(text, logprob)) for text, _, logprob in token.top],
        )
        for token in tokens
    ]
    return ChatLogprobs(content=content)


def _token(text: str, logprob: float) -> dict[str, Any]:
    """A part of a character has no bytes of its own to show."""
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """`offset` is where in the text the first of `tokens` begins."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[max(token.logprob, LEAST_LOGPROB) for token in tokens],
        top_logprobs=[{text: max(logprob, LEAST_LOGPROB) for text, _, logprob in token.top} for token in tokens],
        text_offset=offsets,
    )
