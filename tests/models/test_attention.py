"""Packed attention against transformers' eager one, an example at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from finespun.data.packing import pack
from finespun.data.readers import Origin
from finespun.models.attention import packed_attention, plan_packing
from finespun.training.objectives.causal_lm import CausalLM
from reference import gradients, losses_one_by_one, tokenized


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of one example, written out: q `[heads, length, dim]`, k and v with fewer heads, each shared."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    length = q.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window:
        seen &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_each_example_sees_itself_alone(lengths: list[int], window: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    output, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, packing=plan_packing(cu_seqlens), scaling=0.3, sliding_window=window
    )
    expected = torch.cat(
        [
            plain_attention(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], 0.3, window).transpose(0, 1)
            for a, b in pairwise(cu_seqlens.tolist())
        ]
    )
    torch.testing.assert_close(output[0], expected)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad((output[0] * upstream).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "mistral": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=5),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "gemma2": Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8
    ),
    "bloom": BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradient_equal_transformers_own_for(name: str) -> None:
    """Whether an architecture is packed or falls back to one example at a time, it is right."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], attn_implementation="eager").double().eval()
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
    assert bool(objective.why_slow) == (name in ("gemma2", "bloom"))
    loss = objective(pack(examples)).weighted_sum
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    found = gradients(model)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
