"""The process that serves a study's pages."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator

import uvicorn

from finespun.errors import RecipeError, ServingError
from finespun.evaluation.judging.app import create_app
from finespun.evaluation.judging.settings import JudgeServerSettings
from finespun.evaluation.judging.store import Store


def serve(store: Store, settings: JudgeServerSettings, announce: Callable[[str, str], None]) -> None:
    """Serves the pages of `store` until SIGTERM or Ctrl-C. `announce` gets each link with what it is, once they can be
    opened. Raises `ServingError` for an address that cannot be had, `RecipeError` for a `url` that is none."""
    if settings.url and not settings.url.startswith(("http://", "https://")):
        raise RecipeError(f"url: {settings.url} should begin with https:// or http://.")
    with listen(settings.host, settings.port) as listener:
        base = settings.url or _address(settings.host, listener.getsockname()[1])
        server = Server(store, settings.url)
        announce("Results", f"{base.rstrip('/')}/results/{store.study.admin}")
        for number, annotator in enumerate(store.study.annotators, 1):
            announce(f"Annotator {number}", f"{base.rstrip('/')}/a/{annotator.token}")
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ServingError` where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # negative where a name is not known
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise ServingError(f"Cannot listen at {host} port {port}: {reason}. Choose another --port or --host.") from None


def _address(host: str, port: int) -> str:
    """How this machine is reached: by its name where it listens at all addresses."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server; being told to stop is no failure of it."""

    def __init__(self, store: Store, url: str | None) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(store, url),
                http="h11",  # bounds the size of headers, which the faster parser does not
                ws="none",
                log_level="warning",
                access_log=False,  # addresses are secrets
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """As uvicorn's, without raising the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
