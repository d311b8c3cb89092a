"""The process that serves a study's pages."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from finespun.errors import RecipeError
from finespun.evaluation.judging.app import create_app
from finespun.evaluation.judging.settings import JudgeServerSettings
from finespun.evaluation.judging.store import Store
from finespun.web import Server, listen


def serve(store: Store, settings: JudgeServerSettings, announce: Callable[[str, str], None]) -> None:
    """Serves the pages of `store` until SIGTERM or Ctrl-C. `announce` gets each link with what it is, once they can be
    opened. Raises `ServingError` for an address that cannot be had, `RecipeError` for a `url` that is none."""
    if settings.url and not settings.url.startswith(("http://", "https://")):
        raise RecipeError(f"url: {settings.url} should begin with https:// or http://.")
    with listen(settings.host, settings.port) as listener:
        base = settings.url or _address(settings.host, listener.getsockname()[1])
        server = Server(
            uvicorn.Config(
                create_app(store, settings.url),
                http="h11",  # bounds the size of headers, which the faster parser does not
                ws="none",
                log_level="warning",
                access_log=False,  # addresses are secrets
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        announce("Results", f"{base.rstrip('/')}/results/{store.study.admin}")
        for number, annotator in enumerate(store.study.annotators, 1):
            announce(f"Annotator {number}", f"{base.rstrip('/')}/a/{annotator.token}")
        server.run(sockets=[listener])


def _address(host: str, port: int) -> str:
    """How this machine is reached: by its name where it listens at all addresses."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
