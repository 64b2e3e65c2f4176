"""Running a model over held-out samples: losses and greedy answers in batches, and what went wrong."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from bindllm.data.batches import sorted_batches
from bindllm.data.collate import Lookup, answer_batch, prompt_batch
from bindllm.data.rows import Sample
from bindllm.errors import BindLLMError, InputError
from bindllm.model.bindllm import BindLLM

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 1024
"""Samples whose embeddings are read at a time, so that memory does not grow with their number."""


@dataclass
class Measuring:
    """A model, how to run it, and what went wrong so far.

    Args:
        model: in eval mode (`evaluating`).
        batch_size: samples at a time.
        max_new_tokens: longest answer.
        advance: is told how many samples are done.

    Attributes:
        problems: what could not be measured, and why.
    """

    model: BindLLM
    batch_size: int
    max_new_tokens: int
    advance: Callable[[int], None] = lambda done: None
    problems: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """Return what the work gives, or None with a problem noted: finished measurements outlive a failed one."""
        try:
            return work()
        except Exception as error:
            self.problems[name] = f"{type(error).__name__}: {error}"
            logger.warning("no %s: %s", name, error, exc_info=not isinstance(error, BindLLMError))
            return None

    def loss(self, samples: Sequence[Sample], lookup: Lookup) -> float:
        """Return the mean over all supervised tokens, in nats."""
        total, num_tokens = 0.0, 0
        for rows in sorted_batches([len(sample.input_ids) for sample in samples], batch_size=self.batch_size):
            batch = answer_batch([samples[n] for n in rows], lookup, pad_id=self.model.tokenizer.pad_token_id)
            output = self.model(**{key: value.to(self.model.device) for key, value in batch.items()})
            total += nn.functional.cross_entropy(
                output.logits.float(), output.targets, reduction="sum"
            ).item()
            num_tokens += output.targets.numel()
            self.advance(len(rows))
        if not math.isfinite(total):
            raise InputError("the loss is not finite; the weights or the embeddings hold NaN or infinity")
        return total / num_tokens

    def answers(self, samples: Sequence[Sample], lookup: Lookup) -> list[str]:
        """Return a greedy answer to the last question of each sample; equal inputs are run once."""
        inputs = input_digests(samples, lookup)
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


@contextmanager
def evaluating(model: BindLLM) -> Iterator[None]:
    """Put the model in eval mode, without gradients, and its mode back afterwards."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def input_digests(samples: Sequence[Sample], lookup: Lookup) -> list[bytes]:
    """Return a digest of what the model is given to answer each sample: the prompt, its routing, the embeddings."""
    digests = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        vectors = iter(lookup([group for sample in chunk for group in sample.media]))
        for sample in chunk:
            digest = hashlib.sha256(sample.input_ids[: sample.prompt_length].tobytes())
            digest.update(sample.media_index[: sample.prompt_length].tobytes())
            for _ in sample.media:
                digest.update(next(vectors).numpy().tobytes())
            digests.append(digest.digest())
    return digests


def loss_numbers(loss: float | None) -> dict[str, float | None]:
    """Return a loss with its perplexity, which is None where it is above the largest float."""
    known = loss is not None and loss < math.log(sys.float_info.max)
    return {"loss": loss, "perplexity": math.exp(loss) if known else None}
