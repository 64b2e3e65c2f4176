"""Random choices of a training step: the number of records, groups without them or with foreign ones, copied answers.

A model that knows the answers to its training images does not need records, so it would learn to ignore them.
Therefore some media groups get a record whose text is the answer. In half of these, the words of the answer are random,
so the model finds them only in the record. These are like the made-up names of Link-Context Learning (arXiv 2308.07891,
section 3.2).

A model that always needs its records would follow any. Therefore some groups get the records of another row, with the
scores of random records: it learns to trust a record by its score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bindllm.conversation import control_tokens
from bindllm.model.bind_network import draw_alone
from bindllm.model.context import NO_TOKEN, ContextConfig

_IGNORED = -100
_FOREIGN = 0.25
"""Share of the media groups with the records of another row."""

_RANDOM_WORDS = 0.5
"""Share of the copied answers whose words are replaced."""


def draw_records(
    batch: Mapping[str, Tensor], config: ContextConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Return a training batch with the records that its step reads; a batch without records is not changed.

    Args:
        batch: a batch of `bindllm.data.collate.collate`.
    """
    if "context_ids" not in batch:
        return dict(batch)
    # The nearest records; at inference, any number may be read.
    count = int(torch.randint(1, batch["context_ids"].shape[2] + 1, (), device="cpu"))
    names = ("context_embeddings", "context_scores", "context_ids")
    embeddings, scores, texts = (batch[name][:, :, :count] for name in names)
    # Embeddings of zeros are not records. So the model also learns to answer without any.
    absent = draw_alone(embeddings.shape[:2]).to(embeddings.device)
    embeddings = embeddings.masked_fill(absent[..., None, None], 0)
    # A single row has no other one, and own records must not look foreign.
    foreign = (torch.rand(absent.shape, device="cpu") < _FOREIGN) & ~absent.cpu() & (len(absent) > 1)
    embeddings, scores, texts = _exchange(foreign, embeddings, scores, texts)
    found = {**batch, **dict(zip(names, (embeddings, scores, texts), strict=True))}
    copies = (torch.rand(absent.shape, device="cpu") < config.copied) & ~foreign
    return _copy_answers(found, copies & embeddings.any(-1)[:, :, 0].cpu(), config.text_length, tokenizer)


def _exchange(chosen: Tensor, embeddings: Tensor, scores: Tensor, texts: Tensor) -> Iterator[Tensor]:
    """Give each chosen media group, bool [B, M], the records of the row before, as if they were drawn at random."""
    # A score counts standard deviations above the mean of the datastore, so that of a random record is normal.
    others = embeddings.roll(1, 0), torch.randn(scores.shape, device="cpu").to(scores), texts.roll(1, 0)
    for own, other in zip((embeddings, scores, texts), others, strict=True):
        yield torch.where(chosen.to(own.device).view(*chosen.shape, *[1] * (own.dim() - 2)), other, own)


def _copy_answers(
    batch: dict[str, Tensor], chosen: Tensor, text_length: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Make the answer about each chosen media group, bool [B, M], the text of its first record."""
    texts = batch["context_ids"]
    texts = F.pad(texts, (0, max(0, text_length - texts.shape[-1])), value=NO_TOKEN)
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    control = {*control_tokens(tokenizer).values()}
    for row, group in chosen.nonzero().tolist():
        is_answer = (labels[row] != _IGNORED) & (batch["media_index"][row] == group)
        said = labels[row][is_answer][: texts.shape[-1]]
        if not len(said):
            continue
        # The first answer of several turns: a record with all of them would teach answers that do not end.
        ends = [position for position, word in enumerate(said.tolist()) if word in control]
        said = said[: ends[0] + 1] if ends else said
        texts[row, group, 0] = NO_TOKEN
        texts[row, group, 0, : len(said)] = said
        if torch.rand((), device="cpu") >= _RANDOM_WORDS:
            continue
        for word in {*said.tolist()} - control:
            other = int(torch.randint(len(tokenizer), (), device="cpu"))
            if other in control:
                continue
            # Also in the other records of the group: shared words stay shared.
            texts[row, group][texts[row, group] == word] = other
            for values in (ids[row], labels[row]):
                values[is_answer & (values == word)] = other
    return {**batch, "context_ids": texts, "input_ids": ids, "labels": labels}
