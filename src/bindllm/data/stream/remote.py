"""A file of a web server, read from start to end; a connection that breaks is taken up again where it broke off."""

from __future__ import annotations

import http.client
import time
from types import TracebackType
from typing import Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each new try; after the last one the file is given up."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))


def is_remote(path: str) -> bool:
    """Tell whether this is an http(s) URL.

    Example:
        >>> is_remote("https://example.org/0.tar"), is_remote("data/0.tar")
        (True, False)
    """
    return path.startswith(("http://", "https://"))


class RemoteFile:
    """Reads a file of a web server.

    Args:
        url: http(s).

    Raises:
        OSError: the server does not have the file, or cannot be reached after several tries.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._size: int | None = None
        self._failures = 0
        self._response: http.client.HTTPResponse | None = None
        while self._response is None:
            self._connect()

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, more than none until the end.

        Raises:
            OSError: the connection broke, and could not be taken up again.
        """
        while True:
            while self._response is None:
                self._connect()
            try:
                data = self._response.read(size)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                self._pause(str(error))
                continue
            if data:
                self._position += len(data)
                self._failures = 0
            elif self._size not in (None, self._position):
                self.close()
                self._pause("the connection ended too early")
                continue
            return data

    def close(self) -> None:
        """End the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        """Ask for what is not read yet; a failure that may pass leaves no response, after a pause."""
        headers = {"User-Agent": "bindllm"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        try:
            response = urlopen(Request(self._url, headers=headers), timeout=TIMEOUT)
            length = response.headers.get("Content-Length")
            if self._position and response.status != http.client.PARTIAL_CONTENT:
                # A server without ranges starts over.
                self._pass_over(response)
            elif not self._position:
                self._size = None if length is None else int(length)
        except HTTPError as error:
            error.close()
            if error.code not in _PASSING:
                raise OSError(f"the server answers {error.code} {error.reason}") from error
            self._pause(f"the server answers {error.code} {error.reason}")
        except (OSError, http.client.HTTPException) as error:
            self._pause(str(error))
        else:
            self._response = response

    def _pass_over(self, response: http.client.HTTPResponse) -> None:
        left = self._position
        while left:
            data = response.read(min(left, 1 << 20))
            if not data:
                raise OSError("the connection ended too early")
            left -= len(data)

    def _pause(self, reason: str) -> None:
        """Wait before another try.

        Raises:
            OSError: there were too many.
        """
        if self._failures >= len(PAUSES):
            raise OSError(f"{reason}; given up after {self._failures + 1} tries")
        time.sleep(PAUSES[self._failures])
        self._failures += 1
