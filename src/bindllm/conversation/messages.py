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
from typing import NamedTuple

from bindllm.conversation import Conversation, Message, Role
from bindllm.errors import InputError, MediaError, did_you_mean
from bindllm.media import MODALITIES, Media
from bindllm.media.source import from_base64, local_path, read_data_uri

BETWEEN = "\n\n"
"""Joins two successive messages of the same role."""
MAX_DETAIL = 80
"""Characters of a path or a text that error messages show."""
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FILE_MODALITIES = tuple(modality for modality in MODALITIES if modality != "text")

# Roles of tool calls in the common formats, known so that the error can name the reason.
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
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
        detail: the fault in this row, such as a path.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 3] + "..."
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Verbatim(str):
    """A text in which a placeholder is a word like any other."""


class _Slot(NamedTuple):
    """A content part that names a modality and no media, such as ``{"type": "image"}``."""

    modality: str


class RecordMedia:
    """Media of one row outside its messages, handed out in order.

    Args:
        resolve: turns each value into media.
        values: the values by modality.
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
    for _, parts in turns:
        for part in parts:
            if isinstance(part, _Slot):
                media.reserve(part.modality)
    placed = [(role, _place_media(role, parts, media)) for role, parts in turns]
    users = [number for number, (role, _) in enumerate(placed) if role == "user"]
    rest = media.rest() if users else []
    if rest:
        placed[users[0]] = ("user", [*rest, *placed[users[0]][1]])
    return _join([(role, _strip(parts)) for role, parts in placed], allow_empty_answers)


def answered(messages: Sequence[Message]) -> Conversation:
    """Return a conversation that ends with its last answer; messages after it teach nothing and are dropped.

    Raises:
        RowError: no answer, or an answer before the first question.
    """
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise RowError("no answer: no turn of the assistant")
    if "user" not in [message.role for message in messages[: answers[0]]]:
        raise RowError("it starts with an answer; a question must come first")
    return Conversation(tuple(messages[: answers[-1] + 1]))


def read_conversation(
    messages: Sequence[object],
    media: Sequence[Media] = (),
    *,
    modalities: Collection[str] = FILE_MODALITIES,
) -> Conversation:
    """Return the conversation of messages that a program gives, ready for an answer.

    Unlike in `bindllm serve`, a path is opened: do not pass untrusted messages.

    Args:
        messages: as for `parse_messages`. The media of a part are a path, a ``file:`` URL, a ``data:`` URI, or any
            other source of `Media`, such as a Pillow image.
        media: media for placeholders such as ``<image>``, and for parts without media, in their order; without both,
            they belong to the first question.
        modalities: modalities that parts may name.

    Raises:
        InputError: a message that cannot be used.

    Examples:
        >>> part = {"type": "image", "image": "cat.png"}
        >>> read_conversation([{"role": "user", "content": [part, "What is this?"]}]).media_groups
        ((Media.image('cat.png'),),)
    """
    values: dict[str, list[Media]] = {}
    for item in media:
        values.setdefault(item.modality, []).append(item)

    def resolve(modality: str, value: object) -> Media:
        return value if isinstance(value, Media) else read_media(modality, value, lambda path: path)

    given = RecordMedia(resolve, values, modalities=modalities)
    return Conversation(tuple(parse_messages(messages, given, allow_empty_answers=True)))


def read_media(modality: str, value: object, find: Callable[[str], str | bytes]) -> Media:
    """Return the media that a value of a row or a message refers to.

    Args:
        modality: of the media.
        value: a path, a ``file:`` URL, ``{"bytes": ..., "path": ...}``, or any other source of `Media`; for the
            modality ``text`` the text itself.
        find: returns the full path or the bytes of a named file, or raises `RowError`.

    Raises:
        RowError: the value does not refer to media, or refers to a web address.
    """
    # The forms of Hugging Face datasets. The path may be of another machine, so samples and bytes come first.
    if isinstance(value, Mapping) and modality == "audio" and value.get("array") is not None:
        return Media(modality, value)
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if modality == "text":
        if not isinstance(value, str) or not value.strip():
            raise RowError("no text")
        return Media.text(value)
    value = bytes(value) if isinstance(value, bytearray | memoryview) else value
    is_empty = isinstance(value, str | bytes) and not value.strip()
    if is_empty or isinstance(value, bool | int | float | list | Mapping | None):
        raise RowError(f"no path to the {modality} file")
    if not isinstance(value, str):
        return Media(modality, value)
    if value[:5].lower() == "data:":
        try:
            return Media(modality, read_data_uri(value))
        except MediaError as error:
            reason = f"a data: URI without {modality} content; expected data:TYPE;base64,CONTENT"
            raise RowError(reason, value.partition(",")[0]) from error
    try:
        path = local_path(value)
    except MediaError as error:
        raise RowError(f"no path to the {modality} file, but {error}", value) from error
    return Media(modality, find(path))


def role_of(name: object, roles: Mapping[str, Role]) -> Role:
    """Return our role for the name that a format uses.

    Raises:
        RowError: an unknown role, or one of tool calls.
    """
    if name in _TOOLS:
        raise RowError(f"a turn of the role {name!r}: tool calls are not supported")
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


def _read_message(message: object, media: RecordMedia) -> tuple[Role, list[_Part]]:
    if not isinstance(message, Mapping):
        raise RowError("a message that is not an object with 'role' and 'content'")
    role, content = role_of(message.get("role"), ROLES), message.get("content")
    # Before the content, which a message that calls a tool often lacks.
    if message.get("tool_calls") or message.get("function_call"):
        raise RowError("a message that calls a tool: tool calls are not supported")
    # OpenAI's key, and those of ms-swift and axolotl, which may be false.
    if role == "assistant" and any(message.get(key) == 0 for key in ("weight", "loss", "train")):
        raise RowError("an answer of weight 0; every answer is learned, so remove the row or that answer")
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise RowError("a message whose content is neither a text nor a list of parts")
    return role, _separate([read_part(part, media) for part in content])


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


def _join(turns: list[tuple[Role, list[str | Media]]], allow_empty_answers: bool) -> list[Message]:
    """Join successive turns of one role, unless both hold media, and refuse turns that cannot be used."""
    joined: list[tuple[Role, list[str | Media]]] = []
    # Of the last one of them. Looking at its parts again for each further turn would take quadratic time.
    has_text = has_media = False
    for role, parts in turns:
        message = _checked(role, parts, allow_empty_answers)
        text, media = bool(message.text), bool(message.media)
        if not parts and role == "system":
            continue
        # Two messages with media stay apart, because the media of one message are fused.
        if not joined or joined[-1][0] != role or (has_media and media):
            joined.append((role, list(parts)))
            has_text, has_media = text, media
        else:
            joined[-1][1].extend([BETWEEN, *parts] if has_text and text else parts)
            has_text, has_media = has_text or text, has_media or media
    return [Message(role, parts) for role, parts in joined]


def _checked(role: Role, parts: list[str | Media], allow_empty_answers: bool) -> Message:
    try:
        message = Message(role, parts)
    except InputError as error:
        raise RowError("a text is not valid Unicode (half of a surrogate pair)") from error
    if role == "assistant" and message.media:
        raise RowError("media in an answer; a model answers in text")
    is_needed = role == "user" or (role == "assistant" and not allow_empty_answers)
    if is_needed and not message.media and not is_visible(message.text):
        raise RowError("empty answer" if role == "assistant" else "a question without text or media")
    return message
