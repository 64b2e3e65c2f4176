"""A Milvus server that is asked with patience: every request is bounded in time and tried again where that may help.

The server is a cluster, reached by its address, or milvus-lite, which serves a ``.db`` path from threads of this
process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from bindllm.errors import InputError, MissingExtraError, StoreError

ATTEMPTS = 3
"""How often a request is made before it is given up; each may take an equal part of the time-out."""

LITE = ".db"
"""How the path of an embedded database ends."""

# Waits before the second and the third attempt, as parts of the time-out.
_WAITS = (1 / 60, 1 / 15)
# Answers of gRPC that a second attempt would only repeat.
_FINAL = {
    "ALREADY_EXISTS",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNIMPLEMENTED",
}
# The numbers of pymilvus for "no connection" and "too many requests".
_PASSING = {2, 8}
# They print every failed attempt with its traceback; the error that is raised says it once.
_LOGGERS = (
    "milvus_lite.adapter.grpc.servicer",
    "milvus_lite.server_manager",
    "pymilvus.client.connection_manager",
    "pymilvus.decorators",
)
# Milvus-lite keeps its servers in one table of the process, by path. Who closes last stops the server.
_lite_users: Counter[str] = Counter()
_lite_lock = threading.Lock()


class UnreachableError(StoreError):
    """A Milvus server that did not answer, whatever was tried."""


class RefusedError(StoreError):
    """A Milvus server that answered that it cannot do what was asked."""


class MilvusServer:
    """A connection that is made when it is first needed, and made again when it was lost.

    Args:
        uri: a path that ends in ``.db``, or an address such as ``http://host:19530``.
        token: ``user:password`` or a key, where the cluster asks for one.
        timeout: seconds after which a request is given up, all attempts together.

    Raises:
        InputError: an address or a time-out that cannot be one.
    """

    def __init__(self, uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> None:
        uri = str(uri)
        self.is_lite = uri.endswith(LITE) and "://" not in uri
        if not self.is_lite and urlsplit(uri).scheme not in ("http", "https", "tcp", "unix"):
            raise InputError(
                f"{uri!r} is no address of Milvus: give a path that ends in {LITE!r} for the embedded one, or "
                "'http://host:19530' for a server"
            )
        if not (math.isfinite(timeout) and timeout > 0):
            raise InputError(f"timeout is {timeout}, expected seconds above 0")
        self.timeout = timeout
        self.address = uri if self.is_lite else _without_credentials(uri)
        self._uri, self._token = str(Path(uri).absolute()) if self.is_lite else uri, token or ""
        self._client: Any = None
        self._connecting = threading.Lock()
        self._holds_lite = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str, *arguments: Any, patience: float = 1.0, **options: Any) -> Any:
        """Call a method of ``pymilvus.MilvusClient`` and return its answer.

        A connection that fails or is lost, a server that is not ready and an attempt that takes too long are tried
        again over a new connection; so a request must be one that may arrive twice.

        Args:
            name: of the method.
            arguments: for the method.
            patience: how many times the usual time-out the request may take.
            options: for the method.

        Raises:
            RefusedError: the server cannot do it; says why.
            UnreachableError: no answer in time; names the address.
        """
        grpc, pymilvus = _packages()
        start = time.monotonic()
        for wait in (*_WAITS, None):
            client = None
            with _muffled() as causes:
                try:
                    client = self._connected(causes)
                    method = getattr(client, name)
                    return method(*arguments, timeout=self.timeout * patience / ATTEMPTS, **options)
                except (pymilvus.MilvusException, grpc.RpcError) as error:
                    failure = error
            if not _is_passing(failure):
                raise RefusedError(
                    f"{self.address}: Milvus refused {name} ({_reason(failure, causes)})"
                ) from failure
            self._drop(client)
            if wait is not None:
                time.sleep(wait * self.timeout)
        raise UnreachableError(
            f"{self.address}: Milvus did not answer {name} in {ATTEMPTS} attempts over "
            f"{time.monotonic() - start:.1f} seconds ({_reason(failure, causes)}). Check that the server runs and "
            "can be reached from here, or allow it more time by timeout"
        ) from failure

    def close(self) -> None:
        """Close the connection; the embedded server stops with the last one. A later call connects again."""
        self._drop(self._client)
        if self._holds_lite:
            self._holds_lite = False
            _leave_lite(self._uri)

    def _connected(self, causes: list[BaseException]) -> Any:
        _, pymilvus = _packages()
        with self._connecting:
            if self._client is None:
                if self.is_lite and not self._holds_lite:
                    _enter_lite(self._uri, causes)
                    self._holds_lite = True
                self._client = pymilvus.MilvusClient(
                    self._uri, token=self._token, timeout=self.timeout / ATTEMPTS, dedicated=True
                )
            return self._client

    def _drop(self, client: Any) -> None:
        """Close a client and forget it, unless another thread has put a new one in its place."""
        if client is not None:
            if self._client is client:
                self._client = None
            with _muffled(), suppress(Exception):
                client.close()


def _enter_lite(path: str, causes: list[BaseException]) -> None:
    """Start the server of an embedded database, or share the one that runs.

    Args:
        path: of the database.
        causes: milvus-lite prints why it cannot start, and `_muffled` puts it in here.

    Raises:
        StoreError: the path cannot be opened; says why.
    """
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise MissingExtraError("milvus-lite", extra="milvus", purpose="open an embedded Milvus") from error
    with _lite_lock:
        if server_manager_instance.start_and_get_uri(path) is None:
            cause = causes[-1] if causes else None
            raise StoreError(
                f"{path} cannot be opened as an embedded Milvus ({cause}); one process at a time can have it open. "
                "Close it there, or start a server and give its address to both"
            ) from cause
        _lite_users[path] += 1


def _leave_lite(path: str) -> None:
    from milvus_lite.server_manager import server_manager_instance

    with _lite_lock, _muffled():
        _lite_users[path] -= 1
        if not _lite_users[path]:
            del _lite_users[path]
            server_manager_instance.release_server(path)


def _is_passing(error: Any) -> bool:
    """Return whether the same request may succeed later."""
    code = _grpc_code(error)
    if code is not None:
        return code not in _FINAL
    # Another thread may have closed the connection in order to make a new one.
    return error.retriable or error.code in _PASSING or "closed channel" in error.message


def _grpc_code(error: BaseException | None) -> str | None:
    """Return the name of the status that gRPC ended with, None where the server itself has answered."""
    grpc, pymilvus = _packages()
    # pymilvus wraps the error of gRPC, sometimes more than once.
    while error is not None:
        code = None
        if isinstance(error, grpc.RpcError):
            code = error.code()
        elif isinstance(error, pymilvus.MilvusException):
            code = error.code
        if isinstance(code, grpc.StatusCode):
            return code.name
        error = error.__context__
    return None


def _reason(error: Any, causes: list[BaseException]) -> str:
    """Return one line of what an error of pymilvus or gRPC says."""
    grpc, _ = _packages()
    inner = error.__context__ if isinstance(error.__context__, grpc.RpcError) else error
    text = f"{inner.code().name}: {inner.details()}" if isinstance(inner, grpc.RpcError) else inner.message
    return " ".join(str(text).split())[:300] or (str(causes[-1]) if causes else type(error).__name__)


def _without_credentials(uri: str) -> str:
    """Return an address without the name and the password that it may carry.

    Example:
        >>> _without_credentials("https://me:secret@host:19530/db")
        'https://host:19530/db'
    """
    scheme, slashes, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + slashes + host.rpartition("@")[2] + slash + path


@contextmanager
def _muffled() -> Iterator[list[BaseException]]:
    """Keep pymilvus and milvus-lite from printing; yields the errors that they would have printed, in order."""
    causes: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            causes.append(record.exc_info[1])
        return False

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(keep)
    try:
        yield causes
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(keep)


def _packages() -> tuple[Any, Any]:
    try:
        import grpc
        import pymilvus
    except ImportError as error:
        raise MissingExtraError(
            "pymilvus", extra="milvus", purpose="keep a visual cache in Milvus"
        ) from error
    return grpc, pymilvus
