"""What a request asks for → prompts as token ids and `Sampling`. Raises `ApiError` for what cannot be."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import ValidationError

from finespun.data.formats import ROLES, Message
from finespun.errors import FinespunError
from finespun.generation.settings import Sampling
from finespun.serving.errors import ApiError
from finespun.serving.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
)
from finespun.serving.service import Asked, ServedModel
from finespun.serving.settings import ServerSettings
from finespun.serving.tools import CLOSE, calls_schema


async def read_chat(body: ChatRequest, model: ServedModel, settings: ServerSettings) -> Asked:
    """What a chat request asks of the model. Raises `ApiError` where it cannot be."""
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or []]
    choice = body.tool_choice or "auto"
    if not tools and choice not in ("auto", "none"):
        raise ApiError(400, "`tool_choice` needs `tools`.", param="tool_choice")
    if choice == "none":
        tools = []
    if isinstance(choice, NamedTool):
        name = choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ApiError(400, f"`tool_choice` names {name!r}, which is not among the tools.", param="tool_choice")
    forced = bool(tools) and choice != "auto"
    constraint = _schema(body, tools, forced, model)
    stop = [CLOSE] if tools and body.parallel_tool_calls is False and model.tagged_calls else []
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "`top_logprobs` needs `logprobs`.", param="top_logprobs")
    longest = body.max_completion_tokens or body.max_tokens
    sampling = _sampling(body, model, settings, longest, stop, logprobs=alternatives, json_schema=constraint)
    try:
        prompt = await asyncio.to_thread(model.chat.encode_prompt, _conversation(body.messages), tools or None)
    except (FinespunError, RecursionError) as error:
        hint = " Use /v1/completions." if model.chat.prompt_format == "raw" else ""
        raise ApiError(400, f"{error}{hint}", param="messages") from error
    if forced:
        prompt = [*prompt, *model.call_opening]
    _check_length(prompt, model, settings, "messages")
    return Asked([prompt], sampling, [tool["function"]["name"] for tool in tools], forced)


async def read_completion(body: CompletionRequest, model: ServedModel, settings: ServerSettings) -> Asked:
    """What a completion request asks of the model. Raises `ApiError` where it cannot be."""
    sampling = _sampling(body, model, settings, body.max_tokens, [], logprobs=body.logprobs)
    given: Any = (
        body.prompt if isinstance(body.prompt, list) and isinstance(body.prompt[0], str | list) else [body.prompt]
    )
    prompts = []
    for prompt in given:
        ids = await asyncio.to_thread(model.raw.encode_prompt, prompt) if isinstance(prompt, str) else prompt
        if max(ids) >= model.vocabulary:
            raise ApiError(400, f"The model has no token {max(ids)}.", param="prompt")
        _check_length(ids, model, settings, "prompt")
        prompts.append(ids)
    return Asked(prompts, sampling, [])


def count_texts(body: ChatRequest | CompletionRequest) -> int:
    """How many texts a request asks for."""
    several = (
        isinstance(body, CompletionRequest) and isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    )
    return (body.n or 1) * (len(body.prompt) if several else 1)


def _sampling(
    body: GenerationRequest,
    model: ServedModel,
    settings: ServerSettings,
    longest: int | None,
    stop: Sequence[str],
    **more: Any,
) -> Sampling:
    if longest is not None and longest > settings.max_new_tokens:
        raise ApiError(
            400, f"{longest} tokens are more than this server writes: {settings.max_new_tokens}.", param="max_tokens"
        )
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if bias and max(bias) >= model.vocabulary:
        raise ApiError(400, f"The model has no token {max(bias)}.", param="logit_bias")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given = {
        "max_new_tokens": longest or settings.max_new_tokens,
        "min_new_tokens": body.min_tokens,
        "stop": [*stops, *stop],
        "seed": secrets.randbits(32) if body.seed is None else body.seed % 2**32,
        "logit_bias": bias or None,
        "temperature": 0.0 if (body.temperature or 0) < 0.01 else body.temperature,
        **{name: getattr(body, name) for name in _SAME_NAMES},
        **more,
    }
    try:
        return Sampling.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
        raise ApiError(400, "; ".join(f"{place}: {message}".removeprefix(": ") for place, message in faults)) from error


_SAME_NAMES = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "regex",
    "choices",
)  # no `grammar`: there are some that llguidance never gets to the end of, and all texts would wait


def _schema(
    body: ChatRequest, tools: Sequence[dict[str, Any]], forced: bool, model: ServedModel
) -> dict[str, Any] | None:
    """The JSON schema that the text has to keep to, if any."""
    wanted = body.response_format
    if isinstance(wanted, JsonObjectFormat | JsonSchemaFormat):
        if tools:
            raise ApiError(
                400, "A text that keeps to a `response_format` cannot call `tools`.", param="response_format"
            )
        return wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
    if not forced:
        return None
    if not model.tagged_calls:
        raise ApiError(
            400, "A call can be required only of models whose template writes <tool_call>.", param="tool_choice"
        )
    return calls_schema(tools)


def _conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: ChatMessage) -> Message:
    where = f"messages.{number}"
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and message.role != "assistant":
        raise ApiError(400, "This message has no content.", param=f"{where}.content")
    read = Message(role=ROLES[message.role], content=content or "")
    if message.tool_calls:
        if message.role != "assistant":
            raise ApiError(400, "Only the assistant calls tools.", param=f"{where}.tool_calls")
        read["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, where)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        read["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        read["name"] = message.name
    if message.reasoning_content is not None:
        read["reasoning_content"] = message.reasoning_content
    return read


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The arguments of a call are not JSON: {error}", param=f"{where}.tool_calls") from None
    if not isinstance(arguments, dict):
        raise ApiError(400, "The arguments of a call should be a JSON object.", param=f"{where}.tool_calls")
    return arguments


def _check_length(prompt: Sequence[int], model: ServedModel, settings: ServerSettings, param: str) -> None:
    longest = min(model.context_length - 1, settings.max_prompt_tokens or model.context_length)
    if len(prompt) > longest:
        raise ApiError(
            400,
            f"The prompt has {len(prompt)} tokens; at most {longest} are taken.",
            "context_length_exceeded",
            param=param,
        )
