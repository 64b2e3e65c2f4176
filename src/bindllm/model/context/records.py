"""From the records of a datastore to the inputs of `ContextNetwork`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.conversation import control_tokens, end_tokens
from bindllm.conversation.guard import guard
from bindllm.embeddings.datastore import READS_NO_RECORDS, Datastore
from bindllm.errors import InputError
from bindllm.model.context import NO_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bindllm.model.bindllm import BindLLM

CONTEXT_INPUTS = ("context_embeddings", "context_scores", "context_ids")
"""Arguments of `BindLLM.forward` for the tensors of `RecordReader.read`."""


@dataclass(frozen=True)
class RecordReader:
    """Makes tensors of records."""

    datastore: Datastore
    tokenizer: PreTrainedTokenizerBase
    text_length: int

    def read(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings [..., K, E], scores [..., K] and token ids of the texts [..., K, S] of records.

        Args:
            ids: indices of records, [..., K]; -1 is not a record.
            scores: of `Found`, [..., K].
        """
        # A row of a classifier, for example, is not a unit vector.
        embeddings = F.normalize(self.datastore.embeddings[ids.clamp(min=0)], dim=-1)
        embeddings = embeddings * (ids >= 0).unsqueeze(-1)
        texts = [self.tokens(n) if n >= 0 else [] for n in ids.flatten().tolist()]
        width = max([1, *map(len, texts)])
        padded = [text + [NO_TOKEN] * (width - len(text)) for text in texts]
        tokens = torch.tensor(padded, dtype=torch.long).reshape(*ids.shape, width)
        return embeddings, scores, tokens

    def tokens(self, row: int) -> list[int]:
        """Return the token ids of a record's text and of the end of an answer, cut to the greatest length."""
        # A model that copies a text has to copy its end too.
        return [*self._encode(row), end_tokens(self.tokenizer)[0]][: self.text_length]

    def num_cut(self) -> int:
        """Return the number of records whose text is longer than is read."""
        return sum(len(self._encode(row)) > self.text_length for row in range(len(self.datastore)))

    def _encode(self, row: int) -> list[int]:
        # A datastore may be untrusted: as in a prompt, its texts must not spell the end of an answer.
        text = guard(self.datastore.records[row].text, control_tokens(self.tokenizer), escape=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def find_records(
    model: BindLLM, query: Tensor | None, datastore: Datastore | bool | None
) -> dict[str, Tensor]:
    """Return the records of a request's media as arguments of `BindLLM.generate_from`; empty without any.

    Args:
        query: unit embedding of each media group, [B, M, E]; None: no media.
        datastore: None: the model's own, False: none.

    Raises:
        InputError: a datastore for a model that reads no records, or something else than a datastore.
        StoreError: a datastore of another encoder.
    """
    store = model.datastore if datastore is None else datastore or None
    if store is None:
        return {}
    if model.context is None:
        raise InputError(READS_NO_RECORDS)
    if not isinstance(store, Datastore):
        raise InputError(
            f"datastore is {store!r}, expected a Datastore, False or None; Datastore.open(FOLDER) reads one"
        )
    # `from_pretrained` has not seen a datastore of this call.
    store.check_encoders(model.encoders)
    count = model.context.num_records
    if query is None or not count:
        return {}
    found = store.search(query.flatten(0, 1), count)
    reader = RecordReader(store, model.tokenizer, model.context.config.text_length)
    ids, scores = (x.unflatten(0, query.shape[:2]) for x in (found.ids, found.scores))
    return dict(zip(CONTEXT_INPUTS, reader.read(ids, scores), strict=True))


def read_records(
    model: BindLLM,
    query: Tensor,
    context_embeddings: Tensor | None = None,
    context_scores: Tensor | None = None,
    context_ids: Tensor | None = None,
) -> Tensor | None:
    """Return the context tokens of each media group, [B, M, C, D], or None without records.

    Args:
        query: unit embedding of each media group, [B, M, E].
        context_embeddings: embeddings of its records, nearest first, [B, M, K, E]; zeros are no records.
        context_scores: how near they are, see `Found`, [B, M, K].
        context_ids: token ids of their texts, [B, M, K, S], `NO_TOKEN` for padding.

    Raises:
        InputError: records for a model that reads none.
    """
    if model.context is not None:
        embed = partial(F.embedding, weight=model.injection.words(model.decoder))
        return model.context.read(query, context_embeddings, context_scores, context_ids, embed)
    if context_embeddings is not None:
        raise InputError(READS_NO_RECORDS)
    return None
