"""Safe download of media URLs: only from allowed domains, only from public addresses, within bytes and seconds.

A request names the URL, so it is untrusted: the server must not become a way into the network that it runs in.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urljoin

from bindllm.errors import InputError, MediaError, reading
from bindllm.media.source import CHUNK

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]"
# The only parser of addresses here. It is stricter than RFC 3986: without user info, backslashes, white space or
# letters outside of ASCII, on which parsers disagree.
_URL = re.compile(
    rf"(https?)://({_HOST})(?::([0-9]{{1,5}}))?((?:[/?][a-z0-9._~!$&'()*+,;=:@/?%\[\]|-]*)?)(?:#[!-~]*)?",
    # Without ASCII, the Kelvin sign would be a "k".
    re.IGNORECASE | re.ASCII,
)
# A name server that hangs would otherwise leave one thread more for each request.
_lookups = threading.BoundedSemaphore(16)
_DOMAIN = re.compile(rf"({_HOST})(?::([0-9]{{1,5}}))?")

# Everything of the special-purpose registry of IANA (2026) that is not for the public, and addresses of clouds for
# their own machines. A list of our own, because `ipaddress.is_global` differs between versions of Python.
_REFUSED_IPV4 = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # The host agent of Azure has a public address.
        "168.63.129.16/32",
    )
]
# Only 2000::/3 is for the public. So loopback, private, link-local, multicast, mapped (::ffff:0:0/96) and translated
# (64:ff9b::/96) addresses are refused by lying outside; Teredo, documentation and 6to4 lie inside.
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_REFUSED_IPV6 = [
    ipaddress.ip_network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20")
]


@dataclass(frozen=True)
class FetchConfig:
    """Downloads of media URLs (default: none).

    Raises:
        InputError: a domain that is not a host, or a limit that is not above 0 (redirects: below 0).
    """

    domains: tuple[str, ...] = ()
    """host that media URLs of a request may name, such as media.example.com, without its subdomains; with a port
    (media.example.com:8443) only that port; may be repeated"""
    mib: float = 32.0
    """largest size of all downloads of one request, in MiB"""
    seconds: float = 10.0
    """longest time of all downloads of one request, in seconds"""
    redirects: int = 3
    """most redirects of one download"""

    def __post_init__(self) -> None:
        for domain in self.domains:
            if not _DOMAIN.fullmatch(domain.lower()):
                raise InputError(
                    f"a domain is a host such as media.example.com, with or without a port, not {domain!r}"
                )
        if not (self.mib > 0 and self.seconds > 0 and self.redirects >= 0):
            raise InputError(
                "of a download, mib and seconds must be above 0, and redirects at least 0, not "
                f"{self.mib}, {self.seconds} and {self.redirects}"
            )
        object.__setattr__(self, "domains", tuple(domain.lower() for domain in self.domains))

    @property
    def max_bytes(self) -> int:
        """``mib`` in bytes."""
        return round(self.mib * 2**20)


class _Target(NamedTuple):
    """A parsed URL: host in lower case, an IPv6 address in brackets; path with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host, and the port if it is not the usual one, as the header Host and `FetchConfig.domains` write it."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def fetch(url: str, config: FetchConfig) -> bytes:
    """Download a file.

    The host must be one of the allowed domains and all its addresses must be public; the connection goes to one of
    the addresses that were checked, so a second answer of the name server cannot change it. Each redirect is checked in
    the same way. Proxies of the environment are not used, and no cookie or credential is sent. Compressed answers are
    refused, because their size is unknown.

    Raises:
        MediaError: the URL is not allowed or the download failed; the message names the URL, never an address.
    """
    with reading(url if len(url) <= 80 else f"{url[:77]}..."):
        if not config.domains:
            raise MediaError(
                "this server does not download URLs; send the content as a data: URI, or ask its owner to allow "
                "the domain"
            )
        deadline = time.monotonic() + config.seconds
        target = _parse(url, config)
        for _ in range(config.redirects + 1):
            answer = _get(target, config, deadline)
            if isinstance(answer, bytes):
                return answer
            # Only text: the result is parsed and checked like the first URL.
            moved = _parse(urljoin(f"{target.scheme}://{target.authority}{target.path}", answer), config)
            if target.scheme == "https" != moved.scheme:
                raise MediaError("it redirects from https to http")
            target = moved
        raise MediaError(f"more than {config.redirects} redirects; give the final URL")


def _parse(url: str, config: FetchConfig) -> _Target:
    """Parse a URL, once, and check its domain.

    Raises:
        MediaError: not a plain http or https URL, or its domain is not allowed.
    """
    if (found := _URL.fullmatch(url)) is None:
        raise MediaError(
            "expected http:// or https:// with a plain host, without user or password; write spaces and letters "
            "outside of ASCII as %20 and so on"
        )
    scheme, host, port, path = found[1].lower(), found[2].lower(), found[3], found[4]
    target = _Target(
        scheme,
        host,
        int(port) if port else _PORTS[scheme],
        path if path.startswith("/") else f"/{path}",
    )
    if not {target.authority, f"{host}:{target.port}"} & set(config.domains):
        raise MediaError(
            "its domain is not one that this server downloads from; send the content as a data: URI"
        )
    return target


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    Private, shared, loopback, link-local, reserved, multicast and unspecified addresses do not, nor do IPv6 addresses
    that stand for an IPv4 address (mapped, 6to4, NAT64, Teredo) or name a zone.

    Examples:
        >>> is_public("93.184.216.34"), is_public("10.0.0.1"), is_public("::ffff:93.184.216.34")
        (True, False, False)
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _REFUSED_IPV4)
    return ip.scope_id is None and ip in _PUBLIC_IPV6 and not any(ip in network for network in _REFUSED_IPV6)


def _get(target: _Target, config: FetchConfig, deadline: float) -> bytes | str:
    """Return the content of one URL, or the text of its redirect."""
    # OSError holds time-outs, errors of TLS and lost connections; HTTPException holds every malformed answer.
    try:
        with _connect(target, deadline) as connection:
            timed = _Timed(connection, deadline)
            # The parts were checked by `_URL`: no space, no line break.
            timed.sendall(
                f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: bindllm\r\nAccept: */*\r\n"
                "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            response = HTTPResponse(timed, method="GET")  # type: ignore[arg-type]
            response.begin()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                return location
            return _read(response, config)
    except TimeoutError as error:
        raise MediaError(f"the download takes more than {config.seconds:.3g} seconds") from error
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        # Not the words of the system: they would tell apart closed ports, dead hosts and other services.
        raise MediaError("the download failed (no connection, or not an answer of HTTP)") from error


def _read(response: HTTPResponse, config: FetchConfig) -> bytes:
    """Return the content of a response, never more than the limit."""
    if response.status != 200:
        raise MediaError(f"the download was answered with status {response.status}")
    if response.getheader("Content-Encoding", "identity").strip().lower() != "identity":
        raise MediaError("the answer is compressed; give the URL of the plain file")
    too_large = f"the file has more than {config.max_bytes:,} bytes"
    # The length that the header claims; None in chunked answers.
    if (response.length or 0) > config.max_bytes:
        raise MediaError(too_large)
    content = bytearray()
    while part := response.read(CHUNK):
        content += part
        if len(content) > config.max_bytes:
            raise MediaError(too_large)
    # At the end of a complete answer nothing of its claimed length is left.
    if response.length:
        raise MediaError("the download was cut off; try again")
    return bytes(content)


def _connect(target: _Target, deadline: float) -> socket.socket:
    """Return a connection to the host of a URL, at an address that was checked here."""
    found = _resolve(target, deadline)
    # All of them: a name with one private address is an attack or a mistake, whichever address is taken.
    if not found or not all(is_public(address[0]) for *_, address in found):
        raise MediaError("its domain has no address, or one outside of the public internet")
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            if target.scheme == "http":
                return connection
            # The name of the URL, not the address, is sent and compared with the certificate.
            context = ssl.create_default_context()
            return context.wrap_socket(
                connection, server_hostname=target.host.strip("[]"), suppress_ragged_eofs=False
            )
        except OSError as error:
            connection.close()
            last = error
    raise last


def _resolve(target: _Target, deadline: float) -> list[Any]:
    """Return the answers of the name servers; in a thread, because the system knows no time limit for them."""
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        # How long a lookup lasts is up to the name server, so its thread may outlive the request by minutes.
        try:
            answer.set_result(
                socket.getaddrinfo(target.host.strip("[]"), target.port, type=socket.SOCK_STREAM)
            )
        except Exception as error:
            answer.set_exception(error)
        finally:
            _lookups.release()

    if not _lookups.acquire(timeout=_left(deadline)):
        raise TimeoutError
    threading.Thread(target=ask, name="bindllm-lookup", daemon=True).start()
    return answer.result(timeout=_left(deadline))


def _left(deadline: float) -> float:
    """Return the seconds until the deadline."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """A connection whose reads share one deadline: a time-out for each would never end if single bytes trickle in."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        """Whether bytes can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the bytes that have arrived, at least one unless the connection has ended."""
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        """Send all bytes."""
        self._connection.settimeout(_left(self._deadline))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream that `HTTPResponse` reads."""
        return io.BufferedReader(self)
