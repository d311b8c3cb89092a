"""What a model wrote for each example of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finespun.data.formats import Message


@dataclass(frozen=True)
class Output:
    """What a model wrote for one example, and what it is compared with."""

    index: int
    origin: str
    prompt: str | list[Message]
    references: tuple[str, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int
