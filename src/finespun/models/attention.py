"""Attention over a packed row, for any `transformers` model that takes its attention from the registry.

The row holds examples end to end. On a CUDA GPU it goes to torch's variable-length attention as it is. Elsewhere,
inside the attention call alone, examples are brought into groups of similar length, and each group is a batched
product, a softmax and another product, forward and backward. The shorter ones of a group are filled up on the right; a
causal mask keeps real queries from seeing what is behind them, so no other mask is needed and nothing leaks. Queries
are taken in blocks, each with the keys that it may see: of long examples, half of the products is never computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finespun.models.linear_cross_entropy import accumulation_type

NAME = "finespun_packed"

GROUP_WASTE = 1.15
"""Examples share a group while the filled-up size is at most this many times the real one."""

SMALL_PRODUCT = 16**3
"""Up to so many multiplications, torch takes a batched product in bfloat16 another way on a CPU than a larger one."""

BLOCK = 256
"""Queries of one example that are computed at once. Of examples no longer than this, the probabilities are kept for the
backward pass (`heads * length` numbers a token, less than a layer keeps anyway); of longer ones they are computed
again."""


@dataclass(frozen=True)
class Group:
    """Examples that are computed together: `index` `[examples, length]` are the rows of the packed row that they take,
    each filled up with its first; `real` `[tokens of the group]` is where in `index`, flat, each real token stands."""

    index: torch.Tensor
    real: torch.Tensor


@dataclass
class PackingPlan:
    """How a packed row with examples at `cu_seqlens` `[examples + 1]` is taken apart for attention and put together
    again: its `groups`, and for each token where it stands in all of them end to end, `back` `[tokens]`."""

    cu_seqlens: torch.Tensor
    longest: int
    groups: tuple[Group, ...]
    back: torch.Tensor
    windows: set[int | None] = field(default_factory=set)
    """Of the layers that have used it; None for one that sees all of an example."""
    _indices: dict[tuple[int, int], Indices] = field(default_factory=dict)

    def indices(self, heads: int, key_heads: int) -> Indices:
        """For `heads` that share `key_heads`. All layers of a model ask for the same."""
        if (heads, key_heads) not in self._indices:
            self._indices[heads, key_heads] = self._make_indices(heads, key_heads)
        return self._indices[heads, key_heads]

    def _make_indices(self, heads: int, key_heads: int) -> Indices:
        device, repeats = self.back.device, heads // key_heads
        head = torch.arange(heads, device=device).view(key_heads, 1, repeats, 1)
        rows, places, begin = [], [], 0
        for group in self.groups:
            examples, length = group.index.shape
            rows.append((group.index[:, None] * heads + head).flatten())
            example, position = group.real // length, group.real % length
            batch = head // repeats * examples + example.view(1, 1, 1, -1)
            places.append(begin + (batch * repeats + head % repeats) * length + position)
            begin += examples * heads * length
        of_tokens = torch.cat(places, -1).view(heads, -1).T.index_select(0, self.back)
        return Indices(tuple(rows), of_tokens.flatten())


@dataclass(frozen=True)
class Indices:
    """`rows` of each group `[key heads * examples * repeats * length]` in a table `[tokens * heads, dim]`, and `places`
    `[tokens * heads]` of that table in the groups' rows end to end."""

    rows: tuple[torch.Tensor, ...]
    places: torch.Tensor


def plan_packing(cu_seqlens: torch.Tensor) -> PackingPlan:
    """The plan for a row with examples at `cu_seqlens` `[examples + 1]`."""
    device = cu_seqlens.device
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
        positions = torch.arange(lengths[examples[0]])
        first = torch.tensor([starts[example] for example in examples])[:, None]
        is_real = positions < torch.tensor([lengths[example] for example in examples])[:, None]
        index = torch.where(is_real, first + positions, first)
        order.append(index[is_real])
        groups.append(Group(index.to(device), is_real.flatten().nonzero().squeeze(1).to(device)))
    back = torch.empty(int(cu_seqlens[-1]), dtype=torch.long)
    back[torch.cat(order)] = torch.arange(back.numel())
    return PackingPlan(cu_seqlens, max(lengths, default=0), tuple(groups), back.to(device))


class _Attention(torch.autograd.Function):
    """`query` `[tokens, heads, dim]`, `key` and `value` `[tokens, key heads, dim]` → `[tokens, heads, dim]`.

    A group is one batch of (key head, example); the query heads that share a key head stand below each other in its
    rows, so keys and values are never repeated and their gradients add up in the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: PackingPlan,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.plan, ctx.scale, ctx.window, ctx.softcap = plan, scale, window, softcap
        heads, key_heads = query.shape[1], key.shape[1]
        of_query, of_key = plan.indices(heads, key_heads), plan.indices(key_heads, key_heads)
        outputs, kept = [], []
        for group, rows, key_rows in zip(plan.groups, of_query.rows, of_key.rows, strict=True):
            length = group.index.shape[1]
            q = _gather(query, rows, heads // key_heads, length)
            k, v = (_gather(x, key_rows, 1, length).squeeze(1) for x in (key, value))
            output = torch.empty_like(q)
            for begin, end, low in _blocks(length, window):
                scores = scaled_scores(q[:, :, begin:end], k[:, low:end], scale, softcap)
                probabilities = causal_probabilities(scores, begin, low, window, v.dtype)
                output[:, :, begin:end] = grouped_product(probabilities, v[:, low:end])
                if length <= BLOCK:
                    kept.append(probabilities)
            outputs.append(output)
        ctx.save_for_backward(query, key, value, *kept)
        return _join(outputs, of_query.places, query)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        plan, scale, window, softcap = ctx.plan, ctx.scale, ctx.window, ctx.softcap
        heads, key_heads = query.shape[1], key.shape[1]
        of_query, of_key = plan.indices(heads, key_heads), plan.indices(key_heads, key_heads)
        kept_parts = iter(kept)
        found: list[tuple[torch.Tensor, ...]] = []
        for group, rows, key_rows in zip(plan.groups, of_query.rows, of_key.rows, strict=True):
            examples, length = group.index.shape
            q, above = (_gather(x, rows, heads // key_heads, length) for x in (query, gradients[0]))
            k, v = (_gather(x, key_rows, 1, length).squeeze(1) for x in (key, value))
            if group.real.numel() < examples * length:
                # what was filled up is a query too, and must not add to the gradients of what it looks at
                above.unflatten(0, (key_heads, examples)).mul_(_is_real(group, above.dtype))
            grad_q = torch.empty_like(q)
            sums = accumulation_type(q.dtype) if length > BLOCK else q.dtype
            grad_k, grad_v = (torch.zeros_like(x, dtype=sums) for x in (k, v))
            for begin, end, low in _blocks(length, window):
                part, seen = slice(begin, end), slice(low, end)
                scores = None
                if softcap or length > BLOCK:
                    scores = scaled_scores(q[:, :, part], k[:, seen], scale, softcap)
                slope = (1 - (scores / softcap).square_()) if softcap and scores is not None else None
                if length <= BLOCK:
                    probabilities = next(kept_parts)
                else:
                    assert scores is not None  # computed above for these
                    probabilities = causal_probabilities(scores, begin, low, window, v.dtype)
                grad_v[:, seen] += _transposed_product(probabilities, above[:, :, part])
                grad_probabilities = grouped_product(above[:, :, part], v[:, seen].transpose(1, 2))
                grad_scores = _softmax_backward(grad_probabilities, probabilities)
                if slope is not None:
                    grad_scores = (grad_scores * slope).to(q.dtype)
                grad_q[:, :, part] = grouped_product(grad_scores, k[:, seen], scale)
                grad_k[:, seen] += _transposed_product(grad_scores, q[:, :, part], scale)
            found.append((grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)))
        places = (of_query.places, of_key.places, of_key.places)
        parts = zip(zip(*found, strict=True), places, (query, key, value), strict=True)
        return *(_join(groups, place, like) for groups, place, like in parts), None, None, None, None


def _gather(x: torch.Tensor, rows: torch.Tensor, repeats: int, length: int) -> torch.Tensor:
    """`[tokens, heads, dim]` → `[key heads * examples, repeats, length, dim]`."""
    return x.flatten(0, 1).index_select(0, rows).view(-1, repeats, length, x.shape[-1])


def _join(groups: Sequence[torch.Tensor], places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `_gather` gave of each group → `[tokens, heads, dim]`, the shape of `like`."""
    flat = [group.view(-1, group.shape[-1]) for group in groups]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, places).view(like.shape)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Queries from `begin` to `end` with the keys from `low` to `end`, for all queries."""
    for begin in range(0, length, BLOCK):
        yield begin, min(begin + BLOCK, length), max(0, begin - window + 1) if window else 0


def grouped_product(left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`scale * [batch, repeats, rows, n] @ [batch, n, m]`."""
    return _scaled_product(left.flatten(1, 2), right, scale).view(*left.shape[:-1], right.shape[-1])


def _transposed_product(left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`scale * Σ over repeats of [batch, repeats, rows, n]ᵀ @ [batch, repeats, rows, m]` → `[batch, n, m]`."""
    return _scaled_product(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2), scale)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * [batch, l, n] @ [batch, n, m]`. What one of the batch becomes does not depend on the others: a small
    product, which would be added up in another order than a large one, is made larger."""
    batch, multiplications = left.shape[0], left.numel() * right.shape[2]
    if left.dtype == torch.bfloat16 and left.is_cpu and 0 < multiplications <= SMALL_PRODUCT:
        copies = SMALL_PRODUCT // multiplications + 1
        left, right = left.repeat(copies, 1, 1), right.repeat(copies, 1, 1)
    result = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(result, left, right, beta=0, alpha=scale, out=result)[:batch]


def scaled_scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """In float32 also for shorter types: rounded to bfloat16, a score of 10 would be off by 0.03, and its probability
    by as much of itself."""
    wide = accumulation_type(q.dtype)
    scores = grouped_product(q.to(wide), k.to(wide).transpose(1, 2), scale)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def causal_probabilities(
    scores: torch.Tensor, begin: int, low: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Softmax over the keys that each query sees: not those behind it or before its window. Changes `scores`."""
    queries, keys = scores.shape[-2:]
    hidden = scores
    if window is None:  # only among the last keys are some behind a query
        hidden, keys, low = scores[..., keys - queries :], queries, begin
    hidden += _unseen(queries, keys, begin - low, window, scores.dtype, scores.device)
    return scores.softmax(-1).to(dtype)


def _softmax_backward(gradient: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """probability × (gradient − Σ probability × gradient), in one pass; sums in float32 for shorter types."""
    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)


@functools.lru_cache(maxsize=64)
def _unseen(
    queries: int, keys: int, offset: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`[queries, keys]`, -inf where a query, the first of which stands at key `offset`, may not look, else 0."""
    distance = torch.arange(offset, offset + queries, device=device)[:, None] - torch.arange(keys, device=device)
    unseen = (distance < 0) | (distance >= (window or offset + queries))
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))


def _is_real(group: Group, dtype: torch.dtype) -> torch.Tensor:
    """`[examples, 1, length, 1]`, 0 where a group is filled up, else 1."""
    real = torch.zeros(group.index.numel(), dtype=dtype, device=group.index.device)
    real[group.real] = 1.0
    return real.view(len(group.index), 1, -1, 1)


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
    `NotImplementedError` for attention sinks, which some models add to the scores; `packs_exactly` finds that out
    beforehand.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks are not computed here")
    packing.windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < packing.longest else None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # as they lie in memory behind the projections
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _variable_length(*rows, packing, scale, window)[None], None
    return _Attention.apply(*rows, packing, scale, window, softcap)[None], None


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: PackingPlan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """torch's own attention over a packed row, FlashAttention on a GPU, for what `_Attention` takes."""
    from torch.nn.attention import varlen

    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if grouped and not _takes_grouped(varlen.varlen_attn):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        grouped = {}
    ends = packing.cu_seqlens.int()
    output: Any = varlen.varlen_attn(
        *(query, key, value),
        *(ends, ends),
        *(packing.longest, packing.longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return output


@functools.cache
def _takes_grouped(attention: Callable[..., Any]) -> bool:
    """Whether torch's variable-length attention takes fewer heads of keys than of queries: that of 2.11 does not."""
    return "enable_gqa" in inspect.signature(attention).parameters


def no_mask(*_: Any, **__: Any) -> None:
    """The packing plan says all that a mask would."""


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)


def packed(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, the model attends through `packed_attention` and needs `packing=` in each call."""
    return attending(model, NAME)


@contextmanager
def attending(model: PreTrainedModel, name: str) -> Generator[None]:
    """Inside, the model attends through the function that is registered under `name`."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def packs_exactly(model: PreTrainedModel, decoder: torch.nn.Module) -> bool:
    """Whether two short examples in one row give `decoder` (the model without its head) the same hidden states as one
    at a time with the model's own attention. Not every architecture takes its attention from the registry or its
    positions from `position_ids`, and not every one says there how far a layer looks back; this tries it out."""
    device = next(model.parameters()).device
    # from all over the vocabulary: the first ids are markers, of which untrained ones send bfloat16 astray
    first, second = (torch.arange(1, 1 + length, device=device) * 997 % model.config.vocab_size for length in (5, 9))
    alone = torch.cat([decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in (first, second)])
    plan = plan_packing(torch.tensor([0, len(first), len(first) + len(second)], device=device))
    try:
        with packed(model):
            together = decoder(
                input_ids=torch.cat([first, second])[None],
                position_ids=torch.cat([torch.arange(len(ids), device=device) for ids in (first, second)])[None],
                packing=plan,
                use_cache=False,
            ).last_hidden_state[0]
    except (NotImplementedError, TypeError, ValueError, KeyError):
        return False
    return plan.windows == windows_of(model) and same_up_to_rounding(together, alone)


def same_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the rows of `found` `[tokens, dim]` are those that were `expected`, as exactly as their type allows."""
    errors = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    if expected.dtype in (torch.float32, torch.float64):
        return bool(errors.max() <= 1e-3)
    return bool(errors.median() <= 5e-2)  # of a rounded type single tokens are further away, whatever computes them


def windows_of(model: PreTrainedModel) -> set[int | None]:
    """How far back the layers of a model look, by its config: what `packed_attention` must have been told."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    known = {"full_attention": None, "sliding_attention": window}
    return {known.get(kind, -1) for kind in kinds}
