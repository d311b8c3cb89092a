"""Cross-entropy of a linear head without the whole logits: `[tokens, vocab]` never exists, only a chunk of it.

For 49,152 words and 4,096 tokens the whole matrix with its gradient is 1.6 GB in float32; a chunk is 100 MB. The
gradients of the hidden states and of the head are formed chunk by chunk in the forward pass, while the chunk's
logits are there, as in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989). What is done to
each logit is done in pieces that stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 100_000_000
"""Logits held at a time. Each chunk after the first adds to the whole gradient of the head, so they are not small."""

PIECE_ELEMENTS = 500_000
"""Logits, and elements of the head's gradient, that a CPU takes through all their steps at once, in float32."""


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """What losses and gradients of `dtype` are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """`logits` held between ±`softcap`."""
    return softcap * torch.tanh(logits / softcap)


def rows_of_chunk(weight: torch.Tensor) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (len(weight) * weight.element_size()))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        loss_weights: torch.Tensor,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        chunk = rows_of_chunk(weight)
        accumulate = accumulation_type(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        several = not 0 < len(hidden) <= chunk
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight and several else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            losses[part] = _losses_and_gradient(logits, targets[part], loss_weights[part], softcap)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if needs_weight and not several:
                grad_weight = logits.T @ hidden
            elif grad_weight is not None:
                _add_transposed_product(grad_weight, logits, hidden[part])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=accumulate)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = gradients[0]
        scales = scale.is_cuda or float(scale) != 1.0  # looking at it would make a GPU wait
        scaled = [
            None if gradient is None else (gradient * scale if scales else gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return *scaled, None, None, None


def _losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """The losses of `logits` `[tokens, vocab]`, which become weight × their gradient."""
    accumulate = accumulation_type(logits.dtype)
    losses = []
    rows = len(logits) if logits.is_cuda else max(1, PIECE_ELEMENTS // logits.shape[1])
    for piece, target, weight in zip(*(x.split(rows) for x in (logits, targets[:, None], loss_weights)), strict=True):
        scores = piece.to(accumulate)
        slope = None
        if softcap:
            scores = capped(scores, softcap)
            slope = 1 - (scores / softcap).square()
        of_target = scores.gather(1, target)
        largest = scores.amax(-1, keepdim=True)
        scores = scores.sub_(largest).exp_()
        z = scores.sum(-1, keepdim=True)
        losses.append((largest - of_target + z.log()).squeeze(1))
        scores.scatter_add_(1, target, -z).mul_(weight[:, None] / z)
        if slope is not None:
            scores.mul_(slope)
        if scores.data_ptr() != piece.data_ptr():
            piece.copy_(scores)
    return torch.cat(losses)


def _add_transposed_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds `left.T @ right` to `total` `[columns of left, columns of right]`, which may be of a wider type."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
        return
    rows = len(total) if total.is_cuda else max(1, PIECE_ELEMENTS // total.shape[1])
    for piece, columns in zip(total.split(rows), left.split(rows, dim=1), strict=True):
        piece += columns.T @ right


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ loss_weight × −log softmax(hidden @ weightᵀ + bias)[target], and the unweighted losses. With `softcap`,
    logits x become softcap × tanh(x / softcap), as in Gemma 2.

    `hidden` is `[tokens, dim]`, `weight` `[vocab, dim]`, `bias` `[vocab]`, `targets` and `loss_weights` `[tokens]`.
    Returns the weighted sum (a scalar, differentiable once) and the losses in nats `[tokens]` (without gradient).
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, loss_weights, softcap)
