"""Several continuations of each prompt, followed at once: what beam search and contrastive search have in common.

A search decides after each pass which of its branches go on, and with which tokens. Here they are given slots: a branch
stays in its slot, and where it forks, the other slot is given what it does not have already, which is a few tokens.
A prompt is read once, and a search that ends makes room for the next prompt at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from finespun.generation.cache import Part, common_beginning, wider
from finespun.generation.runner import Copy, Reading, SlotRunner
from finespun.training.memory import tune_memory_use

SLOTS = 64
"""Branches that are continued at once on a CPU, where memory allows; several times as many on a GPU."""

AT_ONCE = 1024
"""Tokens of prompts that are read in one pass on a CPU."""


class Next(NamedTuple):
    """A branch that goes on: the number of the one that it continues, and the token behind it."""

    branch: int
    token: int


class Search(Protocol):
    """What is written after one prompt."""

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def room(self) -> int:
        """Tokens that a continuation has at most."""
        ...

    def advance(self, logits: torch.Tensor, states: torch.Tensor | None) -> list[Next]:
        """The branches that go on, given the `logits` `[branches, vocab]` behind those of the last time; the first
        time there is one, the prompt. None go on when the search has ended. `states`, if they were asked for, are the
        last hidden states `[tokens, dim]` of what was read for it: the prompt the first time, then a token of each
        branch."""
        ...


@torch.inference_mode()
def follow(
    runner: SlotRunner, searches: Sequence[Search], branches: int, cache_tokens: int, with_states: bool = False
) -> None:
    """Takes `searches`, each of at most so many `branches`, to their ends. Their slots have at most `cache_tokens`
    together, or as many as one search needs. `runner` is nobody else's."""
    tune_memory_use()
    # prompts of a length stand side by side, and the longest do not come last, alone
    waiting = deque(sorted(searches, key=lambda search: -len(search.prompt)))
    capacity = max((runner.begin + len(search.prompt) + search.room for search in searches), default=1)
    lanes = max(1, min(SLOTS * wider(runner.device), cache_tokens // capacity) // branches)
    free = [range(lane * branches, (lane + 1) * branches) for lane in range(min(lanes, len(waiting)))]
    runner.resize(len(free) * branches, capacity)
    active: list[_Lane] = []
    with runner.attending():
        while waiting or active:
            while waiting and free:
                active.append(_Lane(waiting.popleft(), free.pop(0), runner))
            _pass(runner, active, with_states)
            free += [lane.slots for lane in active if lane.ended]
            active = [lane for lane in active if not lane.ended]


def _pass(runner: SlotRunner, lanes: Sequence[_Lane], with_states: bool) -> None:
    """Reads what comes next in `lanes`, and lets the searches decide."""
    left = AT_ONCE * wider(runner.device)
    reading: list[tuple[_Lane, list[Reading]]] = []
    for lane in lanes:
        readings = lane.readings(left)
        if not lane.branches:
            left -= sum(len(reading.part.ids) for reading in readings)
        reading.append((lane, readings))
    together = [one for _, readings in reading for one in readings]
    if with_states:
        logits, states = (iter(rows) for rows in runner.logits_and_states(together))
    else:
        logits, states = iter(runner.logits(together)), None
    copies: list[Copy] = []
    for lane, readings in reading:
        found = [next(logits) for _ in readings]
        copies += lane.take(readings, found, [next(states) for _ in readings] if states else [])
    if copies:
        runner.copy_tokens(copies)


class _Lane:
    """The slots of one search."""

    def __init__(self, search: Search, slots: range, runner: SlotRunner) -> None:
        self.slots = slots
        self.branches: list[tuple[int, list[int]]] = []
        """Slot and new tokens, of which the last is still to be read."""
        self.ended = False
        self._search = search
        self._begin = runner.begin
        self._read = 0
        self._states: list[torch.Tensor] = []
        self._held: dict[int, list[int]] = {}  # behind the prompt; a slot that does not have the prompt is not there
        runner.start(slots[0])

    def readings(self, most: int) -> list[Reading]:
        """What is to be read next: a token of each branch, or of the prompt at most so many tokens."""
        prompt = self._search.prompt
        if self.branches:
            at = self._begin + len(prompt) - 1
            return [Reading(Part(slot, at + len(new), new[-1:]), 1) for slot, new in self.branches]
        ids = prompt[self._read : self._read + most]
        done = self._read + len(ids) == len(prompt)
        return [Reading(Part(self.slots[0], self._begin + self._read, ids), int(done))] if ids else []

    def take(
        self, readings: Sequence[Reading], logits: Sequence[torch.Tensor], states: Sequence[torch.Tensor]
    ) -> list[Copy]:
        """Lets the search decide by what was found in `readings`; what has to be copied before the next."""
        self._states += states
        if self.branches:
            self._held |= dict(self.branches)
        else:
            self._read += sum(len(reading.part.ids) for reading in readings)
            if self._read < len(self._search.prompt):
                return []
            self.branches = [(self.slots[0], [])]
            self._held[self.slots[0]] = []
        read, self._states = self._states, []
        following = self._search.advance(torch.cat(list(logits)), torch.cat(read) if read else None)
        self.ended = not following
        return self._fork(following)

    def _fork(self, following: Sequence[Next]) -> list[Copy]:
        """Gives each branch a slot: the first that continues another one, its."""
        free = set(self.slots) - {self.branches[branch][0] for branch, _ in following}
        branches, copies, continued = [], [], set()
        for branch, token in following:
            source, ids = self.branches[branch]
            slot = source
            if source in continued:
                has = {slot: self._common(slot, ids) for slot in free}
                slot = max(free, key=lambda slot: (has[slot], -slot))
                free.remove(slot)
                copies.append(Copy(source, slot, has[slot], self._begin + len(self._search.prompt) + len(ids)))
                self._held[slot] = ids
            continued.add(source)
            branches.append((slot, [*ids, token]))
        self.branches = branches
        return copies

    def _common(self, slot: int, new: Sequence[int]) -> int:
        """How many positions of the prompt and `new` behind it a slot has."""
        if slot not in self._held:
            return 0
        return self._begin + len(self._search.prompt) + common_beginning(self._held[slot], new)
