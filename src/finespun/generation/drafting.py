"""A smaller model that proposes how texts go on, for a larger one to verify several tokens in one pass: speculative
decoding (Leviathan et al. 2023, arXiv:2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation.cache import Part, common_beginning, wider
from finespun.generation.runner import Reading, SlotRunner, runner_for
from finespun.generation.sampling import Guess
from finespun.models.load import LoadedModel

if TYPE_CHECKING:
    from finespun.generation.engine import Request

AT_ONCE = 1024
"""Tokens of one pass."""


class Draft:
    """The smaller model, with slots like those of the engine. `encoder` and `vocabulary` (the length of a row of
    logits) are those of the larger one. Raises `GenerationError` for a model with other tokens, or one that cannot take
    back what it has read."""

    def __init__(self, loaded: LoadedModel, encoder: Encoder, vocabulary: int) -> None:
        if loaded.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            raise GenerationError(
                f"draft: {loaded.base_name} has other tokens than the model that it is to write drafts for. Choose a "
                "smaller model of the same family."
            )
        runner = runner_for(loaded)
        if not isinstance(runner, SlotRunner):
            raise GenerationError(f"draft: {loaded.base_name} cannot take back what it has read. Choose another model.")
        self._runner, self._vocabulary, self._context = runner, vocabulary, loaded.context_length
        self._held: list[list[int]] = []  # what the slots have read

    def running(self) -> AbstractContextManager[None]:
        """Around many calls of `propose`, as `Engine.running`."""
        return self._runner.attending()

    def resize(self, slots: int, capacity: int) -> None:
        """Makes room for so many sequences of so many tokens."""
        self._held += [[] for _ in range(slots - len(self._held))]
        self._runner.resize(slots, capacity)

    def clear(self) -> None:
        """Forgets all slots."""
        self._held.clear()
        self._runner.clear()

    def propose(self, writing: Sequence[tuple[int, Request, int]]) -> list[list[Guess]]:
        """For each (slot, request, count) the next `count` tokens, one at a time; fewer where the context ends."""
        found: list[list[Guess]] = [[] for _ in writing]
        tokens = [request.ids for _, request, _ in writing]

        def unfinished() -> list[int]:
            return [
                number
                for number, (_, _, count) in enumerate(writing)
                if len(found[number]) < count and len(tokens[number]) <= self._context
            ]

        with self.running():
            while left := unfinished():
                logits = self._read({writing[number][0]: tokens[number] for number in left})
                for number in left:
                    slot, request, _ = writing[number]
                    new = tokens[number][len(request.prompt) :]
                    found[number].append(request.choose.propose(request.prompt, new, logits[slot]))
                    tokens[number].append(found[number][-1].token)
        return found

    def _read(self, sequences: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Reads what is new in the sequences of some slots; the logits `[vocabulary]` behind each."""
        found: dict[int, torch.Tensor] = {}
        while len(found) < len(sequences):
            readings: list[Reading] = []
            left = AT_ONCE * wider(self._runner.device)
            for slot, ids in sequences.items():
                if slot in found or not left:
                    continue
                known = min(common_beginning(ids, self._held[slot]), len(ids) - 1)
                if not known:
                    self._runner.start(slot)
                new = ids[known : known + left]
                left -= len(new)
                self._held[slot] = ids[: known + len(new)]
                done = len(self._held[slot]) == len(ids)
                readings.append(Reading(Part(slot, self._runner.begin + known, new), int(done)))
            for reading, rows in zip(readings, self._runner.logits(readings), strict=True):
                if reading.wanted:
                    found[reading.part.slot] = self._fit(rows[0])
        return found

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Models of one family fill up their tables to different sizes."""
        more = self._vocabulary - len(logits)
        return torch.nn.functional.pad(logits[: self._vocabulary], (0, max(0, more)), value=float("-inf"))
