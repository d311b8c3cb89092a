from __future__ import annotations

import pytest
import torch
from torch.nn import Embedding, LayerNorm, Linear, Sequential

from finespun.training.optim import MasterAdamW


def network() -> Sequential:
    torch.manual_seed(0)
    return Sequential(Embedding(11, 8), LayerNorm(8), Linear(8, 5))


def gradient_step(model: Sequential, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = model[2].weight.dtype
    model[0](torch.randint(0, 11, (7,)))
    ids = torch.randint(0, 11, (7,))
    (model(ids) * torch.randn(7, 5).to(dtype)).sum().backward()


def test_equals_torch_adamw_with_clipping_and_no_decay_on_norms_biases_and_embeddings() -> None:
    ours, theirs = network(), network()
    decayed = [theirs[2].weight]
    rest = [theirs[0].weight, theirs[1].weight, theirs[1].bias, theirs[2].bias]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}], lr=0.1)
    optimizer = MasterAdamW(ours, 0.5, torch.float32)
    for seed in range(5):
        gradient_step(ours, seed)
        gradient_step(theirs, seed)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert optimizer.step(0.1, 1.0) == pytest.approx(float(norm))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_bfloat16_weights_have_float32_masters_that_small_steps_reach() -> None:
    model = network()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MasterAdamW(model, 0.0, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    weights, _ = optimizer.state()
    for name, value in start.items():
        assert torch.equal(weights[name], value), "masters begin as the float32 weights, not as rounded ones"
    for seed in range(50):
        gradient_step(model, 3)
        optimizer.step(1e-5, 1e9)
        assert seed or all(parameter.grad is None for parameter in model.parameters())
    moved = (weights["2.weight"] - start["2.weight"]).abs()
    # 50 steps of 1e-5 into one direction; in bfloat16 alone each would be rounded away
    assert moved.max() == pytest.approx(50e-5, rel=0.02)
    torch.testing.assert_close(model[2].weight.float(), weights["2.weight"].bfloat16().float())


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    model = network()
    optimizer = MasterAdamW(model, 0.0, torch.bfloat16)
    for _ in range(400):
        (model[2].bias * torch.full((5,), 0.01, dtype=torch.bfloat16)).sum().backward()
    # in bfloat16 a sum of 0.01 stops growing near 2.5 to 4; in float32 it reaches 4
    assert optimizer.masters["2.bias"].grad.mean() == pytest.approx(4.0, rel=5e-3)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = MasterAdamW(model, 0.1, torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradient_step(model, 0)
    model[2].weight.grad[0, 0] = float("inf")
    assert optimizer.step(0.1, 1.0) == float("inf")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
