"""Classifying and retrieving across modalities, from embeddings alone: no language model takes part.

Each file and each text is encoded once, ever, into the `EmbeddingStore`; a second run only reads it. The score of two
embeddings is their cosine. Classes are prompts: the mean of the unit embeddings of all sentences with the class name,
normalised again (CLIP, https://arxiv.org/abs/2103.00020, section 3.1.4).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bindllm.cache.visual_cache import VisualCache
from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.report import Skipped
from bindllm.encoders import Encoder, encoder_for, passed_over
from bindllm.encoders.alignment import alignment_warnings, space_of
from bindllm.errors import InputError
from bindllm.evaluation.layouts import Task
from bindllm.evaluation.measures import MEASURES, Row, Scores
from bindllm.evaluation.prompts import NAME, fill_templates, templates_for
from bindllm.evaluation.result import Result
from bindllm.media import Media


def evaluate_zero_shot(
    task: Task,
    encoders: Sequence[Encoder],
    *,
    store: str | Path,
    device: torch.device | str = "cpu",
    templates: Sequence[str] | None = None,
    cache: VisualCache | None = None,
    progress: bool = False,
) -> Result:
    """Measure how well encoders classify or retrieve.

    Media whose file cannot be read are left out, counted and reported. In retrieval media of equal content are one,
    and so are equal texts: each is right for all that it belongs to.

    Args:
        task: a data set; see `bindllm.evaluation.layouts.read_layout`.
        encoders: the first that serves a modality embeds it.
        store: folder of the embedding stores.
        device: where the encoders run.
        templates: sentences with {} for the class name, or for the caption; None: those of the modality, and captions
            as they are.
        cache: every query whose modality the cache does not skip is blended with its pictures first: the media in
            classification, and both directions in retrieval. Candidates stay as they are.
        progress: show a bar.

    Raises:
        InputError: no encoder serves a modality, their widths differ, or no media can be read.
        StoreError: the cache was built with none of the encoders, or the store cannot be used.
    """
    started = time.perf_counter()
    needed = _needed(task, encoders)
    templates = tuple(templates or ((NAME,) if task.kind == "retrieve" else templates_for(task.modality)))
    if task.kind == "retrieve" and task.answer != "text" and templates != (NAME,):
        raise InputError(f"prompts are put around texts, and here {task.answer} is retrieved; leave them out")
    embeddings = MediaEmbeddings(needed, store)
    scores = Scores(embeddings, encoders, cache)
    prompts = [_texts(names, templates) for names in task.classes]
    left_out = Skipped()
    left_out.update(task.skipped)
    wanted = [Row(item.media, item.labels, _answers(item.answers, templates)) for item in task.items]
    num_encoded, rows = _fill(embeddings, wanted, prompts, left_out, device=device, progress=progress)
    result = Result(
        kind=task.kind,
        modality=task.modality,
        answer=task.answer,
        measures=[],
        num_listed=task.num_listed,
        num_measured=len(rows),
        left_out=left_out,
        templates=templates,
        encoders=[_describe(encoder) for encoder in needed],
        cache=None if cache is None else _settings(cache),
        warnings=[*alignment_warnings(needed), *passed_over(encoders)],
        notes=[*task.notes, *_notes_on_cache(task, cache)],
        num_encoded=num_encoded,
    )
    MEASURES[task.kind](task, rows, prompts, scores, result)
    result.seconds = time.perf_counter() - started
    return result


def _needed(task: Task, encoders: Sequence[Encoder]) -> list[Encoder]:
    """Return the encoders that the task needs, that of the media first."""
    needed: list[Encoder] = []
    for modality, purpose in ((task.modality, "its media"), (task.answer, "what is compared with them")):
        if not any(modality in encoder.modalities for encoder in encoders):
            served = sorted({name for encoder in encoders for name in encoder.modalities})
            raise InputError(
                f"the task needs an encoder of {modality} for {purpose}; the encoders here serve "
                f"{', '.join(served) or 'nothing'}. Name one more that does, of the same joint space"
            )
        encoder = encoder_for(modality, encoders)
        if not any(encoder is other for other in needed):
            needed.append(encoder)
    return needed


def _texts(names: Sequence[str], templates: Sequence[str]) -> MediaGroup:
    """Return the sentences that stand for one class or caption; their embeddings are averaged."""
    return tuple(map(Media.text, fill_templates(names, templates)))


def _fill(
    embeddings: MediaEmbeddings,
    rows: list[Row],
    prompts: list[MediaGroup],
    left_out: Skipped,
    *,
    device: torch.device | str,
    progress: bool,
) -> tuple[int, list[Row]]:
    """Embed what the store lacks: return how much that was, and the rows that can be measured."""
    wanted = dict.fromkeys(row.media for row in rows)
    for groups in (*(row.answers for row in rows), prompts):
        wanted |= dict.fromkeys(media for group in groups for media in group)
    totals = embeddings.precompute(wanted, device=device, progress=progress)
    failed = totals.failed
    if broken := [media for prompt in prompts for media in prompt if media in failed]:
        raise InputError(f"the prompt {broken[0].name} cannot be embedded: {failed[broken[0]]}")
    kept = []
    for row in rows:
        answers = tuple(group for group in row.answers if not any(media in failed for media in group))
        if row.media in failed:
            left_out.add("the file cannot be read", failed[row.media])
        elif row.answers and not answers:
            left_out.add("nothing that belongs to it can be read", row.media.name)
        else:
            kept.append(row._replace(answers=answers))
    if not kept:
        raise InputError(f"none of {len(rows):,} media can be measured: {'; '.join(left_out.lines())}")
    return totals.encoded, kept


def _answers(answers: Sequence[Media], templates: Sequence[str]) -> tuple[MediaGroup, ...]:
    if tuple(templates) == (NAME,):
        return tuple((answer,) for answer in answers)
    return tuple(_texts([str(answer.source)], templates) for answer in answers)


def _describe(encoder: Encoder) -> dict[str, object]:
    kind = type(encoder)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "modalities": list(encoder.modalities),
        "space": space_of(encoder),
        "fingerprint": encoder.fingerprint(),
    }


def _settings(cache: VisualCache) -> dict[str, object]:
    return {
        "folder": str(cache.index.source),
        "pictures": len(cache),
        "top_k": cache.top_k,
        "temperature": cache.temperature,
        "weight": cache.weight,
        "formula": cache.formula,
    }


def _notes_on_cache(task: Task, cache: VisualCache | None) -> list[str]:
    """Return what a reader must know about the cache."""
    if cache is None:
        return []
    asked = {task.modality, task.answer} if task.kind == "retrieve" else {task.modality}
    left = sorted(asked & set(cache.skip))
    return [f"the cache leaves {' and '.join(left)} queries as they are"] if left else []
