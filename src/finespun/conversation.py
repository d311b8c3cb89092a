"""A conversation with one model: what was said, and how it is changed, taken back and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finespun.data.formats import Message
from finespun.errors import FinespunError, GenerationError, RecipeError
from finespun.files import append_line
from finespun.generation.engine import Engine
from finespun.generation.settings import Sampling
from finespun.recipe import explain, nearest
from finespun.text_model import TextModel


class Conversation:
    """Turns between a person and `model`. A model without a chat template knows no turns: it continues each text by
    itself.

    What the model has read of a conversation stays with its engine, so that a turn costs what is new in it."""

    def __init__(self, model: TextModel, sampling: Sampling) -> None:
        self._encoder = model.encoder
        self._engine: Engine = model.engine(slots=1)
        self.sampling = sampling
        self.system: str | None = None
        self.turns: list[Message] = []

    @property
    def has_turns(self) -> bool:
        """Whether the model was made for conversations."""
        return self._encoder.prompt_format == "chat"

    @property
    def messages(self) -> list[Message]:
        """All of it, the system's message first."""
        return ([Message(role="system", content=self.system)] if self.system else []) + self.turns

    def say(self, text: str, on_text: Callable[[str], None]) -> str:
        """The answer to `text`, of which `on_text` gets each piece as it is written. An interrupted one ends where it
        is. Raises `DataError` where the conversation has become too long for the model, `GenerationError` where a
        setting cannot be followed, and forgets this turn then."""
        self.turns.append(Message(role="user", content=text))
        pieces: list[str] = []

        def hear(piece: str, _: Any) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            prompt = self._encoder.encode_prompt(self.messages if self.has_turns else text)
            request = self._engine.add(prompt, self.sampling, on_text=hear)
        except FinespunError:
            self.turns.pop()
            raise
        try:
            with self._engine.running():
                while self._engine.step():
                    pass
        except KeyboardInterrupt:
            self._engine.cancel(request)
        if request.error:
            self.turns.pop()
            raise request.error
        answer = request.completion.text if request.completion else "".join(pieces)
        self.turns.append(Message(role="assistant", content=answer))
        return answer

    def undo(self) -> str:
        """Takes the last turn and its answer back; returns what was said. Raises `GenerationError` if there is none."""
        if not self.turns:
            raise GenerationError("Nothing has been said yet.")
        said = self.turns[-2]["content"]
        del self.turns[-2:]
        return said

    def regenerate(self, on_text: Callable[[str], None]) -> str:
        """Another answer to what was said last, with the next seed."""
        said = self.undo()
        self.set("seed", str(self.sampling.seed + 1))
        return self.say(said, on_text)

    def set(self, name: str, value: str) -> None:
        """Changes a setting of `Sampling`, read as YAML reads it. Raises `RecipeError` for one that cannot be."""
        if name not in Sampling.model_fields:
            close = nearest(name, list(Sampling.model_fields))
            raise RecipeError(f"There is no setting {name!r}." + (f" Did you mean {close}?" if close else ""))
        try:
            settings = self.sampling.model_dump(exclude_unset=True) | {name: yaml.safe_load(value)}
            self.sampling = Sampling(**settings)
        except (ValidationError, yaml.YAMLError) as error:
            said = explain(error, Sampling.model_fields) if isinstance(error, ValidationError) else str(error)
            raise RecipeError(said) from None

    def save(self, file: Path) -> None:
        """Adds the conversation to a JSON Lines file, as `finespun train` reads it."""
        append_line(file, json.dumps({"messages": self.messages}, ensure_ascii=False))
