"""Prompts → continuations, many at once and streamed. Knows token ids and the model; how a prompt becomes ids and ids
become text is the encoder's business.

Every pass through the model reads one token of each sequence that is being written and, up to a limit, the prompts of
those that are new. A sequence that ends makes room at once. What a slot has read stays there until it is needed for
something else, so that a prompt that begins like an earlier one is read from where they differ.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from operator import itemgetter
from statistics import fmean
from typing import Literal

import torch

from finespun.data.templates import Encoder
from finespun.errors import DataError, GenerationError
from finespun.generation.beams import beam_search
from finespun.generation.cache import Part, common_beginning, wider
from finespun.generation.constraints import Constraint, constraint_for
from finespun.generation.contrastive import contrastive_search
from finespun.generation.drafting import Draft
from finespun.generation.runner import Reading, SlotRunner, runner_for
from finespun.generation.sampling import Chooser, Guess, largest
from finespun.generation.settings import Sampling
from finespun.generation.text import TextStream
from finespun.models.adapters import LoraAdapter
from finespun.models.linear_cross_entropy import accumulation_type
from finespun.models.load import LoadedModel
from finespun.training.memory import memory_available, tune_memory_use

SLOTS = 64
"""Sequences that are continued at once on a CPU, where memory allows; several times as many on a GPU."""

AT_ONCE = 1024
"""Tokens of one pass on a CPU: of prompts, so many less those that are being written."""

SHARED = 16
"""Beginnings shorter than this are read again rather than copied."""

FOR_CACHE = 0.5
"""Share of the available memory that keys and values may take."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (nats) under the model, before any setting changed it, and the likeliest tokens
    in its place, best first."""

    token: str
    id: int
    logprob: float
    top: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Completion:
    """A continuation. `finish_reason` is "stop" if it ended by itself or at a stop string, "length" if it was cut."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    mean_logprob: float | None = None
    """Of its tokens and the one that ended it, where `logprobs` were asked for."""


OnText = Callable[[str, tuple[TokenLogprob, ...]], None]


@dataclass(eq=False)
class Request:
    """A continuation in the making; `completion` or `error` is there when it has ended."""

    prompt: list[int]
    sampling: Sampling
    encoder: Encoder
    adapter: LoraAdapter | None
    choose: Chooser
    stream: TextStream
    constraint: Constraint | None
    on_text: OnText | None
    room: int
    new: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens, of prompt and continuation, that its slot has."""
    guesses: list[Guess] = field(default_factory=list)
    """What may come next; the pass that is being made verifies it."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent: int = 0
    completion: Completion | None = None
    error: GenerationError | None = None

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.new]

    @property
    def ended(self) -> bool:
        return self.completion is not None or self.error is not None

    def result(self) -> Completion:
        """The completion of one that has ended; raises its error."""
        if self.error:
            raise self.error
        assert self.completion is not None  # it has ended
        return self.completion

    def emit(self, piece: str) -> None:
        """Hands on what has become certain, with the tokens since the last time."""
        if piece and self.on_text:
            self.on_text(piece, tuple(self.logprobs[self.unsent :]))
            self.unsent = len(self.logprobs)

    def take(self, token: int) -> None:
        """Adds `token`, which may end it."""
        if token in self.encoder.stop_ids:
            self.finish("stop")
            return
        self.new.append(token)
        self.emit(self.stream.push(token))
        if self.constraint:
            self.constraint.take(token)
        if self.stream.stopped or (self.constraint and self.constraint.must_end):
            self.finish("stop")
        elif len(self.new) >= self.room:
            self.finish("length")

    def finish(self, reason: Literal["stop", "length"]) -> None:
        """Ends it."""
        self.emit(self.stream.rest(cut=reason == "length"))
        logprobs, mean = None, None
        if self.sampling.logprobs is not None:
            logprobs, mean = tuple(self.logprobs[: len(self.new)]), fmean(token.logprob for token in self.logprobs)
        self.completion = Completion(self.stream.text, reason, len(self.prompt), len(self.new), logprobs, mean)


def new_request(
    loaded: LoadedModel,
    encoder: Encoder,
    prompt: Sequence[int],
    sampling: Sampling,
    sample: int = 0,
    on_text: OnText | None = None,
    adapter: LoraAdapter | None = None,
) -> Request:
    """A request of which nothing is written yet. Raises as `Engine.add`."""
    room = room_behind(prompt, sampling, loaded.context_length)
    vocabulary = _vocabulary(loaded)
    unknown = [token for token in sampling.logit_bias if not 0 <= token < vocabulary]
    if unknown:
        raise GenerationError(f"logit_bias: there is no token {unknown[0]}; ids go to {vocabulary - 1}.")
    return Request(
        list(prompt),
        sampling,
        encoder,
        adapter,
        Chooser(sampling, sample, encoder.stop_ids, prompt),
        TextStream(encoder, sampling.stop),
        constraint_for(sampling, encoder.tokenizer, encoder.stop_ids, vocabulary),
        on_text,
        room,
    )


class Engine:
    """Continues requests of one model, at most `slots` at once (by default what suits the device), and as many under
    each of the `adapters` beside it. The tokens that requests want to have guessed are what `draft`, a smaller model,
    would write; without one, what followed earlier in the text. For one thread. Raises `GenerationError` for a draft
    with other tokens."""

    def __init__(
        self,
        loaded: LoadedModel,
        encoder: Encoder,
        slots: int | None = None,
        adapters: Sequence[LoraAdapter] = (),
        draft: LoadedModel | None = None,
    ) -> None:
        tune_memory_use()
        self._loaded, self._encoder = loaded, encoder
        self._runner = runner_for(loaded, adapters)
        self._slots: list[Request | None] = []
        self._held: list[tuple[LoraAdapter | None, list[int]]] = []  # what the slots have read for what has ended
        self._used: list[int] = []  # the pass in which a slot was given away
        self._passes = 0
        self._waiting: deque[Request] = deque()
        self._wider = wider(loaded.device)
        self._each, self._models, self._capacity = slots or SLOTS * self._wider, 1 + len(adapters), 0
        self._draft = Draft(draft, encoder, _vocabulary(loaded)) if draft else None
        self._cache_tokens = _cache_tokens(loaded, draft)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        sample: int = 0,
        on_text: OnText | None = None,
        adapter: LoraAdapter | None = None,
        encoder: Encoder | None = None,
    ) -> Request:
        """A new request, which the coming passes continue; the `sample`-th of its prompt. `on_text` gets each new piece
        of text as soon as it is certain, with the log-probabilities of its tokens if these are asked for. `adapter` is
        one of the engine's, `encoder` the one that goes with it. Raises `DataError` for a prompt that leaves no room in
        the model's context, `GenerationError` for a constraint that cannot be followed."""
        if given := sampling.changed("beams", "best_of", "contrastive_alpha"):
            raise GenerationError(f"{given[0]}: is for prompts that are all there at the beginning.")
        request = new_request(self._loaded, encoder or self._encoder, prompt, sampling, sample, on_text, adapter)
        self._waiting.append(request)
        return request

    @contextmanager
    def running(self) -> Generator[None]:
        """Around many steps, each of which is then a millisecond faster. Inside, the model is the engine's alone."""
        with self._runner.attending(), self._draft.running() if self._draft else nullcontext():
            yield

    def cancel(self, request: Request) -> None:
        """Ends a request, whose slot is free at once; nothing happens to one that has ended."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._slots:
            self._release(self._slots.index(request))

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass through the model; whether there is more to do."""
        self._passes += 1
        self._admit()
        readings = self._readings()
        if readings:
            with self._runner.attending():
                logits = self._runner.logits([reading for _, reading in readings])
            for request, reading in readings:
                request.computed += len(reading.part.ids)
            asked = zip(readings, logits, strict=True)
            self._continue([(request, reading, rows) for (request, reading), rows in asked if reading.wanted])
        for slot, request in enumerate(self._slots):
            if request is not None and request.ended:
                self._release(slot)
        return bool(self._waiting) or any(self._slots)

    def _admit(self) -> None:
        """Gives slots to those that wait."""
        admitted: list[Request] = []
        ready = self._ready()
        active = sum(slot is not None for slot in self._slots)
        for request in ready:
            if any(
                request.adapter is other.adapter and common_beginning(request.prompt, other.prompt) >= SHARED
                for other in admitted
            ):
                continue  # once that one is read, its beginning can be copied
            slot = self._free_slot(request, active + len(ready))
            if slot is None:
                return
            self._waiting.remove(request)
            source, common = self._most_in_common(request)
            if common >= SHARED and isinstance(self._runner, SlotRunner):
                if source != slot:
                    self._runner.copy(source, slot, self._runner.begin + common)
                request.computed = common
            else:
                self._runner.start(slot)
            self._slots[slot], self._used[slot] = request, self._passes
            if not request.computed:
                admitted.append(request)

    def _ready(self) -> list[Request]:
        """Those that wait and may have a slot: in their order, but of all adapters the first before the second of
        any."""
        counts = Counter(request.adapter for request in self._slots if request is not None)
        found: list[tuple[int, Request]] = []
        for request in self._waiting:
            if counts[request.adapter] < self._each:
                counts[request.adapter] += 1
                found.append((counts[request.adapter], request))
        return [request for _, request in sorted(found, key=itemgetter(0))]

    def _free_slot(self, request: Request, wanted: int) -> int | None:
        """A slot with room for `request`, of as many as are `wanted` in all: the one that begins like it, or the one
        that was given away longest ago."""
        need = self._runner.begin + len(request.prompt) + request.room
        capacity = max(self._capacity, -(-need // 64) * 64)
        most = max(1, min(self._each * self._models, self._cache_tokens // capacity))
        active = sum(slot is not None for slot in self._slots)
        if active >= most:
            return None
        if len(self._slots) > most:  # there would be too much of the larger ones
            if active:
                return None
            self._runner.clear()
            if self._draft:
                self._draft.clear()
            self._slots, self._held, self._used, self._capacity = [], [], [], 0
        wanted = min(most, wanted if self._models == 1 else max(wanted, self._models))
        if capacity > self._capacity or wanted > len(self._slots):
            new = max(0, wanted - len(self._slots))
            self._slots += [None] * new
            self._held += [(None, [])] * new
            self._used += [0] * new
            self._capacity = capacity
            self._runner.resize(len(self._slots), capacity)
            if self._draft:
                self._draft.resize(len(self._slots), capacity)
        free = [slot for slot, taken in enumerate(self._slots) if taken is None]
        return min(free, key=lambda slot: (-(self._in_common(request, slot) // SHARED), self._used[slot], slot))

    def _most_in_common(self, request: Request) -> tuple[int, int]:
        """The slot that has read most of the beginning of a prompt, and how much; at least two tokens are left, since
        one alone is computed in other products than among others, and a text would depend on what was asked before."""
        if not isinstance(self._runner, SlotRunner):
            return 0, 0
        common = [self._in_common(request, slot) for slot in range(len(self._slots))]
        best = max(range(len(common)), key=common.__getitem__)
        return best, min(common[best], max(0, len(request.prompt) - 2))

    def _in_common(self, request: Request, slot: int) -> int:
        """How much of the beginning of a prompt a slot has read, under the same adapter."""
        other = self._slots[slot]
        adapter, ids = self._held[slot] if other is None else (other.adapter, other.prompt[: other.computed])
        return common_beginning(request.prompt, ids) if adapter is request.adapter else 0

    def _readings(self) -> list[tuple[Request, Reading]]:
        """What the next pass reads: the last token, and guesses behind it, of all that are being written; then prompts,
        as far as they fit."""
        found: list[tuple[Request, Reading]] = []
        begin = self._runner.begin
        unread: list[tuple[int, Request]] = []
        written: list[tuple[int, Request]] = []
        for slot, request in enumerate(self._slots):
            if request is not None:
                begun = request.new and request.computed == len(request.prompt) + len(request.new) - 1
                (written if begun else unread).append((slot, request))
        self._guess(written)
        for slot, request in written:
            ids = [request.new[-1], *(guess.token for guess in request.guesses)]
            found.append((request, Reading(Part(slot, begin + request.computed, ids), len(ids), request.adapter)))
        left = max(SHARED, AT_ONCE * self._wider - len(found))
        for slot, request in unread:
            rest = request.prompt[request.computed :]
            ids = rest[: left - (len(rest) == left + 1)]  # none is read alone, see `_most_in_common`
            if len(ids) < min(2, len(rest)):
                break
            done = request.computed + len(ids) == len(request.prompt)
            found.append((request, Reading(Part(slot, begin + request.computed, ids), int(done), request.adapter)))
            left -= len(ids)
        return found

    def _guess(self, written: Sequence[tuple[int, Request]]) -> None:
        """Gives each request that wants them guesses at its next tokens."""
        wanting: list[tuple[int, Request, int]] = []
        for slot, request in written:
            request.guesses = []
            most = min(request.sampling.draft_tokens, request.room - len(request.new) - 1)
            if most > 0 and not request.constraint and isinstance(self._runner, SlotRunner):
                wanting.append((slot, request, most))
        if self._draft:
            guessed = self._draft.propose(wanting)
        else:
            guessed = [_look_up(request.ids, most) for _, request, most in wanting]
        for (_, request, _), guesses in zip(wanting, guessed, strict=True):
            request.guesses = guesses

    def _continue(self, done: Sequence[tuple[Request, Reading, torch.Tensor]]) -> None:
        """Chooses the next token of each, and ends those that end."""
        plainly = [
            request.choose.takes_the_largest and request.constraint is None and request.sampling.logprobs is None
            for request, _, _ in done
        ]
        alike = [rows for (_, _, rows), plain in zip(done, plainly, strict=True) if plain]
        tokens = iter(largest(torch.cat(alike)) if alike else [])
        for (request, reading, rows), plain in zip(done, plainly, strict=True):
            chosen = [next(tokens) for _ in range(reading.wanted)] if plain else None
            for number in range(reading.wanted):
                guess = request.guesses[number] if number < len(request.guesses) else None
                try:
                    token = chosen[number] if chosen else self._choose(request, rows[number], guess)
                    request.take(token)
                except GenerationError as error:  # the others go on
                    request.error = error
                    break
                if request.ended or guess is None or token != guess.token:
                    break
            request.computed = len(request.prompt) + len(request.new) - 1

    def _choose(self, request: Request, logits: torch.Tensor, guess: Guess | None) -> int:
        constraint = request.constraint
        if guess is not None:
            token = request.choose.verify(guess, request.prompt, request.new, logits)
        else:
            allowed = constraint.allowed() if constraint else None
            token = request.choose(request.prompt, request.new, logits, allowed)
        if request.sampling.logprobs is not None:
            request.logprobs.append(_logprob(request.encoder, token, logits, request.sampling.logprobs))
        return token

    def _release(self, slot: int) -> None:
        request = self._slots[slot]
        assert request is not None  # only taken slots are released
        self._held[slot] = request.adapter, request.ids[: request.computed]
        self._slots[slot] = None


def _logprob(encoder: Encoder, token: int, logits: torch.Tensor, count: int) -> TokenLogprob:
    def piece(token: int) -> str:
        return encoder.decode([token], skip_special_tokens=False)

    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(count)
    top = tuple((piece(i), i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(piece(token), token, float(logprobs[token]), top)


def _look_up(ids: list[int], most: int) -> list[Guess]:
    """What followed, earlier in `ids`, on the tokens that are the last (Saxena 2023)."""
    for length in (3, 2):
        last = ids[-length:]
        for at in range(len(ids) - length - 1, -1, -1):
            if ids[at : at + length] == last:
                return [Guess(token) for token in ids[at + length : at + length + most]]
    return []


def _vocabulary(loaded: LoadedModel) -> int:
    return int(loaded.causal_lm.config.get_text_config().vocab_size)


def _cache_tokens(loaded: LoadedModel, draft: LoadedModel | None = None) -> int:
    """Tokens whose keys and values, and those of a draft, may be held."""
    bytes_of_token = _bytes_of_token(loaded) + (_bytes_of_token(draft) if draft else 0)
    return int(FOR_CACHE * memory_available(loaded.device, None) / bytes_of_token)


def _bytes_of_token(loaded: LoadedModel) -> int:
    """Bytes that the keys and values of one token take, by the model's config."""
    model = loaded.causal_lm
    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    of_number = accumulation_type(model.dtype).itemsize + model.dtype.itemsize
    return config.num_hidden_layers * heads * dim * of_number


def generate(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int = 1,
    on_text: Callable[[int, int, str], None] | None = None,
    draft: LoadedModel | None = None,
    on_end: Callable[[int, int, Completion], None] = lambda prompt, sample, completion: None,
) -> list[list[Completion]]:
    """For each prompt (token ids) `samples` continuations.

    `on_text(prompt, sample, text)` gets each new piece of text as soon as it is certain, `on_end` each text that has
    ended, where they are not the best of several; `draft` guesses tokens, where
    `sampling` wants that. Raises `DataError` for a prompt that leaves no room in the model's context, `GenerationError`
    for a constraint that cannot be followed, or a draft with other tokens.
    """
    for number, prompt in enumerate(prompts, 1):
        try:
            room_behind(prompt, sampling, loaded.context_length)
        except DataError as error:
            raise DataError(f"Prompt {number}: {error}") from None
    if sampling.beams > 1 or sampling.contrastive_alpha > 0:
        if draft:
            raise GenerationError("draft: beam search and contrastive search follow several texts and take no draft.")
        return _searched(loaded, encoder, prompts, sampling, samples, on_text, on_end)
    if sampling.best_of > 1:
        return _likeliest(loaded, encoder, prompts, sampling, samples, draft)
    engine = Engine(loaded, encoder, draft=draft)
    requests: dict[tuple[int, int], Request] = {}
    found: dict[tuple[int, int], Completion] = {}
    # prompts of a length stand side by side, and the longest do not come last, alone
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        for sample in range(samples):
            emit = _emitter(on_text, number, sample)
            requests[number, sample] = engine.add(prompts[number], sampling, sample, emit)
    with engine.running():
        while requests:
            engine.step()
            for place in [place for place, request in requests.items() if request.ended]:
                found[place] = requests.pop(place).result()
                on_end(*place, found[place])
    return [[found[number, sample] for sample in range(samples)] for number in range(len(prompts))]


def room_behind(prompt: Sequence[int], sampling: Sampling, context: int) -> int:
    """Tokens that a continuation of `prompt` may have. Raises `DataError` where that is none."""
    if len(prompt) >= context:
        raise DataError(
            f"The prompt has {len(prompt)} tokens and the model's context {context}: nothing could follow it. "
            "Shorten it."
        )
    return min(sampling.max_new_tokens, context - len(prompt))


def _likeliest(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int,
    draft: LoadedModel | None,
) -> list[list[Completion]]:
    """Of each `best_of` continuations the one whose tokens are likeliest on average."""
    count, asked = sampling.best_of, sampling.logprobs is not None
    each = sampling.model_copy(update={"best_of": 1, "logprobs": sampling.logprobs or 0})
    found = []
    for drawn in generate(loaded, encoder, prompts, each, samples * count, draft=draft):
        groups = (drawn[first : first + count] for first in range(0, len(drawn), count))
        best = [max(group, key=lambda completion: completion.mean_logprob or 0.0) for group in groups]
        found.append(best if asked else [replace(one, logprobs=None, mean_logprob=None) for one in best])
    return found


def _searched(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int,
    on_text: Callable[[int, int, str], None] | None,
    on_end: Callable[[int, int, Completion], None],
) -> list[list[Completion]]:
    """By beam search, of which nothing is certain before the end, or by contrastive search."""
    requests = [
        [
            new_request(loaded, encoder, prompt, sampling, sample, _emitter(on_text, number, sample))
            for sample in range(samples)
        ]
        for number, prompt in enumerate(prompts)
    ]
    if sampling.beams > 1:

        def write(number: int, texts: Sequence[Sequence[int]]) -> None:
            for sample, (request, ids) in enumerate(zip(requests[number], texts, strict=True)):
                _write(request, ids)
                on_end(number, sample, request.result())

        asked = [(of_prompt[0].prompt, of_prompt[0].room) for of_prompt in requests]
        beam_search(loaded, encoder, asked, sampling, samples, _cache_tokens(loaded), write)
    elif samples > 1:
        raise GenerationError("contrastive_alpha: contrastive search gives one text for a prompt; leave out samples.")
    else:
        alone = [request for (request,) in requests]
        contrastive_search(
            *(loaded, alone, sampling, _cache_tokens(loaded)),
            on_end=lambda number: on_end(number, 0, alone[number].result()),
        )
    return [[request.result() for request in of_prompt] for of_prompt in requests]


def _write(request: Request, ids: Sequence[int]) -> None:
    for token in ids:
        request.take(token)
        if request.ended:
            return
    request.finish("length")


def _emitter(on_text: Callable[[int, int, str], None] | None, number: int, sample: int) -> OnText | None:
    return (lambda text, logprobs: on_text(number, sample, text)) if on_text else None
