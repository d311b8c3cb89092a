"""The thread that runs an engine, and the door by which other backends come in."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finespun.data.templates import Encoder
from finespun.generation.engine import Completion, Engine, Request, TokenLogprob
from finespun.generation.settings import Sampling
from finespun.models.adapters import LoraAdapter

log = logging.getLogger("finespun.serving")

CLOSE_SECONDS = 30.0
"""What a step that is being taken may still take when the server ends; the process ends without it then."""


@dataclass(frozen=True)
class Accepted:
    """A continuation was begun, or waits for a slot: nothing is wrong with what was asked."""


@dataclass(frozen=True)
class Piece:
    """The next piece of a text, with the log-probabilities of the tokens in it where they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class BackendFailed(Exception):
    """A backend broke while it wrote; what it was asked may be asked again."""


Event = Accepted | Piece | Completion | Exception


class Backend(Protocol):
    """What continues token ids under one model. Its methods return at once and may be called from any thread."""

    @property
    def alive(self) -> bool:
        """False once it cannot write any more."""

    def start(
        self, prompt: Sequence[int], sampling: Sampling, sample: int, post: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Begins a continuation. `post`, called from any thread, gets `Accepted`, pieces and then the `Completion`; or
        an exception and nothing after it: a `FinespunError` says what is wrong with the request. What is returned
        cancels the continuation, after which something may still be posted."""

    def close(self) -> None:
        """Ends it, with whatever it is writing."""


@dataclass(eq=False)
class _Job:
    prompt: Sequence[int]
    sampling: Sampling
    sample: int
    post: Callable[[Event], None]
    options: dict[str, Any]
    request: Request | None = None


@dataclass
class EngineThread:
    """Our own engine behind the door: a thread in which all of it happens, one step after another; between two steps
    it takes what has come in. `make` gives a new engine, also after one has broken."""

    make: Callable[[], Engine]
    name: str = "engine"
    _inbox: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)
    _jobs: list[_Job] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._engine = self.make()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(
        self, prompt: Sequence[int], sampling: Sampling, sample: int, post: Callable[[Event], None], **options: Any
    ) -> Callable[[], None]:
        """As any backend's; `options` are what else `Engine.add` takes."""
        job = _Job(prompt, sampling, sample, post, options)
        self._inbox.put(lambda: self._add(job))
        return lambda: self._inbox.put(lambda: self._cancel(job))

    def close(self) -> None:
        self._inbox.put(self._close)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closed:
            with self._engine.running():  # what fails here ends the thread, and `alive` says so
                try:
                    self._write()
                except Exception as error:
                    log.error("engine failed", exc_info=error, extra={"fields": {"model": self.name}})
                    self._fail()
            if not self._closed:
                self._engine = self.make()

    def _write(self) -> None:
        """Takes in, steps and gives out, until the end."""
        working = False
        while not self._closed:
            self._take(wait=not working)
            working = self._engine.step()
            self._deliver()

    def _take(self, wait: bool) -> None:
        """Does all that has come in; with `wait`, until something does."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            command()

    def _add(self, job: _Job) -> None:
        def on_text(text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
            job.post(Piece(text, logprobs))

        try:
            job.request = self._engine.add(job.prompt, job.sampling, job.sample, on_text, **job.options)
        except Exception as error:
            job.post(error)
            return
        self._jobs.append(job)
        job.post(Accepted())

    def _cancel(self, job: _Job) -> None:
        if job in self._jobs and job.request is not None:
            self._jobs.remove(job)
            self._engine.cancel(job.request)

    def _deliver(self) -> None:
        """Posts the ends of the texts that have ended."""
        for job in list(self._jobs):
            if job.request is not None and (end := job.request.completion or job.request.error) is not None:
                self._jobs.remove(job)
                job.post(end)

    def _fail(self) -> None:
        for job in self._jobs:
            job.post(BackendFailed("the engine failed while it wrote this text"))
        self._jobs.clear()

    def _close(self) -> None:
        self._closed = True
        self._fail()


@dataclass
class AdapterOfEngine:
    """One of the models that an engine writes for: `adapter` beside the base, and the encoder that goes with it."""

    thread: EngineThread
    adapter: LoraAdapter
    encoder: Encoder

    @property
    def alive(self) -> bool:
        return self.thread.alive

    def start(
        self, prompt: Sequence[int], sampling: Sampling, sample: int, post: Callable[[Event], None]
    ) -> Callable[[], None]:
        return self.thread.start(prompt, sampling, sample, post, adapter=self.adapter, encoder=self.encoder)

    def close(self) -> None:
        self.thread.close()
