"""Who is refused, with which status, in OpenAI's shape; and that nothing of it is a 5xx or harms others."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from servers import Running, fake, running, wait_until

import finespun.serving.door as door
from finespun.errors import RecipeError
from finespun.serving.server import check_key
from finespun.serving.service import name_sources
from finespun.serving.settings import ServerSettings

ASK = {"model": "m", "prompt": "the old mill", "max_tokens": 4}


@pytest.fixture(scope="module")
def server(small_tokenizer: Any) -> Iterator[Running]:
    load, _ = fake(small_tokenizer, lambda prompt: ["the ", "old ", "mill"])
    with running(load, max_body_mb=0.1, max_prompt_tokens=50, max_new_tokens=100, slots=4) as server:
        yield server
        assert server.post(json=ASK).status_code == 200  # after all that was sent before
        assert server.service.models["m"].in_flight == 0


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error that an answer is, in the shape that OpenAI's clients read."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return body["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"n": 1000}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"echo": True}, "echo"),
        ({"temprature": 1}, "temprature"),
        ({"stop": [""]}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
def test_a_field_out_of_its_range_is_named(server: Running, change: dict[str, Any], param: str) -> None:
    error = refused(server.post(json=ASK | change), 422)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    with pytest.raises(openai.UnprocessableEntityError):
        server.client().post("/completions", body=ASK | change, cast_to=object)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"max_tokens": 101}, None, "more than this server writes: 100"),
        ({"prompt": "江" * 40}, "context_length_exceeded", "at most 50"),
        ({"prompt": [399, 400]}, None, "no token 400"),
        ({"logit_bias": {"400": 1}}, None, "no token 400"),
        ({"n": 5}, None, "4 are written at once"),
        ({"prompt": ["a", "b", "c"], "n": 2}, None, "6 texts"),
    ],
    ids=str,
)
def test_what_this_server_cannot_do_is_said(
    server: Running, change: dict[str, Any], code: str | None, message: str
) -> None:
    error = refused(server.post(json=ASK | change), 400)
    assert message in error["message"]
    assert error["code"] == code


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"\xff\xfe{}",
        json.dumps(ASK).encode()[:-1] + b', "temperature": NaN}',
        json.dumps(ASK).encode()[:-1] + b', "temperature": Infinity}',
        b'{"model": "m", "prompt": "\xe6\xb1"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b"[" * 50_000,
        b'{"a":' * 10_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_not_json_is_refused(server: Running, body: bytes) -> None:
    answer = server.post(content=body, headers={"Content-Type": "application/json"})
    refused(answer, 422 if body == b"" else 400)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"[1]", {"Content-Type": "application/json"}),
        (b'"a"', {"Content-Type": "application/json"}),
        (json.dumps(ASK).encode(), {"Content-Type": "text/plain"}),  # as a web page may send it without asking
        (json.dumps(ASK).encode(), {}),
        (b"a=1", {"Content-Type": "application/x-www-form-urlencoded"}),
    ],
    ids=str,
)
def test_a_body_is_a_json_object_and_says_so(server: Running, body: bytes, headers: dict[str, str]) -> None:
    refused(server.post(content=body, headers=headers), 422)


def test_other_paths_and_methods(server: Running) -> None:
    assert refused(httpx.get(server.url + "/nothing"), 404)["code"] == "not_found"
    assert refused(httpx.get(server.url + "/v1/completions"), 405)["code"] == "method_not_allowed"
    assert refused(server.post(json=ASK | {"model": "x" * 1000}), 404)["code"] == "model_not_found"
    assert refused(server.post("/v1/embeddings", json=ASK), 404)["code"] == "not_found"


def test_a_large_body_is_not_read(server: Running) -> None:
    refused(server.post(content=b"x" * 200_000), 413)
    refused(server.post(content=iter([b"x" * 10_000] * 20)), 413)  # without a length
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    with connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        received = b"".join(iter(lambda: connection.recv(1000), b""))  # to the end of the connection
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"error"' in received


@pytest.mark.parametrize("noise", [b"\x00\xff" * 100, b"GET / HTTP/9\r\n\r\n", b"A" * 100_000, b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000])  # fmt: skip
def test_what_is_not_http_harms_nobody(server: Running, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(1000), b""))
    assert received[:12] in (b"", b"HTTP/1.1 400")
    assert server.post(json=ASK).status_code == 200


def test_without_the_key_nothing_is_told(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, lambda prompt: ["a"])
    with running(load, api_key="secret-1") as server:
        for headers in ({}, {"Authorization": "Bearer secret-2"}, {"Authorization": "secret-1"}, {"Authorization": "Basic secret-1"}, {"Authorization": b"Bearer \xff\xfe"}):  # fmt: skip
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/x")):  # fmt: skip
                answer = httpx.request(method, server.url + path, headers=headers)
                assert refused(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0).models.list()
        assert server.client().completions.create(**ASK).choices[0].text == "a"
        assert len(engines[0].prompts) == 1
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        assert httpx.get(server.url + "/ready").status_code == 200
        other_host = {"Host": "finespun.example", "Authorization": "Bearer secret-1"}
        assert httpx.get(server.url + "/v1/models", headers=other_host).status_code == 200


def test_a_web_page_cannot_reach_a_server_without_a_key(server: Running) -> None:
    """Neither under a name of its own that leads here, nor from its own origin."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert refused(httpx.get(server.url + "/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1"):
        assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 200
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(server.url + "/v1/completions", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]
    answer = httpx.get(server.url + "/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_can_be_let_in(small_tokenizer: Any) -> None:
    load, _ = fake(small_tokenizer, lambda prompt: ["a"])
    with running(load, api_key="k", cors_origin=["https://good.example"]) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        good = httpx.options(server.url + "/v1/completions", headers=asked | {"Origin": "https://good.example"})
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        bad = httpx.options(server.url + "/v1/completions", headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in bad.headers
        refusal = server.post(json=ASK, headers={"Origin": "https://good.example"})
        assert refusal.status_code == 401
        assert refusal.headers["access-control-allow-origin"] == "https://good.example"


def test_a_full_queue_says_when_to_come_again(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, lambda prompt: ["a"])
    with running(load, slots=2, max_queue=1) as server:
        (engine,) = engines
        engine.open.clear()
        served = server.service.models["m"]
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(server.post(json=ASK))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: served.in_flight == 3)
        answer = server.post(json=ASK)
        assert refused(answer, 429)["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        refused(server.post(json=ASK | {"stream": True, "n": 2}), 429)
        engine.open.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert served.in_flight == 0


def test_a_request_that_takes_too_long_is_ended(small_tokenizer: Any) -> None:
    load, engines = fake(small_tokenizer, lambda prompt: ["a "] * 100)
    with running(load, timeout_seconds=0.5) as server:
        (engine,) = engines
        engine.seconds = 0.1
        answer = server.post(json=ASK | {"max_tokens": 100})
        assert "too long" in refused(answer, 503)["message"]
        assert "retry-after" in answer.headers
        wait_until(lambda: not engine.active)
        pieces: list[Any] = []
        stream = server.client().completions.create(**ASK | {"max_tokens": 100}, stream=True)
        with pytest.raises(openai.APIError, match="too long"):
            pieces.extend(stream)
        assert 2 <= len(pieces) < 10
        wait_until(lambda: not engine.active)
        assert server.service.models["m"].in_flight == 0


def test_a_model_that_continues_texts_has_no_chat(small_tokenizer: Any) -> None:
    load, _ = fake(small_tokenizer, lambda prompt: ["a"], prompt_format="raw")
    with running(load) as server, pytest.raises(openai.BadRequestError, match=r"Use /v1/completions"):
        server.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("host", "key", "fine"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("::", None, False),
        ("10.0.0.1", None, False),
        ("example.org", None, False),
        ("", None, False),
        ("0", None, False),
        ("0.0.0.0", "k", True),
        ("127.0.0.1", "", False),
        ("127.0.0.1", " k", False),
        ("127.0.0.1", "é", False),
    ],
)
def test_a_public_address_needs_a_key(host: str, key: str | None, fine: bool) -> None:
    if fine:
        check_key(ServerSettings(host=host), key)
    else:
        with pytest.raises(RecipeError, match="key"):
            check_key(ServerSettings(host=host), key)


def test_names_of_models(in_tmp: Any) -> None:
    (in_tmp / "runs" / "stories").mkdir(parents=True)
    (in_tmp / "a=b").mkdir()
    given = ["runs/stories", "old=runs/stories", "smollm2-135m", "org/model", "files/x.Q8_0.gguf", "a=b"]
    assert name_sources(given) == {
        "stories": "runs/stories",
        "old": "runs/stories",
        "smollm2-135m": "smollm2-135m",
        "org/model": "org/model",
        "x.Q8_0": "files/x.Q8_0.gguf",
        "a=b": "a=b",
    }
    for wrong in (["runs/stories", "stories=x"], ["=x"], ["x="]):
        with pytest.raises(RecipeError):
            name_sources(wrong)
