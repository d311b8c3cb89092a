"""A server from its start to its end: loading, clients that leave, an engine that breaks, signals, logs, figures."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import fake, running, wait_until

import finespun
from finespun.errors import ModelNotFound
from finespun.serving.logs import JsonLines

ASK = {"model": "m", "prompt": "the old mill", "max_tokens": 100}


def endless(prompt: str) -> list[str]:
    return ["word "] * 100


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_one_step(small_tokenizer: Any, stream: bool, chat: bool) -> None:
    load, engines = fake(small_tokenizer, endless)
    path, body = "/v1/completions", ASK | {"stream": stream, "n": 2}
    if chat:
        body = {"model": "m", "messages": [{"role": "user", "content": "the"}], "stream": stream, "n": 2}
        path = "/v1/chat/completions"
    with running(load, slots=4) as server:
        (engine,) = engines
        engine.seconds = 0.15
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        wait_until(lambda: len(engine.active) == 2 and engine.steps >= 2)
        left_at = engine.steps
        connection.close()
        wait_until(lambda: len(engine.cancelled_at) == 2)
        assert max(engine.cancelled_at) - left_at <= 1
        assert engine.active == []
        wait_until(lambda: server.service.models["m"].in_flight == 0)
        assert not server.service.answers


def test_a_client_that_reads_slowly_keeps_nobody_waiting(small_tokenizer: Any) -> None:
    """Not even the engine, which goes on without it."""
    load, engines = fake(small_tokenizer, lambda prompt: ["word " * 20_000] * 100)
    with running(load) as server:
        (engine,) = engines
        data = json.dumps(ASK | {"stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(data) + data
            )
            wait_until(lambda: engine.steps > 50)
            assert server.post(json=ASK | {"max_tokens": 1}).status_code == 200
            wait_until(lambda: not engine.active)
        wait_until(lambda: server.service.models["m"].in_flight == 0)


def test_an_engine_that_breaks_is_made_anew(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, endless)
    with running(load) as server:
        engines[0].breaks = True
        answer = server.post(json=ASK)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert server.post(json=ASK).status_code == 200
        assert len(engines) == 2
        assert httpx.get(server.url + "/health").status_code == 200
        assert server.service.models["m"].in_flight == 0


def test_a_bug_of_ours_is_told_to_the_log_alone(
    small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("finespun.serving").propagate = True
    load, engines = fake(small_tokenizer, lambda prompt: ["a"])
    with running(load) as server:
        monkeypatch.setattr(engines[0], "add", lambda *_: 1 / 0)
        answer = server.post(json=ASK)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "division" not in answer.text
    assert "ZeroDivisionError" in caplog.text


def test_nobody_is_served_before_the_models_are_there(small_tokenizer: Any) -> None:
    load, _ = fake(small_tokenizer, lambda prompt: ["a"])
    go = threading.Event()

    def slow(*arguments: Any) -> Any:
        go.wait()
        return load(*arguments)

    with running(slow, wait=False) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        ready = httpx.get(server.url + "/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        answer = server.post(json=ASK)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert server.post(json=ASK | {"model": "x"}).status_code == 404
        go.set()
        wait_until(lambda: server.service.ready)
        assert server.post(json=ASK).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def missing(*_: Any) -> Any:
        raise ModelNotFound("no such model")

    with running(missing, wait=False) as server:
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert isinstance(server.service.failure, ModelNotFound)


def test_stopping_lets_texts_end(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, endless)
    with running(load) as server:
        engines[0].seconds = 0.02
        pieces = []
        for chunk in server.client().completions.create(**ASK, stream=True):
            pieces.append(chunk.choices[0].text)
            if len(pieces) == 3:
                server.stop()
                with pytest.raises(httpx.TransportError):
                    wait_until(lambda: bool(httpx.get(server.url + "/ready")) and False, 5)
        assert "".join(pieces) == "word " * 100
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_texts_that_do_not_end_in_time_are_ended(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, endless)
    with running(load, grace_seconds=0.3) as server:
        engines[0].seconds = 0.1
        whole: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: whole.append(server.post(json=ASK)))
        thread.start()
        with httpx.stream("POST", server.url + "/v1/completions", json=ASK | {"stream": True}) as answer:
            lines = []
            for line in answer.iter_lines():
                lines += [line] if line else []
                if len(lines) == 3:
                    server.stop()
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "The server is shutting down."
        thread.join()
        assert whole[0].status_code == 503
        begun = time.monotonic()
        server.thread.join(5)
        assert time.monotonic() - begun < 3


def test_figures_for_prometheus(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, lambda prompt: ["a "] * 7)
    with running(load, slots=1) as server:
        for _ in range(2):
            server.post(json=ASK)
        server.post(json=ASK | {"n": 0})
        httpx.get(server.url + "/anything-else")
        engines[0].open.clear()
        waiting = [threading.Thread(target=lambda: server.post(json=ASK)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: server.service.models["m"].in_flight == 3)
        text = httpx.get(server.url + "/metrics").text
        engines[0].open.set()
        for thread in waiting:
            thread.join()
    prompt = len(small_tokenizer(ASK["prompt"])["input_ids"])
    for line in (
        'finespun_requests_total{route="/v1/completions",status="200"} 2.0',
        'finespun_requests_total{route="/v1/completions",status="422"} 1.0',
        'finespun_requests_total{route="other",status="404"} 1.0',
        'finespun_completion_tokens_total{model="m"} 14.0',
        f'finespun_prompt_tokens_total{{model="m"}} {2 * prompt}.0',
        'finespun_first_token_seconds_count{model="m"} 2.0',
        'finespun_texts{model="m",state="written"} 1.0',
        'finespun_texts{model="m",state="waiting"} 2.0',
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_one_object_a_request_and_no_words(
    small_tokenizer: Any, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    logging.getLogger("finespun.serving").propagate = True
    caplog.set_level(logging.INFO, "finespun.serving")
    load, _ = fake(small_tokenizer, lambda prompt: ["heron ", "secret"])
    with running(load, log_prompts=log_prompts) as server:
        server.post(json=ASK)
        server.post(
            "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "the old mill"}]}
        )
        server.post(json={"prompt": "the old mill", "model": "the old mill"})
    lines = [JsonLines(log_prompts).format(record) for record in caplog.records]
    requests = [line for line in map(json.loads, lines) if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 200, 404]
    first = requests[0]
    assert (first["model"], first["completion_tokens"], first["route"]) == ("m", 2, "/v1/completions")
    assert first["seconds"] >= first["first_token_seconds"] >= 0
    assert first["client"] == "127.0.0.1"
    for words in ("old mill", "heron"):
        assert any(words in line for line in lines) == log_prompts


def test_what_an_exception_says_is_logged_only_with_texts() -> None:
    words = "the old mill"
    try:
        raise ValueError(words)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert "mill" not in JsonLines(with_texts=False).format(record)
    line = json.loads(JsonLines(with_texts=True).format(record))
    assert (line["message"], line["exception"], line["event"]) == ("the old mill", "ValueError", "failed")
    assert "test_server_life" in line["traceback"]


# --- the command ----------------------------------------------------------------------------------------------------


def finespun_serve(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finespun", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(tiny_folder: Path, sent: int) -> None:
    environment = {**os.environ, "FINESPUN_API_KEY": "k-1"}
    environment.pop("PYTHONUNBUFFERED", None)  # what is said is said at once all the same
    process = finespun_serve(str(tiny_folder), "--port", "0", "--precision", "float32", env=environment)
    told = process.stdout.readline()
    assert told.startswith("Serving tiny at http://127.0.0.1:")
    client = openai.OpenAI(base_url=told.split()[-1], api_key="k-1", max_retries=0)
    text = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the old"}], max_tokens=8)
    assert text.choices[0].message.content == finespun.load(tiny_folder).generate("the old", max_new_tokens=8)
    stream = client.completions.create(model="tiny", prompt="the", max_tokens=100, stream=True)
    next(iter(stream))
    process.send_signal(sent)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    assert "k-1" not in err
    assert {"model loaded", "request"} <= {line["event"] for line in lines}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give an API key"),
        (["--port", "70000"], "less than or equal to 65535"),
        (["--host", "no.such.host.invalid"], "key"),
        (["--host", "192.0.2.1", "--api-key", "k"], "Cannot listen at 192.0.2.1"),
        (["--slots", "0"], "greater than or equal to 1"),
        (["--nonsense", "1"], "unknown option --nonsense"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_message_and_exit_code_2(
    tiny_folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from finespun.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tiny_folder), *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_package_that_is_missing_is_named(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finespun.cli import main

    monkeypatch.setattr("finespun.cli.serve.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_folder)])
    assert "pip install 'finespun[serve]'" in capsys.readouterr().err


def test_a_port_in_use(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finespun.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            main(["serve", str(tiny_folder), "--port", str(port)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"Cannot listen at 127.0.0.1 port {port}: Address already in use. Choose another --port" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    process = finespun_serve(str(tmp_path / "nothing.gguf"), "--port", "0")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1] == f"finespun: {tmp_path / 'nothing.gguf'}: there is no such file."
    assert "Traceback" not in err
