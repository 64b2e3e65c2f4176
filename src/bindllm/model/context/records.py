"""From the records of a datastore to the inputs of `ContextNetwork`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bindllm.model.context import NO_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bindllm.embeddings.datastore import Datastore


@dataclass(frozen=True)
class RecordReader:
    """Makes tensors of records.

    Args:
        datastore: the records.
        tokenizer: of the decoder.
        text_length: tokens of a text that are read (`ContextConfig.text_length`).
    """

    datastore: Datastore
    tokenizer: PreTrainedTokenizerBase
    text_length: int

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of records, [..., K, E], and the token ids of their texts, [..., K, S].

        Args:
            ids: indices of records, [..., K]; -1 is not a record.
        """
        embeddings = self.datastore.embeddings[ids.clamp(min=0)] * (ids >= 0).unsqueeze(-1)
        texts = [self.tokens(n) if n >= 0 else [] for n in ids.flatten().tolist()]
        width = max([1, *map(len, texts)])
        padded = [text + [NO_TOKEN] * (width - len(text)) for text in texts]
        tokens = torch.tensor(padded, dtype=torch.long).reshape(*ids.shape, width)
        return embeddings, tokens

    def tokens(self, row: int) -> list[int]:
        """Return the token ids of a record's text, cut to the greatest length."""
        return self._encode(row)[: self.text_length]

    def num_cut(self) -> int:
        """Return the number of records whose text is longer than is read."""
        return sum(len(self._encode(row)) > self.text_length for row in range(len(self.datastore)))

    def _encode(self, row: int) -> list[int]:
        return self.tokenizer(self.datastore.records[row].text, add_special_tokens=False)["input_ids"]
