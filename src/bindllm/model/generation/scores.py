"""Log-probabilities of answers: how likely a model finds a text as its answer."""

from __future__ import annotations

from collections.abc import Sequence
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
        prompt: as for `BindLLM.generate`.
        answer: a text for one prompt, or a list of texts: of one prompt, or one for each of several prompts.
        media: as for `BindLLM.generate`.
        cache: as for `BindLLM.generate`.
        datastore: as for `BindLLM.generate`.
        recent: as for `BindLLM.encode`.

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
        conversations: the same prompts.
        answers: one for each.
        tokenizer: of the decoder.
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
