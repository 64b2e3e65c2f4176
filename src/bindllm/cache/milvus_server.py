"""A connection to Milvus: bounded requests, one kind of error, and the embedded server milvus-lite.

milvus-lite serves a ``.db`` path from threads of this process, and locks it for other processes.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bindllm.cache.blend import MILVUS_SUFFIX
from bindllm.errors import InputError, StoreError, needs_extra

# These print every failure with a traceback; the error that is raised says it once.
_LOGGERS = (
    "milvus_lite.adapter.grpc.servicer",
    "milvus_lite.server_manager",
    "pymilvus.client.connection_manager",
    "pymilvus.decorators",
)

# Milvus-lite runs one server per path in this process; whoever closes last stops it.
_lite_users: Counter[str] = Counter()
_lite_lock = threading.Lock()


class MilvusServer:
    """A connection that is made when it is first needed.

    Args:
        uri: A path that ends in ``.db``, or an address such as ``http://host:19530``.
        token: ``user:password`` or an API key, if the server asks for one.
        timeout: Seconds after which a request fails.

    Raises:
        InputError: An invalid address or timeout.
    """

    def __init__(self, uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> None:
        uri = str(uri)
        self.is_lite = uri.endswith(MILVUS_SUFFIX) and "://" not in uri
        parts = urlsplit(uri)
        if not self.is_lite and parts.scheme not in ("http", "https", "tcp", "unix"):
            raise InputError(
                f"{uri!r} is not an address of Milvus: give a path that ends in {MILVUS_SUFFIX!r} for the embedded "
                "one, or 'http://host:19530' for a server"
            )
        if not (math.isfinite(timeout) and timeout > 0):
            raise InputError(f"timeout is {timeout}, expected seconds above 0")
        self.timeout = timeout
        # Messages must not repeat a password of the address.
        self.address = uri if self.is_lite else uri.replace(parts.netloc, parts.netloc.rpartition("@")[2])
        self._uri, self._token = str(Path(uri).absolute()) if self.is_lite else uri, token or ""
        self._client: Any = None
        # Two threads must not connect at once.
        self._connecting = threading.Lock()

    def call(self, name: str, *arguments: Any, patience: float = 1.0, **options: Any) -> Any:
        """Call a method of ``pymilvus.MilvusClient`` and return its answer; pymilvus retries within the timeout.

        Args:
            patience: How many times the usual timeout the request may take.

        Raises:
            StoreError: The server refuses or does not answer in time; names its address and the reason.
        """
        with needs_extra("pymilvus", extra="milvus", purpose="keep a visual cache in Milvus"):
            import grpc
            import pymilvus
        with _muffled() as causes:
            try:
                method = getattr(self._connected(causes), name)
                return method(*arguments, timeout=self.timeout * patience, **options)
            except (pymilvus.MilvusException, grpc.RpcError) as error:
                if not self.is_lite:
                    # The connection may be lost: the next request makes a new one.
                    self.close()
                raise StoreError(
                    f"{self.address}: Milvus did not answer {name} or refused it ({_reason(error)}). Check that the "
                    f"server runs and answers within {self.timeout:g} seconds (timeout), and that the collection was "
                    "not rebuilt or removed since it was opened"
                ) from error

    def close(self) -> None:
        """Close the connection; the embedded server stops with the last one. A later call connects again."""
        # Closing may take long, so it happens outside the lock.
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            with _muffled(), suppress(Exception):
                client.close()
            if self.is_lite:
                _leave_lite(self._uri)

    def _connected(self, causes: list[BaseException]) -> Any:
        import pymilvus

        with self._connecting:
            if self._client is None:
                if self.is_lite:
                    _enter_lite(self._uri, causes)
                # A connection of its own: closing it leaves other clients connected.
                self._client = pymilvus.MilvusClient(
                    self._uri, token=self._token, timeout=self.timeout, dedicated=True
                )
            return self._client


def _enter_lite(path: str, causes: list[BaseException]) -> None:
    """Start the server of an embedded database, or share the running one; `_muffled` collects why it cannot start."""
    with needs_extra("milvus-lite", extra="milvus", purpose="open an embedded Milvus"):
        from milvus_lite.server_manager import server_manager_instance
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
        # The last user releases the path for other processes.
        if not _lite_users[path]:
            del _lite_users[path]
            server_manager_instance.release_server(path)


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


def _reason(error: Any) -> str:
    """Return one line with the message of an error of pymilvus, or of the gRPC error inside it."""
    import grpc

    # The error inside has the reason, the outer one only the name of the call.
    inner = error
    while inner is not None and not isinstance(inner, grpc.RpcError):
        inner = inner.__context__
    text = error.message if inner is None else f"{inner.code().name}: {inner.details()}"
    return " ".join(str(text).split())[:300] or type(error).__name__
