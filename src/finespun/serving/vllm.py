"""vLLM behind the same door, as a process of its own. It gets token ids and gives token ids back, which become text
here: prompts, stops and texts are what they are with our engine.

It listens at a socket in a folder that no other user of the machine can enter; its own key would leave some of its
routes open. Arguments and fields are those of vLLM 0.33.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from finespun.data.templates import Encoder
from finespun.errors import FinespunError, GenerationError, ModelError
from finespun.export.vllm import Adapter, adapter_rank, serve_command
from finespun.generation.engine import Completion, TokenLogprob, room_behind
from finespun.generation.settings import CONSTRAINTS, Sampling
from finespun.generation.text import TextStream
from finespun.models.catalog import locate, weights_sha256
from finespun.models.load import base_of, default_device, faster_precision, read_origin
from finespun.serving.settings import ServerSettings
from finespun.serving.worker import Accepted, BackendFailed, Event, Piece

log = logging.getLogger("finespun.serving")

UNKNOWN = ("beams", "best_of", "contrastive_alpha", "no_repeat_ngram_size", "typical_p")
"""Settings that vLLM does not have, or not for texts that are streamed."""

SEEDS = 1 << 32

POLL_SECONDS = 0.2

END_SECONDS = 20.0
"""What vLLM gets to end by itself."""

LAST_LINES = 25
"""Lines of what it said that are told where it does not start."""

_starting: set[Vllm] = set()


def vllm_for(name: str, source: str, encoder: Encoder, context: int, settings: ServerSettings) -> Vllm:
    """vLLM with the model or adapter at `source`, whose tokenizer has been loaded. Raises `ModelError` for what vLLM
    cannot serve, and where it does not start."""
    precision = settings.precision
    if precision is None:
        trained = read_origin(locate(source).path).get("precision")
        precision = "float32" if trained == "float32" else faster_precision(default_device())
    command = command_for(name, source, context, precision)
    command += ["--max-num-seqs", str(settings.slots), "--structured-outputs-config", '{"backend": "guidance"}']
    command += ["--disable-uvicorn-access-log", *shlex.split(settings.vllm_options)]
    return Vllm(command, name, encoder, context, settings.log_prompts)


def command_for(name: str, source: str, context: int, precision: str) -> list[str]:
    """The `vllm serve` command for the model at `source`, or for an adapter there beside its base. Raises `ModelError`
    for what vLLM cannot serve."""
    folder = locate(source).path
    if folder.suffix.lower() == ".gguf":
        raise ModelError(f"{folder}: vLLM serves model folders. Use --engine llama.cpp for a .gguf file.")
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        return serve_command(name, folder, str(folder), context, precision)
    config, origin = json.loads(config_file.read_text(encoding="utf-8")), read_origin(folder)
    rank = adapter_rank(config)
    if rank is None or origin.get("four_bits"):
        kind = "an adapter beside a base in 4 bits" if rank else "an adapter of this kind"
        raise ModelError(
            f"{source}: vLLM cannot serve {kind} as it was trained. Fold it into its base, and serve that: "
            f"finespun export {source} --to merged"
        )
    if precision == "float32":
        raise ModelError(
            f"{source}: is computed in float32, and vLLM computes adapters in 16 bits only. Give --precision bfloat16, "
            f"with which some texts differ, or fold it into its base: finespun export {source} --to merged"
        )
    base = locate(base_of(folder, origin))
    if base.path.suffix.lower() == ".gguf":
        raise ModelError(f"{source}: its base is {base.path}, and vLLM serves model folders. Use --engine llama.cpp.")
    if "base_sha256" in origin and weights_sha256(base.path) != origin["base_sha256"]:
        raise ModelError(f"{source}: this adapter was trained on other weights than those in {base.path}.")
    adapter = Adapter(str(base.path.absolute()), str(folder.absolute()), rank)
    return serve_command(name, folder, str(folder.absolute()), context, precision, adapter)


def end_starting() -> None:
    """Ends those that are still being started, for which nobody waits any more."""
    for backend in list(_starting):
        backend.close()


class Vllm:
    """A `Backend` that runs the `vllm serve` of `command`, where `model` is the name of what it writes with; ready when
    made. Raises `ModelError` where there is no vLLM, or it ends instead of starting.

    What it says while it starts goes to the log; afterwards, since that can quote a prompt, only with `log_output`."""

    def __init__(
        self, command: Sequence[str], model: str, encoder: Encoder, context: int, log_output: bool = False
    ) -> None:
        self._model, self._encoder, self._context = model, encoder, context
        self._closed = False
        self._logs = True
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        program = _program()
        self._folder = tempfile.TemporaryDirectory(prefix="finespun-", ignore_cleanup_errors=True)
        socket = str(Path(self._folder.name) / "vllm.sock")
        self._process = subprocess.Popen(
            [program, *command[1:], "--uds", socket],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us, who first let texts end
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        )
        self._listener = threading.Thread(target=self._listen, name=f"{model}, output", daemon=True)
        self._listener.start()
        self._loop = asyncio.new_event_loop()
        self._worker = threading.Thread(target=self._loop.run_forever, name=model, daemon=True)
        self._worker.start()
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(max_connections=None)),
            base_url="http://vllm",
            timeout=None,
        )
        _starting.add(self)
        try:
            self._wait(socket)
        except BaseException:
            self.close()
            raise
        finally:
            _starting.discard(self)
        self._logs = log_output

    @property
    def alive(self) -> bool:
        return not self._closed and self._process.poll() is None

    def start(
        self, prompt: Sequence[int], sampling: Sampling, sample: int, post: Callable[[Event], None]
    ) -> Callable[[], None]:
        try:
            room = room_behind(prompt, sampling, self._context)
            body = request_body(self._model, prompt, sampling, sample, self._encoder.stop_ids, room)
        except FinespunError as error:
            post(error)
            return lambda: None
        if not self.alive:
            post(BackendFailed("vLLM has ended"))
            return lambda: None
        reader = _Reader(self._encoder, len(prompt), sampling)
        writing = asyncio.run_coroutine_threadsafe(self._write(body, reader, post), self._loop)

        def cancel() -> None:
            writing.cancel()

        return cancel

    def close(self) -> None:
        """Ends vLLM: SIGTERM, and SIGKILL for whatever of it is left in the end."""
        if self._closed:
            return
        self._closed = True
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that is gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        asyncio.run_coroutine_threadsafe(self._end_streams(), self._loop).result(END_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._worker.join(END_SECONDS)
        self._folder.cleanup()

    async def _end_streams(self) -> None:
        """Waits until those that were being written have noticed, and closes the connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=END_SECONDS / 2)
        await self._client.aclose()

    def _wait(self, socket: str) -> None:
        """Until it is ready; models of many gigabytes take minutes."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://vllm") as client:
            while self.alive:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        return
                time.sleep(POLL_SECONDS)
        self._listener.join(POLL_SECONDS * 5)
        said = "".join(f"\n  {line}" for line in self._last) or " nothing."
        raise ModelError(
            f"vLLM ended (exit code {self._process.poll()}) before it was ready to serve {self._model}. "
            f"What it said last:{said}"
        )

    def _listen(self) -> None:
        """Reads what it says, so that it never waits for a reader, and notices its end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line.rstrip())
            if self._logs:
                log.info("vLLM says", extra={"fields": {"model": self._model, "line": line.rstrip()}})
        code = self._process.wait()
        if not self._closed:
            log.error("vLLM ended", extra={"fields": {"model": self._model, "code": code}})

    async def _write(self, body: dict[str, Any], reader: _Reader, post: Callable[[Event], None]) -> None:
        """Asks, and posts what comes. Only what has begun is accepted: vLLM checks some things when it begins."""
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    post(_refusal(json.loads(await answer.aread())["error"]))
                    return
                accepted = False
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        post(_refusal(event["error"]))
                        return
                    if not accepted:
                        post(Accepted())
                        accepted = True
                    for found in itertools.chain.from_iterable(map(reader.take, event["choices"])):
                        post(found)
                        if isinstance(found, Completion):
                            return
            raise RuntimeError("its answer broke off")
        except (httpx.HTTPError, ValueError, KeyError, RuntimeError) as error:
            post(BackendFailed(f"vLLM: {error or type(error).__name__}"))


def request_body(
    model: str, prompt: Sequence[int], sampling: Sampling, sample: int, stop_ids: Sequence[int], room: int
) -> dict[str, Any]:
    """What vLLM's `/v1/completions` is asked for a continuation of at most `room` tokens. Raises `GenerationError` for
    a setting that it does not know."""
    if given := sampling.changed(*UNKNOWN):
        raise GenerationError(f"The vLLM engine does not know {', '.join(given)}.")
    constraint = next((name for name in CONSTRAINTS if getattr(sampling, name) is not None), None)
    if constraint and sampling.min_new_tokens:
        raise GenerationError(f"The vLLM engine does not take {constraint} and min_new_tokens together.")
    body = {
        "model": model,
        "prompt": list(prompt),
        "stream": True,
        "return_token_ids": True,
        "max_tokens": room,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "stop": [stop for stop in sampling.stop if stop],
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # those that a generation config adds: the stop tokens above are all there are
        "seed": (sampling.seed + sample) % SEEDS,
    }
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if constraint:
        body["structured_outputs"] = _structured(constraint, getattr(sampling, constraint))
    return {name: value for name, value in body.items() if value is not None}


def _structured(constraint: str, value: Any) -> dict[str, Any]:
    """A constraint under vLLM's name; its backend is llguidance, as ours, so that they mean the same."""
    if constraint == "json_schema":
        return {"json": json.dumps(value)}
    return {{"regex": "regex", "choices": "choice", "grammar": "grammar"}[constraint]: value}


class _Reader:
    """What vLLM writes for one request, from token ids to our events, up to where our engine would end it."""

    def __init__(self, encoder: Encoder, prompt_tokens: int, sampling: Sampling) -> None:
        self._encoder, self._prompt_tokens, self._sampling = encoder, prompt_tokens, sampling
        self._stream = TextStream(encoder, sampling.stop)
        self._logprobs: list[TokenLogprob] = []
        self._sent = 0
        self._written = 0

    def take(self, choice: dict[str, Any]) -> Iterator[Piece | Completion]:
        """The events of one chunk. Raises `RuntimeError` where vLLM broke off."""
        logprobs = _logprobs(choice["logprobs"]) if choice.get("logprobs") else itertools.repeat(None)
        for token, logprob in zip(choice["token_ids"], logprobs, strict=False):
            if token in self._encoder.stop_ids:
                yield from self._end("stop")
                return
            self._written += 1
            if logprob:
                self._logprobs.append(self._named(token, *logprob))
            yield from self._piece(self._stream.push(token))
            if self._stream.stopped:
                yield from self._end("stop")
                return
        match choice.get("finish_reason"):
            case None:
                return
            case "stop" | "length" as reason:
                yield from self._end(reason)
            case reason:
                raise RuntimeError(f"it ended the text: {reason}")

    def _piece(self, text: str) -> Iterator[Piece]:
        if text:
            yield Piece(text, tuple(self._logprobs[self._sent :]))
            self._sent = len(self._logprobs)

    def _end(self, reason: Literal["stop", "length"]) -> Iterator[Piece | Completion]:
        yield from self._piece(self._stream.rest(cut=reason == "length"))
        logprobs = None if self._sampling.logprobs is None else tuple(self._logprobs)
        yield Completion(self._stream.text, reason, self._prompt_tokens, self._written, logprobs)

    def _named(self, token: int, logprob: float, top: list[tuple[int, float]]) -> TokenLogprob:
        best = [(self._name(other), other, value) for other, value in top[: self._sampling.logprobs]]
        return TokenLogprob(self._name(token), token, logprob, tuple(best))

    def _name(self, token: int) -> str:
        return self._encoder.decode([token], skip_special_tokens=False)


def _logprobs(given: dict[str, Any]) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """Of each token of a chunk its log-probability, and the likeliest in its place, best first. vLLM puts the token
    itself before them, whatever its rank, and with `return_tokens_as_token_ids` calls each `token_id:` and its id."""
    for logprob, others in zip(given["token_logprobs"], given["top_logprobs"], strict=True):
        top = [(int(name.removeprefix("token_id:")), value) for name, value in others.items()]
        yield logprob, sorted(top, key=lambda one: -one[1])


def _refusal(error: dict[str, Any]) -> Exception:
    """An error that vLLM answers with: of what was asked, or its own."""
    return GenerationError(error["message"]) if error["code"] == 400 else BackendFailed(f"vLLM: {error['message']}")


def _program() -> str:
    """Where `vllm` is: on the path, or where this Python has its programs."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which("vllm", path=places)
    if found is None:
        raise ModelError(
            "The engine vllm needs vLLM, which is not installed here, and a GPU: pip install vllm. Without a GPU, use "
            "--engine finespun or --engine llama.cpp."
        )
    return found
