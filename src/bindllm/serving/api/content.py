"""Content parts of requests become conversations and media, by the parser of training rows.

Media are inside the request (data URI or base64), or are downloaded from an allowed domain. A path is never opened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import PurePath
from typing import Any

from bindllm.cache.visual_cache import CacheChoice, VisualCache
from bindllm.conversation import Conversation, Message
from bindllm.conversation.messages import FILE_MODALITIES, RecordMedia, parse_messages, read_part
from bindllm.encoders import Encoder
from bindllm.media import SUFFIXES, Media
from bindllm.media.source import NamedBytes, from_base64, read_data_uri
from bindllm.model.bindllm import BindLLM
from bindllm.serving.api.errors import ApiError, located, shown
from bindllm.serving.api.schema import CacheSettings, ShotBody, check_depth
from bindllm.serving.api.tools import tool_message, uses_tools
from bindllm.serving.config import ServeConfig
from bindllm.serving.fetch import fetch
from bindllm.shots import Shot

_FILES = ("file", "input_file")
# Keys of media in a part or in the object inside it, whatever the modality.
_VALUES = ("url", "path", "data", "bytes", "file_data")
# Settings of a part at other servers; without them the encoder would see something else.
_SETTINGS = frozenset(
    (
        *("weight", "fps", "sample_fps", "nframes", "num_frames", "min_frames", "max_frames", "start", "end"),
        *("start_time", "end_time", "video_start", "video_end", "min_pixels", "max_pixels", "total_pixels"),
        *("resized_height", "resized_width", "sampling_rate"),
    )
)


class ContentReader:
    """Reads the content of one request, and counts its media and its characters.

    Args:
        encoders: encoders of the model; media that none of them serves are refused.
    """

    def __init__(self, encoders: Sequence[Encoder], config: ServeConfig, *, most_media: int) -> None:
        self._config, self._most_media = config, most_media
        # Of all downloads together: 64 slow files of full size would hold a thread and gigabytes for minutes.
        self._bytes_left, self._seconds_left = config.fetch.max_bytes, config.fetch.seconds
        self._num_media = self._num_characters = 0
        # Of the part that is being read.
        self._name = ""
        self._served = {name for encoder in encoders for name in encoder.modalities}
        # All known words, so that the error for one that no encoder serves lists those that one does.
        self._modalities = tuple(dict.fromkeys([*FILE_MODALITIES, *sorted(self._served - {"text"})]))

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        names: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Conversation:
        """Return the conversation of OpenAI-style messages, which ends with a question, or the result of a tool.

        Args:
            names: where each is in the request, for errors; None: in ``messages``.

        Raises:
            ApiError: a message or a content part that cannot be used, or the last message is not the user's.
        """
        names = names or [f"messages[{number}]" for number in range(len(messages))]
        # The endpoints have different names for it.
        field = names[-1].partition("[")[0]
        given = [self._resolved(message, name) for message, name in zip(messages, names, strict=True)]
        parsed: list[Message] = []
        for with_tools, group in groupby(zip(given, names, strict=True), key=lambda one: uses_tools(one[0])):
            if not with_tools:
                # A client sends back the answers of the model, which may have been empty.
                turns = [message for message, _ in group]
                parsed += parse_messages(turns, self._outside(), allow_empty_answers=True)
                continue
            for message, name in group:
                check_depth(message, name)
                with located(name):
                    parsed.append(tool_message(message, parsed))
        if not parsed or parsed[-1].role not in ("user", "tool"):
            role = parsed[-1].role if parsed else "none"
            raise ApiError(
                400,
                f"the last message is of the role {role!r}; it must be the user's question or a tool's result",
                param=field,
            )
        self._count_characters(field, *(message.text for message in parsed))
        self._count_characters(field, *(str(message.fields) for message in parsed if message.fields))
        self._count_characters("tools", *map(str, tools))
        return Conversation(tuple(parsed), tools=tuple(tools))

    def shots(self, shots: Sequence[ShotBody]) -> list[Shot]:
        """Return worked examples; errors as for `conversation`."""
        questions = [
            self.conversation(
                [{"role": "user", "content": shot.prompt}], [f"shots[{number}].prompt"]
            ).messages[0]
            for number, shot in enumerate(shots)
        ]
        self._count_characters("shots", *(shot.answer for shot in shots))
        return [
            Shot(question.text, shot.answer, question.media)
            for question, shot in zip(questions, shots, strict=True)
        ]

    def media(self, part: Any, name: str) -> Media:
        """Return the media of one content part or text, for an embedding.

        Raises:
            ApiError: not media that an encoder of the model serves, a path, a URL that is not allowed, or too many.
        """
        with located(name):
            text = part.get("text", part.get("input_text")) if isinstance(part, Mapping) else part
            if isinstance(text, str) and not text.strip():
                raise ApiError(400, "an input is an empty text", param="input")
        found = self._read_part(part, name)
        with located(name):
            if not isinstance(found, str):
                return found
            self._count_characters(name, found)
            return self._resolve("text", found)

    def _count_characters(self, field: str, *texts: str) -> None:
        self._num_characters += sum(map(len, texts))
        if self._num_characters > (most := self._config.max_characters):
            message = f"the texts have {self._num_characters:,} characters, at most {most:,} are read"
            raise ApiError(400, message, param=field)

    def _outside(self) -> RecordMedia:
        # No media outside the messages: a placeholder such as <image> in a text is a word.
        return RecordMedia(self._resolve, modalities=self._modalities)

    def _resolve(self, modality: str, value: object) -> Media:
        """Return the media of a value in a content part: bytes, or a URI."""
        # Before the content is decoded or downloaded.
        if modality not in self._served:
            raise ApiError(
                400, f"the model does not serve {modality}, only {', '.join(sorted(self._served))}"
            )
        self._num_media += 1
        if self._num_media > self._most_media:
            raise ApiError(400, f"more than {self._most_media:,} media in one request")
        # A text as it is: it is not looked up, even if it reads like a URL.
        if modality == "text":
            return Media(modality, value)
        if not isinstance(value, str | bytes):
            raise ApiError(400, f"the {modality} is {shown(value)}, expected a data: URI")
        content = value if isinstance(value, bytes) else self._read_uri(modality, value)
        # Encoders decode it later, and their errors name it.
        return Media(modality, NamedBytes(content, self._name))

    def _read_uri(self, modality: str, uri: str) -> bytes:
        scheme = uri[: uri.find(":")].lower() if ":" in uri[:6] else ""
        if scheme == "data":
            return read_data_uri(uri)
        if scheme in ("http", "https"):
            return self._download(uri)
        raise ApiError(
            400,
            f"the {modality} is {shown(uri)}, expected a data: URI such as data:image/png;base64,iVBORw0...",
        )

    def _download(self, uri: str) -> bytes:
        if self._bytes_left <= 0 or self._seconds_left <= 0:
            most = self._config.fetch
            raise ApiError(
                400,
                f"the downloads of one request may take {most.seconds:g} seconds and {most.mib:g} MiB; "
                "name fewer URLs, or send the content as data: URIs",
            )
        # One after the other, so that the limits of a request hold for the sum of its files.
        started = time.monotonic()
        left = replace(self._config.fetch, mib=self._bytes_left / 2**20, seconds=self._seconds_left)
        content = fetch(uri, left)
        self._bytes_left -= len(content)
        self._seconds_left -= time.monotonic() - started
        return content

    def _resolved(self, message: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Return a message whose content parts are texts and media.

        Raises:
            ApiError: media or texts outside of the content, which the parser of rows would leave, or a message or a
                part that cannot be used.
        """
        content = message.get("content")
        with located(name):
            if outside := self._media_keys(message):
                raise ApiError(
                    400,
                    f"it has {' and '.join(outside)} outside of its content; give each as a content part",
                )
        if isinstance(content, list):
            # A shot's parts are in a field of their own.
            inside = name if name.endswith("prompt") else f"{name}.content"
            parts = [self._read_part(part, f"{inside}[{number}]") for number, part in enumerate(content)]
            message = {**message, "content": parts}
        # Its own faults, such as an unknown role; all messages are parsed together once each is known to be sound.
        with located(name):
            if not uses_tools(message):
                parse_messages([message], self._outside(), allow_empty_answers=True)
        return message

    def _read_part(self, part: Any, name: str) -> str | Media:
        """Return a content part as a text or media, by the parser of training rows."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        with located(name, kind) as self._name:
            if isinstance(part, Mapping):
                # That parser reads one key of a part and leaves the others.
                for values in (part, *(value for value in part.values() if isinstance(value, Mapping))):
                    self._check_keys(values)
                # It does not know this type.
                part = _file_part(part) if kind in _FILES else part
            found = read_part(part, self._outside())
            if not isinstance(found, str | Media):
                raise ApiError(400, f"it names the modality {found.modality} and has no {found.modality}")
            return found

    def _check_keys(self, values: Mapping[str, Any]) -> None:
        """Raise an ApiError if a part, or the object inside it, has something that would be left."""
        given = self._media_keys(values) + [key for key in _VALUES if values.get(key)]
        if len(given) > 1:
            raise ApiError(400, f"it has {' and '.join(sorted(given))}; give each a part of its own")
        if settings := sorted(key for key in _SETTINGS & values.keys() if values[key] is not None):
            raise ApiError(
                400,
                f"this server does not support {settings[0]} of a part, and without it the answer would be another "
                "one. Leave it out",
            )

    def _media_keys(self, values: Mapping[str, Any]) -> list[str]:
        """Return the keys of an object that have texts or media, such as ``images`` or ``image_url``."""
        names = {"text", "file", *self._modalities}
        return [
            key
            for key, value in values.items()
            if value and key.removeprefix("input_").removesuffix("_url").removesuffix("s") in names
        ]


def _file_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a content part of type ``file`` as a part of its modality."""
    # OpenAI's Chat Completions have an object here, the Responses put its keys into the part.
    file = part.get("file") if isinstance(part.get("file"), Mapping) else part
    if file.get("file_id") is not None:
        raise ApiError(
            400, "a file_id names a file of OpenAI's storage; send the file as file_data", param="file_id"
        )
    data = next((file[key] for key in ("file_data", "file_url", "url") if file.get(key) is not None), None)
    if not isinstance(data, str):
        raise ApiError(400, f"file_data of a file is {shown(data)}, expected a data: URI", param="file_data")
    modality = _modality_of(data, str(file.get("filename") or ""))
    # Some clients send base64 without the start of a data URI.
    content = None if ":" in data[:6] else from_base64(data)
    return {"type": modality, modality: data if content is None else content}


def _modality_of(uri: str, name: str) -> str:
    """Return the modality of a file by its media type or its ending."""
    # The start of a data URI is a claim of the client; encoders look at the content itself.
    kind = uri.removeprefix("data:").partition("/")[0] if uri.startswith("data:") else ""
    if kind in ("image", "video", "audio"):
        return kind
    # Point clouds have no media type that programs agree on, so the ending decides.
    ending = PurePath(name).suffix.lower()
    for modality, endings in SUFFIXES.items():
        if ending in endings:
            return modality
    raise ApiError(
        400,
        f"the file {shown(name)} may have any modality; give it as a part of its own type, as in "
        '{"type": "depth", "depth": "data:..."}',
        param="filename",
    )


def choose_cache(asked: bool | CacheSettings | None, model: BindLLM) -> CacheChoice:
    """Return the visual cache of a request, which chooses its settings and never its place.

    Raises:
        ApiError: the model has no cache, or a setting is out of its range.
    """
    if asked is None or asked is False:
        return asked
    if model.cache is None:
        raise ApiError(
            400, "this server has no visual cache: leave cache out, or set it to false", param="cache"
        )
    if asked is True:
        return None
    with located("cache"):
        return VisualCache(model.cache.index, model.cache.settings, **asked.model_dump(exclude_none=True))
