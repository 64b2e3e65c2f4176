"""The captions task: how well a model captions held-out media, compared with copying the nearest training caption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.metrics import METRICS, caption_metrics, same_caption
from bindllm.evaluation.task import (
    MODEL,
    NEAREST_CAPTION,
    NO_MEDIA,
    SHUFFLED_MEDIA,
    BaselineAnswer,
    Metrics,
    Task,
    input_digests,
    media_name,
    media_of,
)

_CHUNK = 1024
"""Training media compared at a time, so that memory does not grow with their number."""


@dataclass
class CaptionRow:
    """One held-out image (or other media) and its captions; a caption that could not be measured is None.

    Attributes:
        media: path of the media, or name of the row that contains them.
        modality: modality of the media.
        references: the true captions.
        model: greedy caption of the model.
        exact: whether the model's caption has exactly the words of a reference.
        no_media: caption of the same model without the media.
        shuffled_media: caption of the same model for other media.
        nearest_caption: caption of the nearest training media.
        nearest_exact: whether that caption has exactly the words of a reference.
        nearest_media: path or row of the nearest training media.
        nearest_modality: their modality.
        nearest_similarity: cosine of the two embeddings, -1..1.
    """

    media: str
    modality: str
    references: list[str]
    model: str | None = None
    exact: bool = False
    no_media: str | None = None
    shuffled_media: str | None = None
    nearest_caption: str | None = None
    nearest_exact: bool = False
    nearest_media: str | None = None
    nearest_modality: str | None = None
    nearest_similarity: float | None = None


def captions_task(
    samples: Sequence[Sample], *, train_samples: Sequence[Sample], lookup: Lookup, max_new_tokens: int = 32
) -> Task:
    """Return the captions task: the loss of every sample, and one caption per distinct media.

    Media with several captions are captioned once and compared with all of them. Two files with the same embedding
    count as one.

    Args:
        samples: held-out samples with references.
        train_samples: samples for the baseline.
        lookup: returns the embeddings of media groups.
        max_new_tokens: longest caption.

    Raises:
        InputError: none of the samples has media.
    """
    shown = [sample for sample in samples if sample.media]
    if not shown:
        raise InputError(f"none of the {len(samples)} held-out samples has media; give captioned media")
    first: dict[bytes, Sample] = {}
    references: dict[bytes, dict[str, None]] = {}
    # Grouped by input: a prompt with the same embedding has one caption, whatever the file is called.
    for key, sample in zip(input_digests(shown, lookup), shown, strict=True):
        first.setdefault(key, sample)
        references.setdefault(key, {}).update(dict.fromkeys(sample.references))
    # One item for each input, with the references of all its rows.
    items = [replace(sample, references=tuple(references[key])) for key, sample in first.items()]
    skipped = len(samples) - len(shown)
    return Task(
        "captions",
        items,
        _metric,
        loss_items=shown,
        baseline=NEAREST_CAPTION,
        baseline_answers=partial(nearest_captions, items, train_samples, lookup),
        make_row=_row,
        max_new_tokens=max_new_tokens,
        counts={"without_media": skipped} if skipped else {},
    )


def nearest_captions(
    samples: Sequence[Sample], train_samples: Sequence[Sample], lookup: Lookup
) -> list[BaselineAnswer]:
    """Return for each sample the caption of the training media with the highest cosine; the first of equal ones.

    Raises:
        InputError: no training sample has media.
    """
    training = [sample for sample in train_samples if sample.media]
    if not training:
        raise InputError("the training samples have no media, so the nearest caption is not defined")
    # Unit embeddings, so the product is the cosine.
    held_out = lookup([media_of(sample) for sample in samples])
    best, position = torch.full((len(samples),), -math.inf), torch.zeros(len(samples), dtype=torch.long)
    for start in range(0, len(training), _CHUNK):
        vectors = lookup([media_of(sample) for sample in training[start : start + _CHUNK]])  # [n, E]
        # Rounded, so that equal media stay equal in whatever order the products are summed.
        top, column = (held_out @ vectors.T).round(decimals=6).max(dim=1)
        # Strictly greater, so that the first of equal media is kept across chunks.
        position = torch.where(top > best, column + start, position)
        best = torch.maximum(top, best)
    return [
        BaselineAnswer(sample.references[0], media_name(sample), media_of(sample)[0].modality, similarity)
        for sample, similarity in zip([training[n] for n in position.tolist()], best.tolist(), strict=True)
    ]


def _metric(items: Sequence[Sample], captions: Sequence[str]) -> Metrics:
    if not items:
        # A variant that was not measured has the same keys.
        return dict.fromkeys(METRICS)
    return caption_metrics(captions, [item.references for item in items])


def _row(item: Sample, texts: Mapping[str, str | None], nearest: BaselineAnswer | None) -> dict[str, Any]:
    row = CaptionRow(
        media=media_name(item) or item.name,
        modality=media_of(item)[0].modality,
        references=list(item.references),
        model=texts[MODEL],
        exact=same_caption(texts[MODEL] or "", item.references),
        no_media=texts[NO_MEDIA],
        shuffled_media=texts[SHUFFLED_MEDIA],
    )
    if nearest is not None:
        row.nearest_caption, row.nearest_media, row.nearest_modality, row.nearest_similarity = nearest
        row.nearest_exact = same_caption(nearest.text, item.references)
    return asdict(row)
