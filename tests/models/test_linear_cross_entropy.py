from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from finespun.models import linear_cross_entropy as module
from finespun.models.linear_cross_entropy import linear_cross_entropy


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 40),
    piece=st.integers(1, 40),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 30),
    seed=st.integers(0, 99),
)
def test_equals_cross_entropy_of_whole_logits(
    tokens: int, chunk: int, piece: int, bias: bool, softcap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(23, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(0, 23, (tokens,))
    weights = torch.rand(tokens, dtype=torch.float64)
    inputs = [x for x in (hidden, weight, offset) if x is not None]

    logits = torch.nn.functional.linear(hidden, weight, offset)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, targets, reduction="none")
    wanted = torch.autograd.grad((losses * weights).sum() * 3, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk * 23 * 8)
        patch.setattr(module, "PIECE_ELEMENTS", piece * 23)
        total, each = linear_cross_entropy(hidden, weight, targets, weights, offset, softcap)
    torch.testing.assert_close(each, losses)
    torch.testing.assert_close(total, (losses * weights).sum())
    for found, gradient in zip(torch.autograd.grad(total * 3, inputs), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_huge_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    total, _ = linear_cross_entropy(
        hidden, torch.eye(4).repeat(3, 1) * torch.arange(1, 13)[:, None], torch.tensor([0, 5]), torch.ones(2)
    )
    total.backward()
    assert total.isfinite()
    assert hidden.grad.isfinite().all()


def test_bfloat16_gradients_are_rounded_once_not_summed_in_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, 50, (4000,)), torch.ones(4000)
    exact = weight.detach().double().requires_grad_()
    cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 50 * 8 * 2)
        linear_cross_entropy(hidden, weight, targets, weights)[0].backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3  # one rounding is 2e-3; 500 chunks summed in bfloat16 give over 2e-2
