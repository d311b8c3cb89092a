"""Keys and values of many sequences, each in a slot of its own, and one forward pass over whatever is next in each of
them: one token of those that are being written, many of those that are being read, end to end in one row.

Nothing is padded outside the attention call, and inside it only to the longest of some neighbouring slots. As in
training, the model's own code runs unchanged: it takes its attention from the registry of `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finespun.models.attention import (
    GROUP_WASTE,
    PackingPlan,
    causal_probabilities,
    grouped_product,
    no_mask,
    packed_attention,
    plan_packing,
    scaled_scores,
)
from finespun.models.linear_cross_entropy import accumulation_type

NAME = "finespun_slots"

TOGETHER = 16
"""So many neighbouring slots attend in one call, filled up to the longest of them; more, where that fills up little."""

WASTE_ON_GPU = 4.0
"""There calls are few rather than small: it is the CPU's saying what to do that takes long."""


def wider(device: torch.device) -> int:
    """So many times as much as on a CPU is computed at once on `device`: a GPU is not busy with so few."""
    return 8 if device.type == "cuda" else 1


class SlotCache:
    """Room for `slots` sequences of at most `capacity` tokens. A layer's keys are `[slots, key heads, capacity, dim]`;
    it gets them when it is first asked for. They are kept in the type that scores are computed in, since converting
    them at each step takes as long as the scores."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.windows: set[int | None] = set()
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of layer `number`, for `[tokens, key heads, dim]` like `key` and `value`."""
        if number not in self._layers:
            # zeros, since what lies behind the end of a sequence is multiplied by 0, which does not help against a NaN
            self._layers[number] = tuple(  # ty: ignore[invalid-assignment]
                x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[2], dtype=dtype)
                for x, dtype in ((key, accumulation_type(key.dtype)), (value, value.dtype))
            )
        return self._layers[number]

    def resize(self, slots: int, capacity: int) -> None:
        """Makes room for more, and keeps what is there."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        before = (self.slots, self.capacity)
        self.slots, self.capacity = max(slots, self.slots), max(capacity, self.capacity)
        for number, kept in list(self._layers.items()):
            grown = tuple(x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[3]) for x in kept)
            for old, new in zip(kept, grown, strict=True):
                new[: before[0], :, : before[1]] = old
            self._layers[number] = grown  # ty: ignore[invalid-assignment]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of one slot become those of another."""
        for kept in self._layers.values():
            for x in kept:
                x[target, :, :tokens] = x[source, :, :tokens]

    def copy_tokens(self, sources: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> None:
        """Single tokens: what the slots `sources` `[tokens]` have at `positions`, `targets` get there."""
        for kept in self._layers.values():
            for x in kept:
                x[targets, :, positions] = x[sources, :, positions]

    def begin_with(self, slot: int, cache: Cache) -> None:
        """Puts what `cache` holds of one sequence at the beginning of a slot."""
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            given = layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)
            for room, states in zip(self.layer(number, *given), given, strict=True):
                room[slot, :, : len(states)] = states.transpose(0, 1)


@dataclass(frozen=True)
class Part:
    """The tokens `ids` of the sequence in `slot`, the first of which stands at position `begin`."""

    slot: int
    begin: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)


@dataclass
class Step:
    """What one forward pass reads: `written`, single tokens in the order of their slots; then `fresh`, beginnings of
    sequences; then `read`, what continues one by several tokens."""

    cache: SlotCache
    written: list[Part]
    fresh: list[Part]
    read: list[Part]
    device: torch.device

    def __post_init__(self) -> None:
        parts = self.parts
        tokens = [len(part.ids) for part in parts]
        self.ids = torch.tensor([token for part in parts for token in part.ids], device=self.device)
        self.positions = torch.tensor([p for part in parts for p in range(part.begin, part.end)], device=self.device)
        self.slots = torch.tensor([part.slot for part in parts], device=self.device).repeat_interleave(
            torch.tensor(tokens, device=self.device)
        )
        self.plan: PackingPlan | None = None
        if self.fresh:
            self.plan = plan_packing(
                torch.tensor([0, *(len(part.ids) for part in self.fresh)]).cumsum(0).to(self.device)
            )
        self.groups = [_Group(parts, self.device) for parts in _neighbours(self.written, self.device)]

    @property
    def parts(self) -> list[Part]:
        return [*self.written, *self.fresh, *self.read]


class _Group:
    """Single tokens of neighbouring slots: `first` to `last`, of which `rows` `[tokens]` have one."""

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self.first, self.last = parts[0].slot, parts[-1].slot + 1
        self.tokens = len(parts)
        self.rows = torch.tensor([part.slot - self.first for part in parts], device=device)
        self.longest = max(part.end for part in parts)
        lengths = torch.ones(self.last - self.first, dtype=torch.long, device=device)
        lengths[self.rows] = torch.tensor([part.end for part in parts], device=device)
        self._lengths = lengths[:, None]
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`[slots, 1, 1, longest]`, 0 where a token may look, else -inf."""
        if (window, dtype) not in self._masks:
            place = torch.arange(self.longest, device=self._lengths.device)
            seen = place < self._lengths
            if window is not None:
                seen &= place >= self._lengths - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._masks[window, dtype] = mask[:, None, None]
        return self._masks[window, dtype]


def _neighbours(parts: Sequence[Part], device: torch.device) -> list[list[Part]]:
    """`parts`, in the order of their slots, cut into those that attend in one call."""
    groups: list[list[Part]] = []
    waste = WASTE_ON_GPU if device.type == "cuda" else GROUP_WASTE
    longest = real = 0
    for part in parts:
        longest, real = max(longest, part.end), real + part.end
        slots = part.slot - groups[-1][0].slot + 1 if groups else 0
        if not groups or (slots > TOGETHER and slots * longest > waste * real):
            groups.append([])
            longest = real = part.end
        groups[-1].append(part)
    return groups


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each token of `step` attends to what stands before it in its slot, and its key and value are put there.

    `query` is `[1, heads, tokens, dim]`, `key` and `value` `[1, key heads, tokens, dim]`; returns
    `[1, tokens, heads, dim]`. Registered with `transformers` as `finespun_slots`. Raises `NotImplementedError` for
    attention sinks; `SlotRunner` finds that out beforehand.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks are not computed here")
    step.cache.windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    number: Any = module.layer_idx
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    keys, values = step.cache.layer(number, *rows[1:])
    keys[step.slots, :, step.positions] = rows[1].to(keys.dtype)
    values[step.slots, :, step.positions] = rows[2]
    q, found, begin = rows[0], [], 0
    for group in step.groups:
        found.append(_next_tokens(q[begin : begin + group.tokens], keys, values, group, scale, sliding_window, softcap))
        begin += group.tokens
    if step.plan is not None:
        tokens = int(step.plan.back.numel())
        part = slice(begin, begin + tokens)
        output = packed_attention(
            *(module, query[:, :, part], key[:, :, part], value[:, :, part], None),
            packing=step.plan,
            scaling=scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        found.append(output[0][0])
        begin += tokens
    for part in step.read:
        count = len(part.ids)
        seen = slice(max(0, part.begin - sliding_window + 1) if sliding_window else 0, part.end)
        k, v = (x[part.slot, :, seen] for x in (keys, values))
        found.append(_continued(q[begin : begin + count], k, v, part.begin, seen.start, scale, sliding_window, softcap))
        begin += count
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def _next_tokens(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _Group,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`q` `[tokens, heads, dim]`, one token of each slot of `group` → `[tokens, heads, dim]`. Computed in the same
    products as the tokens of a prompt: torch's own attention rounds by the longest sequence of a call, so that a text
    would depend on its company."""
    slots, key_heads = group.last - group.first, keys.shape[1]
    k, v = (x[group.first : group.last, :, : group.longest].flatten(0, 1) for x in (keys, values))
    if group.tokens < slots:  # some have nothing to say: they are computed, and left
        q = q.new_zeros(slots, *q.shape[1:]).index_copy_(0, group.rows, q)
    q = q.reshape(slots * key_heads, -1, 1, q.shape[-1])
    scores = scaled_scores(q, k, scale, softcap).view(slots, key_heads, -1, group.longest)
    weights = scores.add_(group.mask(window, scores.dtype)).softmax(-1).to(v.dtype)
    output = grouped_product(weights.flatten(0, 1)[:, :, None], v).reshape(slots, -1, v.shape[-1])
    return output if group.tokens == slots else output.index_select(0, group.rows)


def _continued(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begin: int,
    low: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`q` `[tokens, heads, dim]` at positions from `begin`, `k` and `v` `[key heads, seen, dim]` from `low` →
    `[tokens, heads, dim]`."""
    grouped = q.transpose(0, 1).reshape(k.shape[0], -1, *q.shape[::2])
    scores = scaled_scores(grouped, k, scale, softcap)
    output = grouped_product(causal_probabilities(scores, begin, low, window, v.dtype), v)
    return output.flatten(0, 1).transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, slot_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)
