"""Tar shards in the layout of WebDataset: the shards that a pattern names, and the samples of each.

Members with the same path up to the first dot of their name are one sample
(https://github.com/webdataset/webdataset, "The WebDataset Format"): ``000.jpg`` and ``000.json``, say.
"""

from __future__ import annotations

import glob
import http.client
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bindllm.errors import InputError

BAD_SHARD = "shards that are missing or damaged, counted in each pass; the samples before the damage are used"

SUFFIX = ".tar"

MAX_SHARDS = 1_000_000
"""Maximum number of shards of a pattern."""

MAX_SAMPLE_BYTES = 1 << 30
"""Largest sample that is read, with the names of its members: 1 GiB. A damaged header may claim any size."""

MAX_SKIPPED_BYTES = 1 << 40
"""Largest member that is skipped: 1 TiB."""

MAX_HEADER_BYTES = 1 << 20
"""Largest long name or pax header that is read: 1 MiB."""


_READ_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardError(InputError):
    """A shard that is missing, cannot be fetched, or is truncated or damaged; the message names it."""


@dataclass(frozen=True)
class TarSample:
    """The members of a shard that belong together.

    Args:
        members: contents by the rest of their name after the key and a dot, in lower case: ``{"jpg": ..., ...}``;
            none if there is a problem.
        problem: why the sample cannot be used; empty if it can.
    """

    shard: str
    key: str
    number: int
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        """The name of the sample in messages, unique in a source."""
        key = self.key.encode("utf-8", "backslashreplace").decode()
        return f"{self.shard} sample {self.number + 1} ({key})"


def is_stream(path: str) -> bool:
    """Tell whether a source is streamed: its path, pattern or URL ends in ``.tar``.

    Examples:
        >>> is_stream("data/cc3m/{00000..00331}.tar"), is_stream("data/openmoji")
        (True, False)
    """
    return (urlsplit(path).path if is_remote(path) else str(path)).endswith(SUFFIX)


def expand_shards(pattern: str) -> list[str]:
    """Return the shards that a pattern names, in order.

    Args:
        pattern: a path or an http(s) URL with ranges ``{000..331}``, which keep leading zeros, and choices
            ``{a,b}``; a path may have the wildcards ``*``, ``?`` and ``[...]`` too.

    Raises:
        InputError: it names no file that exists, too many, or has a range that goes backwards.

    Examples:
        >>> expand_shards("https://example.org/{08..10}.tar")
        ['https://example.org/08.tar', 'https://example.org/09.tar', 'https://example.org/10.tar']
    """
    pieces = _BRACES.split(pattern)
    # Every second piece is the inside of a pair of braces.
    choices = [[piece] if n % 2 == 0 else _choices(piece, pattern) for n, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise InputError(f"{pattern} names {count:,} shards; at most {MAX_SHARDS:,} are read")
    named = ["".join(parts) for parts in product(*choices)]
    if is_remote(pattern):
        return list(dict.fromkeys(named))
    found = [file for name in named for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    # One is enough: the others may be missing, which is counted while they are read.
    if not any(Path(file).is_file() for file in found):
        place = "" if Path(pattern).is_absolute() else f" in {Path.cwd()}, the working directory"
        raise InputError(f"data source {pattern} names no shard that exists{place}; check the pattern")
    return list(dict.fromkeys(found))


def read_shard(shard: str, *, skip: int = 0) -> Iterator[TarSample]:
    """Yield the samples of a shard, in the order of their first members.

    The members of a sample may be anywhere in a file. A web server is read from start to end, so there they must
    follow each other. Hidden members, folders, and members without a dot in their name are ignored.

    Args:
        shard: path or http(s) URL of an uncompressed tar file.
        skip: number of samples at its start that are not read.

    Raises:
        ShardError: it cannot be opened, is truncated or damaged, or comes from a server and is not sorted. The samples
            before were yielded, except the last one, which may lack members.
    """
    with _opened(shard) as stream:
        yield from (_read_url if is_remote(shard) else _read_file)(shard, stream, skip)


# Errors of tarfile for damaged bytes: sizes beyond 64 bits, numbers that are not numbers, endless chains of headers.
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)


@dataclass
class _Found:
    """A sample whose members are found but not read: offset and size of each by its extension."""

    key: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0
    problem: str = ""

    def add(self, extension: str, member: tarfile.TarInfo) -> None:
        """Add a member; with a problem, the sample is still yielded: it keeps its number and is counted as skipped."""
        # Names count: a member without content may have one of a megabyte.
        self.size += member.size + len(member.name)
        if not member.isfile():
            self.problem = (
                f"its member .{extension} is a link or a device; pack files (tar -h --hard-dereference)"
            )
        elif self.size > MAX_SAMPLE_BYTES:
            self.problem = f"a sample of more than {MAX_SAMPLE_BYTES >> 20} MiB"
        elif extension in self.places:
            self.problem = f"two members .{extension}"
        else:
            self.places[extension] = (member.offset_data, member.size)


def _read_file(shard: str, stream: BinaryIO, skip: int) -> Iterator[TarSample]:
    """Yield the samples of a file: all headers first, because members of a sample may be far apart."""
    samples: list[_Found] = []
    latest: dict[str, _Found] = {}
    damage, is_sorted = None, True
    try:
        for key, extension, member in _members(_strict_tar(stream, "r:")):
            found = latest.get(key)
            follows = found is not None and found is samples[-1]
            # Joined shards may use a key twice: a member that the sample has already begins another one.
            if found is None or (not follows and extension in found.places):
                samples.append(found := _Found(key))
                latest[key] = found
            elif not follows:
                is_sorted = False
            found.add(extension, member)
    except _DAMAGE as error:
        # The sample at the damage may lack members; in a shard without an order, every sample may.
        damage, samples = error, samples[:-1] if is_sorted else []
    for number, found in enumerate(samples[skip:], start=skip):
        members = {}
        for extension, (offset, size) in found.places.items() if not found.problem else ():
            stream.seek(offset)
            members[extension] = stream.read(size)
        yield TarSample(shard, found.key, number, members, found.problem)
    if damage is not None:
        raise _damaged(shard, len(samples), damage)


def _read_url(shard: str, stream: BinaryIO, skip: int) -> Iterator[TarSample]:
    """Yield the samples of a stream: each is complete once a member with another key follows, or the shard ends."""
    # How to read this: ``found`` is the sample that is being read, and ``seen`` holds all samples by key.
    number, found, members = 0, None, {}
    seen: dict[str, _Found] = {}
    try:
        # "r|" never seeks, so that a web server can be read.
        tar = _strict_tar(stream, "r|")
        for key, extension, member in _members(tar):
            if found is None or key != found.key:
                if key in seen and extension not in seen[key].places:
                    raise ShardError(
                        f"{shard}: not sorted, the members of {key} do not follow each other. Pack it again with tar "
                        f"--sort=name, or download it; {number:,} samples before were read, maybe without all members"
                    )
                if found is not None:
                    if number >= skip:
                        yield TarSample(shard, found.key, number, members, found.problem)
                    number += 1
                seen[key] = found = _Found(key)
                members = {}
            found.add(extension, member)
            if found.problem:
                members = {}
            # A skipped sample is counted, but its content is not read.
            elif number >= skip:
                members[extension] = tar.extractfile(member).read()
    except ShardError:
        raise
    except _DAMAGE as error:
        raise _damaged(shard, number, error) from error
    if found is not None and number >= skip:
        yield TarSample(shard, found.key, number, members, found.problem)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, extension and header of each member that belongs to a sample."""
    for member in tar:
        # Otherwise the archive keeps every member of the shard in memory.
        tar.members = []
        # Before the next header, for which tarfile would go back again and again, or skip for years.
        if not 0 <= member.size <= MAX_SKIPPED_BYTES:
            raise tarfile.ReadError(f"a member of {member.size:,} bytes")
        key, extension = _split(member.name)
        if key and not member.isdir():
            yield key, extension, member


def _damaged(shard: str, number: int, error: BaseException) -> ShardError:
    return ShardError(f"{shard}: truncated or damaged after {number:,} samples ({error})")


class _StrictHeader(tarfile.TarInfo):
    """Limits headers, and accepts only zeros before the end: tarfile itself stops at anything that is not a header."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            header = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:
            # A block of zeros, the regular end. Another shard may follow, joined by ``cat``.
            tarfile_.has_end = True
            raise
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EmptyHeaderError) and getattr(tarfile_, "has_end", False):
                raise
            raise tarfile.ReadError(f"no end marker: {error}") from error
        tarfile_.has_end = False
        return header

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        # Long names and pax headers are read into memory as a whole.
        if header.type not in tarfile.REGULAR_TYPES and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size:,} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            header._refuse_sparse()
        return header

    def _refuse_sparse(self, *_: object) -> None:
        """Refuse a sparse member: a few bytes of it become gigabytes, and its map has no limit."""
        raise tarfile.ReadError(f"{self.name} is sparse; pack without tar --sparse")

    # The three forms of the map in pax headers.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _strict_tar(stream: BinaryIO, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    return tarfile.open(
        fileobj=stream, mode=mode, bufsize=_READ_BYTES, tarinfo=_StrictHeader, ignore_zeros=True
    )


@contextmanager
def _opened(shard: str) -> Iterator[BinaryIO]:
    """Open a shard; the error for a missing one differs from that for damage."""
    try:
        # A pipe or a device may block, or never end.
        if not is_remote(shard) and not stat.S_ISREG(os.stat(shard).st_mode):
            raise OSError("not a regular file")
        file = RemoteFile(shard) if is_remote(shard) else open(shard, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ShardError(f"{shard}: cannot be opened ({error.strerror or error}); check the path") from error
    with closing(file):
        yield file


def _split(name: str) -> tuple[str, str]:
    """Return key and extension of a member; both are empty if it does not belong to a sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    # Hidden files have no stem; names such as __this__ are metadata in WebDataset's layout.
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _choices(inside: str, pattern: str) -> list[str]:
    """Return the alternatives in a pair of braces."""
    if (bounds := _RANGE.fullmatch(inside)) is None:
        return inside.split(",")
    first, last = bounds.groups()
    if int(first) > int(last):
        raise InputError(f"{pattern}: the range {{{inside}}} goes backwards; write {{{last}..{first}}}")
    if int(last) - int(first) >= MAX_SHARDS:
        raise InputError(f"{pattern}: the range {{{inside}}} names more than {MAX_SHARDS:,} shards")
    # As many digits as the first bound: {08..10} is 08, 09, 10.
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each retry; after the last one, reading fails."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

# Status codes after which the same request may succeed: timeouts, rate limits, overload.
_TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))


def is_remote(path: str) -> bool:
    """Tell whether this is an http(s) URL.

    Examples:
        >>> is_remote("https://example.org/0.tar"), is_remote("data/0.tar")
        (True, False)
    """
    return path.startswith(("http://", "https://"))


class RemoteFile:
    """Reads a file of a web server from start to end; after a broken connection it continues at the same byte.

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
        """Return up to ``size`` bytes, and none only at the end.

        Raises:
            OSError: the connection broke and could not be restored.
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
                # Only failures in a row count, so progress resets them.
                self._failures = 0
            elif self._size not in (None, self._position):
                # A connection that ends too early looks like the end of the file.
                self.close()
                self._pause("the connection ended too early")
                continue
            return data

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _connect(self) -> None:
        """Request the rest of the file; after a temporary failure, pause and leave no response."""
        headers = {"User-Agent": "bindllm"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        try:
            response = urlopen(Request(self._url, headers=headers), timeout=TIMEOUT)
            length = response.headers.get("Content-Length")
            if self._position and response.status != http.client.PARTIAL_CONTENT:
                # A server without ranges starts at the first byte again.
                self._discard_start(response)
            elif not self._position:
                # Only of the first answer: for a range it is the length of the rest.
                self._size = None if length is None else int(length)
        except HTTPError as error:
            error.close()
            if error.code not in _TEMPORARY:
                raise OSError(f"the server answers {error.code} {error.reason}") from error
            self._pause(f"the server answers {error.code} {error.reason}")
        except (OSError, http.client.HTTPException) as error:
            self._pause(str(error))
        else:
            self._response = response

    def _discard_start(self, response: http.client.HTTPResponse) -> None:
        left = self._position
        while left:
            data = response.read(min(left, 1 << 20))
            if not data:
                raise OSError("the connection ended too early")
            left -= len(data)

    def _pause(self, reason: str) -> None:
        """Wait before a retry.

        Raises:
            OSError: too many failures in a row.
        """
        if self._failures >= len(PAUSES):
            raise OSError(f"{reason}; {self._failures + 1} tries failed")
        time.sleep(PAUSES[self._failures])
        self._failures += 1
