"""Limits of the server, and its API keys."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from bindllm.errors import InputError
from bindllm.serving.fetch import FetchConfig

KEYS_VARIABLE = "BINDLLM_API_KEYS"
"""Environment variable with the API keys, separated by commas or white space."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine in the Host header."""

_KEY = re.compile(r"[!-~]+")
_NAME = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class ServeConfig:
    """Limits of the server. All are on by default.

    Args:
        model: name of the model in the API.
        keys: API keys; any of them opens every route. Empty: no key is needed.
        hosts: names that the Host header of a request may have, without a port; case does not count. Empty: any. A page
            of another site can point its own name at 127.0.0.1, so a server on the loopback address must check it.
        max_body: largest body of a request, in bytes.
        max_held: largest sum of all bodies that are held at the same time, in bytes.
        body_seconds: longest time until a body has arrived.
        timeout: longest time of an answer, in seconds, with waiting.
        max_choices: largest ``n`` of a request.
        max_media: largest number of media in a question.
        max_inputs: largest number of inputs and media of a request for embeddings.
        max_characters: most characters of all texts of a request. A text that cannot fit into the decoder is not even
            tokenized, which takes minutes and gigabytes for 30 MB. It is also the limit on commas and brackets of a
            body, before it is parsed.
        fetch: domains of media URLs, and limits of downloads.

    Raises:
        InputError: a limit that is not above 0, a key with other characters than visible ASCII, or a host that is not
            a name.
    """

    model: str
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = LOOPBACK
    max_body: int = 32 << 20
    max_held: int = 256 << 20
    body_seconds: float = 30.0
    timeout: float = 300.0
    max_choices: int = 8
    max_media: int = 64
    max_inputs: int = 2048
    max_characters: int = 500_000
    fetch: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise InputError(f"{name} is {value}, expected more than 0")
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
    return tuple(dict.fromkeys(filter(None, keys)))
