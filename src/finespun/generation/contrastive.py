"""Contrastive search: likely tokens that do not repeat what has been said (Su et al. 2022, arXiv:2202.06417)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from finespun.errors import GenerationError
from finespun.generation.runner import SlotRunner, runner_for
from finespun.generation.search import Next, follow
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel

if TYPE_CHECKING:
    from finespun.generation.engine import Request

UNKNOWN = ("best_of", "logprobs", "temperature")
"""Settings that contrastive search does not know."""


def contrastive_search(
    loaded: LoadedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    cache_tokens: int,
    on_end: Callable[[int], None],
) -> None:
    """Writes `requests`, all with the settings `sampling`; `on_end` gets the number of each that has ended. Raises
    `GenerationError` for a setting that contrastive search does not know, for a model that cannot be continued in
    several ways from one place, or for a constraint that cannot be followed."""
    if given := sampling.changed(*UNKNOWN):
        raise GenerationError(
            f"contrastive_alpha: contrastive search weighs the likeliest tokens and does not know {', '.join(given)}."
        )
    runner = runner_for(loaded)
    if not isinstance(runner, SlotRunner):
        raise GenerationError(
            f"contrastive_alpha: {loaded.base_name} cannot take back what it has read. Choose another model, or "
            "repetition_penalty against repetition."
        )
    searches = [_ContrastiveSearch(request, lambda at=number: on_end(at)) for number, request in enumerate(requests)]
    follow(runner, searches, sampling.top_k or 1, cache_tokens, with_states=True)


class _ContrastiveSearch:
    """Of one prompt; its branches are the candidates for the next token."""

    def __init__(self, request: Request, on_end: Callable[[], None]) -> None:
        self.prompt, self.room = request.prompt, request.room
        self._request, self._on_end = request, on_end
        self._candidates: list[int] = []
        self._probabilities = torch.empty(0)  # of the candidates
        self._context = torch.empty(0)  # directions of the last hidden states of all tokens, with room for what comes

    def advance(self, logits: torch.Tensor, states: torch.Tensor | None) -> list[Next]:
        assert states is not None  # they are asked for
        request, sampling = self._request, self._request.sampling
        directions = normalize(states.float(), dim=-1)
        end, best = len(request.prompt) + len(request.new), 0
        if not self._candidates:
            self._context = directions.new_empty(end + request.room, directions.shape[1])
            self._context[:end] = directions
        else:
            likeness = (directions @ self._context[:end].T).amax(-1).cpu()
            alpha = sampling.contrastive_alpha
            best = int(((1 - alpha) * self._probabilities - alpha * likeness).argmax())
            self._context[end] = directions[best]
            request.take(self._candidates[best])
            if request.ended:
                self._on_end()
                return []
        allowed = request.constraint.allowed() if request.constraint else None
        probabilities = request.choose.scores(request.prompt, request.new, logits[best], allowed).softmax(-1)
        count = min(sampling.top_k or 1, int(probabilities.count_nonzero()))
        self._probabilities, candidates = probabilities.topk(count)
        self._candidates = candidates.tolist()
        return [Next(best, token) for token in self._candidates]
