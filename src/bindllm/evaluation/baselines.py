"""Honest baselines: a blind model, wrong pictures, and the caption of the nearest training picture.

To the model a picture is its embedding, and so it is here: two files with the same embedding are one picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bindllm.conversation import NO_MEDIA
from bindllm.data.collate import Lookup, MediaGroup
from bindllm.data.rows import Sample
from bindllm.errors import InputError

_SHUFFLE_SEED = 0
_CHUNK = 1024
"""Training pictures compared at a time, so that memory does not grow with their number."""


@dataclass(frozen=True)
class Neighbour:
    """The training picture nearest to a held-out one: its caption and name, the cosine of the two, its modality."""

    caption: str
    picture: str
    similarity: float
    modality: str = "image"


def subject(sample: Sample) -> MediaGroup:
    """Return the media that the last answer of a sample speaks about."""
    return sample.media[int(sample.media_index[-1])]


def subject_name(sample: Sample) -> str:
    """Return what that media is called: its path, or its row where a table or a shard holds its content."""
    media = subject(sample)[0]
    return (isinstance(media.source, bytes) and sample.name) or media.name


def blind(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples without media: nothing is added to any token, bit-equal to gates of zero."""
    return [replace(sample, media_index=np.full_like(sample.media_index, NO_MEDIA)) for sample in samples]


def exchange(samples: Sequence[Sample], lookup: Lookup) -> Lookup:
    """Return a lookup that gives for each media group of the samples the embedding of another one.

    The distinct pictures are put into one cycle, drawn by a fixed seed, and each is exchanged for the next: none
    keeps its place, and one that occurs several times is exchanged for the same picture everywhere.

    Raises:
        InputError: there are no two different pictures.
    """
    groups = [group for sample in samples for group in sample.media]
    vectors = dict(zip(groups, lookup(groups), strict=True))
    distinct = list({vector.numpy().tobytes(): vector for vector in vectors.values()}.items())
    if len(distinct) < 2:
        raise InputError("all held-out pictures are the same one, so there is none to exchange it for")
    random.Random(_SHUFFLE_SEED).shuffle(distinct)
    following = distinct[1:] + distinct[:1]
    other = {key: vector for (key, _), (_, vector) in zip(distinct, following, strict=True)}

    def exchanged(groups: Sequence[MediaGroup]) -> Tensor:
        return torch.stack([other[vectors[group].numpy().tobytes()] for group in groups])

    return exchanged


def neighbours(samples: Sequence[Sample], train_samples: Sequence[Sample], lookup: Lookup) -> list[Neighbour]:
    """Return for each sample the training sample whose picture has the highest cosine; the first of equal ones.

    Raises:
        InputError: no training sample shows anything.
    """
    training = [sample for sample in train_samples if sample.media]
    if not training:
        raise InputError("there are no training pictures to look for the nearest one in")
    held = lookup([subject(sample) for sample in samples])
    best, place = torch.full((len(samples),), -math.inf), torch.zeros(len(samples), dtype=torch.long)
    for start in range(0, len(training), _CHUNK):
        vectors = lookup([subject(sample) for sample in training[start : start + _CHUNK]])
        # Rounded, so that equal pictures stay equal whatever the order of summation was.
        top, column = (held @ vectors.T).round(decimals=6).max(dim=1)
        place = torch.where(top > best, column + start, place)
        best = torch.maximum(top, best)
    found = [training[n] for n in place.tolist()]
    return [
        Neighbour(sample.references[0], subject_name(sample), similarity, subject(sample)[0].modality)
        for sample, similarity in zip(found, best.tolist(), strict=True)
    ]
