"""Slow, plain computations to compare with: one example at a time through transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from conftest import sentences
from finespun.data.formats import PromptExample
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample
from finespun.models.load import LoadedModel


def tokenized(ids: Sequence[int], weights: Sequence[float], origin: Origin) -> TokenizedExample:
    """An example of given ids and weights."""
    return TokenizedExample(np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32), origin)


def encoded(loaded: LoadedModel, count: int = 9) -> list[TokenizedExample]:
    """Prompt examples of different lengths."""
    encoder = Encoder(loaded.tokenizer)
    texts = sentences(2 * count)
    return [
        encoder.encode_example(PromptExample(texts[2 * i], texts[2 * i + 1] * (1 + i % 3), Origin("test", i + 1)))[0]
        for i in range(count)
    ]


def text_of(encoder: Encoder, ids: Sequence[int]) -> str:
    """The text that the new tokens `ids` make: without half a character at the end where no stop token ended it."""
    text = encoder.decode([token for token in ids if token not in encoder.stop_ids])
    return text if any(token in encoder.stop_ids for token in ids) else text.rstrip("\ufffd")


def losses_one_by_one(model: PreTrainedModel, examples: Sequence[TokenizedExample]) -> tuple[torch.Tensor, float]:
    """Σ weight × loss over all tokens of all examples (differentiable), and Σ weight."""
    total = torch.zeros((), dtype=model.dtype)
    weight = 0.0
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        weights = torch.tensor(example.loss_weights, dtype=model.dtype)
        logits = model(input_ids=ids).logits[0]
        total = total + (cross_entropy(logits[:-1], ids[0, 1:], reduction="none") * weights[1:]).sum()
        weight += float(weights[1:].sum())
    return total, weight


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; the parameters' own are cleared."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
