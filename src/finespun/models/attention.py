"""Attention over a packed row, for any `transformers` model that takes its attention from the registry.

The row holds examples end to end. Inside the attention call alone they are brought into groups of similar length
and each group is one batched causal product. The shorter ones of a group are filled up on the right; a causal mask
keeps real queries from seeing what is behind them, so no other mask is needed and nothing leaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "finespun_packed"

GROUP_WASTE = 1.15
"""Examples share a group while the filled-up size is at most this many times the real one."""


@dataclass(frozen=True)
class Group:
    """Examples that are computed together: `index` `[examples * length]` are the rows to gather, filled up with the
    group's first row; `inverse` `[tokens of the group]` is where each real token then stands."""

    length: int
    index: torch.Tensor
    inverse: torch.Tensor


@dataclass(frozen=True)
class PackingPlan:
    """How a packed row is taken apart for attention and put together again.

    `back` `[tokens]` says for each token of the row where it stands in the concatenated outputs of the groups.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor


def plan_packing(cu_seqlens: torch.Tensor) -> PackingPlan:
    """The plan for a row with examples at `cu_seqlens` `[examples + 1]`."""
    starts = cu_seqlens[:-1].tolist()
    lengths = cu_seqlens.diff().tolist()
    by_length = sorted(range(len(starts)), key=lambda example: -lengths[example])
    members: list[list[int]] = []
    real = 0
    for example in by_length:
        longest = lengths[members[-1][0]] if members else 0
        if not members or longest * (len(members[-1]) + 1) > GROUP_WASTE * (real + lengths[example]):
            members.append([])
            real = 0
        members[-1].append(example)
        real += lengths[example]
    groups: list[Group] = []
    order: list[torch.Tensor] = []
    for examples in members:
        length = lengths[examples[0]]
        first = starts[examples[0]]
        index = torch.full((len(examples), length), first)
        for row, example in enumerate(examples):
            index[row, : lengths[example]] = torch.arange(starts[example], starts[example] + lengths[example])
        inverse = torch.cat([torch.arange(lengths[example]) + row * length for row, example in enumerate(examples)])
        order.append(index.flatten()[inverse])
        groups.append(Group(length, index.flatten().to(cu_seqlens.device), inverse.to(cu_seqlens.device)))
    back = torch.empty(int(cu_seqlens[-1]), dtype=torch.long)
    back[torch.cat(order)] = torch.arange(back.numel())
    return PackingPlan(tuple(groups), back.to(cu_seqlens.device))


class _Split(torch.autograd.Function):
    """The rows of each group of a plan, `[tokens, heads, dim]` → one `[examples * length, heads, dim]` a group.

    Each row that counts is used once, so the gradient is a gather too, not the slow sum of an ordinary index. What the
    filled-up rows receive is dropped: nothing real looked at them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: PackingPlan) -> tuple[torch.Tensor, ...]:
        ctx.plan = plan
        return tuple(x.index_select(0, group.index) for group in plan.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan: PackingPlan = ctx.plan
        real = [gradient.index_select(0, group.inverse) for gradient, group in zip(gradients, plan.groups, strict=True)]
        return torch.cat(real).index_select(0, plan.back), None


class _Join(torch.autograd.Function):
    """The opposite of `_Split`: rows of the groups back into the order of the packed row."""

    @staticmethod
    def forward(ctx: Any, plan: PackingPlan, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.plan = plan
        real = [output.index_select(0, group.inverse) for output, group in zip(outputs, plan.groups, strict=True)]
        return torch.cat(real).index_select(0, plan.back)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: PackingPlan = ctx.plan
        results: list[torch.Tensor | None] = [None]
        for group in plan.groups:
            filled = gradients[0].new_zeros(group.index.numel(), *gradients[0].shape[1:])
            filled.index_copy_(
                0, group.inverse, gradients[0].index_select(0, group.index.index_select(0, group.inverse))
            )
            results.append(filled)
        return tuple(results)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: PackingPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example of a packed row.

    `query` is `[1, heads, tokens, dim]`, `key` and `value` `[1, key heads, tokens, dim]`; returns
    `[1, tokens, heads, dim]`. Dropout is never applied. Registered with `transformers` as `finespun_packed`. Raises
    `NotImplementedError` for what some models add to the scores; `packs_exactly` finds that out beforehand.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("soft-capped scores and attention sinks are not computed here")
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    split = [_Split.apply(tensor, packing) for tensor in rows]
    outputs = []
    for group, *parts in zip(packing.groups, *split, strict=True):
        q, k, v = (part.unflatten(0, (-1, group.length)).transpose(1, 2) for part in parts)
        windowed = sliding_window is not None and sliding_window < group.length
        mask = _window_mask(group.length, sliding_window, q.device) if windowed else None
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Join.apply(packing, *outputs)[None], None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[length, length]`, true where a query may look: at itself and the `window - 1` tokens before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (window or length))


def _no_mask(*_: Any, **__: Any) -> None:
    """The packing plan says all that a mask would."""


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Generator[None]:
    """Inside, the model attends through `packed_attention` and needs `packing=` in each call."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def packs_exactly(model: PreTrainedModel, decoder: torch.nn.Module) -> bool:
    """Whether two short examples in one row give `decoder` (the model without its head) the same hidden states as one
    at a time with the model's own attention. Not every architecture takes its attention from the registry or its
    positions from `position_ids`; this looks instead of knowing."""
    device = next(model.parameters()).device
    first, second = (torch.arange(length, device=device) % model.config.vocab_size for length in (5, 9))
    alone = torch.cat([decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in (first, second)])
    cu_seqlens = torch.tensor([0, len(first), len(first) + len(second)], device=device)
    try:
        with packed(model):
            together = decoder(
                input_ids=torch.cat([first, second])[None],
                position_ids=torch.cat([torch.arange(len(ids), device=device) for ids in (first, second)])[None],
                packing=plan_packing(cu_seqlens),
                use_cache=False,
            ).last_hidden_state[0]
    except (NotImplementedError, TypeError, ValueError, KeyError):
        return False
    tolerance = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())
