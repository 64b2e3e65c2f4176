"""What bindllm raises: every message says what was given, what was expected and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class BindLLMError(Exception):
    """Base of every error that bindllm raises on purpose."""


class InputError(BindLLMError, ValueError):
    """An argument, a recipe value or a data row that cannot be used."""


class MediaError(InputError):
    """A picture, sound or other media that cannot be read; the message names the file."""


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
    """A run that cannot go on; the last good state has been saved."""


class UsageError(BindLLMError):
    """A command line or a recipe that cannot be read; the command ends with exit code 2."""


class MissingExtraError(BindLLMError, ImportError):
    """An optional package that is not installed.

    Args:
        package: name of the package that could not be imported.
        extra: the extra of bindllm that brings it.
        purpose: what needs it, as the end of the sentence "... is needed to ...".
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed; it is needed to {purpose}. "
            f"Install it with: pip install 'bindllm[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names and the closest match to an unknown one.

    Example:
        >>> did_you_mean("residul", ["residual", "value"])
        "Did you mean 'residual'? Known: residual, value."
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    question = f"Did you mean {close[0]!r}? " if close else ""
    return f"{question}Known: {', '.join(known) or 'none'}."


def printable(text: str) -> str:
    """Return a text as it may be shown on a terminal: control characters become ``?``."""
    return "".join(character if character.isprintable() else "?" for character in text)
