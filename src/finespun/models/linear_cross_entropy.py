"""Cross-entropy of a linear head without the whole logits: `[tokens, vocab]` never exists, only a chunk of it.

For 49,152 words and 2,048 tokens the whole matrix with its gradient is 0.8 GB in float32; a chunk is 25 MB. The
gradients of the hidden states and of the head are formed chunk by chunk in the forward pass, while the chunk's
logits are there, as in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ELEMENTS = 6_000_000
"""Logits held at a time: 24 MB in float32."""


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """What losses and gradients of `dtype` are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """`logits` held between ±`softcap`."""
    return softcap * torch.tanh(logits / softcap)


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
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        accumulate = accumulation_type(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).to(accumulate)
            if softcap:
                logits = capped(logits, softcap)
                slope = 1 - (logits / softcap).square()
            target = targets[part, None]
            # One pass of log-sum-exp; the logits then become their own gradient in place.
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (log_z - logits.gather(1, target)).squeeze(1)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = logits.sub_(log_z).exp_()
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            if softcap:
                gradient.mul_(slope)
            gradient = gradient.mul_(loss_weights[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None:
                if grad_weight.dtype == gradient.dtype:
                    grad_weight.addmm_(gradient.T, hidden[part])
                else:
                    grad_weight += gradient.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
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
