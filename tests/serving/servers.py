"""Servers in a thread, with the real engine or with one that writes what a test tells it to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from finespun.data.templates import Encoder
from finespun.generation.engine import Completion
from finespun.serving.server import ModelServer
from finespun.serving.service import ServedModel, Service, load_served
from finespun.serving.settings import ServerSettings
from finespun.serving.worker import EngineThread
from finespun.web import listen


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    server: ModelServer
    thread: threading.Thread
    key: str | None = None

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **options)

    def post(self, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def stop(self) -> None:
        self.server.handle_exit(15, None)


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def running(
    load: Callable[[str, str, ServerSettings], ServedModel] = load_served,
    sources: dict[str, str] | None = None,
    api_key: str | None = None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Running]:
    chosen = ServerSettings(port=0, **settings)
    service = Service(chosen, sources or {"m": "m"}, api_key, load)
    server = ModelServer(service)
    with listen(chosen.host, chosen.port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        it = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, thread, api_key)
        wait_until(lambda: server.started and (service.ready or not wait))
        try:
            yield it
        finally:
            it.stop()
            thread.join(30)
    assert not thread.is_alive()


@dataclass
class FakeRequest:
    pieces: list[str]
    on_text: Any
    longest: int
    prompt_tokens: int
    completion: Completion | None = None
    error: Exception | None = None
    written: list[str] = field(default_factory=list)


class FakeEngine:
    """Writes a piece a step for each of `slots` texts: those of `script(prompt)`. Steps only while `open` is set."""

    def __init__(self, script: Callable[[str], list[str]], encoder: Encoder, slots: int, seconds: float = 0.0) -> None:
        self.script, self.encoder, self.slots, self.seconds = script, encoder, slots, seconds
        self.active: list[FakeRequest] = []
        self.steps = 0
        self.cancelled_at: list[int] = []
        self.samplings: list[Any] = []
        self.prompts: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.breaks = False

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self, prompt, sampling, sample=0, on_text=None) -> FakeRequest:
        text = self.encoder.decode(prompt, skip_special_tokens=False)
        self.prompts.append(text)
        self.samplings.append(sampling)
        request = FakeRequest(self.script(text), on_text, sampling.max_new_tokens, len(prompt))
        self.active.append(request)
        return request

    def cancel(self, request: FakeRequest) -> None:
        self.active.remove(request)
        self.cancelled_at.append(self.steps)

    def step(self) -> bool:
        self.open.wait()
        self.steps += 1
        time.sleep(self.seconds)
        if self.breaks:
            self.breaks = False
            raise RuntimeError("broken")
        for request in self.active[: self.slots]:
            if request.pieces and len(request.written) < request.longest:
                request.written.append(request.pieces.pop(0))
                request.on_text(request.written[-1], ())
            if not request.pieces or len(request.written) == request.longest:
                reason = "length" if request.pieces else "stop"
                request.completion = Completion(
                    "".join(request.written), reason, request.prompt_tokens, len(request.written), None
                )
        self.active = [request for request in self.active if request.completion is None]
        return bool(self.active)


def fake(
    tokenizer: Any,
    script: Callable[[str], list[str]],
    seconds: float = 0.0,
    tagged: bool = False,
    context: int = 128,
    prompt_format: Any = None,
) -> tuple[Callable[[str, str, ServerSettings], ServedModel], list[FakeEngine]]:
    """A loader of models for `running`, and the engines that it makes."""
    engines: list[FakeEngine] = []

    def load(name: str, source: str, settings: ServerSettings) -> ServedModel:
        chat, raw = Encoder(tokenizer, prompt_format), Encoder(tokenizer, "raw")

        def engine() -> FakeEngine:
            engines.append(FakeEngine(script, chat, settings.slots, seconds))
            return engines[-1]

        opening = tokenizer("<tool_call>\n")["input_ids"] if tagged else []
        return ServedModel(name, chat, raw, context, EngineThread(engine, name), settings.slots, opening)

    return load, engines
