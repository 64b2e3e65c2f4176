"""Log-probabilities of answers: how likely a model finds a text as its answer, and which answers it doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bindllm.cache.visual_cache import CacheChoice
from bindllm.conversation import Conversation, Message, render
from bindllm.embeddings.datastore import Datastore
from bindllm.embeddings.embedder import RecentEmbeddings
from bindllm.errors import InputError
from bindllm.model.context.records import find_records
from bindllm.model.generation import Prompt, as_conversations, is_one, part_modalities

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM

IGNORED = -100

UNSURE = "I do not recognize this."
"""Replaces an answer about media with a token below ``min_probability``."""


@torch.no_grad()
def log_probability(
    model: BindLLM,
    prompt: Prompt | Sequence[Prompt],
    answer: str | Sequence[str],
    media: Sequence[Any] | None = None,
    *,
    cache: CacheChoice = None,
    datastore: Datastore | bool | None = None,
    recent: RecentEmbeddings | None = None,
) -> float | list[float]:
    """Return how likely an answer is: the sum of the log-probabilities of its tokens and of its end, in nats.

    Args:
        model: the model.
        prompt: one prompt, as for `BindLLM.generate`.
        answer: a text for one prompt, or a list of texts: of one prompt, or one for each of several prompts.
        media: its media, as for `BindLLM.generate`.
        cache: the visual cache, as for `BindLLM.generate`.
        datastore: the records, as for `BindLLM.generate`.
        recent: embeddings kept in memory, as for `BindLLM.encode`.

    Raises:
        InputError: another number of answers than prompts.

    Examples:
        >>> model.log_probability("What is this?", ["a cat", "a dog"], [Media.image("cat.png")])  # doctest: +SKIP
        [-1.2, -4.7]
    """
    answers = [answer] if isinstance(answer, str) else list(answer)
    if is_one(prompt):
        prompt, media = [prompt] * len(answers), None if media is None else [media] * len(answers)
    if len(prompt) != len(answers):
        raise InputError(f"{len(prompt)} prompts but {len(answers)} answers: give one answer for each prompt")
    *batch, embeddings, tokens = model.prepare(prompt, media, cache, recent=recent)
    conversations = as_conversations(prompt, media, modalities=part_modalities(model.encoders))
    inputs = append_answers(batch, conversations, answers, model.tokenizer)
    inputs |= {"embeddings": embeddings, "tokens": tokens, **find_records(model, embeddings, datastore)}
    output = model(**{name: x if x is None else x.to(model.device) for name, x in inputs.items()})
    found = log_likelihoods(output.logits, output.targets, output.rows, len(answers)).tolist()
    return found[0] if isinstance(answer, str) else found


def append_answers(
    batch: Sequence[Tensor],
    conversations: Sequence[Conversation],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """Return the inputs of `BindLLM.forward` for prompts with their answers, with labels of the answers.

    Args:
        batch: ids, mask and media index of the prompts, padded on the left, each [B, T].
    """
    own = []
    for conversation, answer in zip(conversations, answers, strict=True):
        whole = replace(conversation, messages=(*conversation.messages, Message("assistant", answer)))
        # The tokens before an answer are those of its prompt, so only its own are appended.
        rendered = render(whole, tokenizer, control_text="escape")
        first, stop = rendered.answers[-1]
        own.append(torch.tensor(rendered.input_ids[first:stop]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask, index = batch
    return {
        "input_ids": torch.cat(
            [ids, pad(own, batch_first=True, padding_value=tokenizer.pad_token_id)], dim=1
        ),
        "attention_mask": torch.cat(
            [mask, pad([torch.ones_like(row) for row in own], batch_first=True)], dim=1
        ),
        # An answer listens to the media of its question.
        "media_index": torch.cat([index, index[:, -1:].expand(-1, max(map(len, own)))], dim=1),
        "labels": torch.cat(
            [torch.full_like(ids, IGNORED), pad(own, batch_first=True, padding_value=IGNORED)], dim=1
        ),
    }


def log_likelihoods(logits: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the log-likelihood of the supervised tokens of each of ``count`` rows, [B], from logits [N, V]."""
    own = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return torch.zeros(count, device=own.device).index_add_(0, rows, own).cpu()


@torch.no_grad()
def replace_unsure(
    model: BindLLM,
    batch: Sequence[Tensor | None],
    records: Mapping[str, Tensor],
    answers: Tensor,
    texts: Sequence[str],
    least: float,
    stop: str | Sequence[str] | None = None,
) -> list[str]:
    """Return answers, with `UNSURE` in place of those about media with a token that is less likely than ``least``.

    Without temperature, penalties or other changes of the distribution. Text-only answers stay.

    Args:
        batch: B prompts, as `BindLLM.prepare` returns them.
        records: further inputs of `BindLLM.forward`.
        answers: ids of the answers, [N, A]; N is a multiple of B.
        least: smallest probability of a token that is not doubtful, 0 to 1.
    """
    # An answer listens to the media of its last token: after shots with media, a question may have none.
    about_media = batch[2][:, -1].repeat_interleave(len(answers) // len(batch[2])) >= 0
    if not about_media.any():
        return list(texts)
    names = ("input_ids", "attention_mask", "media_index", "embeddings", "tokens")
    answers, inputs = answers.to(model.device), dict(zip(names, batch, strict=True)) | records
    inputs = {
        name: value.to(model.device).repeat_interleave(len(answers) // len(value), 0)
        for name, value in inputs.items()
        if value is not None
    }
    ended = torch.isin(answers, torch.tensor(model.settings.eos_token_id, device=model.device))
    # The end of an answer counts, the padding after it does not.
    own = ended.cumsum(1) - ended.long() == 0  # [N, A]
    # After a stop string all is padding, which may look like an end.
    stops = [stop] if isinstance(stop, str) else stop or ()
    raw = [
        model.tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(answers, own, strict=True)
    ]
    stopped = torch.tensor([any(one in text for one in stops) for text in raw], device=model.device)[:, None]
    own &= ~(stopped & (ended | (answers == model.tokenizer.pad_token_id)))
    index = inputs["media_index"]
    added = {
        "input_ids": answers,
        "attention_mask": own.long(),
        "media_index": index[:, -1:].expand_as(answers),
    }
    inputs |= {name: torch.cat([inputs[name], value], 1) for name, value in added.items()}
    inputs["labels"] = torch.cat([torch.full_like(index, IGNORED), answers.masked_fill(~own, IGNORED)], 1)
    output = model(**inputs)
    found = output.logits.float().softmax(-1).gather(1, output.targets[:, None])[:, 0]
    doubtful = {*output.rows[found < least].tolist()}
    pairs = zip(texts, about_media.tolist(), strict=True)
    return [UNSURE if about and n in doubtful else text for n, (text, about) in enumerate(pairs)]
