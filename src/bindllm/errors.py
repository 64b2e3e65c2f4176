"""Exceptions of bindllm. Every message names the given value, the expected values and the next step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

ASSET_FOLDERS = {
    "smollm2-135m-instruct": "checkpoints/smollm2-135m-instruct",
    "efficientnet-lite0": "checkpoints/efficientnet-lite0",
    "minilm": "checkpoints/minilm-l6",
    "openmoji": "data/openmoji",
    "stamps": "data/stamps",
    "easyvqa": "data/easyvqa",
    "scenes": "data/scenes",
    "links": "data/links",
    "languages": "data/languages",
    "clip-vocabulary": "checkpoints/clip-vocabulary",
    "imagenet-names": "datastores/imagenet-names",
}
"""Folder of each quickstart asset, relative to the working directory. It is kept here, and not in
`bindllm.quickstart`, because every room suggests ``bindllm fetch`` when such a folder is missing."""


class BindLLMError(Exception):
    """Base class of all errors of bindllm."""


class InputError(BindLLMError, ValueError):
    """An argument, a recipe value or a data row that cannot be used."""


class MediaError(InputError):
    """An image, audio or other media that cannot be read; the message names the file."""


class DecoderError(BindLLMError):
    """A decoder that cannot be loaded, or that lacks the names which the injection needs."""


class EncoderError(BindLLMError):
    """An encoder that cannot be loaded or breaks its contract."""


class StoreError(BindLLMError):
    """An embedding store that cannot be read or written."""


class CheckpointError(BindLLMError):
    """A checkpoint folder that does not fit: other decoder, other encoder, newer format, wrong keys."""


class AssetError(BindLLMError):
    """A file of the embedded default that is missing, damaged or cannot be fetched."""


class TrainingError(BindLLMError):
    """A run that cannot continue; the last good state has been saved."""


class EngineBusy(BindLLMError):
    """A serving engine whose queue is full; the request may be sent again later."""


class EngineClosed(BindLLMError):
    """A serving engine that is shutting down and takes no further request."""


class UsageError(BindLLMError):
    """A command line or a recipe that cannot be read; the command ends with exit code 2."""


class MissingExtraError(BindLLMError, ImportError):
    """An optional package that is not installed.

    Args:
        purpose: what needs it, as the end of the sentence "... is needed to ...".
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed; it is needed to {purpose}. "
            f"Install it with: pip install 'bindllm[{extra}]'"
        )


@contextmanager
def needs_extra(package: str, *, extra: str, purpose: str) -> Iterator[None]:
    """Turn an `ImportError` inside into a `MissingExtraError`; arguments as there."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(package, extra=extra, purpose=purpose) from error


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Put the name of a file before the message of every `MediaError` that is raised inside.

    Examples:
        >>> with reading("cat.png"):
        ...     raise MediaError("the file is empty")
        Traceback (most recent call last):
        bindllm.errors.MediaError: cat.png: the file is empty
    """
    try:
        yield
    except MediaError as error:
        # A file of an untrusted folder may have escape sequences in its name.
        prefix = f"{printable(name)}: "
        # One reader may call another with the same file.
        if not str(error).startswith(prefix):
            error.args = (prefix + str(error),)
        raise


def own_cause(error: BaseException) -> BindLLMError | None:
    """Return the error of ours that another error was raised from, or the error itself if it is ours."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BindLLMError):
        cause = cause.__cause__
    return cause


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names and the closest match to an unknown one.

    Of many names only the first are listed if one of them is a close match.

    Examples:
        >>> did_you_mean("residul", ["residual", "value"])
        "Did you mean 'residual'? Known: residual, value."
    """
    known = sorted(set(known))
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    question = f"Did you mean {close[0]!r}? " if close else ""
    return f"{question}Known: {listed(known, 12 if close else len(known)) or 'none'}."


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise if a value is not one of the known ones.

    Raises:
        InputError: lists them, and the closest match.
    """
    known = list(known)
    if value not in known:
        raise InputError(f"unknown {what} {value!r}. {did_you_mean(str(value), known)}")


def listed(names: Sequence[str], most: int = 5, *, separator: str = ", ") -> str:
    """Return the first of many names, and how many more there are.

    Examples:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def printable(text: str) -> str:
    r"""Return a text as it may be shown on a terminal: control characters, such as escape sequences, become "?".

    Examples:
        >>> printable("red\x1b[31m")
        'red?[31m'
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def printable_lines(text: str) -> str:
    r"""Return a text of several lines as it may be shown on a terminal, see `printable`.

    Examples:
        >>> print(printable_lines("red\x1b[31m\nblue"))
        red?[31m
        blue
    """
    return "\n".join(printable(line) for line in text.split("\n"))


def known_asset(path: str | Path, *, root: Path = Path(".")) -> str | None:
    """Return the name of the quickstart asset whose folder is, or contains, ``path``.

    Examples:
        >>> known_asset("./data/openmoji/captions.jsonl")
        'openmoji'
    """
    given = Path(os.path.abspath(root / path))
    for name, folder in ASSET_FOLDERS.items():
        if given.is_relative_to(os.path.abspath(root / folder)):
            return name
    return None


def fetch_hint(path: str | Path) -> str:
    """Return a sentence for an error about a missing path: how to fetch it, or "" if it is not an asset.

    Examples:
        >>> fetch_hint("data/stamps")
        ' It is part of the quickstart; run: bindllm fetch stamps'
        >>> fetch_hint("data/mine")
        ''
    """
    name = known_asset(path)
    return f" It is part of the quickstart; run: bindllm fetch {name}" if name else ""
