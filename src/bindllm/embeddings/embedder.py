"""Media to embeddings: threads read and prepare files while the encoder embeds the batch before.

Threads, not processes: Pillow and hashing release Python's lock, an encoder with its weights is not copied, and the
encoder takes most of the time. With several devices, each has its own process (`bindllm.parallel.Processes`).
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from bindllm.encoders import Encoder, encoder_for, prepare
from bindllm.encoders.fusion import fuse_groups
from bindllm.encoders.tokens import group_tokens, reduce_tokens, token_size
from bindllm.errors import BindLLMError, EncoderError, InputError, MediaError, listed
from bindllm.media import Media
from bindllm.media.limits import current_budget, decoding_one
from bindllm.parallel import prefetch

Key = TypeVar("Key")

BATCH_SIZE = 32
"""Media of one modality that are embedded together, by default."""

BAD_IN_A_ROW = 2
"""Batches of one media that may fail after each other. At the next, the encoder counts as broken and the run ends."""

RECENT_BYTES = 256 << 20
"""Memory of `RecentEmbeddings`, by default."""

_NORM_TOLERANCE = 0.01
"""Largest difference of the norm of an embedding from 1: more than the rounding of bfloat16."""

PREPARED_BYTES = 1 << 30
"""Prepared inputs held in memory at the same time, approximately: one long video can take 200 MB."""


class Work(NamedTuple, Generic[Key]):
    """One media to embed.

    Args:
        media: read in a thread, and not referenced after that: only the prepared input stays in memory.
        name: for error messages; None: the name of the media.
    """

    key: Key
    media: Media
    name: str | None = None


class EmbeddingResult(NamedTuple, Generic[Key]):
    """The result for one media: its embedding or the reason why it has none.

    Args:
        inputs: prepared by the encoder, until they are embedded.
        embedding: unit norm, float32, on the CPU, [E]; None after an error.
        tokens: [*grid, C], as `reduce_tokens` returns them; None after an error, or if they were not asked for.
        error: why the media could not be read or embedded; empty: it was embedded. A string, because an exception
            would keep the content of the media in memory through its traceback.
        warnings: about the media, if it came with a request (`bindllm.media.limits.warn`).
    """

    key: Key
    name: str
    modality: str
    inputs: Tensor | None = None
    embedding: Tensor | None = None
    tokens: Tensor | None = None
    error: str = ""
    warnings: tuple[str, ...] = ()


class GroupEmbeddings(NamedTuple):
    """The embeddings and the tokens of media groups.

    Args:
        embeddings: [N, E].
        tokens: [N, n, C], see `group_tokens`; None: no modality's tokens were asked for.
    """

    embeddings: Tensor
    tokens: Tensor | None


_Row = tuple[Tensor, Tensor | None]
"""The embedding of one media and its tokens."""


class Embedder:
    """Prepares media in threads, groups them by modality and embeds them in batches.

    About `PREPARED_BYTES` of prepared inputs are held at a time: half for the next batch, half for the media that
    wait for it. Batches depend only on the order and the sizes of the media, so the same media give the same bits.

    Args:
        encoders: the first that serves a modality embeds it.
        device: where encoders are moved before their first batch; None: they stay where they are.
        threads: number of threads that read and prepare; None: one for each CPU core.
        reported: types of errors that are returned as the result of one media. Others are raised with a note that
            names the media.
        token_modalities: modalities whose tokens are kept; their encoders have tokens (see `token_size`).
        trains: whether embeddings have a gradient, if the caller computes gradients.

    Attributes:
        pool: the threads; the owner may use them for other work.
        seconds_embedding: time in which the encoders worked.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        *,
        device: torch.device | str | None = None,
        batch_size: int = BATCH_SIZE,
        threads: int | None = None,
        reported: tuple[type[Exception], ...] = (MediaError,),
        token_modalities: Collection[str] = (),
        trains: bool = False,
    ) -> None:
        self.encoders, self.device, self.batch_size = tuple(encoders), device, batch_size
        self.trains = trains
        self.threads = max(1, (os.cpu_count() or 1) if threads is None else threads)
        self.reported, self.token_modalities = reported, frozenset(token_modalities)
        # One pool for all batches, and for other work of the owner, such as hashing.
        # The threads do not inherit the limits of the request that this works for.
        self._budget = current_budget()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="prepare")
        self.seconds_embedding = 0.0
        # Encoders move to the device at their first batch: a modality without media takes no memory there.
        self._serving: dict[str, Encoder] = {}
        self._largest = 0
        # How many single media may still fail. An encoder that has never worked has no such credit.
        self._credit = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel waiting work and end the threads; the encoders stay on their device."""
        self.pool.shutdown(cancel_futures=True)

    def embed(
        self, works: Iterable[Work[Key]], *, check: Callable[[Work[Key]], None] | None = None
    ) -> Iterator[EmbeddingResult[Key]]:
        """Yield the result for each media, in the order in which batches are complete.

        Args:
            works: may be a generator; it is read only as far ahead as memory allows.
            check: called in the thread after a media was prepared; may raise like reading does.

        Raises:
            Exception: of a type that is not in ``reported`` while preparing a media, or of the encoder for every media
                of a batch (of one media: at the first, or `BAD_IN_A_ROW` times before); a note names them.
        """
        # One open batch per modality, because an encoder embeds one modality at a time.
        waiting: defaultdict[str, list[EmbeddingResult[Key]]] = defaultdict(list)
        prepared = prefetch(self.pool, partial(self._prepare, check), works, limit=self._limit)
        while (item := next(prepared, None)) is not None:
            # A media that failed is reported at once, as it belongs to no batch.
            if item.error:
                yield item
                continue
            batch = waiting[item.modality]
            batch.append(item)
            # Whether one more media, as large as the largest here, would exceed the limit: sizes decide, never timing.
            size = (len(batch) + 1) * max(one.inputs.nbytes for one in batch)
            if len(batch) >= self.batch_size or size > PREPARED_BYTES // 2:
                yield from self._embed_batch(waiting.pop(item.modality))
        for batch in waiting.values():
            yield from self._embed_batch(batch)

    def embed_in_order(self, media: Iterable[Media]) -> list[EmbeddingResult[int]]:
        """Return the results for media in their order; keys are positions."""
        works = (Work(position, item) for position, item in enumerate(media))
        return sorted(self.embed(works), key=lambda result: result.key)

    def _prepare(self, check: Callable[[Work], None] | None, work: Work) -> EmbeddingResult:
        """Read and prepare one media (in a thread)."""
        media = work.media
        prepared = EmbeddingResult(work.key, work.name or media.name, media.modality)
        try:
            with decoding_one(self._budget) as warnings:
                inputs = prepare(media, self.encoders)
            if not isinstance(inputs, Tensor):
                raise _broken(
                    encoder_for(media.modality, self.encoders), "prepare() must return a tensor", inputs
                )
            if check is not None:
                check(work)
        except self.reported as error:
            return prepared._replace(error=str(error))
        except Exception as error:
            # Such an error ends the run, so it must name the file.
            error.add_note(f"while preparing {prepared.name}")
            # A generator would turn it into an error without the name.
            if isinstance(error, StopIteration):
                raise RuntimeError(
                    f"prepare() raised StopIteration, while preparing {prepared.name}"
                ) from error
            raise
        # Without a lock: an update that is lost only delays the tighter limit.
        self._largest = max(self._largest, inputs.nbytes)
        return prepared._replace(inputs=inputs, warnings=tuple(warnings))

    def _limit(self) -> int:
        """Return how many media may be in work or waiting for a batch."""
        if not self._largest:
            # No size is known yet; two are enough to keep reading.
            return 2
        return min(self.threads + self.batch_size, max(1, PREPARED_BYTES // 2 // self._largest))

    def _embed_batch(self, batch: list[EmbeddingResult]) -> Iterator[EmbeddingResult]:
        """Embed media of one modality, and report those that fail or whose embedding is not finite."""
        started = time.perf_counter()
        rows = self._try(batch)
        if isinstance(rows, Exception):
            # Each on its own: one bad media does not cost the others, and a batch that was too large for memory works.
            apart = [rows] if len(batch) == 1 else [self._try([item]) for item in batch]
            rows = [row if isinstance(row, Exception) else row[0] for row in apart]
        # If none works the encoder is at fault, except for a few single media after others that worked. A `MediaError`
        # blames the media, however many there are.
        if not all(isinstance(row, Exception) and not isinstance(row, MediaError) for row in rows):
            self._credit = BAD_IN_A_ROW
        elif len(batch) > 1 or not self._credit:
            rows[0].add_note(_while_embedding(batch))
            raise rows[0]
        else:
            self._credit -= 1
        self.seconds_embedding += time.perf_counter() - started
        # Row by row, so that one bad media does not cost the whole batch.
        for item, row in zip(batch, rows, strict=True):
            error = _problem(item.name, row)
            # A caller that wants no errors as results gets this one raised, too.
            if error and not issubclass(MediaError, self.reported):
                raise MediaError(error) from (row if isinstance(row, Exception) else None)
            embedding, tokens = (None, None) if error else row
            # Without the prepared input, which would stay in memory with the result.
            yield item._replace(inputs=None, embedding=embedding, tokens=tokens, error=error)

    def _try(self, batch: list[EmbeddingResult]) -> list[_Row] | Exception:
        """Return the embedding [E] of each media of a batch and its tokens, on the CPU, or the error of the encoder."""
        modality = batch[0].modality
        try:
            if modality not in self._serving:
                encoder = encoder_for(modality, self.encoders)
                self._serving[modality] = encoder if self.device is None else encoder.to(self.device)
            encoder, inputs = self._serving[modality], [item.inputs for item in batch]
            with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
                if modality not in self.token_modalities:
                    rows = _checked(encoder, encoder.embed(modality, inputs), len(batch))
                    return [(row, None) for row in rows]
                found = encoder.embed(modality, inputs, tokens=True)
                rows = _checked(encoder, found.embeddings, len(batch))
                return list(zip(rows, map(reduce_tokens, found.tokens), strict=True))
        except Exception as error:
            # Weights that are missing or damaged, for example: no other batch would work.
            if isinstance(error, BindLLMError) and not isinstance(error, MediaError):
                error.add_note(_while_embedding(batch))
                raise
            # The traceback stays, without the tensors in it, so that a smaller batch has their memory.
            traceback.clear_frames(error.__traceback__)
            return error


def _checked(encoder: Encoder, embeddings: Any, count: int) -> Tensor:
    """Return embeddings [B, E] as float32 on the CPU.

    Raises:
        EncoderError: they have another form. Other rows than inputs would give media the embeddings of others.
    """
    shape = (count, encoder.embedding_size)
    if not (isinstance(embeddings, Tensor) and embeddings.shape == shape and embeddings.is_floating_point()):
        raise _broken(encoder, f"embed() of {count} inputs must return float32 {list(shape)}", embeddings)
    return embeddings.cpu().float()


def _broken(encoder: Encoder, promise: str, found: Any) -> EncoderError:
    given = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    return EncoderError(
        f"{type(encoder).__name__} breaks the contract of an encoder: {promise}, not {given}. "
        "`bindllm check --encoder` checks all of it"
    )


def _while_embedding(batch: Sequence[EmbeddingResult]) -> str:
    return f"while embedding {listed([item.name for item in batch])}"


def _problem(name: str, row: _Row | Exception) -> str:
    """Return why a media has no embedding, "" if it has one."""
    if isinstance(row, MediaError):
        return str(row)
    if isinstance(row, Exception):
        return f"{name}: the encoder cannot embed it ({type(row).__name__}: {row})"
    embedding, tokens = row
    if not embedding.isfinite().all():
        return f"{name}: its embedding is not finite"
    # Cosines and the bind network take the length for granted.
    if abs((norm := float(embedding.detach().norm())) - 1) > _NORM_TOLERANCE:
        return f"{name}: its embedding has norm {norm:.4g} instead of 1; `bindllm check --encoder` checks an encoder"
    return "" if tokens is None or tokens.isfinite().all() else f"{name}: its tokens are not finite"


class RecentEmbeddings:
    """Embeddings and tokens of the media that were used last, by content: a file that comes again is not encoded again.

    It belongs to one list of encoders. Several threads may use it.

    Args:
        most_bytes: memory for them; those that were not used for the longest time are dropped first.

    Attributes:
        hits: number of media that were found.
        misses: number of media that were encoded.
    """

    def __init__(self, most_bytes: int = RECENT_BYTES) -> None:
        self.hits = self.misses = 0
        self._most_bytes, self._num_bytes = most_bytes, 0
        self._rows: OrderedDict[tuple[str, bool], EmbeddingResult] = OrderedDict()
        self._lock = threading.Lock()

    def embed_in_order(self, embedder: Embedder, media: Iterable[Media]) -> list[EmbeddingResult]:
        """Do as `Embedder.embed_in_order`; errors are never kept."""
        media = list(media)
        # An embedding without its tokens does not serve a request that needs them.
        keys = [(item.content_hash(), item.modality in embedder.token_modalities) for item in media]
        with self._lock:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
            # A media that is twice in the list is embedded once.
            absent = {key: item for key, item in zip(keys, media, strict=True) if key not in found}
            self.hits += len(keys) - len(absent)
            self.misses += len(absent)
        # Without the lock: other threads encode at the same time.
        found |= zip(absent, embedder.embed_in_order(absent.values()), strict=True)
        with self._lock:
            for key in absent:
                self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: tuple[str, bool], result: EmbeddingResult) -> None:
        if result.error or key in self._rows:
            return
        self._rows[key] = result
        self._num_bytes += _size(result)
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= _size(self._rows.popitem(last=False)[1])


def _size(result: EmbeddingResult) -> int:
    return sum(x.nbytes for x in (result.embedding, result.tokens) if x is not None)


def embed_groups(
    groups: Sequence[Sequence[Media]],
    encoders: Sequence[Encoder],
    *,
    device: torch.device | str,
    normalize: bool = True,
    token_modalities: Collection[str] = (),
    recent: RecentEmbeddings | None = None,
    trains: bool = False,
) -> GroupEmbeddings:
    """Embed the media of each group and fuse them; batches are made by modality, across all groups.

    Args:
        encoders: the first that serves a modality embeds it.
        token_modalities: modalities whose tokens are returned too; none by default.
        recent: embeddings of these encoders that are read instead of encoding a media again, and added to.

    Returns:
        the embeddings of the groups, unit norm (if normalized), float32, on the CPU, and their tokens.

    Raises:
        InputError: a group is empty, no encoder serves a modality, or an encoder has no tokens (see `token_size`).
        MediaError: a media cannot be read, or its embedding is not finite.
    """
    if not all(groups):
        raise InputError("a list of media to be fused is empty: leave it out, or put a Media into it")
    width = token_size(encoders, token_modalities) if token_modalities else 0
    # Any failure ends the call, because a group needs all of its media.
    options = {"token_modalities": token_modalities, "trains": trains}
    with Embedder(encoders, device=device, reported=(), **options) as embedder:
        media = [item for group in groups for item in group]
        results = recent.embed_in_order(embedder, media) if recent else embedder.embed_in_order(media)
    # Also those of an embedding that an earlier request left: its media has another place in this one.
    if (budget := current_budget()) is not None:
        for item, result in zip(media, results, strict=True):
            budget.add_warnings(item.name, result.warnings)
    embeddings = fuse_groups(
        torch.stack([result.embedding for result in results]), groups, normalize=normalize
    )
    if not token_modalities:
        return GroupEmbeddings(embeddings, None)
    tokens = group_tokens([result.tokens for result in results], [len(group) for group in groups], width)
    return GroupEmbeddings(embeddings, tokens)
