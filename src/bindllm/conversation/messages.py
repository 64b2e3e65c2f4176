"""The one parser for messages: OpenAI-style messages and the media that go with them become `Message` objects.

Rows of every data format are written as such messages first (`bindllm.data.formats`). The parser knows nothing about
files: a media resolver turns references into media. Media that stand outside the messages, such as those in the
column ``images`` of a row, are `RecordMedia`; they go to content parts without media and to placeholders.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bindllm.conversation import REASONING, Conversation, Learned, Message, Role
from bindllm.conversation.tools import read_calls, read_reasoning
from bindllm.errors import InputError, did_you_mean
from bindllm.media import MODALITIES, Media
from bindllm.media.source import from_base64

BETWEEN = "\n\n"
"""Joins two successive messages of the same role."""
MAX_DETAIL = 80
"""Characters of a path or a text that error messages show."""
ROLES: dict[str, Role] = {name: name for name in ("system", "user", "assistant", "tool")} | {
    "developer": "system"
}
FILE_MODALITIES = tuple(modality for modality in MODALITIES if modality != "text")

_TEXTS = ("text", "input_text", "output_text")
# White space belongs to the match, because it goes away with the placeholder. A match begins only at the first space of
# several: from each of them, a long row of spaces would be searched again.
_PLACEHOLDER = re.compile(r"(?:(?<!\s)(\s+))?<(\w+)>(\s*)")
# Also the spellings of other formats, such as <image 1>, <|image|> and <image_1>.
_SPELLED = re.compile(rf"<\|?({'|'.join(FILE_MODALITIES)})[ _]?\d*\|?>", re.IGNORECASE)

MediaResolver = Callable[[str, object], Media]
"""Returns the media of a modality that a value refers to: a path, a URL, bytes, ``{"bytes": ..., "path": ...}`` or,
for the modality ``text``, the text itself. Raises `RowError` if there are none."""


class RowError(InputError):
    """A row or a message that cannot be used.

    Args:
        reason: the same words for all rows with this fault; they are counted by it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 3] + "..."
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Verbatim(str):
    """A text in which a placeholder is a word like any other."""


class _Turn(NamedTuple):
    """A message on its way: its role, its parts, further fields for the template, and what of it is learned."""

    role: Role
    parts: list[_Part]
    fields: dict[str, Any]
    learned: Learned


class _Slot(NamedTuple):
    """A content part that names a modality and no media, such as ``{"type": "image"}``."""

    modality: str


class RecordMedia:
    """Media of one row outside its messages, handed out in order.

    Args:
        modalities: modalities that content parts may name.
        columns: where the values come from, by modality, for error messages.
        needs_placeholders: refuse media without a placeholder; otherwise they go before the first question.
        unnamed: returns values, by modality, that count if neither the row nor its messages name any media.
    """

    def __init__(
        self,
        resolve: MediaResolver,
        values: Mapping[str, Sequence[object]] | None = None,
        *,
        modalities: Collection[str] = FILE_MODALITIES,
        columns: Mapping[str, str] | None = None,
        needs_placeholders: bool = False,
        unnamed: Callable[[], Mapping[str, Sequence[object]]] = dict,
    ) -> None:
        self.modalities, self._resolve, self._needs_placeholders = (
            tuple(modalities),
            resolve,
            needs_placeholders,
        )
        self._values, self._columns, self._unnamed = dict(values or {}), columns or {}, unnamed
        self._is_named = any(self._values.values())
        # Counts by modality: media handed out, and media promised to content parts.
        self._taken: dict[str, int] = {}
        self._reserved: dict[str, int] = {}

    def resolve(self, modality: str, value: object) -> Media:
        """Return the media that a message itself names."""
        self._is_named = True
        return self._resolve(modality, value)

    def settle(self) -> None:
        """Fall back to media that are not named, once all messages are read."""
        # Media inside a message count as named: the fallback would add others to them.
        if not self._is_named:
            self._values = dict(self._unnamed())

    def reserve(self, modality: str) -> None:
        """Keep the next media of a modality for a content part, so that no placeholder takes them."""
        self._reserved[modality] = self._reserved.get(modality, 0) + 1
        if self._reserved[modality] > len(self._values.get(modality, ())):
            raise self._mismatch("more", self._reserved[modality], modality)

    def is_left(self, modality: str) -> bool:
        """Whether a placeholder of a modality stands for media."""
        used = self._taken.get(modality, 0) + self._reserved.get(modality, 0)
        return used < len(self._values.get(modality, ()))

    def take(self, modality: str) -> Media:
        """Return the next media of a modality."""
        number = self._taken.get(modality, 0)
        self._taken[modality] = number + 1
        return self._resolve(modality, self._values[modality][number])

    def fill(self, slot: _Slot) -> Media:
        """Return the media that a content part waits for."""
        self._reserved[slot.modality] -= 1
        return self.take(slot.modality)

    def rest(self) -> list[Media]:
        """Return all media, if no content part and no placeholder took any.

        Raises:
            RowError: some media were taken and others were not, or placeholders are needed.
        """
        for modality, values in self._values.items():
            taken = self._taken.get(modality, 0)
            # No placeholder at all is fine. If some media have one, the others were forgotten.
            if taken < len(values) and (self._taken or self._needs_placeholders):
                raise self._mismatch("fewer", taken, modality)
        return [
            self.take(modality)
            for modality, values in self._values.items()
            if not self._taken.get(modality)
            for _ in values
        ]

    def _mismatch(self, word: str, count: int, modality: str) -> RowError:
        column, available = self._columns.get(modality, modality), len(self._values.get(modality, ()))
        detail = f"{count} for {available} in column {column!r}"
        return RowError(f"{word} placeholders <{modality}> than media", detail)


def parse_messages(
    messages: Sequence[object], media: RecordMedia, *, allow_empty_answers: bool = False
) -> list[Message]:
    r"""Parse OpenAI-style messages.

    A placeholder such as ``<image>`` in a user's text counts only if the row has media of that modality left;
    otherwise it is text. White space around a message is removed. Two successive messages of one role become one,
    unless both hold media, which would then be fused.

    Args:
        messages: each ``{"role": ..., "content": text or parts}``. A part is a text, a `Media`,
            ``{"type": "text", "text": ...}``, ``{"type": "image_url", "image_url": {"url": ...}}``,
            ``{"type": "input_audio", "input_audio": {"data": ...}}``, or for any modality
            ``{"type": "point", "point": ...}``; without its media, ``{"type": "image"}``, it stands for the next of
            ``media``.
            An answer may have ``tool_calls`` and ``reasoning_content``, and a weight of 0 if it is not learned. The
            result of a call has the role ``tool``.
        media: media outside the messages; resolves those inside, too.
        allow_empty_answers: take an empty answer, which a model may have given; no one can learn from it.

    Raises:
        RowError: a message that cannot be used; the reason says why.

    Examples:
        >>> messages = [{"role": "user", "content": "2 + 2?\n"}, {"role": "assistant", "content": "4"}]
        >>> [message.text for message in parse_messages(messages, RecordMedia(Media))]
        ['2 + 2?', '4']
    """
    # How to read this: read all messages, fill content parts, then placeholders, then put the rest first.
    turns = [_read_message(message, media) for message in messages]
    # Only after all messages is it known whether any of them names media.
    media.settle()
    # Content parts come first in the count: a placeholder is only a word once they have taken all media.
    for turn in turns:
        for part in turn.parts:
            if isinstance(part, _Slot):
                media.reserve(part.modality)
    placed = [turn._replace(parts=_place_media(turn.role, turn.parts, media)) for turn in turns]
    users = [number for number, turn in enumerate(placed) if turn.role == "user"]
    rest = media.rest() if users else []
    if rest:
        first = placed[users[0]]
        placed[users[0]] = first._replace(parts=[*rest, *first.parts])
    placed = [turn._replace(parts=_strip(turn.parts)) for turn in placed]
    return _join(_name_results(placed), allow_empty_answers)


def answered(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Return a conversation that ends with its last answer; messages after it teach nothing and are dropped.

    Raises:
        RowError: no answer that is learned, or an answer before the first question.
    """
    answers = [
        n for n, message in enumerate(messages) if message.role == "assistant" and message.learned != "none"
    ]
    if not answers:
        raise RowError("no answer to learn: no turn of the assistant, or all have the weight 0")
    if "user" not in [message.role for message in messages[: answers[0]]]:
        raise RowError("it starts with an answer; a question must come first")
    return Conversation(tuple(messages[: answers[-1] + 1]), tools=tuple(tools))


def role_of(name: object, roles: Mapping[str, Role]) -> Role:
    """Return our role for the name that a format uses.

    Raises:
        RowError: an unknown role.
    """
    if not isinstance(name, str) or name not in roles:
        raise RowError(f"unknown role {reprlib.repr(name)}. {did_you_mean(str(name), roles)}")
    return roles[name]


def spells_placeholder(text: str) -> bool:
    """Tell whether a text spells a placeholder, as here or in another format.

    Examples:
        >>> spells_placeholder("Compare <image 1> and <image 2>."), spells_placeholder("What does <b> do?")
        (True, False)
    """
    return _SPELLED.search(text) is not None


def is_visible(text: str) -> bool:
    r"""Tell whether a text has any visible character.

    Examples:
        >>> is_visible(" \u200b"), is_visible(".")
        (False, True)
    """
    # Cf and Cc print nothing: zero-width spaces, direction marks, control characters.
    return any(not char.isspace() and unicodedata.category(char) not in ("Cf", "Cc") for char in text)


_Part = str | Media | _Slot


def _read_message(message: object, media: RecordMedia) -> _Turn:
    if not isinstance(message, Mapping):
        raise RowError("a message that is not an object with 'role' and 'content'")
    role, content = role_of(message.get("role"), ROLES), message.get("content")
    fields: dict[str, Any] = {}
    # A message that calls a tool often has no content.
    if calls := role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
        if (found := read_calls(calls)) is None:
            raise RowError(
                "a tool call without the name of a function, or whose arguments are not a JSON object"
            )
        fields["tool_calls"], content = found, content or []
    if role == "tool":
        fields = {
            name: message[name] for name in ("tool_call_id", "name") if isinstance(message.get(name), str)
        }
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise RowError("a message whose content is neither a text nor a list of parts")
    if role == "assistant":
        reasoning, content = read_reasoning(message, content)
        fields |= {REASONING: reasoning} if reasoning else {}
    # OpenAI's key, and those of ms-swift and axolotl, which may be false.
    is_masked = role == "assistant" and any(message.get(key) == 0 for key in ("weight", "loss", "train"))
    parts = _separate([read_part(part, media) for part in content])
    return _Turn(role, parts, fields, "none" if is_masked else "all")


def _name_results(turns: list[_Turn]) -> list[_Turn]:
    """Give the result of each tool the id and the name of its call, which templates write; some sets leave them out."""
    names: dict[str, str] = {}
    waiting: list[str] = []
    named = []
    for turn in turns:
        if calls := turn.fields.get("tool_calls"):
            waiting = [call["id"] for call in calls]
            names |= {call["id"]: call["function"]["name"] for call in calls}
        if turn.role == "tool":
            # Without an id, results come in the order of the calls.
            call = turn.fields.get("tool_call_id") or next(iter(waiting), None)
            if call is not None and call not in names:
                raise RowError("the result of a tool names no call before it", str(call))
            waiting = [other for other in waiting if other != call]
            own = {} if call is None else {"tool_call_id": call, "name": names[call]}
            # A call may be a text of the answer, as in sets of Hermes.
            turn = turn._replace(fields={**turn.fields, **own})
        named.append(turn)
    return named


def read_part(part: object, media: RecordMedia) -> str | Media | _Slot:
    """Return the text or the media of one content part, or its slot if it names a modality and no media.

    Raises:
        RowError: neither; and errors of the media resolver.
    """
    if isinstance(part, str | Media):
        return part
    if not isinstance(part, Mapping):
        raise RowError("a content part that is not an object with a 'type'")
    known = media.modalities
    # Some writers leave the type out, and Arrow gives every part the keys of all parts.
    kind = part.get("type") or next((key for key in (*_TEXTS, *known) if part.get(key) is not None), None)
    if kind in _TEXTS:
        if not isinstance(text := part.get("text", part.get(kind)), str):
            raise RowError("a text part without a text")
        return text
    # "input_audio" -> "audio", "image_url" -> "image".
    modality = str(kind).removeprefix("input_").removesuffix("_url")
    if modality not in known:
        kinds = (*_TEXTS[:1], *known, "image_url", "input_audio")
        raise RowError(f"unknown content part {reprlib.repr(kind)}. {did_you_mean(str(kind), kinds)}")
    # Writers put the media under the type of the part, its modality, or a general key.
    keys = (kind, modality, f"{modality}_url", "url", "path")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    # As the processors of transformers have it.
    if value is None and part.get("base64") is not None:
        value = {"data": part["base64"]}
    return _Slot(modality) if value is None else media.resolve(modality, _unwrap(value))


def _unwrap(value: object) -> object:
    """Take the media out of the object that OpenAI wraps around it."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(data := value.get("data"), str):
        # OpenAI has base64 here; a path is taken as well.
        content = from_base64(data)
        return data if content is None else content
    # Without a URL it may be ``{"bytes": ..., "path": ...}``, which the resolver reads.
    return value["url"] if value.get("url") is not None else value


def _separate(parts: list[_Part]) -> list[_Part]:
    """Keep the texts of different parts from running into each other."""
    separate: list[_Part] = []
    ends_open = False
    for part in parts:
        if isinstance(part, str) and part:
            if ends_open and not part[0].isspace():
                # ``type(part)`` keeps a verbatim text verbatim.
                part = type(part)("\n" + part)
            ends_open = not part[-1].isspace()
        separate.append(part)
    return separate


def _place_media(role: Role, parts: list[_Part], media: RecordMedia) -> list[str | Media]:
    """Fill the slots of a message and the placeholders in a user's texts; answers are taken as they are."""
    placed: list[str | Media] = []
    for part in parts:
        if isinstance(part, _Slot):
            placed.append(media.fill(part))
        elif role == "user" and isinstance(part, str) and not isinstance(part, Verbatim):
            placed += _split_at_placeholders(part, media)
        else:
            # A plain text again: nothing looks for placeholders after this.
            placed.append(str(part) if isinstance(part, str) else part)
    return placed


def _split_at_placeholders(text: str, media: RecordMedia) -> list[str | Media]:
    """Put media at the placeholders of a text.

    A placeholder goes away with the line breaks around it; if there is text on both sides, those of one side stay.
    """
    if "<" not in text:
        return [text]
    # How to read this: found[n] goes between pieces[n] and pieces[n + 1], after spaces[n].
    spaces, found, edges = [], [], [0]
    for match in _PLACEHOLDER.finditer(text):
        if media.is_left(match[2]):
            spaces.append(max(match[1] or "", match[3], key=lambda side: (side.count("\n"), len(side))))
            found.append(media.take(match[2]))
            edges += match.span()
    # The spans include the white space, so no piece has it.
    edges.append(len(text))
    pieces = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    parts: list[str | Media] = [pieces[0]]
    before = pieces[0]
    for number, (space, item) in enumerate(zip(spaces, found, strict=True), start=1):
        # White space is needed only between two texts, and only if they do not bring their own.
        is_between = before.strip() and "".join(pieces[number:]).strip()
        space = space if is_between and not before[-1].isspace() else ""
        parts += [space, item, pieces[number]]
        before += space + pieces[number]
    return parts


def _strip(parts: list[str | Media]) -> list[str | Media]:
    """Remove white space at both ends of a message, and empty texts."""
    parts = list(parts)
    texts = [number for number, part in enumerate(parts) if isinstance(part, str)]
    for strip, numbers in ((str.lstrip, texts), (str.rstrip, texts[::-1])):
        # A text that becomes empty does not end the loop: the next one is then the edge of the message.
        for number in numbers:
            parts[number] = strip(parts[number])
            if parts[number]:
                break
    return [part for part in parts if part != ""]


def _join(turns: list[_Turn], allow_empty_answers: bool) -> list[Message]:
    """Join successive turns of one role, unless both hold media, and refuse turns that cannot be used."""
    joined: list[_Turn] = []
    # Of the last one of them. Looking at its parts again for each further turn would take quadratic time.
    has_text = has_media = False
    for turn in turns:
        role, parts = turn.role, turn.parts
        message = _checked(turn, allow_empty_answers)
        text, media = bool(message.text), bool(message.media)
        if not parts and role == "system":
            continue
        last = joined[-1] if joined else None
        # Two messages with media stay apart, because the media of one message are fused; and so do calls, their
        # results, and answers that are learned in another way.
        is_alone = last is None or last[0] != role or role == "tool" or turn[2:] != last[2:] or turn.fields
        if is_alone or (has_media and media):
            joined.append(turn._replace(parts=list(parts)))
            has_text, has_media = text, media
        else:
            last.parts.extend([BETWEEN, *parts] if has_text and text else parts)
            has_text, has_media = has_text or text, has_media or media
    return [Message(*turn) for turn in joined]


def _checked(turn: _Turn, allow_empty_answers: bool) -> Message:
    role = turn.role
    try:
        message = Message(*turn)
    except InputError as error:
        raise RowError("a text is not valid Unicode (half of a surrogate pair)") from error
    if role == "assistant" and message.media:
        raise RowError("media in an answer; a model answers in text")
    if role == "tool" and message.media:
        raise RowError("media in the result of a tool; put them into a message of the user")
    is_needed = role == "user" or (
        role == "assistant" and not allow_empty_answers and "tool_calls" not in turn.fields
    )
    if is_needed and not message.media and not is_visible(message.text):
        raise RowError("empty answer" if role == "assistant" else "a question without text or media")
    return message
