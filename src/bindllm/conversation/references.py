"""Media that rows and messages refer to, and the messages that a program gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from bindllm.conversation import Conversation
from bindllm.conversation.messages import FILE_MODALITIES, RecordMedia, RowError, parse_messages
from bindllm.errors import MediaError
from bindllm.media import Media
from bindllm.media.audio import wav_bytes
from bindllm.media.source import local_path, read_data_uri


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
        value: a path, a ``file:`` URL, ``{"bytes": ..., "path": ...}``, or any other source of `Media`; for the
            modality ``text`` the text itself.
        find: returns the full path or the bytes of a named file, or raises `RowError`.

    Raises:
        RowError: the value does not refer to media, or refers to a web address.
    """
    # The forms of Hugging Face datasets. The path may be of another machine, so samples and bytes come first.
    if isinstance(value, Mapping) and modality == "audio" and value.get("array") is not None:
        # Rows are looked up by their media, and an array has no hash.
        return Media(modality, wav_bytes(Media(modality, value).source))
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
