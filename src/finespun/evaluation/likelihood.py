"""How well a model predicts texts: perplexity of its tokens, and bits for each byte, whatever the tokens are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finespun.data.formats import TextExample, Trainable
from finespun.data.packing import micro_batches, pack
from finespun.data.templates import Encoder, TokenizedExample
from finespun.evaluation.kept import Kept
from finespun.files import hash_of
from finespun.training.objectives.causal_lm import CausalLM

MICRO_BATCH_TOKENS = 4096
"""Tokens computed at once."""

TOGETHER = 8192
"""Tokens after which what was computed is put down."""

Scope = Literal["completions", "all"]


@dataclass(frozen=True)
class TextLikelihood:
    """Of one example: `nats` −log probability of its `tokens`, the one that ends a text among them; `text_nats` that of
    the tokens that are text, which say `bytes` bytes in UTF-8."""

    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    bytes: int = 0

    def __add__(self, other: TextLikelihood) -> TextLikelihood:
        return TextLikelihood(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_nats + other.text_nats,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class PerExample:
    """A likelihood as a metric's result: `scale` of Σ nats / Σ of what they are counted by, over the examples that have
    any."""

    nats: NDArray[np.float64]
    units: NDArray[np.float64]
    scale: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    @property
    def per_example(self) -> NDArray[np.float64]:
        """`[examples]`; NaN where there is nothing to predict."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.scale(self.nats / self.units)

    def value(self, draw: NDArray[np.intp] | None = None) -> float:
        """Over the examples of `draw`, or all."""
        nats, units = (self.nats, self.units) if draw is None else (self.nats[draw], self.units[draw])
        with np.errstate(invalid="ignore", over="ignore"):
            return float(self.scale(nats.sum() / units.sum()))


def perplexity_of(found: Sequence[TextLikelihood]) -> PerExample:
    """exp(nats for each token): of the tokens that are trained, as in a run's validation."""
    return PerExample(np.array([one.nats for one in found]), np.array([float(one.tokens) for one in found]), np.exp)


def bits_per_byte_of(found: Sequence[TextLikelihood]) -> PerExample:
    """Bits for each byte of text (Gao et al. 2020, arXiv:2101.00027, section 3.1), which models with different tokens
    can be compared by. Tokens that are no text, such as the one that ends it, are not counted."""
    return PerExample(
        np.array([one.text_nats for one in found]), np.array([float(one.bytes) for one in found]), _in_bits
    )


def _in_bits(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    return nats / math.log(2)


def sequences_to_score(text: Trainable, encoder: Encoder, scope: Scope) -> list[TokenizedExample]:
    """The token ids of `text` with a loss weight of 1 for each token that is measured: those that are trained, or with
    scope "all" every one. A whole text stands behind the tokenizer's BOS, or EOS where it has none, so that its first
    token is predicted too, as in EleutherAI's lm-eval. Raises `DataError` as `Encoder.encode_example` does."""
    encoded = encoder.encode_example(text)
    whole = isinstance(text, TextExample) or (scope == "all" and encoder.prompt_format == "raw")
    found = []
    # where a template shows earlier turns otherwise later, the last sequence is the whole conversation
    for sequence in encoded[-1:] if scope == "all" else encoded:
        ids = sequence.input_ids
        weights = np.ones(len(ids)) if whole or scope == "all" else sequence.loss_weights != 0
        if whole:
            first = _opening(encoder)
            if ids[0] != first:
                ids, weights = np.concatenate([[first], ids]), np.concatenate([[0], weights])
        weights[0] = 0
        found.append(TokenizedExample(ids.astype(np.int32), weights.astype(np.float32), sequence.origin))
    return found


def _opening(encoder: Encoder) -> int:
    tokenizer = encoder.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def windows(sequence: TokenizedExample, window: int, stride: int) -> list[TokenizedExample]:
    """`sequence` in parts of at most `window` tokens that begin every `stride` tokens. Each token is measured once, in
    the first part that holds it, so that at least `window` − `stride` tokens stand before it, or all there are."""
    length, done = len(sequence.input_ids), 1
    found = []
    for start in range(0, length, stride):
        end = min(start + window, length)
        weights = sequence.loss_weights[start:end].copy()
        weights[: done - start] = 0.0
        if weights.any():
            found.append(TokenizedExample(sequence.input_ids[start:end], weights, sequence.origin))
        done = end
        if end == length:
            break
    return found


def likelihoods(
    objective: CausalLM,
    encoder: Encoder,
    examples: Sequence[Sequence[TokenizedExample]],
    window: int,
    stride: int,
    kept: Kept,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[TextLikelihood]:
    """The likelihood of each of `examples`, which is the sum over its sequences. What is in `kept` is not computed
    again, and what is computed goes there; `on_done` gets the number of sequences that are done."""
    keys = [[_key(sequence, window, stride) for sequence in example] for example in examples]
    todo = {
        key: sequence
        for group, example in zip(keys, examples, strict=True)
        for key, sequence in zip(group, example, strict=True)
        if key not in kept
    }
    done = sum(map(len, keys)) - len(todo)
    on_done(done)
    for group in _groups(todo):
        parts = [windows(sequence, window, stride) for _, sequence in group]
        sums = iter(_nats(objective, [part for each in parts for part in each], encoder))
        for (key, sequence), each in zip(group, parts, strict=True):
            nats, text_nats = (sum(values) for values in zip(*(next(sums) for _ in each), strict=True))
            kept.add(key, [nats, sequence.trained_tokens, text_nats, _bytes(sequence, encoder)])
        done += len(group)
        on_done(done)
    return [sum((TextLikelihood(*kept[key]) for key in group), TextLikelihood()) for group in keys]


def _key(sequence: TokenizedExample, window: int, stride: int) -> str:
    return hash_of([sequence.input_ids.tolist(), sequence.loss_weights.tolist(), window, stride])


def _groups(todo: dict[str, TokenizedExample]) -> Iterator[list[tuple[str, TokenizedExample]]]:
    group: list[tuple[str, TokenizedExample]] = []
    size = 0
    for key, sequence in todo.items():
        group.append((key, sequence))
        size += len(sequence.input_ids)
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


@torch.no_grad()
def _nats(objective: CausalLM, parts: Sequence[TokenizedExample], encoder: Encoder) -> list[list[float]]:
    """For each of `parts` −log probability of its measured tokens, and of those among them that are text; float64."""
    device = next(objective.model.parameters()).device
    special = torch.tensor(sorted(_special(encoder)), device=device)
    found: dict[int, list[float]] = {}
    for group in micro_batches(parts, MICRO_BATCH_TOKENS):
        batch = pack(group).to(device)
        result = objective(batch)
        text = torch.isin(batch.targets[batch.loss_weights.nonzero().squeeze(1)], special, invert=True)
        losses = result.losses.double()
        sums = torch.zeros(len(group), 2, dtype=torch.float64, device=device)
        sums.index_add_(0, result.examples, torch.stack([losses, losses * text], dim=1))
        found |= {id(part): both for part, both in zip(group, sums.tolist(), strict=True)}
    return [found[id(part)] for part in parts]


def _special(encoder: Encoder) -> set[int]:
    return {*encoder.tokenizer.all_special_ids, *encoder.stop_ids}


def _bytes(sequence: TokenizedExample, encoder: Encoder) -> int:
    """UTF-8 bytes that the measured tokens of `sequence` say, run by run."""
    special = _special(encoder)
    tokens = zip(sequence.input_ids.tolist(), sequence.loss_weights.tolist(), strict=True)
    runs = groupby(tokens, key=lambda token: bool(token[1]) and token[0] not in special)
    said = (encoder.decode([token for token, _ in run]) for measured, run in runs if measured)
    return sum(len(text.encode()) for text in said)
