"""Answers of a model to held-out items, batch by batch: texts, or the most likely option of a multiple choice.

Prompts of similar length share a batch, and equal inputs are answered once. Batches depend only on the items and the
batch size, so an evaluation that skips batches which are done gives the answers of one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from bindllm.conversation import Message
from bindllm.data.collate import Lookup, answer_batch, prompt_batch, records_of, tokens_of
from bindllm.data.formats import answer_of
from bindllm.data.rows import Sample, with_conversation
from bindllm.model.bindllm import BindLLM
from bindllm.model.generation.scores import log_likelihoods
from bindllm.parallel import chunks


class Choice(NamedTuple):
    """The chosen option of a multiple choice.

    Args:
        text: the answer that chooses it.
        probability: probability of this answer among those of all options, 0..1.
    """

    text: str
    probability: float


class Sampling(NamedTuple):
    """Several sampled answers to each question, of which one is kept (self-consistency, arXiv 2203.11171).

    Args:
        choose: returns the position of the kept one among the answers to an item.
    """

    count: int
    temperature: float
    seed: int
    choose: Callable[[int, list[str]], int]


Answers = Iterator[tuple[list[int], list[str]]]
"""Positions of items, and their answers, for each batch."""
Choices = Iterator[tuple[list[int], list[Choice]]]
Answer = TypeVar("Answer", str, Choice)

_BATCH_TOKENS = 4096
"""Tokens of the prompts of a batch."""
_CHUNK = 1024
"""Samples whose embeddings are read at a time, so that memory does not grow with their number."""


def answer_batches(
    model: BindLLM,
    items: Sequence[Sample],
    lookup: Lookup,
    *,
    batch_size: int | None,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    is_done: Callable[[Sequence[int]], bool] = lambda positions: False,
) -> Answers:
    """Yield positions and answers to the last question of each item, batch by batch.

    Args:
        batch_size: different inputs answered at the same time; None: as many as `default_batch_size` says.
        sampling: how answers are sampled; None: they are greedy.
        is_done: whether all items at these positions have an answer already; their batch is skipped.
    """
    pad_id = model.tokenizer.pad_token_id
    answers = 1 if sampling is None else sampling.count
    size = batch_size or max(1, default_batch_size(items) // answers)
    for rows, positions in _distinct_batches(items, lookup, size, is_done):
        # Padded on the left, so that generation starts at one position.
        batch = prompt_batch([items[n] for n in rows], lookup, pad_id=pad_id)
        options = {} if sampling is None else _sampling_options(sampling, rows)
        texts = model.decode(model.generate_from(**batch, max_new_tokens=max_new_tokens, **options))
        if sampling is not None:
            groups = [texts[at : at + sampling.count] for at in range(0, len(texts), sampling.count)]
            texts = [group[sampling.choose(n, group)] for n, group in zip(rows, groups, strict=True)]
        yield _to_all(positions, texts)


def _sampling_options(sampling: Sampling, rows: Sequence[int]) -> dict[str, object]:
    # Seeded by the batch, so that an evaluation that skips finished batches samples the same answers.
    torch.manual_seed(hash((sampling.seed, *rows)) % 2**63)
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "num_return_sequences": sampling.count,
    }


@torch.no_grad()
def choice_batches(
    model: BindLLM,
    items: Sequence[Sample],
    lookup: Lookup,
    *,
    batch_size: int | None,
    is_done: Callable[[Sequence[int]], bool] = lambda positions: False,
) -> Choices:
    """Yield positions and, for each multiple choice, the answer with the highest log-likelihood, batch by batch.

    The answers of the options differ only in their letter, "The answer is (B).", so they have the same length and need
    no normalization. The first of equally likely ones counts. Arguments as for `answer_batches`.
    """
    pad_id, size = model.tokenizer.pad_token_id, batch_size or default_batch_size(items)
    for rows, positions in _distinct_batches(items, lookup, size, is_done):
        choices = []
        # One item at a time: its options are the rows of a batch.
        for item in (items[n] for n in rows):
            answers = [answer_of(item.options, n) for n, option in enumerate(item.options) if option]
            candidates = [_answered(item, answer, model) for answer in answers]
            batch = answer_batch(candidates, lookup, pad_id=pad_id)
            output = model(**{name: value.to(model.device) for name, value in batch.items()})
            likely = log_likelihoods(output.logits, output.targets, output.rows, len(candidates))
            best = int(likely.argmax())
            choices.append(Choice(answers[best], float(likely.softmax(0)[best])))
        yield _to_all(positions, choices)


def loaded_settings(model: BindLLM) -> dict[str, Any]:
    """Return the settings of a loaded model that change its answers and are not a part of its fingerprint."""
    tokens = model.bind.num_tokens
    found: dict[str, Any] = {"tokens": "all" if tokens == sys.maxsize else tokens}
    if model.context is not None:
        store = model.datastore
        records = "" if store is None else repr([(record.keys, record.texts) for record in store.records])
        found["records"] = 0 if store is None else model.context.num_records
        found["datastore"] = hashlib.sha256(records.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return found


def input_digests(samples: Sequence[Sample], lookup: Lookup) -> list[bytes]:
    """Return a digest of the model's input for each sample: the prompt, its media index, embeddings and tokens."""
    digests = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        # One embedding for each media group, in the order of the samples.
        vectors = iter(lookup([group for sample in chunk for group in sample.media]))
        for sample in chunk:
            # The embeddings, not the file names: two files with the same content are the same input.
            digest = hashlib.sha256(sample.input_ids[: sample.prompt_length].tobytes())
            digest.update(sample.media_index[: sample.prompt_length].tobytes())
            for _ in sample.media:
                digest.update(next(vectors).numpy().tobytes())
            # Sample by sample: the tokens of a chunk would take gigabytes.
            if sample.media and (records := records_of(lookup, sample.media)) is not None:
                digest.update(b"".join(part.numpy().tobytes() for part in records))
            if sample.media and (tokens := tokens_of(lookup, sample.media)) is not None:
                digest.update(tokens.numpy().tobytes())
            digests.append(digest.digest())
    return digests


def _distinct_batches(
    items: Sequence[Sample], lookup: Lookup, batch_size: int, is_done: Callable[[Sequence[int]], bool]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield the first position of each distinct input of a batch, and all its positions."""
    # Without media every wording of a question is one input, however many images it was asked about.
    same: dict[bytes, list[int]] = {}
    for n, digest in enumerate(input_digests(items, lookup)):
        same.setdefault(digest, []).append(n)
    distinct = list(same.values())
    for rows in plan_batches([items[every[0]] for every in distinct], batch_size):
        positions = [distinct[n] for n in rows]
        if not is_done([n for every in positions for n in every]):
            yield [every[0] for every in positions], positions


def default_batch_size(samples: Sequence[Sample]) -> int:
    """Return how many answers share a batch: 32, or more if prompts are short, since each step reads all weights."""
    longest = max((sample.prompt_length for sample in samples), default=1)
    return max(32, min(256, _BATCH_TOKENS // longest))


def plan_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Return all rows in batches of similar length, or of questions about the same media, whichever reads fewer tokens.

    Tokens that all prompts start with, such as a system text, are computed once for all rows of a batch with equal
    media (`bindllm.model.generation.shared`).
    """
    prompts = [sample.input_ids[: sample.prompt_length] for sample in samples]
    shared = count_shared(prompts)
    numbers: dict[object, int] = {}
    media = [
        numbers.setdefault(sample.media if (sample.media_index >= 0).any() else (), len(numbers))
        for sample in samples
    ]
    by_media = sorted(range(len(samples)), key=lambda n: media[n])
    plans, window = [], batch_size
    # In a window of one batch the same media are together, in one of all rows equal lengths are.
    while not plans or window < 2 * len(samples):
        rows = [n for part in chunks(by_media, window) for n in sorted(part, key=lambda n: len(prompts[n]))]
        batches = list(chunks(rows, batch_size))
        cost = sum(
            len(batch) * max(len(prompts[n]) for n in batch)
            - shared * (len(batch) - len({media[n] for n in batch}))
            for batch in batches
        )
        plans.append((cost, -window, batches))
        window *= 2
    return min(plans)[2]


def count_shared(prompts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all prompts start with."""
    shortest = min(map(len, prompts), default=0)
    same = np.ones(shortest, dtype=bool)
    for prompt in prompts:
        same &= prompt[:shortest] == prompts[0][:shortest]
    return int(same.cumprod().sum())


def _to_all(positions: Sequence[list[int]], answers: Sequence[Answer]) -> tuple[list[int], list[Answer]]:
    """Return all positions of the inputs of a batch, and the answer of each."""
    pairs = [(n, answer) for every, answer in zip(positions, answers, strict=True) for n in every]
    return [n for n, _ in pairs], [answer for _, answer in pairs]


def _answered(item: Sample, answer: str, model: BindLLM) -> Sample:
    conversation = item.conversation
    conversation = replace(conversation, messages=(*conversation.messages[:-1], Message("assistant", answer)))
    made = with_conversation(item, conversation, model.tokenizer)
    # The item may have lost its media: then none of its tokens listens to any.
    return made if item.media else replace(made, media_index=made.media_index * 0 - 1)
