"""A process that serves: its socket, its signals, its beginning and end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from finespun.errors import RecipeError
from finespun.serving.app import create_app
from finespun.serving.logs import log_to_stderr
from finespun.serving.service import Service, name_sources
from finespun.serving.settings import ServerSettings
from finespun.web import Server, listen


def serve(
    sources: Sequence[str],
    settings: ServerSettings,
    api_key: str | None,
    announce: Callable[[str], None],
) -> None:
    """Serves the models at `sources` until it is told to stop (SIGTERM, SIGINT): it takes no more requests then, lets
    the texts that are being written end, for `grace_seconds`, and ends the rest with an error.

    `announce` gets the address when all models are ready. Raises `RecipeError` for a public address without a key,
    `ServingError` for an address that cannot be had, and the errors of `load_model`.
    """
    check_key(settings, api_key)
    service = Service(settings, name_sources(sources), api_key)
    with listen(settings.host, settings.port) as listener:
        log_to_stderr(settings.log_prompts)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listener.getsockname()[1]}/v1"
        service.on_ready = lambda: announce(f"Serving {', '.join(service.models)} at {address}")
        ModelServer(service).run(sockets=[listener])
    if service.failure:
        raise service.failure


def check_key(settings: ServerSettings, api_key: str | None) -> None:
    """Raises `RecipeError` for an address that others can reach while anybody may ask, and for a key that is none."""
    if api_key is not None and (not api_key.strip() or not api_key.isascii() or api_key != api_key.strip()):
        raise RecipeError("The API key should be a text in ASCII without spaces around it.")
    if api_key is None and not _is_loopback(settings.host):
        raise RecipeError(
            f"{settings.host} can be reached from other machines: give an API key (FINESPUN_API_KEY or --api-key), or "
            "listen at 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class ModelServer(Server):
    """A server that tells `service` to stop."""

    def __init__(self, service: Service) -> None:
        grace = service.settings.grace_seconds
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",  # bounds the size of headers, which the faster parser does not
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(grace) + 5,
            )
        )
        self._service = service
        self._signals = 0
        service.on_failure = lambda: self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server when all texts have ended; a second one ends the texts, a third waits for
        nothing."""
        self.force_exit = self._signals > 1
        self._signals += 1
        self.should_exit = self._service.draining = True
        seconds = self._service.settings.grace_seconds if self._signals == 1 else 0.0
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end_answers, seconds)

    def _end_answers(self, seconds: float) -> None:
        self._loop.call_later(seconds, self._service.end_answers)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
