"""Rationales that a model has written, by the ids of their questions: the first stage of Multimodal-CoT."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from bindllm.errors import InputError


def read_rationales(path: str) -> dict[str, str]:
    """Return the answers by id of a file that ``bindllm generate --input`` or ``bindllm evaluate`` wrote.

    Raises:
        InputError: another file, a line without an id, or two answers of one id.

    Examples:
        >>> read_rationales("answers.jsonl")["images/1.png"]  # doctest: +SKIP
        'a cat and a dog.'
    """
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as rationales ({error!r}); expected lines with id and answer, as `bindllm generate "
            "--input TABLE` writes them for rows with a column id, or the items.jsonl of `bindllm evaluate`"
        ) from error


# Asked for with every row; the time notices a file that is written again.
@lru_cache(maxsize=8)
def _read(path: str, time: int) -> dict[str, str]:
    found: dict[str, str] = {}
    # Only line feeds: a text may hold the other signs that `splitlines` splits at.
    for line in map(json.loads, filter(None, Path(path).read_text(encoding="utf-8").split("\n"))):
        # A table of questions has ids and answers too, and these are the true ones.
        if "prompt_sha256" not in line and "error" not in line:
            raise ValueError("a line that no model has written")
        # Controls of an evaluation have answers to the same questions.
        if "error" in line or line.get("variant", "model") != "model":
            continue
        if line["id"] is None:
            raise ValueError("a line without an id")
        name, text = str(line["id"]), line["answer"]
        if not isinstance(text, str) or found.setdefault(name, text) != text:
            raise ValueError(f"several answers of the id {name!r}")
    return found
