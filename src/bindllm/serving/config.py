"""Limits of the server, and its API keys."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from bindllm.errors import InputError
from bindllm.serving.fetch import FetchConfig

SLOTS = 16
"""Requests that are decoded together, by default."""
QUEUE = 128
"""Requests that wait for a slot, by default."""
TOKENS = 32_768
"""Tokens in the key/value cache, by default."""
PREFILL_TOKENS = 512
"""Tokens of newcomers that are read between two steps, by default; a longer prompt is read in several parts."""

KEYS_VARIABLE = "BINDLLM_API_KEYS"
"""Environment variable with the API keys, separated by commas or white space."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine in the Host header."""

# RFC 6750 allows fewer characters, but other servers hand out keys with these.
_KEY = re.compile(r"[!-~]+")
_NAME = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits (docs/serve.md), with the HTTP status of requests beyond them.

    Raises:
        InputError: a limit that is not above 0.
    """

    slots: int = SLOTS
    """requests that are decoded together"""
    queue: int = QUEUE
    """requests that may wait (429)"""
    kv_tokens: int = TOKENS
    """most tokens in the key/value cache, of all prompts and answers together; requests wait until they fit"""
    prefill: int = PREFILL_TOKENS
    """tokens of new prompts that are read between two decoding steps; a longer prompt is read in several parts"""
    timeout: float = 300.0
    """longest time of a request in seconds: its body, downloads, decoding, waiting, and its answer (504)"""
    body_seconds: float = 30.0
    """longest time until the body of a request has arrived, in seconds (408)"""
    drain: float = 60.0
    """longest time in seconds to finish what runs, after SIGTERM or Ctrl-C"""
    max_body_mib: float = 32.0
    """largest body of a request, in MiB (413)"""
    max_held_mib: float = 512.0
    """most memory that all requests hold at the same time, in MiB: each body twice, as it arrived and as it was parsed,
    and the content of its media (429)"""
    max_choices: int = 8
    """largest n of a request, its number of answers (400)"""
    max_media: int = 64
    """most media of a question (400)"""
    max_inputs: int = 2048
    """most inputs, and most media, of a request for embeddings (400)"""
    max_characters: int = 500_000
    """most characters of all texts of a request (400), and most commas and brackets of a body before it is parsed
    (413)"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # Written so that NaN is refused too.
            if isinstance(value, int | float) and not value > 0:
                raise InputError(f"{name} is {value}, expected more than 0")


@dataclass(frozen=True)
class ServeConfig(Limits):
    """All settings of the application.

    Args:
        model: name of the model in the API.
        keys: API keys; any of them opens every route. Empty: no key is needed.
        hosts: names that the Host header of a request may have, without a port; case does not count. Empty: any. A page
            of another site can point its own name at 127.0.0.1, so a server on the loopback address must check it.
        fetch: domains of media URLs, and limits of downloads.

    Raises:
        InputError: a limit that is not above 0, a key with other characters than visible ASCII, or a host that is not
            a name.
    """

    model: str
    # Without ``repr``: a log line or a traceback with the settings must not have them.
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = LOOPBACK
    fetch: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        # Keys and hosts are texts, which the check of the limits passes over.
        super().__post_init__()
        object.__setattr__(self, "hosts", tuple(name.lower() for name in self.hosts))
        # A name that no header can equal would lock its users out without a word.
        for name in self.hosts:
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"a host is a name such as models.example.com, without a scheme or a port, not {name!r}"
                )
        # The key itself stays out of the message, which may be logged.
        for number, key in enumerate(self.keys, start=1):
            if not _KEY.fullmatch(key):
                raise InputError(
                    f"API key {number} has characters that a header cannot carry: use visible ASCII"
                )


def read_keys(file: str | None) -> tuple[str, ...]:
    """Return the API keys of a file, one on each line (# starts a comment), and of the environment.

    Raises:
        InputError: the file cannot be read, or it has no key: a server that should have one must not open without.
    """
    # From the environment first: a process list shows arguments to other users, but no environment.
    keys = re.split(r"[\s,]+", os.environ.get(KEYS_VARIABLE, "").strip())
    if KEYS_VARIABLE in os.environ and not any(keys):
        raise InputError(f"{KEYS_VARIABLE} is set and has no API key: unset it, or put a key into it")
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the API keys cannot be read ({error})") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"{file} has no API key: write one on each line")
        keys += found
    # A key that is in both places counts once.
    return tuple(dict.fromkeys(filter(None, keys)))
