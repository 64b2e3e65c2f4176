"""The datastore: records of media with their texts, found by the embeddings of other media.

    datastore.json           format, fingerprints of the encoders, checksums: written last
    embeddings.safetensors   one embedding for each record, [R, E]
    records.jsonl            one object for each record: keys and names of its media, their modality, its texts

The media themselves are not needed once a datastore is built. Search is exact: an inner product with every record, in
memory (4 E bytes for each).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from bindllm.atomic import (
    atomic_folder,
    check_replaceable,
    file_sha256,
    read_json,
    read_tensors,
    require_file,
    write_json,
    write_tensors,
)
from bindllm.encoders import Encoder
from bindllm.errors import BindLLMError, InputError, StoreError, listed

FORMAT = 1
MANIFEST = "datastore.json"
EMBEDDINGS = "embeddings.safetensors"
RECORDS = "records.jsonl"

READS_NO_RECORDS = (
    "this model reads no records: train it with model.context, or leave out datastore and records"
)

EQUAL = 1 - 1e-5
"""Cosine from which two media count as exact duplicates; float32 products of equal unit vectors differ by less."""

_CHUNK = 1 << 24
"""Products that are in memory at the same time, 64 MB."""


@dataclass(frozen=True)
class Record:
    """One record of a datastore.

    Args:
        keys: content hashes of its media; empty for a record without media, such as a row of a classifier.
        name: path of its media, or row of their table.
        modality: modality of its media.
        texts: texts that belong to it, such as captions.
    """

    keys: tuple[str, ...]
    name: str
    modality: str
    texts: tuple[str, ...]

    @property
    def text(self) -> str:
        """All texts as one."""
        return "; ".join(self.texts)


class Found(NamedTuple):
    """Records for N queries.

    Attributes:
        ids: indices of the records, nearest first, -1 if there are no more, int64 [N, K].
        scores: how many standard deviations their inner products are above the mean over the whole datastore, [N, K];
            comparable between datastores, unlike the inner products.
        itself: for each query the number of records that were excluded because they show the same media, [N].
        equal: the number that were excluded because their embedding is equal, [N].
    """

    ids: Tensor
    scores: Tensor
    itself: Tensor
    equal: Tensor


class Datastore:
    """Records with one embedding each.

    Args:
        embeddings: embeddings of the records, float32 [R, E]; usually unit vectors.
        records: the R records.
        fingerprints: fingerprints of the encoders that made the embeddings.
        source: path for messages.

    Raises:
        InputError: no records, another number of embeddings, embeddings that are not finite, or no fingerprint.

    Examples:
        >>> cat = Record(keys=(), name="cat", modality="image", texts=("a cat",))
        >>> dog = Record(keys=(), name="dog", modality="image", texts=("a dog",))
        >>> store = Datastore(torch.eye(2), [cat, dog], ["0" * 64])
        >>> store.search(torch.tensor([[0.1, 0.9]]), 1).ids.tolist()
        [[1]]
    """

    def __init__(
        self, embeddings: Tensor, records: Sequence[Record], fingerprints: Sequence[str], *, source: str = ""
    ) -> None:
        if not len(records) or embeddings.shape[:-1] != (len(records),):
            raise InputError(
                f"a datastore takes at least one record and one embedding for each, not {len(records)} records and "
                f"embeddings {list(embeddings.shape)}"
            )
        self.embeddings, self.records = embeddings.float().cpu(), tuple(records)
        # A larger number of float64 may have become infinite.
        if not self.embeddings.isfinite().all():
            raise InputError("the embeddings of a datastore must be finite")
        # One word would be read as a list of its letters, and an empty list would fit every model.
        words = [] if isinstance(fingerprints, str) else list(fingerprints)
        if not words or not all(isinstance(word, str) for word in words):
            raise InputError(
                f"the fingerprints of a datastore are {fingerprints!r}, expected a list with that of each encoder that "
                "made the embeddings: [encoder.fingerprint()]"
            )
        self.fingerprints, self.source = tuple(words), source
        self._rows: dict[str, list[int]] = {}
        for row, record in enumerate(self.records):
            for key in record.keys:
                self._rows.setdefault(key, []).append(row)

    def __len__(self) -> int:
        return len(self.records)

    def check_encoders(self, encoders: Sequence[Encoder]) -> None:
        """Refuse a datastore whose embeddings are not in the space of these encoders.

        Raises:
            StoreError: one of its encoders is not among them.
        """
        known = [encoder.fingerprint() for encoder in encoders]
        if foreign := [name[:16] for name in self.fingerprints if name not in known]:
            raise StoreError(
                f"the datastore {self.source} was built with the encoder {listed(foreign)}, and the model has "
                f"{listed([name[:16] for name in known])}: build it again with `bindllm datastore` and the encoder of "
                "the model"
            )

    def search(
        self,
        queries: Tensor,
        count: int,
        *,
        keys: Sequence[Collection[str]] = (),
        exclude_equal: bool = False,
    ) -> Found:
        """Return the records with the largest inner products; of equal ones, those of the lower index first.

        Args:
            queries: unit embeddings, [N, E]; a row of zeros finds nothing.
            count: most records of a query, K.
            keys: content hashes for each query, N collections: records with one of them are excluded. Empty: none are.
            exclude_equal: also exclude records whose cosine to the query is at least `EQUAL`.

        Raises:
            InputError: queries of another width.
        """
        if queries.shape[1] != self.embeddings.shape[1]:
            raise InputError(
                f"queries {list(queries.shape)} for a datastore of embeddings {list(self.embeddings.shape)}"
            )
        parts, step = [], max(1, _CHUNK // len(self))
        for start in range(0, len(queries), step):
            chunk = slice(start, start + step)
            parts.append(self._search(queries[chunk].float().cpu(), count, keys[chunk], exclude_equal))
        none = torch.zeros(0, min(count, len(self)))
        empty = Found(none.long(), none, *torch.zeros(2, 0).long())
        return Found(*(torch.cat(columns) for columns in zip(empty, *parts, strict=True)))

    def _search(
        self, queries: Tensor, count: int, keys: Sequence[Collection[str]], exclude_equal: bool
    ) -> Found:
        # Rounded, so that equal records stay equal in whatever order the products are summed.
        scores = (queries @ self.embeddings.T).round(decimals=6)
        # Over all records, so that an exclusion changes no score of another record.
        spread, mean = torch.std_mean(scores, dim=1, correction=0, keepdim=True)
        itself = torch.zeros(scores.shape, dtype=torch.bool)
        for row, own in enumerate(keys):
            itself[row, [n for key in own for n in self._rows.get(key, ())]] = True
        equal = torch.zeros_like(itself)
        if exclude_equal:
            norms = self.embeddings.norm(dim=1).clamp(min=1e-12)
            equal = (scores / norms >= EQUAL) & ~itself
        # A query of zeros is the padding of a batch: it finds nothing.
        scores[itself | equal | ~queries.any(1, keepdim=True)] = -torch.inf
        best, ids = _largest(scores, min(count, len(self)))
        # One record, or equal ones, have no spread.
        above = torch.where(best.isinf(), 0, (best - mean) / spread.clamp(min=1e-6))
        return Found(torch.where(best.isinf(), -1, ids), above, itself.sum(1), equal.sum(1))

    def save(self, folder: str | Path) -> None:
        """Write the datastore, in one step; an earlier one there is replaced.

        Raises:
            StoreError: the folder holds something else.
        """
        folder = Path(folder)
        check_datastore_folder(folder)
        with atomic_folder(folder) as part:
            write_tensors(part / EMBEDDINGS, {"embeddings": self.embeddings})
            # In ASCII: names of files may hold bytes that are not UTF-8.
            lines = (json.dumps(asdict(record)) for record in self.records)
            (part / RECORDS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            hashes = {
                f"{name.partition('.')[0]}_sha256": file_sha256(part / name) for name in (EMBEDDINGS, RECORDS)
            }
            facts = {"format": FORMAT, "fingerprints": self.fingerprints}
            write_json(part / MANIFEST, {**facts, **hashes})

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read a datastore.

        Raises:
            StoreError: missing, damaged, or of a newer format.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise StoreError(
                f"{folder} is not the folder of a datastore (no {MANIFEST}); build one with `bindllm datastore`"
            )
        manifest = read_json(folder / MANIFEST, StoreError)
        try:
            number = int(manifest["format"])
            if number > FORMAT:
                raise StoreError(
                    f"{folder} has format {number}, this bindllm reads up to {FORMAT}: update bindllm"
                )
            tensors = read_tensors(folder / EMBEDDINGS, manifest["embeddings_sha256"], StoreError)
            require_file(folder / RECORDS, StoreError, "copy the whole folder")
            if file_sha256(folder / RECORDS) != manifest["records_sha256"]:
                raise ValueError(f"{RECORDS} is not the file that it was written with")
            with (folder / RECORDS).open(encoding="utf-8") as lines:
                records = [_parse(json.loads(line)) for line in lines]
            return cls(tensors["embeddings"], records, manifest["fingerprints"], source=str(folder))
        except StoreError:
            raise
        except (BindLLMError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreError(f"{folder} is damaged ({error!r}); copy or build it again") from error


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row and their columns, [N, K]; of equal ones, the lower column first."""
    # `topk` may take any of equal scores. So it gives the least one that belongs to a row, and only scores from there
    # on are sorted: few, unless many are equal.
    ids = []
    for row, least in zip(
        scores, scores.topk(count, dim=1).values.amin(1) if count else scores[:, 0], strict=True
    ):
        near = (row >= least).nonzero().squeeze(1)
        order = row[near].argsort(descending=True, stable=True)
        ids.append(near[order[:count]])
    ids = torch.stack(ids)
    return scores.gather(1, ids), ids


def check_datastore_folder(folder: str | Path) -> None:
    """Raise a `StoreError` if a datastore cannot be written there: the folder holds something else."""
    check_replaceable(Path(folder), MANIFEST, StoreError, kind="a datastore")


def _parse(entry: dict[str, Any]) -> Record:
    """Check the types of a record: its file may be untrusted."""
    record = Record(**{**entry, "keys": tuple(entry["keys"]), "texts": tuple(entry["texts"])})
    if not all(isinstance(x, str) for x in (*record.keys, *record.texts, record.name, record.modality)):
        raise ValueError(f"a record holds other values than texts: {entry}")
    return record


def open_datastore(
    choice: Datastore | str | Path | bool | None, encoders: Sequence[Encoder], *, own: Path | None
) -> Datastore | None:
    """Return the datastore that a model answers with.

    Args:
        choice: a datastore or its folder; None: the model's own, False: none.
        own: folder of the model's own datastore; None: the model reads no records.

    Raises:
        InputError: a datastore for a model that reads no records, or something else than a datastore.
        StoreError: missing, damaged, or of another encoder.
    """
    if choice is True:
        raise InputError(
            "datastore is True, expected a Datastore, its folder, False, or None for the model's own"
        )
    if choice is False or (own is None and choice is None):
        return None
    if own is None:
        raise InputError(READS_NO_RECORDS)
    if choice is None and not own.exists():
        raise StoreError(
            f"the checkpoint has no datastore ({own}): give one (datastore=FOLDER, --datastore FOLDER), or none "
            "(datastore=False, --records 0)"
        )
    found = choice if isinstance(choice, Datastore) else Datastore.open(own if choice is None else choice)
    found.check_encoders(encoders)
    return found
