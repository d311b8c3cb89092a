"""What runs differently on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from finespun.data.templates import Encoder
from finespun.generation.engine import generate
from finespun.generation.sampling import largest
from finespun.generation.settings import Sampling
from finespun.models.attention import packed_attention, plan_packing
from finespun.models.load import faster_precision, load_model
from reference import text_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_is_that_of_each_example_alone(
    dtype: torch.dtype, heads: tuple[int, int], window: int | None
) -> None:
    """Values and gradients, beside torch's own attention in float64."""
    torch.manual_seed(0)
    lengths = torch.tensor([0, 3, 20, 29, 100]).cumsum(0)
    total = int(lengths[-1])
    q, k, v = (
        torch.randn(1, n, total, 64, device=GPU, dtype=dtype, requires_grad=True) for n in (heads[0], *heads[1:] * 2)
    )
    upstream = torch.randn(total, heads[0], 64, device=GPU, dtype=dtype)
    plan = plan_packing(lengths.to(GPU))
    output, _ = packed_attention(torch.nn.Module(), q, k, v, None, packing=plan, scaling=0.3, sliding_window=window)
    found = output[0], *torch.autograd.grad((output[0] * upstream).sum(), (q, k, v))

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = []
    for a, b in pairwise(lengths.tolist()):
        one, *shared = (x[:, :, a:b] for x in exact)
        place = torch.arange(b - a, device=GPU)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (window or total))
        shared = [x.repeat_interleave(heads[0] // heads[1], 1) for x in shared]
        parts.append(torch.nn.functional.scaled_dot_product_attention(one, *shared, attn_mask=seen, scale=0.3))
    together = torch.cat(parts, 2)[0].transpose(0, 1)
    wanted = together, *torch.autograd.grad((together * upstream.double()).sum(), exact)
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), error


def test_the_largest_is_the_first_of_those_that_are_equal() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]], device=GPU)
    assert largest(rows) == [1, 0, 3]
    assert largest(rows.bfloat16()) == [1, 0, 3]


def test_it_computes_in_bfloat16_where_the_gpu_does() -> None:
    assert faster_precision(GPU) == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32")


@torch.inference_mode()
def test_many_texts_at_once_are_those_of_transformers() -> None:
    """More prompts than a CPU has slots, in float32, greedily."""
    loaded = load_model("smollm2-135m", "float32", GPU)
    encoder = Encoder(loaded.tokenizer)
    prompts = [
        encoder.encode_prompt(f"Write {'one short ' * (n % 4)}sentence about the number {n}.") for n in range(100)
    ]
    found = generate(loaded, encoder, prompts, Sampling(max_new_tokens=24))
    same = 0
    for prompt, (completion,) in zip(prompts, found, strict=True):
        ids = loaded.causal_lm.generate(
            input_ids=torch.tensor([prompt], device=GPU),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=GPU),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(encoder.stop_ids),
            pad_token_id=encoder.stop_ids[0],
        )[0, len(prompt) :]
        same += completion.text == text_of(encoder, ids.tolist())
    assert same >= 98, f"{same} of 100: rounding may part one or two where two tokens are as good"
