"""Reading the rows of a JSON file one after another, however large it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bindllm.data.report import NOT_UTF8, Skipped
from bindllm.errors import InputError

_CHUNK = 1 << 20
_SPACE = " \t\n\r"
# Bytes that are not UTF-8 become lone surrogates, which no valid text holds.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# A value that the end of the buffer cuts fails at most this many characters ahead of it (an escape, a literal).
_NEAR_END = 16


def read_list(path: Path, skipped: Skipped) -> Iterator[tuple[str, object]]:
    """Yield the items of the list in a JSON file, each with its name.

    The file holds a list, or an object of which one value is a list of objects, such as
    ``{"info": {...}, "annotations": [...]}``. Only one item is in memory at a time.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        skipped: counts items that are not UTF-8.

    Raises:
        InputError: damaged JSON, JSON Lines, an object without such a list, or one with several.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        text = _Text(path, stream)
        first = text.peek()
        if first == "[":
            yield from _items(text, path.name, skipped)
        elif first == "{":
            yield from _list_of_object(text, path.name, skipped)
        else:
            raise InputError(f"{path}: neither a JSON list of rows nor an object that holds one")
        text.end()


def _items(text: _Text, name: str, skipped: Skipped) -> Iterator[tuple[str, object]]:
    text.take("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.take(",")
        number += 1
        row = f"{name} row {number}"
        item, is_utf8 = text.value(row)
        if is_utf8:
            yield row, item
        else:
            skipped.add(NOT_UTF8, row)
    text.take("]")


def _list_of_object(text: _Text, name: str, skipped: Skipped) -> Iterator[tuple[str, object]]:
    """Yield the items of the one list of objects among the values of an object."""
    text.take("{")
    lists, is_first = [], True
    while text.peek() != "}":
        if not is_first:
            text.take(",")
        is_first = False
        if text.peek() != '"':
            raise InputError(
                f"{text.path}: not valid JSON ({text.peek()!r} where a key in quotation marks belongs)"
            )
        key, _ = text.value("a key")
        text.take(":")
        if text.peek() != "[":
            text.value(f"the value of {key!r}")
            continue
        # A list of other things, such as the names of the classes, holds no rows.
        items = _items(text, name, skipped)
        holds_rows = False
        for number, (row, item) in enumerate(items):
            holds_rows = holds_rows or (number == 0 and isinstance(item, dict))
            if holds_rows and not lists:
                yield row, item
        lists += [str(key)] * holds_rows
    text.take("}")
    text.end()
    if len(lists) != 1:
        found = f"the lists {', '.join(lists)}" if lists else "no list of objects"
        raise InputError(
            f"{text.path}: the object holds {found}; expected one list of rows. Write the rows as a list of their own"
        )


class _Text:
    """The characters of a JSON file from a place on, as many as are needed at a time."""

    def __init__(self, path: Path, stream) -> None:
        self.path = path
        self._stream, self._buffer, self._place, self._ended = stream, "", 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Pass over white space; return the next character, or nothing at the end."""
        while True:
            while self._place < len(self._buffer):
                if self._buffer[self._place] not in _SPACE:
                    return self._buffer[self._place]
                self._place += 1
            if not self._more(_CHUNK):
                return ""

    def take(self, wanted: str) -> None:
        """Pass over one character, which must be the next."""
        found = self.peek()
        if found != wanted:
            what = (
                f"{found!r} where {wanted!r} belongs" if found else f"the file ends where {wanted!r} belongs"
            )
            raise InputError(f"{self.path}: not valid JSON ({what})")
        self._place += 1

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise InputError(
                f"{self.path}: more than one JSON value; if each line is a row, call the file .jsonl"
            )

    def value(self, name: str) -> tuple[object, bool]:
        """Return the next value, and whether all of it is UTF-8."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                found, end = self._decoder.raw_decode(self._buffer, self._place)
            except json.JSONDecodeError as error:
                # A string that the end of the buffer cuts is reported at its start.
                near_end = error.pos + _NEAR_END >= len(self._buffer) or "Unterminated" in error.msg
                if not (near_end and self._more(size)):
                    what = "the file ends in the middle of it" if near_end else error.msg
                    raise InputError(f"{self.path}: {name} is not valid JSON ({what})") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}: {name} is not valid JSON ({error})") from error
            else:
                # A number may go on behind the end of the buffer.
                if end < len(self._buffer) or not self._more(size):
                    is_utf8 = not _NOT_UTF8.search(self._buffer, self._place, end)
                    self._place = end
                    return found, is_utf8
            size *= 2

    def _more(self, size: int) -> bool:
        """Read on; return whether there was anything."""
        read = self._stream.read(size)
        self._buffer = self._buffer[self._place :] + read
        self._place = 0
        return bool(read)
