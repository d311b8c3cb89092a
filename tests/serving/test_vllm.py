"""The server with vLLM behind it: vLLM's place is taken by `vllm_stand_in.py`, which has its arguments, its fields and
its way of streaming. With vLLM itself, which needs a GPU, none of this has run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from servers import running, wait_until

import finespun
from conftest import sentences
from finespun.data.templates import Encoder
from finespun.errors import GenerationError, ModelError
from finespun.generation.engine import Completion
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel, load_model
from finespun.serving import vllm
from finespun.serving.settings import ServerSettings
from finespun.serving.vllm import Vllm, command_for, end_starting, request_body, vllm_for
from finespun.serving.worker import Accepted, BackendFailed, Piece

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")


class Place:
    """Where the stand-in is, told what to do and asked what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"model": "m"} | plan))
        (self.folder / "asked.jsonl").unlink(missing_ok=True)

    def asked(self, what: str) -> list[Any]:
        file = self.folder / "asked.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line)[what] for line in lines if what in json.loads(line)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(STAND_IN, folder / "stand_in.py")
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/stand_in.py" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Place(folder)


def ids_of(loaded: LoadedModel, prompt: list[int], new: int) -> list[int]:
    """What the model writes greedily, by transformers."""
    with torch.no_grad():
        row = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0]
    return row[len(prompt) :].tolist()


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_a_text_is_that_of_the_library_through_openai_s_client(
    place: Place, tiny: LoadedModel, tiny_folder: Path
) -> None:
    encoder = Encoder(tiny.tokenizer)
    prompt = encoder.encode_prompt("the old ferryman")
    place.plan(ids=ids_of(tiny, prompt, 20), slow=1.0)
    (expected,) = finespun.load(tiny_folder).complete(["the old ferryman"], max_new_tokens=20)[0]
    options = {"slots": 5, "precision": "float32", "vllm_options": "--gpu-memory-utilization 0.4"}
    with running(sources={"m": str(tiny_folder)}, engine="vllm", **options) as server:
        ask = {"model": "m", "messages": [{"role": "user", "content": "the old ferryman"}], "max_tokens": 20}
        answer = server.client().chat.completions.create(**ask)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == expected.completion_tokens
        stream = server.client().chat.completions.create(**ask, stream=True)
        pieces = [event.choices[0].delta.content or "" for event in stream]
        assert "".join(pieces) == expected.text
        assert sum(map(bool, pieces)) > 1, "it is streamed"
        process = server.service.models["m"].backend._process
    assert process.poll() is not None, "it ends with the server"
    (arguments,) = place.asked("arguments")
    assert arguments[:2] == ["serve", str(tiny_folder)]
    for name, value in {
        "--served-model-name": "m",
        "--max-model-len": "128",
        "--dtype": "float32",
        "--max-num-seqs": "5",
        "--chat-template": f"{tiny_folder}/chat_template.jinja",
        "--structured-outputs-config": '{"backend": "guidance"}',
        "--gpu-memory-utilization": "0.4",
    }.items():
        assert option(arguments, name) == value
    assert place.asked("environment") == ["1"], "it tells nobody that it is used"
    assert not Path(option(arguments, "--uds")).parent.exists()
    body = place.asked("body")[0]
    assert body["prompt"] == prompt
    assert body["stop_token_ids"] == list(encoder.stop_ids)
    assert (body["temperature"], body["max_tokens"]) == (0.0, 20)


class Posted(list):
    """What a backend posts."""

    def ended(self) -> bool:
        return any(isinstance(event, Completion | Exception) for event in self)

    def texts(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Piece)]


def write(backend: Vllm, prompt: list[int], **sampling: Any) -> Posted:
    posted = Posted()
    backend.start(prompt, Sampling(**sampling), 0, posted.append)
    wait_until(posted.ended)
    return posted


@pytest.fixture
def start(place: Place, tiny: LoadedModel, tiny_folder: Path):
    """Starts the stand-in with a plan."""
    with contextlib.ExitStack() as stack:

        def started(**plan: Any) -> Vllm:
            place.plan(**plan)
            settings = ServerSettings(engine="vllm", precision="float32", slots=4)
            backend = vllm_for("m", str(tiny_folder), Encoder(tiny.tokenizer), 128, settings)
            stack.callback(backend.close)
            return backend

        yield started


def test_what_is_asked_for_and_what_comes_back(start: Callable[..., Vllm], place: Place, small_tokenizer) -> None:
    """Whole characters only, no part of a stop string, log-probabilities of the tokens that are in the text."""
    ids = small_tokenizer("the 雪 river and said nothing")["input_ids"]
    backend = start(ids=[*ids, small_tokenizer.eos_token_id])
    accepted, *pieces, end = write(
        backend, [5, 6], max_new_tokens=500, logprobs=2, seed=2**32 - 1, logit_bias={7: -3.5}, top_k=9, regex="a+"
    )
    assert isinstance(accepted, Accepted)
    assert [piece.text for piece in pieces if "\ufffd" in piece.text] == []
    assert "".join(piece.text for piece in pieces) == end.text == "the 雪 river and said nothing"
    assert (end.finish_reason, end.prompt_tokens, end.completion_tokens) == ("stop", 2, len(ids))
    assert [token.id for token in end.logprobs] == ids, "without the stop token"
    assert [token for piece in pieces for token in piece.logprobs] == list(end.logprobs)
    first = end.logprobs[0]
    assert (first.token, first.logprob) == (small_tokenizer.decode([ids[0]]), -2.0)
    assert [(token, value) for _, token, value in first.top] == [(10, -0.5), (11, -1.5)], "the best, in their order"
    (body,) = place.asked("body")
    expected = {"max_tokens": 126, "seed": 2**32 - 1, "logit_bias": {"7": -3.5}, "top_k": 9, "ignore_eos": True}
    assert {name: body[name] for name in expected} == expected
    assert body["structured_outputs"] == {"regex": "a+"}
    stopped = write(backend, [5], stop=["and s", "nothing"])[-1]
    assert (stopped.text, stopped.finish_reason) == ("the 雪 river ", "stop")
    half = next(count for count in range(len(ids)) if small_tokenizer.decode(ids[:count]).endswith("\ufffd"))
    cut = write(backend, [5], max_new_tokens=half)
    assert (cut[-1].finish_reason, cut[-1].completion_tokens) == ("length", half)
    assert "".join(cut.texts()) == cut[-1].text == "the "


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"json_schema": {}}, {"json": "{}"}),
        ({"json_schema": {"type": "object", "properties": {"b": {}, "a": {}}}}, {"json": '{"type": "object", "properties": {"b": {}, "a": {}}}'}),
        ({"choices": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"grammar": "start: /a+/"}, {"grammar": "start: /a+/"}),
    ],
)  # fmt: skip
def test_constraints_have_the_names_that_vllm_gives_them(setting: dict[str, Any], named: dict[str, Any]) -> None:
    assert request_body("m", [1], Sampling(**setting), 0, [0], 5)["structured_outputs"] == named


def test_each_sample_has_a_seed_of_its_own() -> None:
    seeds = [request_body("m", [1], Sampling(seed=2**32 - 1), sample, [0], 5)["seed"] for sample in range(3)]
    assert seeds == [2**32 - 1, 0, 1]


def test_what_vllm_does_not_know_is_said() -> None:
    with pytest.raises(GenerationError, match="does not know beams, typical_p"):
        request_body("m", [1], Sampling(beams=2, typical_p=0.5), 0, [0], 5)
    with pytest.raises(GenerationError, match="regex and min_new_tokens"):
        request_body("m", [1], Sampling(regex="a", min_new_tokens=2), 0, [0], 5)


@pytest.mark.parametrize(
    ("plan", "kind", "message"),
    [
        ({"refuses": "no such token"}, GenerationError, "no such token"),
        ({"error": ["Grammar error: line 3", 400]}, GenerationError, "line 3"),
        ({"error": ["Internal server error", 500]}, BackendFailed, "Internal server error"),
        ({"ids": [20, 21], "reason": "abort"}, BackendFailed, "abort"),
    ],
)
def test_what_vllm_refuses_and_where_it_fails(
    plan: dict[str, Any], kind: type[Exception], message: str, start: Callable[..., Vllm]
) -> None:
    backend = start(**plan)
    posted = write(backend, [5])
    assert isinstance(posted[-1], kind)
    assert message in str(posted[-1])
    assert kind is BackendFailed or len(posted) == 1, "it was never accepted"
    assert backend.alive


def test_a_text_that_nobody_wants_any_more_is_broken_off(start: Callable[..., Vllm], place: Place) -> None:
    backend = start(ids=[20] * 1000, seconds=0.02)
    posted = Posted()
    cancel = backend.start([5], Sampling(max_new_tokens=1000), 0, posted.append)
    wait_until(lambda: len(posted.texts()) > 2)
    cancel()
    wait_until(lambda: bool(place.asked("left_after")))
    assert place.asked("left_after")[0] < 100
    assert not posted.ended()


def test_its_death_in_the_middle_of_a_text(start: Callable[..., Vllm]) -> None:
    backend = start(ids=[20] * 10, crashes_after=3)
    posted = write(backend, [5])
    assert isinstance(posted[-1], BackendFailed)
    wait_until(lambda: not backend.alive)
    (failed,) = write(backend, [5])
    assert isinstance(failed, BackendFailed)


def test_a_server_whose_vllm_has_died_says_so(place: Place, tiny_folder: Path) -> None:
    place.plan(ids=[20] * 10, crashes_after=3)
    with running(sources={"m": str(tiny_folder)}, engine="vllm", precision="float32") as server:
        with pytest.raises(openai.InternalServerError, match="vLLM"):
            server.client().completions.create(model="m", prompt="a", max_tokens=9)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)


def test_its_last_words_where_it_does_not_start(start: Callable[..., Vllm]) -> None:
    with pytest.raises(ModelError, match=r"exit code 1.*before it was ready(.|\n)*INFO loading\n  .*out of memory"):
        start(dies="torch.OutOfMemoryError: CUDA out of memory.")
    assert not vllm._starting


def test_a_server_that_is_stopped_does_not_wait_for_it_to_start(place: Place, tiny_folder: Path) -> None:
    place.plan(slow=600)
    begun = time.monotonic()
    with running(sources={"m": str(tiny_folder)}, engine="vllm", precision="float32", wait=False):
        wait_until(lambda: bool(place.asked("arguments")))
    assert time.monotonic() - begun < 60
    wait_until(lambda: not vllm._starting)


def test_what_cannot_be_started_is_ended(place: Place, tiny: LoadedModel, tiny_folder: Path) -> None:
    place.plan(slow=600)
    errors: list[Exception] = []

    def load() -> None:
        try:
            vllm_for("m", str(tiny_folder), Encoder(tiny.tokenizer), 128, ServerSettings(precision="float32"))
        except ModelError as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    wait_until(lambda: bool(place.asked("arguments")))
    (backend,) = vllm._starting
    end_starting()
    thread.join(20)
    assert not thread.is_alive()
    assert backend._process.poll() is not None
    assert len(errors) == 1


def test_without_vllm_it_is_said_how_to_get_it(
    tmp_path: Path, tiny: LoadedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ModelError, match=r"GPU: pip install vllm.*--engine llama\.cpp"):
        vllm_for("m", str(tiny_folder), Encoder(tiny.tokenizer), 128, ServerSettings(precision="float32"))


def test_an_adapter_stands_beside_its_base(place: Place, tiny: LoadedModel, tiny_folder: Path, in_tmp: Path) -> None:
    rows = [{"prompt": text, "completion": text[::-1]} for text in sentences(12)]
    finespun.finetune(
        model=str(tiny_folder), data=rows, out="run", quiet=True, method="lora", max_steps=1, lora={"rank": 12}
    )
    prompt = Encoder(tiny.tokenizer).encode_prompt("a")
    place.plan(ids=ids_of(load_model("run"), prompt, 8))
    with running(sources={"m": "run"}, engine="vllm", precision="bfloat16") as server:
        ask = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
        answer = server.client().chat.completions.create(**ask)
    assert answer.choices[0].message.content == finespun.load("run").generate("a", max_new_tokens=8)
    (arguments,) = place.asked("arguments")
    folder = str(Path("run/model").absolute())
    assert arguments[1] == str(tiny_folder)
    assert "--enable-lora" in arguments
    assert json.loads(option(arguments, "--lora-modules")) == {"name": "m", "path": folder}
    assert option(arguments, "--max-lora-rank") == "16"
    assert option(arguments, "--dtype") == "bfloat16"
    assert option(arguments, "--tokenizer") == folder
    assert option(arguments, "--generation-config") == "vllm", "not what the base suggests"


def changed(folder: Path, file: str, **keys: Any) -> str:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(folder)


def test_what_vllm_cannot_serve_is_refused(tiny_folder: Path, in_tmp: Path) -> None:
    rows = [{"text": text} for text in sentences(12)]
    finespun.finetune(model=str(tiny_folder), data=rows, out="run", quiet=True, method="lora", max_steps=1)
    assert command_for("m", "run", 128, "bfloat16")[:2] == ["vllm", "serve"]
    with pytest.raises(ModelError, match=r"16 bits only\. Give --precision bfloat16.*--to merged"):
        command_for("m", "run", 128, "float32")

    def copy(name: str) -> Path:
        return Path(shutil.copytree("run/model", name))

    Path("model.gguf").write_bytes(b"GGUF")
    for source, why in [
        ("model.gguf", r"--engine llama\.cpp"),
        (changed(copy("dora"), "adapter_config.json", use_dora=True), "of this kind.*--to merged"),
        (changed(copy("qlora"), "finespun.json", four_bits=True), "in 4 bits.*--to merged"),
        (changed(copy("other"), "finespun.json", base_sha256="0"), "trained on other weights"),
        (changed(copy("on-gguf"), "finespun.json", base_name="model.gguf"), "its base is model.gguf"),
    ]:
        with pytest.raises(ModelError, match=why):
            command_for("m", source, 128, "bfloat16")
