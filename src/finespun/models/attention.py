"""Attention over a packed row, for any `transformers` model that takes its attention from the registry.

The row holds examples end to end. On a CUDA GPU it goes to torch's variable-length attention as it is. Elsewhere,
inside the attention call alone, examples are brought into groups of similar length, and each group is a batched
product, a softmax and another product, forward and backward. The shorter ones of a group are filled up on the right; a
causal mask keeps real queries from seeing what is behind them, so no other mask is needed and nothing leaks. Queries
are taken in blocks, each with the keys that it may see: of long examples, half of the products is never computed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finespun.models.linear_cross_entropy import accumulation_type

NAME = "finespun_packed"

GROUP_WASTE = 1.15
"""Examples share a group while the filled-up size is at most this many times the real one."""

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
                scores = _scores(q[:, :, begin:end], k[:, low:end], scale, softcap)
                _hide_unseen(scores, begin, low, window)
                probabilities = scores.softmax(-1)
                rounded = probabilities.to(v.dtype)
                output[:, :, begin:end] = _product(rounded, v[:, low:end])
                kept.append(rounded if length <= BLOCK else _log_z(scores, probabilities))
            outputs.append(output)
        joined = _join(outputs, of_query.places, query)
        ctx.save_for_backward(query, key, value, joined, *kept)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, joined, *kept = ctx.saved_tensors
        plan, scale, window, softcap = ctx.plan, ctx.scale, ctx.window, ctx.softcap
        gradient = gradients[0]
        heads, key_heads = query.shape[1], key.shape[1]
        of_query, of_key = plan.indices(heads, key_heads), plan.indices(key_heads, key_heads)
        # Σ over values of probability × its gradient (Dao et al. 2022, arXiv:2205.14135, eq. 4)
        wide = accumulation_type(query.dtype)
        deltas = (gradient.to(wide) * joined).sum(-1, keepdim=True)
        kept_parts = iter(kept)
        found: list[tuple[torch.Tensor, ...]] = []
        for group, rows, key_rows in zip(plan.groups, of_query.rows, of_key.rows, strict=True):
            examples, length = group.index.shape
            q, above, delta = (_gather(x, rows, heads // key_heads, length) for x in (query, gradient, deltas))
            k, v = (_gather(x, key_rows, 1, length).squeeze(1) for x in (key, value))
            if group.real.numel() < examples * length:
                # what was filled up is a query too, and must not add to the gradients of what it looks at
                for x in (above, delta):
                    x.unflatten(0, (key_heads, examples)).masked_fill_(_filled(group), 0.0)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for begin, end, low in _blocks(length, window):
                part, seen = slice(begin, end), slice(low, end)
                saved, scores = next(kept_parts), None
                if softcap or length > BLOCK:
                    scores = _scores(q[:, :, part], k[:, seen], scale, softcap)
                if scores is None or length <= BLOCK:
                    probabilities = saved
                else:
                    probabilities = scores.clone() if softcap else scores
                    _hide_unseen(probabilities, begin, low, window)
                    probabilities = probabilities.sub_(saved).exp_().to(v.dtype)
                grad_v[:, seen] += _transposed_product(probabilities, above[:, :, part])
                grad_scores = _product(above[:, :, part], v[:, seen].transpose(1, 2)).to(wide)
                grad_scores.sub_(delta[:, :, part]).mul_(probabilities).mul_(scale)
                if softcap and scores is not None:
                    grad_scores.mul_(1 - (scores / softcap).square_())
                grad_scores = grad_scores.to(q.dtype)
                grad_q[:, :, part] = _product(grad_scores, k[:, seen])
                grad_k[:, seen] += _transposed_product(grad_scores, q[:, :, part])
            found.append((grad_q, grad_k, grad_v))
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


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[batch, repeats, rows, n] @ [batch, n, m]`."""
    return torch.bmm(left.flatten(1, 2), right).view(*left.shape[:-1], right.shape[-1])


def _transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`Σ over repeats of [batch, repeats, rows, n]ᵀ @ [batch, repeats, rows, m]` → `[batch, n, m]`."""
    return torch.bmm(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2))


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """In float32 also for shorter types: rounded to bfloat16, a score of 10 would be off by 0.03, and its probability
    by as much of itself."""
    wide = accumulation_type(q.dtype)
    scores = _product(q.to(wide), k.transpose(1, 2).to(wide)).mul_(scale)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _log_z(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """log Σ exp(scores) of each row, from its largest score and what that became."""
    return scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()


def _hide_unseen(scores: torch.Tensor, begin: int, low: int, window: int | None) -> None:
    """Sets the scores of keys behind a query, and of those before its window, to -inf."""
    queries, keys = scores.shape[-2:]
    if window is None:  # only among the last keys are some behind a query
        scores, keys, low = scores[..., keys - queries :], queries, begin
    scores.masked_fill_(_unseen(queries, keys, begin - low, window, scores.device), float("-inf"))


@functools.lru_cache(maxsize=64)
def _unseen(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[queries, keys]`, true where a query, the first of which stands at key `offset`, may not look."""
    distance = torch.arange(offset, offset + queries, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance >= (window or offset + queries))


def _filled(group: Group) -> torch.Tensor:
    """`[examples, 1, length, 1]`, true where a group is filled up."""
    filled = torch.ones(group.index.numel(), dtype=torch.bool, device=group.index.device)
    filled[group.real] = False
    return filled.view(len(group.index), 1, -1, 1)


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

    ends = packing.cu_seqlens.int()
    output: Any = varlen.varlen_attn(
        *(query, key, value),
        *(ends, ends),
        *(packing.longest, packing.longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


def _no_mask(*_: Any, **__: Any) -> None:
    """The packing plan says all that a mask would."""


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Generator[None]:
    """Inside, the model attends through `packed_attention` and needs `packing=` in each call."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
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
    first, second = (torch.arange(length, device=device) % model.config.vocab_size for length in (5, 9))
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
    if plan.windows != _windows(model.config.get_text_config()):
        return False
    tolerance = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def _windows(config: PreTrainedConfig) -> set[int | None]:
    """How far back the layers of a model look, by its config: what `packed_attention` must have been told."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    known = {"full_attention": None, "sliding_attention": window}
    return {known.get(kind, -1) for kind in kinds}
