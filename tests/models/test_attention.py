"""Packed attention against transformers' eager one, an example at a time."""

from __future__ import annotations

import inspect
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from architectures import architectures
from finespun.data.packing import pack
from finespun.data.readers import Origin
from finespun.models import attention
from finespun.models.attention import grouped_product, packed_attention, plan_packing
from finespun.models.load import LoadedModel, compute_in
from finespun.models.prepacked import can_prepack
from finespun.training.objectives.causal_lm import CausalLM
from reference import gradients, losses_one_by_one, tokenized


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention of one example, written out: q `[heads, length, dim]`, k and v with fewer heads, each shared."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    length = q.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window:
        seen &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    scores = q @ k.transpose(1, 2) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 50),
    block=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_each_example_sees_itself_alone(
    lengths: list[int], window: int | None, softcap: float | None, block: int, seed: int
) -> None:
    """With blocks smaller than the examples too, as they are for long ones."""
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    upstream = torch.randn(total, 6, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        output, _ = packed_attention(
            torch.nn.Module(),
            *(q, k, v, None),
            packing=plan_packing(cu_seqlens),
            scaling=0.3,
            sliding_window=window,
            softcap=softcap,
        )
        found = torch.autograd.grad((output[0] * upstream).sum(), (q, k, v))
    expected = torch.cat(
        [
            plain_attention(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], 0.3, window, softcap).transpose(0, 1)
            for a, b in pairwise(cu_seqlens.tolist())
        ]
    )
    torch.testing.assert_close(output[0], expected)
    wanted = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_gpu_is_asked_for_the_same(grouped: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's variable-length attention runs on a GPU only; here something plain stands in for it, called in the way
    that its signature and its documentation say; without the last parameter in torch 2.11."""
    signature = inspect.signature(varlen.varlen_attn)
    parameters = [each for each in signature.parameters.values() if each.name != "enable_gqa"]
    if grouped:
        parameters.append(inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False))
    signature = signature.replace(parameters=parameters)

    def stand_in(*arguments, **keywords) -> torch.Tensor:
        given = signature.bind(*arguments, **keywords).arguments
        assert given["cu_seq_q"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == 17
        left, right = given["window_size"]
        assert right == 0, "no query sees what comes behind it"
        assert given.get("enable_gqa", False) == (given["query"].shape[1] != given["key"].shape[1])
        rows = [given[name].transpose(0, 1) for name in ("query", "key", "value")]
        return torch.cat(
            [
                plain_attention(*(x[:, a:b] for x in rows), given["scale"], left + 1 or None, None).transpose(0, 1)
                for a, b in pairwise(given["cu_seq_q"].tolist())
            ]
        )

    stand_in.__signature__ = signature  # ty: ignore[unresolved-attribute]
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(0)
    q, k, v = (torch.randn(29, heads, 8) for heads in (6, 2, 2))
    plan = plan_packing(torch.tensor([0, 3, 20, 29]))
    expected = attention._Attention.apply(q, k, v, plan, 0.3, window, None)
    torch.testing.assert_close(attention._variable_length(q, k, v, plan, 0.3, window), expected)


ARCHITECTURES = architectures(vocab_size=99, positions=64)


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
def test_a_product_does_not_depend_on_its_batch_in_bfloat16() -> None:
    torch.manual_seed(0)
    for dim in (8, 16, 32, 64):
        for length in (3, 20, 66, 67, 130):
            values = torch.randn(240, length, dim).bfloat16()
            weights = torch.randn(240, 2, 1, length).mul(2).softmax(-1).bfloat16()
            whole = grouped_product(weights, values)
            for count in (1, 2, 3, 8):
                parts = zip(weights.split(count), values.split(count), strict=True)
                assert torch.equal(torch.cat([grouped_product(*part) for part in parts]), whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradient_equal_transformers_own_for(name: str) -> None:
    """Whether an architecture is packed or falls back to one example at a time, it is right."""
    torch.manual_seed(0)
    # transformers' eager attention rounds to float32 in its softmax, and Gemma's norms are computed in float32
    implementation = "eager" if name in ("gemma2", "bloom") else "sdpa"
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], attn_implementation=implementation).double().eval()
    precision = 1e-5 if name in ("gemma2", "gemma3") else 1e-11
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = (3, 17, 9, 2)
    examples = [
        tokenized(
            torch.randint(3, 99, (n,)).tolist(),
            [0.0, *torch.randint(0, 2, (n - 2,)).double().tolist(), 1.0],
            Origin("t", n),
        )
        for n in lengths
    ]
    total, _ = losses_one_by_one(model, examples)
    total.backward()
    expected = gradients(model)
    objective = CausalLM(model)
    assert bool(objective.why_slow) == (name in ("bloom", "cohere", "granite"))
    loss = objective(pack(examples)).weighted_sum
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=precision)
    found = gradients(model)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=precision, atol=precision, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_can_be_packed_is_told_in_bfloat16_too(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).bfloat16().eval()
    assert bool(CausalLM(model).why_slow) == (name in ("bloom", "cohere", "granite"))


def test_the_real_model_is_packed_in_bfloat16(smollm2_shared: LoadedModel) -> None:
    """Its first tokens, markers that it was hardly trained on, have hidden states that bfloat16 changes completely."""
    assert CausalLM(compute_in(deepcopy(smollm2_shared.model), torch.bfloat16)).why_slow is None
