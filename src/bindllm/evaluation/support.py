"""The support of few-shot prompts: worked examples read from a table, and chosen for each question.

Nearest by media is RICES; by media first, then by text among those, is MMICES (https://arxiv.org/abs/2311.18021).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from bindllm.conversation.guard import in_nfc
from bindllm.data.collate import Lookup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.episodes.draw import draw_in_turn
from bindllm.data.report import SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.embeddings.datastore import EQUAL
from bindllm.errors import InputError, MediaError
from bindllm.media import Media
from bindllm.parallel import RunContext
from bindllm.shots import RETRIEVED, Shot, ShotsBy

POOL = 10
"""By media and text: for each shot, so many of the nearest by media are compared by text."""


def read_shots(config: SourceConfig) -> tuple[list[Shot], SourceReport]:
    """Read a table of worked examples, in its order; a column ``split`` does not matter.

    In the format caption, each media is one shot with its first caption.

    Returns:
        The shots, and a report of the skipped rows.

    Raises:
        InputError: the table cannot be read, or no row of it is a worked example.
    """
    # A given split stands above the column and the hash, so that the rows stay in one list.
    rows, report = read_source(replace(config, split="train"))
    shots = []
    for row in one_per_caption(rows["train"]):
        try:
            shots.append(shot_of(row))
        except InputError as error:
            report.skipped.add_error(error, row.name)
    if not shots:
        raise InputError(f"{config.path} has no worked example: {'; '.join(report.skipped.lines())}")
    return shots, report


def one_per_caption(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows, of captioned media only the row of the first caption."""
    described = set()
    for row in rows:
        if row.task != "caption" or row.media not in described:
            described.add(row.media)
            yield row


def shot_of(row: Row) -> Shot:
    """Return a row as a worked example.

    Raises:
        InputError: it is not one question with one answer, or the answer is an unwanted one.
    """
    messages = row.conversation.messages
    if [message.role for message in messages] != ["user", "assistant"]:
        raise InputError("a shot is one question and one answer, without a system message")
    if row.desirable is False:
        raise InputError("the answer is an unwanted one")
    question, answer = messages
    return Shot(question.text, answer.text, question.media)


class Chosen(NamedTuple):
    """The shots of a question.

    Args:
        num_excluded: shots that would have been chosen, but are the question itself (see `Support.choose`).
        failed: why shots that would have been chosen cannot be read.
    """

    shots: list[Shot]
    num_excluded: int
    failed: Sequence[str] = ()


@dataclass
class Support:
    """Worked examples, and the way in which those of a question are chosen.

    Args:
        nearest_first: the nearest shot comes first in the prompt, instead of last.
        lookup: returns the embeddings of media groups; needed to find the nearest.
        ask: returns the embeddings of the groups of a question; None: ``lookup`` does.
        read: called with each media of a shot that would be chosen; a shot that it cannot read is skipped.
        knows_media: whether all media have embeddings, not only those that are compared.
    """

    shots: Sequence[Shot]
    by: ShotsBy = "order"
    seed: int = 0
    nearest_first: bool = False
    lookup: Lookup | None = None
    ask: Lookup | None = None
    read: Callable[[Media], object] | None = None
    knows_media: bool = False
    # Content hashes of the media of each shot; the row of each shot and the vectors, once they are needed.
    _hashes: dict[int, frozenset[str]] = field(default_factory=dict)
    _vectors: dict[str, tuple[dict[int, int], Tensor]] = field(default_factory=dict)

    def embed(
        self, questions: Iterable[Shot], embeddings: MediaEmbeddings, context: RunContext
    ) -> dict[Media, str]:
        """Embed all that is compared, and leave out the shots that cannot be embedded.

        Args:
            questions: prompts with their media; their answers do not matter.
            embeddings: of the model's encoders; becomes the lookup.

        Returns:
            the media that cannot be embedded, each with the reason.

        Raises:
            InputError: no encoder serves a modality, or no shot is left.
            MediaError: media of a question cannot be embedded.
        """
        self.lookup = embeddings
        if self.by not in RETRIEVED:
            return {}
        self.knows_media |= self.by != "text"
        needed = {shot: self._compared(shot) for shot in self.shots}
        asked = [media for question in questions for media in self._compared(question)]
        totals = embeddings.precompute(
            [*(media for row in needed.values() for media in row), *asked], context
        )
        for media in asked:
            if media in totals.failed:
                raise MediaError(totals.failed[media])
        self.shots = [shot for shot in self.shots if totals.failed.keys().isdisjoint(needed[shot])]
        if not self.shots:
            raise InputError(f"no shot can be embedded: {next(iter(totals.failed.values()))}")
        return totals.failed

    def choose(self, prompt: str, media: Sequence[Media], count: int) -> Chosen:
        """Return at most ``count`` shots for a question.

        A shot is excluded if it shows media of the question (the same content, whatever the file is called, or an equal
        embedding, if embeddings are known), or, if neither has media, if its prompt is that of the question.

        Raises:
            InputError: nearest by media, but the question or every shot has none.
            MediaError: a file of the question cannot be read; or one of a shot, without ``read``.
        """
        own, excluded, failed = _content(media), 0, []
        near = self._near(prompt, media) if count else {}
        # The same pixels in another format, for example.
        equal = {n for n, cosine in near.items() if cosine >= EQUAL}

        def allowed(order: Iterable[int]) -> Iterator[int]:
            nonlocal excluded
            for n in order:
                try:
                    if n in equal or self._is_question(n, prompt, own):
                        excluded += 1
                        continue
                    for item in self.shots[n].media if self.read else ():
                        self.read(item)
                except MediaError as error:
                    if self.read is None:
                        raise
                    failed.append(str(error))
                else:
                    yield n

        # Lazily: files are only hashed until enough shots are found.
        if self.by == "order":
            order = allowed(range(len(self.shots)))
        elif self.by == "random":
            # By content, so that a question gets the same shots in any batch.
            draw = random.Random("\n".join([str(self.seed), prompt, *sorted(own)]))
            order = allowed(draw_in_turn(range(len(self.shots)), draw))
        else:
            if self.by == "text":
                near = self._similarities("text", prompt, media)
            order = allowed(sorted(near, key=near.__getitem__, reverse=True))
            if self.by == "media_text":
                near = self._similarities("text", prompt, media)
                # Sorting is stable: equal prompts stay in the order of their media.
                order = iter(sorted(islice(order, POOL * count), key=near.__getitem__, reverse=True))
        chosen = [self.shots[n] for n in islice(order, count)]
        if self.by in RETRIEVED and not self.nearest_first:
            chosen.reverse()
        return Chosen(chosen, excluded, failed)

    def _near(self, prompt: str, media: Sequence[Media]) -> dict[int, float]:
        """Return the cosine of the media of the question and of each shot; empty if they are not known or compared."""
        compared = self.by in ("media", "media_text")
        known = self.knows_media and media and any(shot.media for shot in self.shots)
        return self._similarities("media", prompt, media) if compared or known else {}

    def _is_question(self, n: int, prompt: str, own: frozenset[str]) -> bool:
        shot = self.shots[n]
        if not (own or shot.media):
            # As `Message` writes a text.
            return in_nfc(shot.prompt).split() == in_nfc(prompt).split()
        if n not in self._hashes:
            self._hashes[n] = _content(shot.media)
        return not own.isdisjoint(self._hashes[n])

    def _compared(self, shot: Shot) -> tuple[Media, ...]:
        """Return the media, and the prompt as a text for an encoder, by which a shot is compared."""
        return (
            *(() if self.by == "text" else shot.media),
            *(() if self.by == "media" else _text(shot.prompt)),
        )

    def _similarities(self, kind: str, prompt: str, media: Sequence[Media]) -> dict[int, float]:
        """Return the cosine of the question and each shot by its position; shots without media have none."""
        if kind not in self._vectors:
            groups = [_text(shot.prompt) if kind == "text" else tuple(shot.media) for shot in self.shots]
            # Many shots share their prompt or their image, which has one vector.
            distinct = {group: row for row, group in enumerate(dict.fromkeys(filter(None, groups)))}
            if not distinct:
                raise InputError(
                    f"none of the {len(self.shots)} shots has media, so none is the nearest by media"
                )
            rows = {n: distinct[group] for n, group in enumerate(groups) if group}
            self._vectors[kind] = rows, self.lookup([*distinct])
        if kind == "media" and not media:
            raise InputError(
                "the question has no media, so no shot is the nearest by media; choose another way"
            )
        rows, vectors = self._vectors[kind]
        query = (self.ask or self.lookup)([_text(prompt) if kind == "text" else tuple(media)])[0]
        # Rounded, so that equal media stay equal in whatever order the products are summed.
        found = (vectors @ query).round(decimals=6).tolist()
        return {n: found[row] for n, row in rows.items()}


def _text(prompt: str) -> tuple[Media, ...]:
    return (Media.text(prompt),)


def _content(media: Sequence[Media]) -> frozenset[str]:
    return frozenset(item.content_hash() for item in media)
