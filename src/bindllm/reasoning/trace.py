"""The trace of a run: its plans, calls, results and decisions, as terminal text, JSON lines, or a page.

A trace is plain data, so it can be shown again without the model and without the media.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from bindllm.atomic import atomic_file
from bindllm.errors import BindLLMError, InputError, did_you_mean, printable
from bindllm.media import Media
from bindllm.reasoning.brain import Reply
from bindllm.report.page import brief, page_templates, thumbnail

Event = Mapping[str, Any]

KINDS = {
    "question": {"text", "media", "tools", "brain", "budget"},
    "reply": {"round", "text", "calls", "tokens", "seconds", "problem"},
    "result": {"number", "name", "ok", "text", "seconds", "thumbnail"},
    "answer": {"text"},
    "failure": {"reason", "text"},
}
"""Kinds of events and their keys; each event also has ``kind`` and ``at``, the seconds since the start."""

_SUFFIXES = (".jsonl", ".html", ".txt")


class Trace:
    """The events of one run, in order.

    Args:
        listener: a function that is called with each new event.

    Attributes:
        events: plain data, see `KINDS`.
    """

    def __init__(self, listener: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self._listener = listener

    def add(self, kind: str, at: float, **fields: Any) -> None:
        """Add an event; its keys are those of its kind."""
        assert fields.keys() == KINDS[kind], (kind, fields)
        event = {"kind": kind, "at": round(at, 3), **fields}
        self.events.append(event)
        if self._listener is not None:
            self._listener(event)

    @property
    def replies(self) -> list[Reply]:
        """The replies of the brain, for `ScriptedBrain`."""
        return [
            Reply(
                event["text"],
                tuple((call["name"], call["arguments"]) for call in event["calls"]),
                event["tokens"],
                event["problem"],
            )
            for event in self.events
            if event["kind"] == "reply"
        ]

    def lines(self) -> Iterator[str]:
        """Yield the trace as text for a terminal."""
        for event in self.events:
            yield from event_lines(event)

    def save(self, path: str | Path) -> None:
        """Write the trace: JSON lines (.jsonl), a self-contained page (.html), or text (.txt), by the ending.

        Raises:
            InputError: another ending.
        """
        ending = check_ending(path)
        if ending == ".html":
            text = self.page()
        elif ending == ".txt":
            text = "".join(f"{line}\n" for line in self.lines())
        else:
            text = "".join(json.dumps(event, ensure_ascii=True) + "\n" for event in self.events)
        with atomic_file(path) as part:
            part.write_text(text, encoding="utf-8", errors="replace")

    def page(self) -> str:
        """Return the trace as a page, which loads nothing and runs nothing."""
        # An overlay: the reports keep their own filters.
        page = page_templates().overlay()
        page.filters = {**page.filters, "arguments": show_arguments, "image": _image}
        results = {event["number"]: event for event in self.events if event["kind"] == "result"}
        return page.get_template("trace.html.j2").render(events=self.events, results=results)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a trace that was saved as JSON lines; it may be untrusted.

        Raises:
            InputError: not a trace; the message names the line.
        """
        trace = cls()
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as a trace ({error})") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                event = json.loads(line)
                keys = KINDS[event["kind"]]
                if event.keys() != keys | {"kind", "at"}:
                    raise ValueError(f"its keys are not {', '.join(sorted(keys))}")
                # Showing the event once finds values of another type.
                "".join([f"{event['at']:f}", *event_lines(event)])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}: not an event of a trace ({error!r}); expected a file that `--trace "
                    "FILE.jsonl` wrote"
                ) from error
            trace.events.append(event)
        if not trace.events:
            raise InputError(f"{path} is empty; expected a file that `--trace FILE.jsonl` wrote")
        return trace


def check_ending(path: str | Path) -> str:
    """Return the ending of the file of a trace.

    Raises:
        InputError: an ending of no form of traces.
    """
    ending = Path(path).suffix.lower()
    if ending not in _SUFFIXES:
        raise InputError(f"{path}: the ending names the form of the trace. {did_you_mean(ending, _SUFFIXES)}")
    return ending


def shown_image(media: Media) -> str:
    """Return the thumbnail of an image as a data URI; "" for other media and for one that cannot be read."""
    found = ""
    if media.modality == "image":
        with suppress(BindLLMError):
            found = thumbnail(media.source)
    return found


def _image(source: Any) -> str:
    """Return the address of a thumbnail; "" for any other address, which a trace of someone else may have."""
    return source if isinstance(source, str) and source.startswith("data:image/webp;base64,") else ""


def event_lines(event: Event) -> Iterator[str]:
    """Yield an event as text for a terminal."""
    match event["kind"]:
        case "question":
            yield f"question  {printable(event['text'])}"
            for item in event["media"]:
                yield f"  {item['handle']}: {item['modality']} {brief(item['name'])}"
            yield f"  tools: {printable(', '.join(event['tools']))}"
        case "reply":
            cost = f"{event['tokens']} tokens, {event['seconds']:.1f} s"
            yield f"round {event['round']:<3} {len(event['calls'])} calls ({cost})"
            if event["text"] and (event["calls"] or event["problem"]):
                yield f"  wrote: {brief(event['text'])}"
            if event["problem"]:
                yield f"  unusable: {printable(event['problem'])}"
            for call in event["calls"]:
                waits = ", ".join(f"result{number}" for number in call["needs"])
                yield (
                    f"  result{call['number']:d} = {printable(call['name'])}({show_arguments(call['arguments'])})"
                    + (f"  after {waits}" if waits else "")
                )
        case "result":
            yield f"  -> result{event['number']:d}: {brief(event['text'])} ({event['seconds']:.1f} s)"
        case "answer":
            yield f"answer    {printable(event['text'])}"
        case _:
            yield f"failed    {printable(event['reason'])}: {printable(event['text'])}"


def show_arguments(arguments: Mapping[str, Any]) -> str:
    """Return arguments as text in one line."""
    return printable(
        ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    )
