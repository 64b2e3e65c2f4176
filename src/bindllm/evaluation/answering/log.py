"""Answers on disk: one line of JSON for each, and a file of facts about their run. An interrupted run resumes.

Lines are appended batch by batch. An interrupted run keeps its whole lines, and a resumed one computes only the batches
that miss a line. At the end the lines are put in their order, so both give the same file. With several processes, each
appends to a file of its own, and the first one joins them at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bindllm.atomic import atomic_file, locked, read_json, write_json
from bindllm.errors import InputError

Line = dict[str, Any]
"""One answer, as its file has it."""


@dataclass(frozen=True)
class AnswerLog:
    """The files of a run.

    Args:
        subject: key of the facts for the questions that are asked, and the words for it.
        free: settings of the facts that may change between two parts of a run.
    """

    lines: Path
    facts: Path
    place: Path
    subject: tuple[str, str]
    free: Collection[str] = ()
    rank: int = 0

    @property
    def own(self) -> Path:
        """File that this process appends to."""
        return self.lines if self.rank == 0 else self.lines.with_name(f".{self.lines.name}.{self.rank}.part")

    @property
    def files(self) -> list[Path]:
        """Files with lines of all processes, also of earlier ones."""
        return [self.lines, *sorted(self.lines.parent.glob(f".{self.lines.name}.*.part"))]

    def locked(self) -> AbstractContextManager[None]:
        """Return a lock: two runs that append to one file would mix their lines."""
        return locked(
            self.place, InputError(f"{self.place} is written by another process; choose another output")
        )

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write the facts of a run that starts or resumes.

        Raises:
            InputError: there are answers of another run: to other questions, of another checkpoint or with other
                settings.
        """
        if self.facts.exists():
            self._check(read_json(self.facts, InputError, "choose another output"), facts)
        write_json(self.facts, {**facts, "complete": False})

    def _check(self, old: Any, new: Mapping[str, Any]) -> None:
        # A half of the answers of one model and a half of another would be a score of none.
        for name, words in (self.subject, ("checkpoint_fingerprint", "the checkpoint with the fingerprint")):
            if old.get(name) != new[name]:
                raise InputError(
                    f"{self.place} holds answers of {words} {old.get(name)!r}, and this is {new[name]!r}. Choose "
                    f"another output, or delete {self.place}"
                )
        settings = old.get("settings", {})
        changed = [
            f"{name} {settings.get(name)!r} (now {value!r})"
            for name, value in new["settings"].items()
            if settings.get(name) != value and name not in self.free
        ]
        if changed:
            raise InputError(
                f"{self.place} was started with {', '.join(changed)}. Use the same settings to resume it, or choose "
                "another output"
            )

    def known(self) -> list[Line]:
        """Return the lines so far, and let the own file be appended to."""
        lines = [line for file in self.files for line in read_lines(file)]
        # A cut line stays in the file until the end; a line break separates it from those that are appended.
        with self.own.open("a", encoding="utf-8") as stream:
            stream.write("\n" if stream.tell() else "")
        return lines

    def append(self, lines: Iterable[Line]) -> None:
        """Add the lines of a batch.

        Raises:
            InputError: they cannot be written, such as to a full disk.
        """
        try:
            with self.own.open("ab") as stream:
                stream.write(b"".join(map(_bytes, lines)))
        except OSError as error:
            raise InputError(
                f"{self.own} cannot be written ({error.strerror or error}). The answers so far are kept: free some "
                "disk space and run the same command again"
            ) from error

    def finish(self, facts: Mapping[str, Any], lines: Iterable[Line]) -> None:
        """Write all lines in their order, and the facts."""
        with atomic_file(self.lines) as part, part.open("wb") as stream:
            stream.writelines(map(_bytes, lines))
        for file in self.files[1:]:
            file.unlink()
        write_json(self.facts, {**facts, "complete": True})


def read_lines(path: Path, *, is_finished: bool = False) -> list[Line]:
    """Return the lines of a file; one that was cut by an interruption is dropped.

    Raises:
        InputError: a line of a finished file cannot be read.
    """
    lines = []
    if path.is_file():
        # Line by line in bytes, since an interruption may cut a line inside a character.
        for text in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                # Else the end of the file, or the start of a batch that is computed again.
                if is_finished and text:
                    raise InputError(f"{path} has a damaged line; evaluate again") from error
    return lines


def prompt_sha256(text: str) -> Line:
    """Return the field of a line for the text that the decoder reads before it answers."""
    return {"prompt_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def media_sha256(hashes: Iterable[str]) -> Line:
    """Return the field of a line for the content of its media, from the hash of each; empty without media."""
    joined = " ".join(hashes)
    return {"media_sha256": hashlib.sha256(joined.encode()).hexdigest()} if joined else {}


def changed_question(old: Line, new: Line) -> str:
    """Return which part of a question differs from that of an earlier answer, in words; empty: none."""
    if old.get("prompt_sha256") != new.get("prompt_sha256"):
        return "to another question"
    # A file may have been replaced by another one of the same name.
    return "about other media" if old.get("media_sha256") != new.get("media_sha256") else ""


def _bytes(line: Line) -> bytes:
    # Half of a surrogate pair, such as one in a path of a table, stays the escape of JSON.
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
