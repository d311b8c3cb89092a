"""What all requests of a server share: the models, the texts that are being written, and when it has to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finespun.data.templates import Encoder
from finespun.errors import FinespunError, RecipeError
from finespun.generation.engine import Completion, Engine
from finespun.generation.settings import Sampling
from finespun.models.adapters import Base, load_lora, shared_base
from finespun.models.load import load_model, load_tokenizer
from finespun.serving.errors import ApiError, busy
from finespun.serving.llama_cpp import LlamaCpp, gguf_of
from finespun.serving.metrics import Metrics
from finespun.serving.protocol import Usage
from finespun.serving.settings import ServerSettings
from finespun.serving.tools import OPEN
from finespun.serving.vllm import end_starting, vllm_for
from finespun.serving.worker import Accepted, AdapterOfEngine, Backend, BackendFailed, EngineThread, Event, Piece

log = logging.getLogger("finespun.serving")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class ServedModel:
    """A model that can be asked for by its name.

    `chat` puts conversations through the template, `raw` takes texts as they are. `call_opening` are the ids with which
    a call of a tool begins, for templates that write calls between tags; empty for others.
    """

    name: str
    chat: Encoder
    raw: Encoder
    context_length: int
    backend: Backend
    slots: int
    call_opening: list[int]
    created: int = field(default_factory=lambda: int(time.time()))
    in_flight: int = 0
    """Texts that are being written or wait for a slot."""
    seconds: float = 1.0
    """About how long a text took of late."""

    @property
    def vocabulary(self) -> int:
        return len(self.chat.tokenizer)

    @property
    def tagged_calls(self) -> bool:
        return bool(self.call_opening)


def load_served(name: str, source: str, settings: ServerSettings) -> ServedModel:
    """The model at `source` with the engine that `settings` name. Raises the errors of `load_model`, and `ModelError`
    for what llama.cpp or vLLM cannot run."""
    if settings.engine == "finespun":
        loaded = load_model(source, settings.precision)
        chat = Encoder(loaded.tokenizer)
        thread = EngineThread(lambda: Engine(loaded, chat, settings.slots), name)
        return _served(name, chat, loaded.context_length, thread, settings)
    tokenizer, context = load_tokenizer(source)
    chat = Encoder(tokenizer)
    backend: Backend
    if settings.engine == "llama.cpp":
        exact = settings.quantization == "f32"
        backend = LlamaCpp(gguf_of(source, chat, settings.quantization), context, settings.slots, exact)
    else:
        backend = vllm_for(name, source, chat, context, settings)
    return _served(name, chat, context, backend, settings)


class Loader:
    """Loads `sources` one after the other. Plain LoRA adapters of the same weights, and these themselves, share them in
    memory and are written for by one of finespun's engines, each with slots of its own; llama.cpp has one for each."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._bases: dict[str, Base | None] = {}
        self._loaded: dict[str, ServedModel] = {}

    def __call__(self, name: str, source: str, settings: ServerSettings) -> ServedModel:
        """The model called `name` at `source`. Raises as `load_served` does."""
        if settings.engine != "finespun" or len(self._sources) == 1:
            return load_served(name, source, settings)
        if not self._bases:
            self._bases = {each: shared_base(place, settings.precision) for each, place in self._sources.items()}
        if name not in self._loaded:
            base = self._bases[name]
            alike = {each: place for each, place in self._sources.items() if self._bases[each] == base}
            if base is None or len(alike) == 1:
                return load_served(name, source, settings)
            self._loaded |= load_together(base, alike, settings)
        return self._loaded.pop(name)


def load_together(base: Base, sources: Mapping[str, str], settings: ServerSettings) -> dict[str, ServedModel]:
    """The models at `sources`, which have `base` in common as `shared_base` says, with one engine for all that can
    share it, and engines of their own for the others. Raises as `load_served` does."""
    loaded = base.load()
    adapters = {name: load_lora(loaded, source) for name, source in sources.items()}
    sharing = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    served = {name: load_served(name, sources[name], settings) for name in sources.keys() - sharing.keys()}
    if sharing:
        encoders = {name: Encoder(load_tokenizer(sources[name])[0]) for name in sharing}
        some = next(iter(encoders.values()))
        together = list(sharing.values())
        thread = EngineThread(lambda: Engine(loaded, some, settings.slots, together), "+".join(sharing))
        for name, adapter in sharing.items():
            backend = AdapterOfEngine(thread, adapter, encoders[name])
            served[name] = _served(name, encoders[name], loaded.context_length, backend, settings)
    return served


def _served(name: str, chat: Encoder, context_length: int, backend: Backend, settings: ServerSettings) -> ServedModel:
    raw = chat if chat.prompt_format == "raw" else Encoder(chat.tokenizer, "raw")
    opening: list[int] = []
    if OPEN in str(chat.tokenizer.chat_template):
        opening = list(chat.tokenizer(OPEN + "\n", add_special_tokens=False)["input_ids"])
    return ServedModel(name, chat, raw, context_length, backend, settings.slots, opening)


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """Model names → where each is. A name can be given (`stories=runs/a`); else it is that of the folder or file, or
    the known name or hub id as it is. Raises `RecipeError` for a name given twice."""
    named: dict[str, str] = {}
    for source in sources:
        name, equals, place = source.partition("=")
        if not equals or Path(source).exists():
            path, place = Path(source), source
            name = path.resolve().name if path.is_dir() else path.stem if path.suffix.lower() == ".gguf" else source
        if not name or not place:
            raise RecipeError(f"{source!r} should be a model, or NAME=MODEL.")
        if name in named:
            raise RecipeError(
                f"Two models would be called {name!r}: {named[name]} and {place}. Name one: other-name={place}"
            )
        named[name] = place
    return named


class Asked(NamedTuple):
    """What a backend is asked for."""

    prompts: list[list[int]]
    sampling: Sampling
    tools: list[str]
    """Names of the tools that may be called."""
    forced: bool = False
    """The prompts end with the opening of a call, which the texts go on with."""


class Service:
    """The state of a server. Everything in it belongs to the event loop."""

    def __init__(
        self,
        settings: ServerSettings,
        sources: Mapping[str, str],
        api_key: str | None = None,
        load: Callable[[str, str, ServerSettings], ServedModel] | None = None,
    ) -> None:
        self.settings = settings
        self.sources = dict(sources)
        self.api_key = api_key
        self.models: dict[str, ServedModel] = {}
        self.answers: set[Answer] = set()
        self.draining = False
        self.failure: Exception | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = Metrics(self.models)
        self._load = load or Loader(sources)

    @property
    def ready(self) -> bool:
        return not self.draining and self.models.keys() == self.sources.keys() and self.healthy

    @property
    def healthy(self) -> bool:
        return all(model.backend.alive for model in self.models.values())

    async def load_models(self) -> None:
        """Loads one model after the other; the server answers meanwhile. An error is kept in `failure`."""
        try:
            for name, source in self.sources.items():
                self.models[name] = await asyncio.to_thread(self._load, name, source, self.settings)
                log.info("model loaded", extra={"fields": {"model": name}})
        except Exception as error:
            self.failure = error
            self.on_failure()
        else:
            self.on_ready()

    def model(self, name: str) -> ServedModel:
        """The model called `name`. Raises `ApiError`: 404 for one that is not served, 503 for one that is not ready."""
        if name not in self.sources:
            known = ", ".join(self.sources)
            raise ApiError(
                404, f"The model {name!r} is not served here. Served: {known}", "model_not_found", param="model"
            )
        model = self.models.get(name)
        if model is None:
            raise busy("The model is being loaded.", 5)
        if self.draining or not model.backend.alive:
            raise busy("The server is shutting down." if self.draining else "The model has stopped working.", 30)
        return model

    def end_answers(self) -> None:
        """Ends all texts that are still being written."""
        for answer in list(self.answers):
            answer.fail(busy("The server is shutting down.", 30))

    async def close(self) -> None:
        await asyncio.to_thread(end_starting)
        for model in self.models.values():
            await asyncio.to_thread(model.backend.close)


class Answer:
    """The texts of one request, from their place in the queue to their ends.

    Made, it holds places for `count` texts (429 where there are none); `begin` starts them, `events` gives what is
    written, `close` gives back what is not used any more, whatever happened.
    """

    def __init__(self, service: Service, model: ServedModel, count: int, record: dict[str, Any]) -> None:
        self.model = model
        self.count = count
        self.deadline = asyncio.get_running_loop().time() + service.settings.timeout_seconds
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: deque[tuple[int, Event]] = deque()  # what some texts got while others were not accepted yet
        self._cancels: dict[int, Callable[[], None]] = {}
        self._held = 0
        self._record = record
        self._started = time.monotonic()
        if count > model.slots:
            raise ApiError(
                400, f"{count} texts in one request are too many; {model.slots} are written at once.", param="n"
            )
        waiting = model.in_flight + count - model.slots
        if waiting > service.settings.max_queue:
            raise busy(
                f"{model.in_flight} texts are being written or wait already.",
                model.seconds * max(1, waiting / model.slots),
                status=429,
            )
        model.in_flight += count
        self._held = count
        service.answers.add(self)

    async def begin(self, asked: Asked, n: int) -> None:
        """Starts `n` texts for each prompt, and returns when all are accepted. Raises what is wrong with them."""
        self._record |= {"prompt_tokens": sum(map(len, asked.prompts)), "completion_tokens": 0}
        for number, prompt in enumerate(asked.prompts):
            for sample in range(n):
                index = number * n + sample
                self._cancels[index] = self.model.backend.start(prompt, asked.sampling, sample, self._poster(index))
        accepted = 0
        while accepted < len(self._cancels):
            index, event = await self._next()
            if isinstance(event, Accepted):
                accepted += 1
            else:
                self._early.append((index, event))

    async def events(self) -> AsyncIterator[tuple[int, Piece | Completion]]:
        """(number of the text, next piece of it or its end), until all have ended. Raises `ApiError` where the time is
        over or the server stops, `ClientGone` where nobody waits."""
        while self._cancels:
            index, event = self._early.popleft() if self._early else await self._next()
            if isinstance(event, Completion):
                self._ended(index, event)
            elif isinstance(event, Piece):
                self._record.setdefault("first_token_seconds", round(time.monotonic() - self._started, 4))
            if isinstance(event, Piece | Completion):
                yield index, event

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many texts follow it."""
        prompt, completion = self._record["prompt_tokens"], self._record["completion_tokens"]
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def fail(self, error: Exception) -> None:
        """Makes whoever waits for what is next get `error`."""
        self._events.put_nowait((-1, error))

    def close(self) -> None:
        """Cancels what is still being written and gives its places to others."""
        for cancel in self._cancels.values():
            cancel()
        self._cancels.clear()
        self._release(self._held)
        self._service.answers.discard(self)

    def _ended(self, index: int, completion: Completion) -> None:
        del self._cancels[index]
        self._release(1)
        self.model.seconds += 0.1 * (time.monotonic() - self._started - self.model.seconds)
        self._record["completion_tokens"] += completion.completion_tokens
        if self._service.settings.log_prompts:
            self._record.setdefault("texts", []).append(completion.text)

    def _poster(self, index: int) -> Callable[[Event], None]:
        def post(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was made to stop at once
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return post

    async def _next(self) -> tuple[int, Event]:
        try:
            async with asyncio.timeout_at(self.deadline):
                index, event = await self._events.get()
        except TimeoutError:
            raise busy("The request took too long.", self.model.seconds) from None
        if isinstance(event, BackendFailed):
            raise busy(f"{event}. Ask again.") from event
        if isinstance(event, FinespunError):
            raise ApiError(400, str(event)) from event
        if isinstance(event, Exception):
            raise event
        return index, event

    def _release(self, count: int) -> None:
        self._held -= count
        self.model.in_flight -= count
