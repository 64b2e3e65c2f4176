"""The media that a record lists beside its texts, and the placeholders in the texts that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bindllm.data.formats.columns import hint, written_list
from bindllm.data.formats.place import Place, RowError
from bindllm.data.tables import Record
from bindllm.media import MODALITIES, Media


def kinds(place: Place) -> tuple[str, ...]:
    """Modalities that a record may name: those of bindllm, and the one of the source."""
    known = tuple(modality for modality in MODALITIES if modality != "text")
    return known if place.config.modality in known else (*known, place.config.modality)


def media_column(place: Place, modality: str) -> str:
    """Return the column that holds media of a modality: the one that a recipe names, else called like the modality."""
    named = place.config.columns.image
    return named if modality == place.config.modality and named != "image" else modality


class Enclosed:
    """Media of one record, given to its placeholders in order.

    Args:
        record: has a column for each modality, such as ``image`` (or ``images``), with one value or a list.
        place: finds the media.
    """

    def __init__(self, record: Record, place: Place) -> None:
        self._record, self._place = record, place
        self._values = {modality: _values(record, media_column(place, modality)) for modality in kinds(place)}
        self._taken = dict.fromkeys(self._values, 0)

    @property
    def modalities(self) -> list[str]:
        """Those of which the record has media."""
        return [modality for modality, values in self._values.items() if values]

    @property
    def any_taken(self) -> bool:
        """Whether anything in the texts has stood for media, whether or not there were any."""
        return any(self._taken.values())

    def take(self, modality: str) -> Media | None:
        """Return the next media of a modality; None where there is no further one, which `check` reports."""
        number, values = self._taken[modality], self._values[modality]
        self._taken[modality] += 1
        return self._place.media(modality, values[number]) if number < len(values) else None

    def rest(self) -> list[Media]:
        """Return all that was not taken yet, in the order of the modalities."""
        left = [
            (modality, max(0, len(values) - self._taken[modality]))
            for modality, values in self._values.items()
        ]
        return [media for modality, count in left for _ in range(count) if (media := self.take(modality))]

    def required(self) -> list[Media]:
        """Return all that was not taken yet, at least one.

        Raises:
            RowError: the record has none, and the place none beside it.
        """
        if found := self.rest():
            return found
        try:
            return [self._place.media(self._place.config.modality, None)]
        except RowError as error:
            column = media_column(self._place, self._place.config.modality)
            # A place that looked for the media elsewhere says where.
            told_enough = error.detail or column in self._record or f"{column}s" in self._record
            reason = error.reason if told_enough else f"{error.reason}: no column {column!r}"
            told = hint(self._record, self._place.config.format)
            raise RowError(f"{reason}.{told}" if told else reason, error.detail) from error

    def check(self) -> None:
        """Refuse a record whose placeholders are not as many as its media.

        Raises:
            RowError: more of one than of the other.
        """
        for modality, values in self._values.items():
            taken = self._taken[modality]
            if taken != len(values):
                word = "more" if taken > len(values) else "fewer"
                detail = f"{taken} for {len(values)} in column {media_column(self._place, modality)!r}"
                raise RowError(f"{word} placeholders <{modality}> than media", detail)


def split_at_placeholders(text: str, enclosed: Enclosed, modalities: Sequence[str]) -> list[str | Media]:
    r"""Return the parts of a text whose placeholders, such as ``<image>``, are taken by media.

    A placeholder goes with the line breaks around it; where there is text on both sides, those of one side stay.

    Args:
        text: of one turn.
        enclosed: what takes the places.
        modalities: which placeholders are meant.
    """
    placeholder = re.compile(rf"(\s*)<({'|'.join(modalities)})>(\s*)")
    parts: list[str | Media] = []
    said, end = "", 0
    for match in placeholder.finditer(text):
        said += text[end : match.start()]
        space = max(match[1], match[3], key=lambda side: (side.count("\n"), len(side)))
        is_between = said.strip() and placeholder.sub("", text[match.end() :]).strip()
        space = space if is_between and not said[-1].isspace() else ""
        parts += [text[end : match.start()], space]
        said += space
        if media := enclosed.take(match[2]):
            parts.append(media)
        end = match.end()
    return [*parts, text[end:]]


def with_media(text: str, enclosed: Enclosed) -> list[str | Media]:
    """Return a text and all media: at its placeholders where it has any, else ahead of it.

    Raises:
        RowError: placeholders, but not as many as there are media.
    """
    placeholders = [modality for modality in enclosed.modalities if f"<{modality}>" in text]
    if not placeholders:
        return [*enclosed.rest(), text]
    parts = split_at_placeholders(text, enclosed, placeholders)
    enclosed.check()
    return parts


def is_given(value: object) -> bool:
    """Tell whether a value names media; Arrow writes one that is not there as a struct of nothing.

    Example:
        >>> is_given({"bytes": None, "path": None}), is_given("a.png")
        (False, True)
    """
    return any(value.values()) if isinstance(value, Mapping) else bool(value)


def _values(record: Record, column: str) -> list:
    named = [record[name] for name in (column, f"{column}s") if name in record and is_given(record[name])]
    if not named:
        return []
    value = written_list(named[0])
    values = value if isinstance(value, list) else [value]
    return [one for one in values if is_given(one)]
