"""Prompts → continuations, batched and streamed. Knows token ids and the model; how a prompt becomes ids and ids become
text is the encoder's business.

Prompts of a batch are filled up on the left, so that all of them continue at the same column; the mask hides the
filling and positions count real tokens only. A sequence that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import DynamicCache

from finespun.data.templates import Encoder
from finespun.errors import DataError
from finespun.generation.sampling import Chooser
from finespun.generation.settings import Sampling
from finespun.models.adapters import soft_prompt_cache
from finespun.models.load import LoadedModel

BATCH = 16
"""Sequences that are continued at once."""


@dataclass(frozen=True)
class Completion:
    """A continuation. `finish_reason` is "stop" if it ended by itself or at a stop string, "length" if it was cut."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass
class _Sequence:
    """A continuation in the making."""

    prompt: list[int]
    choose: Chooser
    emit: Callable[[str], None]
    new: list[int] = field(default_factory=list)
    emitted: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    text: str = ""

    def accept(self, token: int, encoder: Encoder, sampling: Sampling, room: int) -> None:
        """Takes the next token: ends the sequence, or adds to its text what is certain by now."""
        if token in encoder.stop_ids:
            self.finish_reason = "stop"
        else:
            self.new.append(token)
            self.text = encoder.decode(self.new)
            found = [at for at in (self.text.find(stop) for stop in sampling.stop if stop) if at >= 0]
            if found:
                self.text, self.finish_reason = self.text[: min(found)], "stop"
            elif len(self.new) >= min(sampling.max_new_tokens, room):
                self.finish_reason = "length"
        certain = len(self.text) if self.finish_reason else _certain(self.text, sampling.stop)
        if certain > self.emitted:
            self.emit(self.text[self.emitted : certain])
            self.emitted = certain


def _certain(text: str, stops: Sequence[str]) -> int:
    """How much of `text` can be shown: no character of which bytes are missing, no beginning of a stop string."""
    end = len(text)
    while end and text[end - 1] == "\ufffd":
        end -= 1
    for stop in stops:
        for length in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:length]):
                end -= length
                break
    return end


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int = 1,
    on_text: Callable[[int, int, str], None] | None = None,
) -> list[list[Completion]]:
    """For each prompt (token ids) `samples` continuations.

    `on_text(prompt, sample, text)` gets each new piece of text as soon as it is certain. Raises `DataError` for a
    prompt that leaves no room in the model's context.
    """
    context = loaded.context_length
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= context:
            raise DataError(
                f"Prompt {number} has {len(prompt)} tokens and the model's context {context}: nothing "
                "could follow it. Shorten it."
            )
    sequences = [
        _Sequence(list(prompt), Chooser(sampling, sample), _emitter(on_text, number, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    by_length = sorted(sequences, key=lambda sequence: len(sequence.prompt))
    for start in range(0, len(by_length), BATCH):
        _continue(loaded, encoder, by_length[start : start + BATCH], sampling)
    done = [
        Completion(sequence.text, sequence.finish_reason or "length", len(sequence.prompt), len(sequence.new))
        for sequence in sequences
    ]
    return [done[first : first + samples] for first in range(0, len(done), samples)]


def _emitter(on_text: Callable[[int, int, str], None] | None, number: int, sample: int) -> Callable[[str], None]:
    return (lambda text: on_text(number, sample, text)) if on_text else (lambda text: None)


def _continue(loaded: LoadedModel, encoder: Encoder, batch: list[_Sequence], sampling: Sampling) -> None:
    """Continues all sequences of `batch` to their ends."""
    device, context = loaded.device, loaded.context_length
    width = max(len(sequence.prompt) for sequence in batch)
    pads = [width - len(sequence.prompt) for sequence in batch]
    fill = encoder.tokenizer.eos_token_id
    ids = torch.tensor(
        [[fill] * pad + sequence.prompt for pad, sequence in zip(pads, batch, strict=True)], device=device
    )
    mask = torch.tensor(
        [[0] * pad + [1] * len(sequence.prompt) for pad, sequence in zip(pads, batch, strict=True)], device=device
    )
    model = loaded.causal_lm
    cache, before = soft_prompt_cache(loaded.model, len(batch)) or (DynamicCache(config=model.config), 0)
    mask = torch.cat([mask.new_ones(len(batch), before), mask], dim=1)
    while batch:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for sequence, logits in zip(batch, output.logits[:, -1], strict=True):
            token = sequence.choose([*sequence.prompt, *sequence.new], logits)
            sequence.accept(token, encoder, sampling, room=context - len(sequence.prompt))
        alive = [row for row, sequence in enumerate(batch) if sequence.finish_reason is None]
        if len(alive) < len(batch):
            batch = [batch[row] for row in alive]
            rows = torch.tensor(alive, device=device, dtype=torch.long)
            cache.batch_select_indices(rows)
            mask = mask[rows]
        if batch:
            ids = torch.tensor([[sequence.new[-1]] for sequence in batch], device=device)
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
