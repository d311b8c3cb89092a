from __future__ import annotations

import sys
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_optimizer import ScheduleFreeAdamW
from safetensors.torch import load_file, save_file
from torch.nn import Embedding, LayerNorm, Linear, Sequential

from finespun.errors import RecipeError
from finespun.training import optim
from finespun.training.optim import MasterOptimizer, update_seconds
from finespun.training.schedule import default_learning_rate


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
    optimizer = MasterOptimizer(ours, "adamw", 0.5, torch.float32)
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
    optimizer = MasterOptimizer(model, "adamw", 0.0, torch.bfloat16)
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
    optimizer = MasterOptimizer(model, "adamw", 0.0, torch.bfloat16)
    for _ in range(400):
        (model[2].bias * torch.full((5,), 0.01, dtype=torch.bfloat16)).sum().backward()
    # in bfloat16 a sum of 0.01 stops growing near 2.5 to 4; in float32 it reaches 4
    assert optimizer._gradient("2.bias").mean() == pytest.approx(4.0, rel=5e-3)


@pytest.mark.parametrize("kind", ["adamw", "schedule-free-adamw"])
def test_what_a_cpu_saved_goes_on_where_parameters_are_updated_together(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it, and back."""
    models = {together: wide() for together in (False, True)}
    optimizers = {}
    for together, model in models.items():
        monkeypatch.setattr(optim, "_on_cpu", lambda tensors, together=together: not together)
        optimizers[together] = MasterOptimizer(model, kind, 0.1, torch.bfloat16, b_rate_ratio=2.0)
    for before, after, steps in ((False, True, range(3)), (True, False, range(3, 6))):
        trained(optimizers[before], models[before], steps)
        optimizers[after].load_state(
            *({key: x.clone() for key, x in part.items()} for part in optimizers[before].state())
        )
    assert optimizers[True].state()[1].keys() == optimizers[False].state()[1].keys()
    expected = wide()
    whole = MasterOptimizer(expected, kind, 0.1, torch.bfloat16)
    trained(whole, expected, range(6))
    for name, master in whole.masters.items():
        torch.testing.assert_close(optimizers[False].masters[name], master)


def test_the_length_of_a_large_gradient_is_exact() -> None:
    """Summed in one go in float32, the squares of so many numbers are off by more."""
    model = torch.nn.Linear(4096, 4096, bias=False)
    optimizer = MasterOptimizer(model, "adamw", 0.0, torch.bfloat16)
    gradient = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    (model.weight * gradient).sum().backward()
    assert optimizer.step(0.0, 1.0) == pytest.approx(float(gradient.double().norm()), rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = MasterOptimizer(model, "adamw", 0.1, torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradient_step(model, 0)
    model[2].weight.grad[0, 0] = float("inf")
    assert optimizer.step(0.1, 1.0) == float("inf")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


OPTIMIZERS = ["adamw", "adamw-8bit", "adafactor", "muon", "lion", "schedule-free-adamw"]


def wide() -> Sequential:
    """With a matrix large enough for 8-bit moments."""
    torch.manual_seed(0)
    return Sequential(Embedding(11, 128), LayerNorm(128), Linear(128, 64))


def regression_step(model: Sequential, step: int) -> None:
    torch.manual_seed(step)
    target = torch.randn(7, model[2].out_features).to(model[2].weight.dtype)
    (model(torch.randint(0, 11, (7,))) - target).square().mean().backward()


def trained(optimizer: MasterOptimizer, model: Sequential, steps: range) -> None:
    for step in steps:
        regression_step(model, step)
        optimizer.step(1e-3, 1.0)


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(
    kind: str, dtype: torch.dtype, ema: float | None, tmp_path: Path
) -> None:
    if ema and kind == "schedule-free-adamw":
        pytest.skip("averages the weights itself; the recipe refuses both")
    model = wide()
    optimizer = MasterOptimizer(model, kind, 0.1, dtype, ema)
    trained(optimizer, model, range(3))
    save_file({key: value.contiguous() for key, value in optimizer.state()[0].items()}, tmp_path / "weights")
    save_file({key: value.contiguous() for key, value in optimizer.state()[1].items()}, tmp_path / "moments")
    trained(optimizer, model, range(3, 6))
    optimizer.settle()

    other = wide()
    for parameter in other.parameters():
        parameter.data.normal_()
    again = MasterOptimizer(other, kind, 0.1, dtype, ema)
    again.load_state(load_file(tmp_path / "weights"), load_file(tmp_path / "moments"))
    trained(again, other, range(3, 6))
    again.settle()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    moments, others = optimizer.state()[1], again.state()[1]
    assert moments.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in moments.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_at_its_default_rate(kind: str) -> None:
    model = wide()
    optimizer = MasterOptimizer(model, kind, 0.0, torch.float32)
    rate, _ = default_learning_rate("full", kind, 10_000_000)
    ids, target = torch.arange(11), torch.randn(11, 64)
    losses = []
    for _ in range(60):
        loss = (model(ids) - target).square().mean()
        loss.backward()
        optimizer.step(rate, 1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_muon_turns_hidden_matrices_and_adamw_the_rest() -> None:
    ours, theirs = wide(), wide()
    ours.get_output_embeddings = lambda: None
    optimizer = MasterOptimizer(ours, "muon", 0.1, torch.float32)
    muon = torch.optim.Muon([theirs[2].weight], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs[0].weight, theirs[1].weight, theirs[1].bias, theirs[2].bias]
    adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0)
    trained(optimizer, ours, range(4))
    for step in range(4):
        regression_step(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        muon.step()
        adamw.step()
        theirs.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_the_head_of_a_language_model_is_not_turned_by_muon() -> None:
    model = wide()
    model.get_output_embeddings = lambda: model[2]
    optimizer = MasterOptimizer(model, "muon", 0.1, torch.float32)
    trained(optimizer, model, range(1))
    assert "2.weight/exp_avg" in optimizer.state()[1], "AdamW's moments"


def test_the_average_of_the_weights_is_validated_and_kept_and_training_goes_on_from_the_weights() -> None:
    model = wide()
    optimizer = MasterOptimizer(model, "adamw", 0.0, torch.float32, ema_decay=0.75)
    average = model[2].weight.detach().clone()
    for step in range(4):
        trained(optimizer, model, range(step, step + 1))
        average = 0.75 * average + 0.25 * model[2].weight.detach()
    before = model[2].weight.detach().clone()
    with optimizer.evaluating():
        torch.testing.assert_close(model[2].weight, average)
    assert torch.equal(model[2].weight, before)
    optimizer.settle()
    torch.testing.assert_close(model[2].weight, average)


def test_schedule_free_is_judged_by_its_average() -> None:
    model, other = wide(), wide()
    optimizer = MasterOptimizer(model, "schedule-free-adamw", 0.0, torch.float32)
    reference = ScheduleFreeAdamW(other.parameters(), lr=1e-3)
    trained(optimizer, model, range(5))
    for step in range(5):
        regression_step(other, step)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(model[2].weight, other[2].weight)
    reference.eval()
    with optimizer.evaluating():
        torch.testing.assert_close(model[2].weight, other[2].weight)


def test_the_b_matrices_of_lora_learn_faster_by_the_ratio() -> None:
    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = torch.nn.Parameter(torch.ones(2, 3))
            self.lora_B = torch.nn.Parameter(torch.ones(3, 2))

    model = Adapter()
    optimizer = MasterOptimizer(model, "adamw", 0.0, torch.float32, b_rate_ratio=16.0)
    (model.lora_A.sum() + model.lora_B.sum()).backward()
    optimizer.step(1e-3, 1e9)
    # the first step of AdamW is as long as the rate
    assert (1 - model.lora_A).mean().item() == pytest.approx(1e-3, rel=1e-3)
    assert (1 - model.lora_B).mean().item() == pytest.approx(16e-3, rel=1e-3)


def test_buffers_keep_their_precision() -> None:
    """Rotary frequencies in bfloat16 would put far tokens in the wrong place."""
    model = wide()
    model.register_buffer("frequencies", torch.rand(8))
    MasterOptimizer(model, "adamw", 0.0, torch.bfloat16)
    assert model.frequencies.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_time_of_an_update_is_taken_on_copies_of_some_numbers_for_all(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count()
    monkeypatch.setattr(optim, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(optim, "MEASURED_NUMBERS", 200)
    model = wide()
    model[0].requires_grad_(False)
    before = deepcopy(model.state_dict())
    # of norm (two), matrix and bias the last two: 64 rows of 128 numbers, which are enough
    assert update_seconds(model, kind, dtype) == (128 + 128 + 64 * 128 + 64) / (64 * 128)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(RecipeError, match=r"pytorch-optimizer.*finespun\[optimizers\]"):
        MasterOptimizer(wide(), "lion", 0.0, torch.float32)
