"""Requests and responses in OpenAI's shapes (https://platform.openai.com/docs/api-reference).

A field that is not known is refused rather than passed over, since its sender expects something of it; those that
change nothing about the text are taken and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_MESSAGES = 1000
"""Messages of one conversation: templates take time that grows with the square of their number."""


class _Asked(BaseModel):
    """Strict: a number is no text, and nothing is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TextPart(_Asked):
    """A piece of a message's text; pieces of other kinds are not taken."""

    type: Literal["text"]
    text: str


class FunctionCall(_Asked):
    """Which function an assistant called, and with what."""

    name: str
    arguments: str
    """A JSON object, written as a text."""


class ToolCall(_Asked):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Asked):
    """A turn of a conversation, as a client sends it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # what a client sends back of an answer it got
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(_Asked):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None


class Tool(_Asked):
    """A tool that may be called: a function, the only kind there is."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Asked):
    """The name of a function that is to be called."""

    name: str


class NamedTool(_Asked):
    """`tool_choice`: this function has to be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(_Asked):
    """What a stream is to have beside the text."""

    include_usage: bool = False
    """A last chunk with the counts of tokens."""
    include_obfuscation: bool | None = None
    """Not used."""


class TextFormat(_Asked):
    """`response_format`: any text."""

    type: Literal["text"]


class JsonObjectFormat(_Asked):
    """`response_format`: a JSON object of any kind."""

    type: Literal["json_object"]


class JsonSchema(_Asked):
    """A schema with its name."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Not used: a text always keeps to the schema."""


class JsonSchemaFormat(_Asked):
    """`response_format`: JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class GenerationRequest(_Asked):
    """What both kinds of requests share. Without `temperature`, texts are greedy, as they are in finespun's library and
    command line; the last fields are finespun's own (see `Sampling`)."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    """Texts for each prompt; not more than the server has slots."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest text in tokens; without it, the longest that the server writes."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy, and so is anything below 0.01, with which float32 could not divide."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed gives the same text; without it, each request has its own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=1, le=1000)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    regex: str | None = None
    choices: list[str] | None = None
    # taken and not used
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives for each token; needs `logprobs`."""
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`: prompts go to the model as they are, without a chat template."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives for each token."""
    # what would change the text and is not offered
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class Usage(BaseModel):
    """Tokens of the prompts and of the texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token with its log-probability (nats) and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """A written token, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class AnsweredMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of `n` messages, with the reason why it ended."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(ToolCall):
    """A call in a stream, at its place among the calls of the message."""

    index: int


class Delta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one of `n` messages."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens, in the four lists of the older API."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts, with the reason why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextCompletion(BaseModel):
    """The answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "finespun"
    context_length: int


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """What state the server is in."""

    status: str
