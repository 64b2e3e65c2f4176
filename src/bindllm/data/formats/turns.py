"""From turns to a conversation that can be learnt from: what every format's turns go through."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bindllm.conversation import Conversation, Message, Role
from bindllm.data.formats.place import RowError
from bindllm.data.texts import is_visible
from bindllm.errors import did_you_mean
from bindllm.media import Media

BETWEEN = "\n\n"
"""What stands between two turns of the same role that become one."""

_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")


class Turn(NamedTuple):
    """What one speaker says at once.

    Args:
        role: who speaks.
        parts: texts and media, in order.
    """

    role: Role
    parts: Sequence[str | Media]

    @property
    def text(self) -> str:
        """All texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def has_media(self) -> bool:
        """Whether there is media in it."""
        return any(isinstance(part, Media) for part in self.parts)


def role_of(name: object, roles: dict[str, Role]) -> Role:
    """Return the role that a format calls by this name.

    Args:
        name: as the record has it.
        roles: the names of the format.

    Raises:
        RowError: an unknown role, or one of tool calls.
    """
    if name in _TOOLS:
        raise RowError(f"a turn of the role {name!r}: tool calls are not supported")
    if not isinstance(name, str) or name not in roles:
        raise RowError(f"unknown role {reprlib.repr(name)}. {did_you_mean(str(name), roles)}")
    return roles[name]


def converse(turns: Iterable[Turn]) -> Conversation:
    r"""Put turns right and make them a conversation that ends with an answer.

    White space around a turn goes. Two turns of one role in a row become one, unless both hold media, which would
    then be fused. Turns after the last answer teach nothing and are left out. Everything else that does not fit is
    refused.

    Raises:
        RowError: no answer, an answer ahead of every question, an empty turn, media in an answer, or a text that is
            not valid Unicode.

    Example:
        >>> turns = [Turn("user", ["2 + 2?\n"]), Turn("assistant", ["4"]), Turn("user", ["Thanks"])]
        >>> [message.text for message in converse(turns).messages]
        ['2 + 2?', '4']
    """
    joined: list[Turn] = []
    for turn in map(_stripped, turns):
        _check(turn)
        if not turn.parts:
            continue
        last = joined[-1] if joined else None
        if last is None or last.role != turn.role or (last.has_media and turn.has_media):
            joined.append(turn)
        else:
            between = [BETWEEN] if last.text and turn.text else []
            joined[-1] = Turn(turn.role, [*last.parts, *between, *turn.parts])
    answers = [number for number, turn in enumerate(joined) if turn.role == "assistant"]
    if not answers:
        raise RowError("no answer: no turn of the assistant")
    if "user" not in [turn.role for turn in joined[: answers[0]]]:
        raise RowError("it starts with an answer; a question must come first")
    return Conversation(tuple(Message(turn.role, turn.parts) for turn in joined[: answers[-1] + 1]))


def _stripped(turn: Turn) -> Turn:
    """Take white space off the ends of a turn, and empty texts out of it."""
    parts = list(turn.parts)
    texts = [number for number, part in enumerate(parts) if isinstance(part, str)]
    for strip, numbers in ((str.lstrip, texts), (str.rstrip, texts[::-1])):
        for number in numbers:
            parts[number] = strip(parts[number])
            if parts[number]:
                break
    return Turn(turn.role, [part for part in parts if part != ""])


def _check(turn: Turn) -> None:
    try:
        turn.text.encode()
    except UnicodeEncodeError as error:
        raise RowError("a text is not valid Unicode (half of a surrogate pair)") from error
    if turn.role == "assistant" and turn.has_media:
        raise RowError("media in an answer; a model answers in text")
    if turn.role != "system" and not turn.has_media and not is_visible(turn.text):
        raise RowError("empty answer" if turn.role == "assistant" else "a question without text or media")
