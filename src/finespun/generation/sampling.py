"""How the next token of a sequence is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finespun.generation.settings import Sampling


class Chooser:
    """Chooses the tokens of one sequence under `sampling`; `sample` is its number among several of one prompt, so that
    a sequence comes out the same alone or in any batch."""

    def __init__(self, sampling: Sampling, sample: int = 0) -> None:
        self.greedy = sampling.temperature == 0
        self._generator = torch.Generator().manual_seed((sampling.seed << 20) + sample)
        self._process = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._process.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self.greedy:
            if sampling.temperature != 1:
                self._process.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k is not None:
                self._process.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._process.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0:
                self._process.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `ids` (prompt included), given its `logits` `[vocab]`."""
        scores = logits.float().cpu()[None]
        if self._process:
            scores = self._process(torch.LongTensor([ids]), scores.float())
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
