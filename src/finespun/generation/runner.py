"""Forward passes for the engine: `SlotRunner` for models whose attention comes from the registry of `transformers`,
`SingleRunner`, a sequence at a time through the model's own cache, for all others."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from finespun.generation.cache import NAME, Part, SlotCache, Step
from finespun.models.adapters import LoraAdapter, MixedAdapters, soft_prompt_cache
from finespun.models.attention import attending, same_up_to_rounding, windows_of
from finespun.models.load import LoadedModel
from finespun.models.prepacked import Prepacked


@dataclass(frozen=True)
class Reading:
    """Tokens to read, and of how many of them, from the last one back, the logits are wanted; under `adapter`, one of
    those that the runner was made with, if there is one."""

    part: Part
    wanted: int
    adapter: LoraAdapter | None = None


class Copy(NamedTuple):
    """The positions from `begin` to before `end` of slot `source`, for slot `target`."""

    source: int
    target: int
    begin: int
    end: int


def runner_for(loaded: LoadedModel, adapters: Sequence[LoraAdapter] = ()) -> SlotRunner | SingleRunner:
    """The faster runner that is exact for this model; each reading may have its own of `adapters`."""
    model = loaded.causal_lm
    if model not in _exact:
        _exact[model] = _is_exact(model)
    prompt = soft_prompt_cache(loaded.model, rows=1)
    return SlotRunner(model, prompt, adapters) if _exact[model] else SingleRunner(loaded, adapters)


_exact: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


class SlotRunner:
    """All sequences in one packed row. A slot can be copied, and read again from an earlier position; `begin` is where
    a sequence begins, behind the soft prompt, if there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        soft_prompt: tuple[Cache, int] | None = None,
        adapters: Sequence[LoraAdapter] = (),
    ) -> None:
        self._model = model
        self._adapters = MixedAdapters(adapters)
        self._prepacked: Prepacked | None = None
        self._inside = False
        self._cache = SlotCache(0, 0)
        self._soft_prompt, self.begin = soft_prompt or (None, 0)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def windows(self) -> set[int | None]:
        """How far back the layers have looked that were computed; None for one that sees all."""
        return self._cache.windows

    def resize(self, slots: int, capacity: int) -> None:
        """Makes room for so many sequences of so many tokens."""
        self._cache.resize(slots, capacity)

    def clear(self) -> None:
        """Forgets all slots."""
        self._cache = SlotCache(0, 0)

    def start(self, slot: int) -> None:
        """Makes a slot ready for a new sequence."""
        if self._soft_prompt is not None:
            self._cache.begin_with(slot, self._soft_prompt)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` positions of a slot become those of another."""
        self._cache.copy(source, target, tokens)

    def copy_tokens(self, copies: Sequence[Copy]) -> None:
        """Makes all `copies`, none of which reads what another writes."""
        device = self._model.device
        counts = torch.tensor([copy.end - copy.begin for copy in copies], device=device)
        sources, targets = (
            torch.tensor(slots, device=device).repeat_interleave(counts)
            for slots in ([copy.source for copy in copies], [copy.target for copy in copies])
        )
        positions = torch.cat([torch.arange(copy.begin, copy.end, device=device) for copy in copies])
        self._cache.copy_tokens(sources, targets, positions)

    @contextmanager
    def attending(self) -> Generator[None]:
        """Around calls of `logits`; may be entered inside itself."""
        if self._inside:
            yield
            return
        self._prepacked = self._prepacked or Prepacked(torch.nn.ModuleList([self._model, *self._adapters.modules]))
        with attending(self._model, NAME), self._prepacked.used(), self._adapters.used():
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def logits(self, readings: Sequence[Reading]) -> list[torch.Tensor]:
        """For each reading `[wanted, vocab]`."""
        return self._read(readings, with_states=False)[0]

    def logits_and_states(self, readings: Sequence[Reading]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The `logits`, and for each reading the last hidden states `[tokens, dim]` of all of its tokens."""
        return self._read(readings, with_states=True)

    def _read(self, readings: Sequence[Reading], with_states: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        written = sorted((r for r in readings if len(r.part.ids) == 1), key=lambda r: r.part.slot)
        fresh = [r for r in readings if len(r.part.ids) > 1 and r.part.begin == 0]
        read = [r for r in readings if len(r.part.ids) > 1 and r.part.begin > 0]
        ordered = [*written, *fresh, *read]
        parts = ([r.part for r in kind] for kind in (written, fresh, read))
        step = Step(self._cache, *parts, device=self._model.device)
        self._adapters.choose(_tokens_of_adapters(ordered, step.ids.device))
        ends = torch.tensor([len(r.part.ids) for r in ordered]).cumsum(0).tolist()
        wanted = [row for r, end in zip(ordered, ends, strict=True) for row in range(end - r.wanted, end)]
        output = self._model(
            input_ids=step.ids[None],
            position_ids=step.positions[None],
            step=step,
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=step.ids.device),
            output_hidden_states=with_states,
        )
        place = {id(reading): number for number, reading in enumerate(ordered)}
        order = [place[id(reading)] for reading in readings]
        logits = output.logits[0].split([r.wanted for r in ordered])
        states = output.hidden_states[-1][0].split([len(r.part.ids) for r in ordered]) if with_states else ()
        return [logits[number] for number in order], [states[number] for number in order if with_states]


def _tokens_of_adapters(readings: Sequence[Reading], device: torch.device) -> dict[LoraAdapter, torch.Tensor | None]:
    """For each adapter the places of its tokens in the row that `readings` make; None where that is all of them."""
    places: dict[LoraAdapter | None, list[int]] = {}
    end = 0
    for reading in readings:
        begin, end = end, end + len(reading.part.ids)
        places.setdefault(reading.adapter, []).extend(range(begin, end))
    return {
        adapter: torch.tensor(tokens, device=device) if len(places) > 1 else None
        for adapter, tokens in places.items()
        if adapter is not None
    }


class SingleRunner:
    """A sequence at a time, in the model's own way. Its cache may have forgotten its beginning, so that slots cannot be
    copied, or read again from an earlier position."""

    def __init__(self, loaded: LoadedModel, adapters: Sequence[LoraAdapter] = ()) -> None:
        self._loaded = loaded
        self._model = loaded.causal_lm
        self._adapters = MixedAdapters(adapters)
        self._caches: dict[int, DynamicCache] = {}
        prompt = soft_prompt_cache(loaded.model, rows=1)
        self.begin = prompt[1] if prompt else 0

    @property
    def device(self) -> torch.device:
        return self._model.device

    def resize(self, slots: int, capacity: int) -> None:
        pass

    def clear(self) -> None:
        self._caches.clear()

    def start(self, slot: int) -> None:
        prompt: Any = soft_prompt_cache(self._loaded.model, rows=1)
        self._caches[slot] = prompt[0] if prompt else DynamicCache(config=self._model.config)

    def attending(self) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, readings: Sequence[Reading]) -> list[torch.Tensor]:
        with self._adapters.used():
            return [self._of_one(reading) for reading in readings]

    def _of_one(self, reading: Reading) -> torch.Tensor:
        self._adapters.choose({reading.adapter: None} if reading.adapter else {})
        output = self._model(
            input_ids=torch.tensor([list(reading.part.ids)], device=self._model.device),
            past_key_values=self._caches[reading.part.slot],
            use_cache=True,
            logits_to_keep=max(1, reading.wanted),
        )
        return output.logits[0, : reading.wanted]


@torch.inference_mode()
def _is_exact(model: PreTrainedModel) -> bool:
    """Whether two sequences, read and continued in slots, get the logits that each gets alone by the model's own code.
    This tries it out, as `packs_exactly` does for training."""
    sequences = {2: [token * 997 % model.config.vocab_size for token in range(1, 10)]}
    sequences[0] = sequences[2][::-1][:7]
    # beginnings of both; one token more of each; several more of the first
    cuts = {2: ((0, 4), (4, 5), (5, 9)), 0: ((0, 6), (6, 7))}
    runner = SlotRunner(model)
    runner.resize(slots=3, capacity=16)
    found: dict[int, list[torch.Tensor]] = {slot: [] for slot in cuts}
    try:
        with runner.attending():
            for turn in range(3):
                parts = [
                    Part(slot, begin, sequences[slot][begin:end])
                    for slot, of_slot in cuts.items()
                    for begin, end in of_slot[turn : turn + 1]
                ]
                for part, rows in zip(parts, runner.logits([Reading(p, len(p.ids)) for p in parts]), strict=True):
                    found[part.slot].append(rows)
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError):
        return False
    own = [
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        for ids in sequences.values()
    ]
    rows = torch.cat([rows for slot in sequences for rows in found[slot]])
    return runner.windows == windows_of(model) and same_up_to_rounding(rows, torch.cat(own))
