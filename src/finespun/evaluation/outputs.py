"""What a model wrote for the examples of an evaluation, with the references to it: one line of `outputs.jsonl` each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finespun.data.formats import Message
from finespun.errors import DataError
from finespun.files import read_text
from finespun.recipe import explain

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Output:
    """What a model wrote for one example. `index` counts the examples of an evaluation from 0; `references` is empty
    where there are none; `finish_reason` is "stop" if the text ended by itself, "length" if it was cut."""

    index: int
    origin: str
    prompt: str | list[Message]
    references: tuple[str, ...]
    text: str
    finish_reason: FinishReason
    tokens: int


class _Turn(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str


class _Line(BaseModel):
    """A line of `outputs.jsonl`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    index: int
    origin: str
    prompt: str | Annotated[list[_Turn], Field(min_length=1)]
    references: list[str]
    output: str
    finish_reason: FinishReason
    output_tokens: Annotated[int, Field(ge=0)]


def output_line(output: Output) -> str:
    """`output` as a line of `outputs.jsonl`, without the line end."""
    line = {
        "index": output.index,
        "origin": output.origin,
        "prompt": output.prompt,
        "references": list(output.references),
        "output": output.text,
        "finish_reason": output.finish_reason,
        "output_tokens": output.tokens,
    }
    return json.dumps(line, ensure_ascii=False)


def read_outputs(file: Path) -> list[Output]:
    """The outputs in `file`. Raises `DataError`, with the line, where it is not as `finespun evaluate` wrote it."""
    found = []
    for number, value in enumerate(read_lines(file)):
        where = f"{file}, line {number + 1}"
        try:
            line = _Line.model_validate(value)
        except ValidationError as error:
            raise DataError(f"{where}: {explain(error, _Line.model_fields)}. {_REMEDY}") from None
        if line.index != number:
            raise DataError(f"{where}: has the index {line.index} where {number} should be. {_REMEDY}")
        found.append(
            Output(
                line.index,
                line.origin,
                value["prompt"],
                tuple(line.references),
                line.output,
                line.finish_reason,
                line.output_tokens,
            )
        )
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a results file, one a line. Raises `DataError`, with the line, where one is none."""
    if not file.exists():
        raise DataError(f"{file}: there is no such file. `finespun evaluate` writes it.")
    found = []
    for number, line in enumerate(read_text(file).removesuffix("\n").split("\n"), 1):
        try:
            value = json.loads(line)
        except ValueError as error:  # also for numbers of too many digits
            raise DataError(f"{file}, line {number}: is no JSON ({getattr(error, 'msg', error)}). {_REMEDY}") from None
        if not isinstance(value, dict):
            raise DataError(f"{file}, line {number}: is {type(value).__name__}, not a JSON object. {_REMEDY}")
        found.append(value)
    return found


_REMEDY = "The file was changed since it was written; delete it and run `finespun evaluate` again."
