"""llama.cpp behind the same door, from the `xllamacpp` wheel: a GGUF file of the model, made once and kept, and
llama.cpp's own continuous batching. It gets token ids, so that a prompt is what it is with our engine."""

from __future__ import annotations

import importlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from finespun.data.templates import Encoder
from finespun.errors import GenerationError, ModelError
from finespun.export.folders import fold_in_adapter
from finespun.export.gguf import write_gguf
from finespun.export.settings import Quantization
from finespun.files import data_cache, hash_of
from finespun.generation.engine import Completion, TokenLogprob
from finespun.generation.settings import Sampling
from finespun.models.catalog import weights_sha256
from finespun.models.load import base_of, load_model, locate_model, read_origin
from finespun.serving.worker import Accepted, BackendFailed, Event, Piece

UNKNOWN = (
    "beams",
    "best_of",
    "choices",
    "contrastive_alpha",
    "grammar",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "regex",
)
"""Settings that this backend does not pass on."""

SEEDS = 1 << 32

CACHE_TOKENS = 32_768
"""Keys and values that all texts share, unless the model's context is longer."""


def gguf_of(source: str, encoder: Encoder, quantization: Quantization) -> Path:
    """A GGUF file of the model or adapter at `source`, whose tokenizer has been loaded: out of the cache, or made now.
    Raises what `load_model` and `write_gguf` raise."""
    path = locate_model(source).path
    if path.suffix.lower() == ".gguf":
        return path
    adapter = (path / "adapter_config.json").is_file()
    base = locate_model(base_of(path, read_origin(path))).path if adapter else path
    tokenizer: Any = encoder.tokenizer
    texts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)]
    made_of = [weights_sha256(path), weights_sha256(base), quantization, encoder.stop_ids, texts]
    file = data_cache() / "gguf" / f"{hash_of(made_of)}.gguf"
    if not file.is_file():
        loaded = load_model(source, "float32")
        file.parent.mkdir(parents=True, exist_ok=True)
        fold_in_adapter(loaded, encoder)
        write_gguf(loaded, file, quantization, encoder.stop_ids)
    return file


class LlamaCpp:
    """A `Backend` that runs llama.cpp on `file`, for `slots` texts at once of at most `context` tokens each; `exact`
    keeps keys and values in float32 instead of float16, as our engine does.

    llama.cpp listens at a free port of this machine alone, and takes only what carries a key of this process."""

    def __init__(self, file: Path, context: int, slots: int, exact: bool = False) -> None:
        try:
            xllamacpp: Any = importlib.import_module("xllamacpp")
        except ImportError:
            raise ModelError("llama.cpp needs the package xllamacpp: pip install 'finespun[llama-cpp]'") from None
        key = secrets.token_hex(16)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        parameters.api_keys = [key]
        parameters.n_parallel = slots
        parameters.kv_unified = True
        parameters.n_ctx = max(context, min(context * slots, CACHE_TOKENS))
        parameters.n_gpu_layers = -1
        parameters.verbosity = 1
        if exact:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)
        self._client = httpx.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=None,
            limits=httpx.Limits(max_connections=None),
        )
        self._closed = False
        self._client.post("/completion", json={"prompt": [1], "n_predict": 1})  # one that has done nothing never ends

    @property
    def alive(self) -> bool:
        return not self._closed

    def start(
        self, prompt: Sequence[int], sampling: Sampling, sample: int, post: Callable[[Event], None]
    ) -> Callable[[], None]:
        cancelled = threading.Event()
        try:
            body = json.dumps(request_body(prompt, sampling, sample))
        except GenerationError as error:
            post(error)
            return cancelled.set
        threading.Thread(target=self._write, args=(body, len(prompt), post, cancelled), daemon=True).start()
        return cancelled.set

    def close(self) -> None:
        self._closed = True
        self._client.close()

    def _write(self, body: str, prompt_tokens: int, post: Callable[[Event], None], cancelled: threading.Event) -> None:
        try:
            with self._client.stream("POST", "/completion", content=body) as answer:
                if answer.status_code != 200:
                    said = json.loads(answer.read())["error"]["message"]
                    post(GenerationError(said) if answer.status_code == 400 else BackendFailed(said))
                    return
                post(Accepted())
                for event in _pieces(answer.iter_lines(), prompt_tokens):
                    if cancelled.is_set():
                        return
                    post(event)
        except (httpx.HTTPError, ValueError, KeyError, RuntimeError) as error:
            post(BackendFailed(f"llama.cpp: {error}"))


def request_body(prompt: Sequence[int], sampling: Sampling, sample: int) -> dict[str, Any]:
    """What llama.cpp is asked for a continuation. Raises `GenerationError` for a setting that it does not know."""
    if given := sampling.changed(*UNKNOWN):
        raise GenerationError(f"The llama.cpp engine does not know {', '.join(given)}.")
    body = {
        "prompt": list(prompt),
        "stream": True,
        "n_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": 2**31 - 1,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "stop": sampling.stop,
        "seed": (sampling.seed + sample) % SEEDS,
    }
    if sampling.logprobs is not None:
        body["n_probs"] = max(1, sampling.logprobs)
    if sampling.json_schema is not None:
        body["json_schema"] = sampling.json_schema
    return body


def _pieces(lines: Iterator[str], prompt_tokens: int) -> Iterator[Piece | Completion]:
    """llama.cpp's stream of events as ours."""
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    for line in lines:
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        new = tuple(_logprob(each) for each in event.get("completion_probabilities", ()))
        if event["content"] or new:
            texts.append(event["content"])
            logprobs += new
            yield Piece(event["content"], new)
        if event["stop"]:
            reason = "length" if event["stop_type"] == "limit" else "stop"
            written = event["tokens_predicted"] - (event["stop_type"] == "eos")
            yield Completion("".join(texts), reason, prompt_tokens, written, tuple(logprobs) or None)
            return
    raise RuntimeError("its answer broke off")


def _logprob(event: dict[str, Any]) -> TokenLogprob:
    top = tuple((each["token"], each["id"], each["logprob"]) for each in event["top_logprobs"])
    return TokenLogprob(event["token"], event["id"], event["logprob"], top)
