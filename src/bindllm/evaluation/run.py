"""How well a model captions held-out pictures, beside the baselines.

- ``heldout``: the model as it is.
- ``zero_gates``: the same model with nothing added anywhere, as if its gates were zero.
- ``shuffled``: the same model, every picture exchanged for another held-out one. If this is no worse than
  ``heldout``, the model does not use what it sees.
- ``nearest``: no model, the caption of the nearest training picture. It is copied as it stands, so it has no loss.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from torch import nn

from bindllm.data.batches import sorted_batches
from bindllm.data.collate import Lookup, collate, prompt_batch
from bindllm.data.tokenise import Sample
from bindllm.errors import BindLLMError, InputError
from bindllm.evaluation.baselines import Neighbour, blind, exchange, neighbours, subject
from bindllm.evaluation.metrics import METRICS, caption_metrics, same_caption
from bindllm.model.bindllm import BindLLM

logger = logging.getLogger(__name__)

VARIANTS = ("heldout", "zero_gates", "shuffled", "nearest")

T = TypeVar("T")


@dataclass
class CaptionRow:
    """One held-out picture and what was said of it; None where that could not be measured.

    Attributes:
        picture: path or short name of the picture that the answer is about.
        references: its true captions.
        generated: the model's caption, greedily decoded.
        exact: whether that has exactly the words of a reference.
        zero_gates: caption of the same model, blind.
        shuffled: caption of the same model, shown another picture.
        nearest: caption of the nearest training picture.
        nearest_exact: whether that has exactly the words of a reference.
        nearest_picture: path or short name of that picture.
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
    with _evaluating(model), Progress(disable=not progress) as bar:
        task = bar.add_task("evaluating", total=3 * len(shown) + 2 * len(asked))
        run = _Run(model, batch_size, max_new_tokens, lambda done: bar.advance(task, done))
        nearest = run.attempt("nearest", lambda: neighbours(asked, train_samples, lookup))
        exchanged = run.attempt("shuffled", lambda: exchange(shown, lookup))
        measured = {
            "heldout": run.measure("heldout", shown, asked, lookup),
            "zero_gates": run.measure("zero_gates", blind(shown), blind(asked), lookup),
            "shuffled": run.measure("shuffled", shown, asked, exchanged) if exchanged else _Measured(),
            "nearest": _Measured(captions=nearest and [neighbour.caption for neighbour in nearest]),
        }
    metrics = {name: run.metrics(name, one, references) for name, one in measured.items()}
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
    with _evaluating(model):
        run = _Run(model, batch_size, max_new_tokens, lambda done: None)
        numbers = run.metrics("captions", run.measure("held-out", list(samples), asked, lookup), references)
    if run.problems:
        raise InputError("; ".join(f"{name}: {why}" for name, why in run.problems.items()))
    return numbers


@dataclass
class _Measured:
    """What a model gave: its loss, and a caption for each picture; None where it failed."""

    loss: float | None = None
    captions: list[str] | None = None


@dataclass
class _Run:
    """A model, how to run it, and what went wrong so far."""

    model: BindLLM
    batch_size: int
    max_new_tokens: int
    advance: Callable[[int], None]
    problems: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """Return what the work gives, or None with a problem noted: finished measurements outlive a failed one."""
        try:
            return work()
        except Exception as error:
            self.problems[name] = f"{type(error).__name__}: {error}"
            logger.warning("no %s: %s", name, error, exc_info=not isinstance(error, BindLLMError))
            return None

    def measure(self, name: str, shown: list[Sample], asked: list[Sample], lookup: Lookup) -> _Measured:
        """Return the loss over the samples shown, and captions for those asked."""
        return _Measured(
            loss=self.attempt(f"{name} loss", lambda: self.loss(shown, lookup)),
            captions=self.attempt(f"{name} captions", lambda: self.captions(asked, lookup)),
        )

    def loss(self, samples: Sequence[Sample], lookup: Lookup) -> float:
        """Return the mean over all supervised tokens, in nats."""
        total, num_tokens = 0.0, 0
        for rows in sorted_batches([len(sample.input_ids) for sample in samples], batch_size=self.batch_size):
            batch = collate([samples[n] for n in rows], lookup, pad_id=self.model.tokenizer.pad_token_id)
            output = self.model(**{key: value.to(self.model.device) for key, value in batch.items()})
            total += nn.functional.cross_entropy(
                output.logits.float(), output.targets, reduction="sum"
            ).item()
            num_tokens += output.targets.numel()
            self.advance(len(rows))
        if not math.isfinite(total):
            raise InputError("the loss is not finite; the weights or the embeddings hold NaN or infinity")
        return total / num_tokens

    def captions(self, samples: Sequence[Sample], lookup: Lookup) -> list[str]:
        """Return a greedy caption for each sample; equal inputs are run once."""
        inputs = _inputs(samples, lookup)
        distinct = list(dict(zip(inputs, samples, strict=True)).items())
        tokenizer, said = self.model.tokenizer, {}
        for rows in sorted_batches(
            [sample.prompt_length for _, sample in distinct], batch_size=self.batch_size
        ):
            batch = prompt_batch([distinct[n][1] for n in rows], lookup, pad_id=tokenizer.pad_token_id)
            ids = self.model.generate_from(
                **batch, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
            )
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            said.update((distinct[n][0], text.strip()) for n, text in zip(rows, texts, strict=True))
            self.advance(len(rows))
        return [said[key] for key in inputs]

    def metrics(self, name: str, measured: _Measured, references: list[list[str]]) -> dict[str, float | None]:
        """Return the numbers of one variant; perplexity is None where it is above the largest float."""
        numbers: dict[str, float | None] = {"loss": measured.loss, **dict.fromkeys(("perplexity", *METRICS))}
        if measured.loss is not None and measured.loss < math.log(sys.float_info.max):
            numbers["perplexity"] = math.exp(measured.loss)
        if measured.captions is not None:
            captions = measured.captions
            numbers.update(
                self.attempt(f"{name} metrics", lambda: caption_metrics(captions, references)) or {}
            )
        return numbers


@contextmanager
def _evaluating(model: BindLLM) -> Iterator[None]:
    """Put the model in eval mode, without gradients, and its mode back afterwards."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def _inputs(samples: Sequence[Sample], lookup: Lookup) -> list[bytes]:
    """Return a digest of what the model is given to answer each sample: the prompt, its routing, the embeddings."""
    vectors = iter(lookup([group for sample in samples for group in sample.media]))
    digests = []
    for sample in samples:
        digest = hashlib.sha256(sample.input_ids[: sample.prompt_length].tobytes())
        digest.update(sample.media_index[: sample.prompt_length].tobytes())
        for _ in sample.media:
            digest.update(next(vectors).numpy().tobytes())
        digests.append(digest.digest())
    return digests


def _pictures(shown: list[Sample], lookup: Lookup) -> tuple[list[Sample], list[list[str]]]:
    """Return the first sample of each distinct input, and the references of all samples with that input."""
    first: dict[bytes, Sample] = {}
    references: dict[bytes, dict[str, None]] = {}
    for key, sample in zip(_inputs(shown, lookup), shown, strict=True):
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
                picture=subject(sample)[0].name,
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
