"""Beam search, plain and diverse. Plain, it gives what `transformers`' own `generate` gives, which does it for models
that have no slots to copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation.cache import wider
from finespun.generation.runner import SlotRunner, runner_for
from finespun.generation.search import SLOTS, Next, follow
from finespun.generation.settings import CONSTRAINTS, Sampling
from finespun.models.load import LoadedModel

UNKNOWN = (
    *("best_of", "contrastive_alpha", "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "temperature"),
    *CONSTRAINTS,
)
"""Settings that beam search, which takes the likeliest texts, does not know."""


def beam_search(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[tuple[Sequence[int], int]],
    sampling: Sampling,
    samples: int,
    cache_tokens: int,
    on_end: Callable[[int, list[list[int]]], None],
) -> None:
    """Hands to `on_end`, as each ends, the number of each of `prompts` with the ids of its `samples` best texts, an
    end-of-text token with them if there is one. Prompts come with the number of tokens that may follow. Raises
    `GenerationError` for a setting that beam search does not know, for more samples than beams, or for groups with a
    model that has no slots to copy."""
    if given := sampling.changed(*UNKNOWN):
        raise GenerationError(f"beams: beam search takes the likeliest texts and does not know {', '.join(given)}.")
    if samples > sampling.beams:
        raise GenerationError(f"beams: {sampling.beams} beams end in as many texts, not in {samples} samples.")
    runner = runner_for(loaded)
    if isinstance(runner, SlotRunner):
        searches = [
            _BeamSearch(
                *(prompt, room, sampling, encoder.stop_ids, loaded.device),
                on_end=lambda texts, number=number: on_end(number, texts[:samples]),
            )
            for number, (prompt, room) in enumerate(prompts)
        ]
        return follow(runner, searches, sampling.beams, cache_tokens)
    if sampling.beam_groups > 1:
        raise GenerationError(
            f"beam_groups: {loaded.base_name} cannot take back what it has read. Choose another model, or leave out "
            "beam_groups."
        )
    return _by_transformers(loaded, encoder, prompts, sampling, samples, on_end)


@dataclass(frozen=True)
class _Beam:
    """A beginning that is followed; `branch` is its number among those of all groups, `score` the sum of its
    log-probabilities."""

    branch: int
    ids: list[int]
    score: float


class _BeamSearch:
    """Of one prompt: `beam_groups` groups of beams one after another (Vijayakumar et al. 2016, arXiv:1610.02424,
    algorithm 1 with Hamming diversity); plain beam search is one group."""

    def __init__(
        self,
        prompt: Sequence[int],
        room: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        device: torch.device,
        on_end: Callable[[list[list[int]]], None],
    ) -> None:
        self.prompt, self.room, self._on_end = prompt, room, on_end
        self._diversity_penalty = sampling.diversity_penalty
        self._processors = _processors(sampling, len(prompt), stop_ids, device)
        size = sampling.beams // sampling.beam_groups
        self._groups = [_Group(size, sampling.length_penalty, stop_ids, room) for _ in range(sampling.beam_groups)]

    def advance(self, logits: torch.Tensor, states: torch.Tensor | None) -> list[Next]:
        log_probs = logits.float().log_softmax(-1)
        following: list[Next] = []
        taken: Counter[int] = Counter()
        for group in self._groups:
            if group.ended:
                continue
            scores = log_probs[[beam.branch for beam in group.beams]]
            if taken:
                times = torch.tensor(list(taken.values()), device=scores.device)
                scores[:, list(taken)] -= self._diversity_penalty * times
            if self._processors:
                ids: Any = torch.tensor([[*self.prompt, *beam.ids] for beam in group.beams], device=scores.device)
                scores = self._processors(ids, scores)
            following += group.advance(scores, len(following))
            taken.update(beam.ids[-1] for beam in group.beams)
        if not following:
            finished = [text for group in self._groups for text in group.finished]
            self._on_end([ids for _, ids in sorted(finished, key=lambda text: -text[0])])
        return following


class _Group:
    """`size` beams. It ends when so many texts are finished and the best beam, were it to end now, would not be better
    than the worst of them, or when there is no more room."""

    def __init__(self, size: int, length_penalty: float, stop_ids: Sequence[int], room: int) -> None:
        self.beams = [_Beam(0, [], 0.0)]
        self.finished: list[tuple[float, list[int]]] = []
        """Texts with their scores, the best first."""
        self.ended = False
        self._size, self._length_penalty, self._stop_ids, self._room = size, length_penalty, stop_ids, room

    def advance(self, log_probs: torch.Tensor, branch: int) -> list[Next]:
        """Adds a token to each beam, by `log_probs` `[beams, vocab]`; those that go on have numbers from `branch`."""
        vocabulary = log_probs.shape[1]
        totals = log_probs + torch.tensor([[beam.score] for beam in self.beams], device=log_probs.device)
        # so many that there are enough to go on with where all beams could end
        count = self._size * (1 + max(1, len(self._stop_ids)))
        scores, places = totals.flatten().topk(min(count, totals.numel()))
        length = len(self.beams[0].ids) + 1
        norm, last = length**self._length_penalty, length == self._room
        beams: list[_Beam] = []
        following: list[Next] = []
        for rank, (score, place) in enumerate(zip(scores.tolist(), places.tolist(), strict=True)):
            number, token = divmod(place, vocabulary)
            ids, ends = [*self.beams[number].ids, token], token in self._stop_ids
            if (ends or last) and rank < self._size:
                self.finished.append((score / norm, ids))
            if not ends and len(beams) < self._size:
                beams.append(_Beam(branch + len(beams), ids, score))
                following.append(Next(self.beams[number].branch, token))
        self.finished = sorted(self.finished, key=lambda text: -text[0])[: self._size]
        full = len(self.finished) == self._size
        self.beams = beams
        self.ended = last or not beams or (full and beams[0].score / norm <= self.finished[-1][0])
        return [] if self.ended else following


def _processors(sampling: Sampling, prompt: int, stop_ids: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What changes the log-probabilities of a step, for a prompt of so many tokens."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size is not None:
        found.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.min_new_tokens:
        ends = torch.tensor(list(stop_ids), device=device)
        found.append(MinNewTokensLengthLogitsProcessor(prompt, sampling.min_new_tokens, ends))
    return found


@torch.inference_mode()
def _by_transformers(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[tuple[Sequence[int], int]],
    sampling: Sampling,
    samples: int,
    on_end: Callable[[int, list[list[int]]], None],
) -> None:
    """Prompts are filled up on the left."""
    size = max(1, SLOTS * wider(loaded.device) // sampling.beams)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number][0]))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        width = max(len(prompts[number][0]) for number in batch)
        fill = encoder.stop_ids[0]
        gaps = [width - len(prompts[number][0]) for number in batch]
        ids = [[fill] * gap + list(prompts[number][0]) for number, gap in zip(batch, gaps, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        made: Any = loaded.model.generate(
            input_ids=torch.tensor(ids, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            max_new_tokens=min(sampling.max_new_tokens, loaded.context_length - width),
            eos_token_id=list(encoder.stop_ids),
            pad_token_id=fill,
            num_return_sequences=samples,
            **_options(sampling),
        )
        for number, rows in zip(batch, made[:, width:].view(len(batch), samples, -1).tolist(), strict=True):
            on_end(number, [_to_its_end(row, encoder.stop_ids) for row in rows])


def _to_its_end(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]


def _options(sampling: Sampling) -> dict[str, Any]:
    return {
        "num_beams": sampling.beams,
        "length_penalty": sampling.length_penalty,
        "do_sample": False,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size or 0,
        "min_new_tokens": sampling.min_new_tokens or None,
    }
