"""The process: it listens, and at its end it finishes what runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bindllm.errors import UsageError, printable
from bindllm.serving.engine import Engine

logger = logging.getLogger("bindllm.serving")

CONTINUED = "  | "
"""Starts each further line of one entry of the log."""

HEADER_SECONDS = 30.0
"""Longest time until the headers of a request have arrived. The time of its body is `ServeConfig.body_seconds`."""

WRITE_SECONDS = 30.0
"""Longest time in which a client takes nothing of a full buffer."""

CONNECTIONS = 1024
"""Connections at the same time; further ones get status 503."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which does not listen yet.

    Raises:
        UsageError: the address is unknown or in use.
    """
    try:
        # An exact int: the type of an option is a subclass, which is refused.
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        # A server that was just stopped does not block its port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); choose another --host or --port"
        ) from error
    return bound


def build_server(
    app: FastAPI,
    engine: Engine,
    bound: socket.socket,
    *,
    drain: float,
    name: str,
    certificate: tuple[str, str | None] | None = None,
) -> uvicorn.Server:
    """Return a server, which a signal ends.

    Args:
        drain: longest time for finishing what runs, in seconds.
        name: of the model, for the line that is printed once requests are served.
        certificate: PEM files of a certificate chain and of its key (None: in the same file); None: no TLS.
    """
    chain, key = certificate or (None, None)
    config = uvicorn.Config(
        app,
        # The parser in Python: the same everywhere, and strict about lengths.
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Headers of a proxy decide nothing here, so none is trusted.
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=75,
        ssl_certfile=chain,
        ssl_keyfile=key,
    )
    # The port that was found, if port 0 was asked for.
    host, port = bound.getsockname()[:2]
    address = f"{'http' if chain is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
    greeting = f"{printable(name)} at {address}: chat page, and {address}/v1 for programs"
    return _Server(config, app, engine, drain=drain, greeting=greeting)


def run(app: FastAPI, engine: Engine, bound: socket.socket, **options: Any) -> None:
    """Serve until a signal ends it, and close the engine; arguments as for `build_server`."""
    # The model and the libraries stay to the end, so no collection has to look at them: neither between two tokens, nor
    # in the seconds that a service manager waits for the end of the process.
    gc.freeze()
    try:
        build_server(app, engine, bound, **options).run(sockets=[bound])
    finally:
        engine.close(drain=0)


class LogFormatter(logging.Formatter):
    """Writes entries so that no text in them, such as one of a request, can look like an entry of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return an entry; its further lines, such as a traceback, start with `CONTINUED`."""
        first, *more = super().format(record).splitlines()
        return "\n".join([printable(first), *(CONTINUED + printable(line) for line in more)])


class _Connection(H11Protocol):
    """Closes a connection on which no request arrives, or whose client does not read; uvicorn waits without end."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, or no longer."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop()
        self._stop_writing()

    def pause_writing(self) -> None:
        """Start to wait for the client to read: its request holds memory until then."""
        super().pause_writing()
        # Not `close`, which waits for the rest of the buffer.
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        self._stop_writing()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        # Once for all parts of the headers, however slowly they come.
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Keeps listening while it drains, so that a client is told to try elsewhere."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, engine: Engine, *, drain: float, greeting: str
    ) -> None:
        super().__init__(config)
        self._endpoints, self._engine = app.state.endpoints, engine
        self._drain_seconds, self._greeting = drain, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and print where."""
        await super().startup(sockets)
        # For programs that start this one: from now on a connection is accepted.
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain at the first signal; end at once at the second."""
        if self._endpoints.draining:
            self.should_exit = self.force_exit = True
            return
        self._endpoints.draining = True
        # Not in the handler of the signal, which must not wait.
        threading.Thread(target=self._drain, name="bindllm-drain", daemon=True).start()

    def _drain(self) -> None:
        started = time.monotonic()
        logger.info("finishing %d requests, up to %g seconds", self._engine.running, self._drain_seconds)
        try:
            self._engine.close(drain=self._drain_seconds)
        finally:
            # What is left of the time, for answers that are being sent and for embeddings.
            left = self._drain_seconds - (time.monotonic() - started)
            self.config.timeout_graceful_shutdown = max(1, round(left))
            self.should_exit = True
