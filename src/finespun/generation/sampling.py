"""How the next token of a sequence is chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from finespun.files import seed_of
from finespun.generation.settings import Sampling


class Guess(NamedTuple):
    """A token that may come next, to be verified. `odds` `[vocab]` are the probabilities that it was drawn with; None
    for one that was certain."""

    token: int
    odds: torch.Tensor | None = None


def largest(logits: torch.Tensor) -> list[int]:
    """The token with the largest of each row of `logits` `[rows, vocab]`: the first of those that are equal, as
    some are in bfloat16. torch's `argmax` promises none of them."""
    if logits.is_cuda:  # they stay there: copying them takes longer
        columns = torch.arange(logits.shape[-1], device=logits.device)
        found = columns.where(logits == logits.amax(-1, keepdim=True), logits.shape[-1]).amin(-1)
        return found.tolist()
    return logits.float().cpu().numpy().argmax(-1).tolist()


class Chooser:
    """Chooses the tokens of one sequence under `sampling`; `sample` is its number among several behind `prompt`. It
    draws by these three alone, so that a sequence comes out the same alone or in any batch, and those of two prompts
    are independent. `stop_ids` end it."""

    def __init__(
        self, sampling: Sampling, sample: int = 0, stop_ids: Collection[int] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.greedy = sampling.temperature == 0
        self._sampling = sampling
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long)
        self._generator = torch.Generator().manual_seed(seed_of([sampling.seed, sample, list(prompt)]))
        penalties, warpers = LogitsProcessorList(), LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            penalties.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.no_repeat_ngram_size is not None:
            penalties.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
        if not self.greedy:
            if sampling.temperature != 1:
                warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k is not None:
                warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.typical_p < 1:
                warpers.append(TypicalLogitsWarper(sampling.typical_p))
            if sampling.min_p > 0:
                warpers.append(MinPLogitsWarper(sampling.min_p))
        self._penalties, self._warpers = penalties, warpers

    @property
    def takes_the_largest(self) -> bool:
        """Whether it always takes the token with the largest logit, whatever came before."""
        s = self._sampling
        changes = s.presence_penalty, s.frequency_penalty, s.logit_bias, s.min_new_tokens, self._penalties
        return self.greedy and not any(changes)

    def __call__(
        self, prompt: Sequence[int], new: Sequence[int], logits: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> int:
        """The next token after `prompt` and `new`, given its `logits` `[vocab]`, among those `allowed` `[vocab]`."""
        scores = self.scores(prompt, new, logits, allowed)
        if self.greedy:
            return largest(scores[None])[0]
        return self._draw(scores.softmax(-1))

    def propose(self, prompt: Sequence[int], new: Sequence[int], logits: torch.Tensor) -> Guess:
        """A guess by the `logits` of another model, chosen as this chooses tokens."""
        scores = self.scores(prompt, new, logits, None)
        if self.greedy:
            return Guess(largest(scores[None])[0])
        odds = scores.softmax(-1)
        return Guess(self._draw(odds), odds)

    def verify(self, guess: Guess, prompt: Sequence[int], new: Sequence[int], logits: torch.Tensor) -> int:
        """The next token where a guess x has been made with odds q: with probability min(1, p(x) / q(x)) that one, else
        one drawn from max(0, p - q); together the model's own distribution p (Leviathan et al. 2023,
        arXiv:2211.17192)."""
        scores = self.scores(prompt, new, logits, None)
        if self.greedy:
            return largest(scores[None])[0]
        token, odds = guess
        if odds is None:
            odds = torch.nn.functional.one_hot(torch.tensor(token), len(scores)).to(scores.dtype)
        probabilities = scores.softmax(-1)
        if float(torch.rand((), generator=self._generator)) * float(odds[token]) < float(probabilities[token]):
            return token
        rest = (probabilities - odds).clamp(min=0)
        return self._draw(rest if rest.any() else probabilities)  # both are the same up to rounding

    def _draw(self, probabilities: torch.Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def scores(
        self, prompt: Sequence[int], new: Sequence[int], logits: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`logits` `[vocab]` as the settings change them, -inf for what is not to be chosen."""
        settings = self._sampling
        scores = logits.float().cpu().clone()
        if self._penalties:
            scores = self._penalties(torch.LongTensor([[*prompt, *new]]), scores[None])[0]
        if new and (settings.presence_penalty or settings.frequency_penalty):
            counts = Counter(new)
            times = torch.tensor(list(counts.values()), dtype=scores.dtype)
            taken = settings.presence_penalty + settings.frequency_penalty * times
            scores[torch.tensor(list(counts))] -= taken
        for token, bias in settings.logit_bias.items():
            scores[token] += bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        elif len(new) < settings.min_new_tokens:  # what a constraint has completed ends all the same
            scores[self._stop_ids] = float("-inf")
        return self._warpers(torch.LongTensor([[*prompt, *new]]), scores[None])[0] if self._warpers else scores
