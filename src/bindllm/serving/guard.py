"""The outermost layer of the server: it checks a request before anything reads it, and adds headers to every answer.

Decisions use the path of the ASGI scope, which is the path that routing uses. A URL that is put together from headers
could be another one (CVE-2026-48710).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bindllm.errors import printable
from bindllm.serving.api.errors import RETRY, ApiError, draining_error, error_response, request_id
from bindllm.serving.config import ServeConfig
from bindllm.serving.metrics import Metrics

logger = logging.getLogger("bindllm.serving")

OPEN_PATHS = ("/health", "/ready")
"""Paths for probes: without an API key, and under any Host header, as Kubernetes and load balancers name an address."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]+)?")

HEADERS = {
    # The page has only its own files: no foreign script, style, font or frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # The page records sound and images, if the user lets it.
    "permissions-policy": "camera=(self), microphone=(self), geolocation=(), payment=(), usb=()",
    "cache-control": "no-store",
}
"""Headers of every answer."""


class Allowance:
    """Time and memory that one request may still take; both are counted from its first byte.

    Args:
        total: bytes that all requests hold, shared by them; only the event loop counts.
    """

    def __init__(self, config: ServeConfig, total: list[int]) -> None:
        self._deadline, self._most = time.monotonic() + config.timeout, config.max_held_mib * 2**20
        self._total, self._own = total, 0

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def hold(self, size: int) -> None:
        """Count bytes that stay in memory until the request ends.

        Raises:
            ApiError: all requests together hold too many. These count too, until `release`.
        """
        self._own += size
        self._total[0] += size
        if self._total[0] > self._most:
            raise ApiError(429, "the server holds too many large requests; try again later", headers=RETRY)

    def release(self) -> None:
        """Count nothing for this request any more."""
        self._total[0] -= self._own
        self._own = 0


class Guard:
    """Checks host, API key and size of a request, reads its body, and turns unexpected errors into answers.

    Args:
        page: paths of the static page, which need no API key; every other one but `OPEN_PATHS` does.
        is_draining: whether the server is about to end; then no new question is taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServeConfig,
        page: Collection[str],
        metrics: Metrics,
        is_draining: Callable[[], bool],
    ) -> None:
        self._app, self._config, self._page = app, config, frozenset(page)
        self._metrics, self._is_draining = metrics, is_draining
        # Digests have one length, so a comparison does not tell the length of a key either.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.keys]
        self._held = [0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _only(scope, b"x-request-id").decode("latin-1")
        # An id of a client goes into headers and logs, so only harmless characters are taken over.
        identity = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        request_id.set(identity)
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message["headers"])
                own = {**HEADERS, "x-request-id": identity}
                # A route may have its own, such as a page that may be cached.
                message["headers"] = [
                    *((k.encode(), v.encode()) for k, v in own.items() if k.encode() not in headers)
                ]
                message["headers"] += headers.items()
            await send(message)

        try:
            await self._serve(scope, receive, answer, lambda: status)
        finally:
            seconds = time.perf_counter() - started
            # The name of the route, as a path of a client would make a new series of numbers for each spelling.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status or "none")).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            line = f"{scope['method']} {scope['path'][:200]} {status or 'client left'}"
            logger.info("%s %.3f s %s", printable(line), seconds, identity)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, started: Callable[[], int]) -> None:
        """Serve one request; an error before the start of an answer becomes the answer."""
        allowance = Allowance(self._config, self._held)
        # For the routes, as `request.state`.
        scope.setdefault("state", {})["allowance"] = allowance
        try:
            # First, so that no one without a key can make the server hold a body.
            self._check(scope)
            # No other method has a body that is read.
            if scope["method"] == "POST":
                receive = _replaying(await self._read_body(scope, receive, allowance), receive)
            await self._app(scope, receive, send)
        except ClientLeftError:
            return
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except Exception as error:
            if started():
                # Part of the answer has been sent: the server logs the error with this note, and ends the connection.
                error.add_note(f"an answer ended early: {request_id.get()}")
                raise
            await error_response(error)(scope, receive, send)
        finally:
            allowance.release()

    def _check(self, scope: Scope) -> None:
        """Raise an ApiError for a wrong host, a missing key, or a server that is about to end."""
        if scope["path"] in OPEN_PATHS:
            return
        host = _HOST.fullmatch(_only(scope, b"host").decode("latin-1").lower())
        if self._config.hosts and (host is None or host[1] not in self._config.hosts):
            raise ApiError(
                403,
                "the Host header is not a name of this server; open it as localhost, or give its name at the start: "
                "--allowed_hosts NAME",
                code="host_not_allowed",
            )
        if scope["path"] in self._page:
            return
        if self._keys and not self._has_key(scope):
            raise ApiError(
                401,
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        # Its numbers can still be read.
        if self._is_draining() and scope["method"] == "POST":
            raise draining_error()

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = _only(scope, b"authorization").partition(b" ")
        given, known = hashlib.sha256(key.strip()).digest(), False
        # All of them, so that the time does not tell which one was compared last.
        for digest in self._keys:
            known |= hmac.compare_digest(digest, given)
        return known and scheme.lower() == b"bearer"

    async def _read_body(self, scope: Scope, receive: Receive, allowance: Allowance) -> bytes:
        """Return the whole body, which may come in chunks without a length.

        Raises:
            ApiError: it is compressed, too large or too slow, has too many values, or all requests together hold too
                much.
        """
        # Unpacked, some kilobytes may become gigabytes, and no client of this API packs its bodies.
        if any(
            key == b"content-encoding" and value.lower() != b"identity" for key, value in scope["headers"]
        ):
            raise ApiError(
                415, "a body with a Content-Encoding is not read: send it as it is, without compression"
            )
        length = _only(scope, b"content-length")
        self._check_size(int(length) if length.isdigit() else 0)
        chunks, size, seconds = [], 0, min(self._config.body_seconds, allowance.left)
        try:
            # One limit for all chunks: single bytes that trickle in would keep each short one.
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self._check_size(size)
                    # Twice: the values that the body is parsed into are texts of the same length, and both stay.
                    allowance.hold(2 * len(chunks[-1]))
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
        body = b"".join(chunks)
        # A megabyte of empty lists becomes twenty in memory, and the event loop stands still while it is parsed.
        # Inside of texts they are characters, and base64 has none of them.
        if sum(body.count(mark) for mark in b",[{") > (most := self._config.max_characters):
            raise ApiError(
                413,
                f"the body has more than {most:,} commas and brackets: send less text, and media in base64",
            )
        return body

    def _check_size(self, size: int) -> None:
        if size > self._config.max_body_mib * 2**20:
            raise ApiError(
                413,
                f"the body is larger than {self._config.max_body_mib:g} MiB, the limit here: send smaller media",
            )


class ClientLeftError(Exception):
    """The client closed its connection before its body was complete."""


def _only(scope: Scope, name: bytes) -> bytes:
    """Return the value of a header that occurs once; of several, which two programs may read differently, none."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else b""


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body that was read, and then the further messages of the connection."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
