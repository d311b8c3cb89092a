"""Beam search, by `transformers`' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation.settings import CONSTRAINTS, Sampling
from finespun.models.load import LoadedModel

TOGETHER = 64
"""Beams that are continued at once."""

UNKNOWN = ("best_of", "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "temperature", *CONSTRAINTS)
"""Settings that beam search, which takes the likeliest texts, does not know."""


@torch.inference_mode()
def beam_search(
    loaded: LoadedModel, encoder: Encoder, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """The ids of the best continuation of each prompt, an end-of-text token with them if there is one. Prompts are
    filled up on the left. Raises `GenerationError` for a setting that beam search does not know."""
    if given := sampling.changed(*UNKNOWN):
        raise GenerationError(f"beams: beam search takes the likeliest texts and does not know {', '.join(given)}.")
    context = loaded.context_length
    size = max(1, TOGETHER // sampling.beams)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, list[int]] = {}
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        width = max(len(prompts[number]) for number in batch)
        fill = encoder.stop_ids[0]
        ids = [[fill] * (width - len(prompts[number])) + list(prompts[number]) for number in batch]
        mask = [[0] * (width - len(prompts[number])) + [1] * len(prompts[number]) for number in batch]
        made = loaded.model.generate(
            input_ids=torch.tensor(ids, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            max_new_tokens=min(sampling.max_new_tokens, context - width),
            eos_token_id=list(encoder.stop_ids),
            pad_token_id=fill,
            **_options(sampling),
        )
        for number, row in zip(batch, made[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in encoder.stop_ids), len(row) - 1)
            found[number] = row[: end + 1]
    return [found[number] for number in range(len(prompts))]


def _options(sampling: Sampling) -> dict[str, Any]:
    return {
        "num_beams": sampling.beams,
        "length_penalty": sampling.length_penalty,
        "do_sample": False,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size or 0,
        "min_new_tokens": sampling.min_new_tokens or None,
    }
