"""What the servers of finespun have in common: a socket, and an end on SIGTERM or Ctrl-C that is no failure."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Generator

import uvicorn

from finespun.errors import ServingError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: whoever else wants the port is told now. Raises `ServingError` where the address cannot be
    had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # negative where a name is not known
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise ServingError(f"Cannot listen at {host} port {port}: {reason}. Choose another --port or --host.") from None


class Server(uvicorn.Server):
    """uvicorn's server, which does not die of the signal that told it to stop."""

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
