"""What every request passes before any route sees it: key, host, size and time of its body; and what is counted and
logged of it afterwards."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finespun.serving.errors import ApiError, as_api_error, busy
from finespun.serving.service import ClientGone, Service

log = logging.getLogger("finespun.serving")

OPEN_PATHS = ("/health", "/ready")
"""What an orchestrator asks, without a key."""

BODY_SECONDS = 60.0
"""Longest time for a body to arrive."""

LATE_SECONDS = 30.0
"""After the time of a request is over, what its client gets to read the end of its answer."""


class Door:
    """ASGI middleware. The `record` of a request, in its scope under "finespun", is what the log will say of it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._body_limit = int(service.settings.max_body_mb * 1_000_000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        record: dict[str, Any] = {
            "request": f"req_{uuid.uuid4().hex}",
            "method": scope["method"],
            "path": scope["path"][:200],
            "client": (scope.get("client") or ("",))[0],
        }
        scope["finespun"] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record["request"].encode())]
            await send(message)

        try:
            async with asyncio.timeout(self._service.settings.timeout_seconds + LATE_SECONDS):
                self._check(scope)
                body = await self._read(scope, receive)
                await self._app(scope, _replay(body, receive), send_marked)
        except ClientGone:
            record["client_gone"] = True
        except Exception as error:
            if isinstance(error, TimeoutError):
                error = busy("The request took too long.")
            if "status" not in record:
                await as_api_error(error).response()(scope, receive, send_marked)
            else:  # too late to say so; uvicorn closes a connection on which an answer has no end
                record["cut"] = True
        finally:
            record["route"] = getattr(scope.get("route"), "path", "other")
            record["seconds"] = round(time.monotonic() - begun, 4)
            self._service.metrics.record(record)
            log.info("request", extra={"fields": record})

    def _check(self, scope: Scope) -> None:
        """Raises `ApiError` for a request without the key; or, where there is none, for one that a web page has sent
        here by giving its own name this machine's address (DNS rebinding)."""
        headers = dict(scope["headers"])
        key = self._service.api_key
        if key is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if name.strip("[]") not in ("localhost", "127.0.0.1", "::1", self._service.settings.host.lower(), ""):
                raise ApiError(
                    403, "This server answers to its own address only; others need an API key.", "wrong_host"
                )
        elif scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
                raise ApiError(
                    401,
                    "The API key is wrong or missing (Authorization: Bearer KEY).",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        too_large = ApiError(413, f"The body is larger than {self._body_limit:,} bytes.", "body_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if len(declared) > 15 or int(declared) > self._body_limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > self._body_limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive in {BODY_SECONDS:.0f} seconds.", headers={"Connection": "close"}
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives `body` once, then what comes from the connection: that the client has gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
