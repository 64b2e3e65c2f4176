"""How well a model captions held-out pictures, beside the baselines.

- ``heldout``: the model as it is.
- ``zero_gates``: the same model with nothing added anywhere, as if its gates were zero.
- ``shuffled``: the same model, every picture exchanged for another held-out one. If this is no worse than
  ``heldout``, the model does not use what it sees.
- ``nearest``: no model, the caption of the nearest training picture. It is copied as it stands, so it has no loss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress

from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.baselines import Neighbour, blind, exchange, neighbours, subject, subject_name
from bindllm.evaluation.measuring import Measuring, evaluating, input_digests, loss_numbers
from bindllm.evaluation.metrics import METRICS, caption_metrics, same_caption
from bindllm.model.bindllm import BindLLM

VARIANTS = ("heldout", "zero_gates", "shuffled", "nearest")


@dataclass
class CaptionRow:
    """One held-out picture and what was said of it; None where that could not be measured.

    Attributes:
        picture: path or row of the picture that the answer is about.
        references: its true captions.
        generated: the model's caption, greedily decoded.
        exact: whether that has exactly the words of a reference.
        zero_gates: caption of the same model, blind.
        shuffled: caption of the same model, shown another picture.
        nearest: caption of the nearest training picture.
        nearest_exact: whether that has exactly the words of a reference.
        nearest_picture: path or row of that picture.
        nearest_similarity: cosine of the two embeddings, -1..1.
        modality: of the picture, or whatever else it is.
        nearest_modality: of the nearest one.
    """

    picture: str
    references: list[str]
    generated: str | None = None
    exact: bool = False
    zero_gates: str | None = None
    shuffled: str | None = None
    nearest: str | None = None
    nearest_exact: bool = False
    nearest_picture: str | None = None
    nearest_similarity: float | None = None
    modality: str = "image"
    nearest_modality: str = "image"


@dataclass
class HeldOutResult:
    """What an evaluation found.

    Attributes:
        metrics: for each of `VARIANTS` ``loss`` (nats per supervised token), ``perplexity`` (its exponential) and
            the numbers of `caption_metrics`; None where a number is not defined or could not be measured.
        rows: one per held-out picture, in the order of the samples.
        problems: what could not be measured, and why.
        num_without_media: samples left out because they show nothing.
        seconds: wall time.
    """

    metrics: dict[str, dict[str, float | None]]
    rows: list[CaptionRow]
    problems: dict[str, str]
    num_without_media: int
    seconds: float

    def captions(self) -> list[dict[str, Any]]:
        """Return the rows as JSON-able dicts."""
        return [asdict(row) for row in self.rows]


def evaluate_captions(
    model: BindLLM,
    samples: Sequence[Sample],
    *,
    train_samples: Sequence[Sample],
    lookup: Lookup,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> HeldOutResult:
    """Measure a model on held-out samples, and the baselines beside it.

    The loss is taken over every sample; a picture with several captions is captioned once and compared with all of
    them. Decoding is greedy. The same inputs give the same numbers, and no global random state is touched. What
    fails in one measurement (too little memory, say) is logged and reported, and the others are still made.

    Args:
        model: the trained model; its mode is put back at the end.
        samples: held-out samples, with references.
        train_samples: where the nearest picture is looked for.
        lookup: gives the embeddings of media groups.
        batch_size: samples at a time.
        max_new_tokens: longest caption.
        progress: show a bar with a time estimate.

    Raises:
        InputError: no sample shows anything.
    """
    started = time.perf_counter()
    shown = [sample for sample in samples if sample.media]
    if not shown:
        raise InputError(f"none of the {len(samples)} held-out samples has media; give captioned pictures")
    asked, references = _pictures(shown, lookup)
    with evaluating(model), Progress(disable=not progress) as bar:
        task = bar.add_task("evaluating", total=3 * len(shown) + 2 * len(asked))
        run = Measuring(model, batch_size, max_new_tokens, lambda done: bar.advance(task, done))
        nearest = run.attempt("nearest", lambda: neighbours(asked, train_samples, lookup))
        exchanged = run.attempt("shuffled", lambda: exchange(shown, lookup))
        measured = {
            "heldout": _measure(run, "heldout", shown, asked, lookup),
            "zero_gates": _measure(run, "zero_gates", blind(shown), blind(asked), lookup),
            "shuffled": _measure(run, "shuffled", shown, asked, exchanged) if exchanged else _Measured(),
            "nearest": _Measured(captions=nearest and [neighbour.caption for neighbour in nearest]),
        }
    metrics = {name: _numbers(run, name, one, references) for name, one in measured.items()}
    return HeldOutResult(
        metrics=metrics,
        rows=_rows(asked, references, measured, nearest),
        problems=run.problems,
        num_without_media=len(samples) - len(shown),
        seconds=time.perf_counter() - started,
    )


def measure_captions(
    model: BindLLM,
    samples: Sequence[Sample],
    lookup: Lookup,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> dict[str, float | None]:
    """Measure a model on held-out samples alone, as `evaluate_captions` does, for comparisons of one's own.

    Args:
        model: the trained model; its mode is put back at the end.
        samples: held-out samples with media and references.
        lookup: gives what the model is shown: the embeddings of the media groups, or any others in their place.
        batch_size: samples at a time.
        max_new_tokens: longest caption.

    Returns:
        loss, perplexity and the numbers of `caption_metrics`.

    Raises:
        InputError: samples without media, or a measurement that failed; says why.
    """
    if not samples or not all(sample.media for sample in samples):
        raise InputError("every sample to be measured has media; leave out those that show nothing")
    asked, references = _pictures(list(samples), lookup)
    with evaluating(model):
        run = Measuring(model, batch_size, max_new_tokens)
        measured = _measure(run, "held-out", list(samples), asked, lookup)
        numbers = _numbers(run, "captions", measured, references)
    if run.problems:
        raise InputError("; ".join(f"{name}: {why}" for name, why in run.problems.items()))
    return numbers


@dataclass
class _Measured:
    """What a model gave: its loss, and a caption for each picture; None where it failed."""

    loss: float | None = None
    captions: list[str] | None = None


def _numbers(
    run: Measuring, name: str, measured: _Measured, references: list[list[str]]
) -> dict[str, float | None]:
    """Return the numbers of one variant."""
    numbers: dict[str, float | None] = {**loss_numbers(measured.loss), **dict.fromkeys(METRICS)}
    if measured.captions is not None:
        captions = measured.captions
        numbers.update(run.attempt(f"{name} metrics", lambda: caption_metrics(captions, references)) or {})
    return numbers


def _measure(
    run: Measuring, name: str, shown: list[Sample], asked: list[Sample], lookup: Lookup
) -> _Measured:
    """Return the loss over the samples shown, and captions for those asked."""
    return _Measured(
        loss=run.attempt(f"{name} loss", lambda: run.loss(shown, lookup)),
        captions=run.attempt(f"{name} captions", lambda: run.answers(asked, lookup)),
    )


def _pictures(shown: list[Sample], lookup: Lookup) -> tuple[list[Sample], list[list[str]]]:
    """Return the first sample of each distinct input, and the references of all samples with that input."""
    first: dict[bytes, Sample] = {}
    references: dict[bytes, dict[str, None]] = {}
    for key, sample in zip(input_digests(shown, lookup), shown, strict=True):
        first.setdefault(key, sample)
        references.setdefault(key, {}).update(dict.fromkeys(sample.references))
    return list(first.values()), [list(texts) for texts in references.values()]


def _rows(
    asked: list[Sample],
    references: list[list[str]],
    measured: dict[str, _Measured],
    nearest: list[Neighbour] | None,
) -> list[CaptionRow]:
    rows = []
    for n, (sample, true) in enumerate(zip(asked, references, strict=True)):
        said = {name: one.captions[n] if one.captions else None for name, one in measured.items()}
        neighbour = nearest[n] if nearest else None
        rows.append(
            CaptionRow(
                picture=subject_name(sample),
                references=true,
                generated=said["heldout"],
                exact=same_caption(said["heldout"] or "", true),
                zero_gates=said["zero_gates"],
                shuffled=said["shuffled"],
                nearest=said["nearest"],
                nearest_exact=same_caption(said["nearest"] or "", true),
                nearest_picture=neighbour and neighbour.picture,
                nearest_similarity=neighbour and neighbour.similarity,
                modality=subject(sample)[0].modality,
                nearest_modality=neighbour.modality if neighbour else "image",
            )
        )
    return rows
