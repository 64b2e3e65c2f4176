"""Retrieved context: the records of a datastore that are nearest to a media become context tokens of its group.

Two forms. `ContextPerceivers`, after CaMML (arXiv 2401.03149, section 3): a perceiver for each stream of a record (its
media, its text), and a context perceiver whose learned latents read all records at once. So the decoder reads ``2 M``
context tokens, whatever the number of records is. docs/context.md lists the differences from the paper. `ContextWords`:
a context token for each token of the records' texts, which is its word embedding.

Letters: `B` batch, `M` media groups, `K` records, `S` tokens of a text, `E` embedding width, `W` perceiver width,
`D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders.tokens import add_positions
from bindllm.errors import InputError
from bindllm.model.bind_network import BindConfig, LatentBlock, start_at_unit_size

NO_TOKEN = -1
"""Token id of padding in the texts of records."""

SCORE_SCALE = 4.0
"""Usual score of a record that fits, so that the term of the score starts at unit scale."""

_MOST = 4096
"""Largest value of a setting: a damaged checkpoint cannot ask for more."""


@dataclass
class ContextConfig:
    """Form of the context tokens, and how much of the records they read."""

    records: int = 3
    """Most records that a step of training reads for a media; each step draws a number from 1 to this. Also the number
    in answers, unless another one is given."""

    latents: int | Literal["all"] = 8
    """Learned latents of each stream. A media gets two times as many context tokens; 64 and 128 in the paper. ``all``:
    no perceivers, but a context token for each token of the records' texts; best with injection kind `cross`."""

    width: int = 256
    """Width of the perceivers, a multiple of 8; 768 in the paper."""

    depth: int = 2
    """Blocks of each perceiver; 2 in the paper."""

    text_length: int = 32
    """Tokens of a record's text that are read; longer texts are cut, and counted."""

    copied: float = 0.0
    """Share of the media in a training step, 0 to 1, whose nearest record gets the answer as its text, in half of them
    with random words in both: so the model learns to copy (`bindllm.model.context.draws`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.copied <= 1:
            raise InputError(f"context.copied is {self.copied}, expected a share from 0 to 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if (field.name == "latents" and value == "all") or field.name == "copied":
                continue
            if type(value) is not int or not 1 <= value <= _MOST:
                raise InputError(
                    f"context.{field.name} is {value}, expected a whole number from 1 to {_MOST}"
                )
        if self.width % 8:
            raise InputError(f"context.width is {self.width}, expected a multiple of 8, the attention heads")


class ContextNetwork(nn.Module):
    """Turns the records of each media group into context tokens.

    Attributes:
        output_size: ``C``, width of the context tokens: ``D``, and behind it what only keys are made of.
    """

    def __init__(self, config: ContextConfig, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.config, self._num_records = config, config.records

    @property
    def num_records(self) -> int:
        """Records that an answer reads for each media; 0: none."""
        return self._num_records

    @num_records.setter
    def num_records(self, count: int) -> None:
        if not isinstance(count, int) or count < 0:
            raise InputError(f"the number of records is {count!r}, expected a whole number of at least 0")
        self._num_records = count

    def read(
        self,
        query: Tensor,
        embeddings: Tensor | None,
        scores: Tensor | None,
        ids: Tensor | None,
        embed: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """Return context tokens as `forward` does; None without records, so that nothing is added.

        Args:
            query: unit embedding of each media group, [B, M, E].
            embeddings: unit embeddings of its records, nearest first, [B, M, K, E]; rows of zeros are no records.
            scores: how near they are, see `bindllm.embeddings.datastore.Found`, [B, M, K].
            ids: token ids of their texts, [B, M, K, S], `NO_TOKEN` for padding.
        """
        if embeddings is None:
            if not (self.training and torch.is_grad_enabled()):
                return None
            # An absent record, so that every trained tensor has a gradient: DDP waits for it.
            embeddings, scores = query.new_zeros(*query.shape[:2], 1, query.shape[2]), query[..., :1]
            ids = torch.full((*query.shape[:2], 1, 1), NO_TOKEN, device=query.device)
        embeddings, scores, ids = (x.to(query.device) for x in (embeddings, scores, ids))
        return self(embeddings, scores, ids != NO_TOKEN, embed(ids.clamp(min=0)))

    def forward(self, embeddings: Tensor, scores: Tensor, present: Tensor, words: Tensor) -> Tensor:
        """Return context tokens, [B, M, C, D]; rows of zeros are no tokens.

        Args:
            embeddings: unit embeddings of the records of each media group, [B, M, K, E]; zeros are no records.
            scores: how near they are, [B, M, K].
            present: which tokens of a record's text are not padding, bool [B, M, K, S].
            words: the decoder's word embeddings of the texts, [B, M, K, S, D].
        """
        raise NotImplementedError


class ContextPerceivers(ContextNetwork):
    """Context tokens from learned latents that read the media and the texts of all records.

    Args:
        embedding_size: ``E``, width of the joint space.
        width: ``D``, the decoder's hidden size.

    Examples:
        >>> network = ContextPerceivers(16, 64, ContextConfig(latents=4, width=32)).eval()
        >>> embeddings, scores, words = torch.randn(1, 1, 3, 16), torch.ones(1, 1, 3), torch.randn(1, 1, 3, 5, 64)
        >>> network(embeddings, scores, torch.ones(1, 1, 3, 5, dtype=torch.bool), words).shape
        torch.Size([1, 1, 8, 64])
    """

    def __init__(self, embedding_size: int, width: int, config: ContextConfig) -> None:
        super().__init__(config, width)
        size = config.width
        self.media_projection = nn.Linear(embedding_size, size)
        self.text_projection = nn.Linear(width, size)
        # Added to both streams of a record, times its score.
        self.score = nn.Parameter(torch.randn(size) / SCORE_SCALE)
        self.norm = nn.RMSNorm(size, eps=1e-6)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(LatentBlock(size, size, BindConfig()) for _ in range(config.depth))

        self.media_perceiver, self.text_perceiver, self.context_perceiver = blocks(), blocks(), blocks()
        self.latents = nn.Parameter(torch.randn(2, config.latents, size))
        self.output_norm = nn.RMSNorm(size, eps=1e-6)
        self.media_output, self.text_output = nn.Linear(size, width), nn.Linear(size, width)
        # Embeddings are unit vectors, all other inputs have unit scale.
        start_at_unit_size(self, self.media_projection)

    def forward(self, embeddings: Tensor, scores: Tensor, present: Tensor, words: Tensor) -> Tensor:
        """Return context tokens, [B, M, 2 * latents, D]; rows of zeros for a stream without content."""
        num_groups, num_records, dtype = *embeddings.shape[1:3], self.latents.dtype
        # How to read this: G groups of K records; each record is two short sequences in the width of the perceivers.
        embeddings, scores, present, words = (x.flatten(0, 1) for x in (embeddings, scores, present, words))
        has_media = embeddings.any(-1, keepdim=True)  # [G, K, 1]
        present = present & has_media
        shift = (scores.to(dtype)[..., None] * self.score).unsqueeze(2)  # [G, K, 1, W]
        media = self.media_projection(embeddings.to(dtype)).unsqueeze(2)
        # Word embeddings of decoders differ in scale by far.
        text = self.text_projection(F.rms_norm(words, words.shape[-1:], eps=1e-6).to(dtype))
        text = text + add_positions(torch.zeros(*text.shape[-2:])).to(text)
        media, text = (self.norm(x + shift).flatten(0, 1) for x in (media, text))  # [G * K, 1 or S, W]
        # Both perceivers read the whole record, the published cross-attention and self-attention in one softmax.
        record = torch.cat([media, text], 1)
        counts = torch.cat([has_media, present], 2).flatten(0, 1)
        for block, other in zip(self.media_perceiver, self.text_perceiver, strict=True):
            media, text = (part(z, record, _masked(counts)) for part, z in ((block, media), (other, text)))
        # The streams share the context perceiver and its weights, but not their latents.
        found = []
        for latents, output, tokens, counts in (
            (self.latents[0], self.media_output, media, has_media),
            (self.latents[1], self.text_output, text, present),
        ):
            joined = self.norm(tokens).unflatten(0, (-1, num_records)).flatten(1, 2)  # [G, K * n, W]
            z, counts = latents.unsqueeze(0), counts.flatten(1)
            for block in self.context_perceiver:
                z = block(z, joined, _masked(counts))
            # Zeros are no tokens: the injection skips them.
            found.append(torch.where(counts.any(1)[:, None, None], output(self.output_norm(z)), 0))
        return torch.cat(found, 1).unflatten(0, (-1, num_groups))


class ContextWords(ContextNetwork):
    """A context token for each token of the records' texts.

    It is the word embedding, to which the score of the record and the position in its text add a little. With kind
    ``cross`` a text token that attends to one makes its word more likely, so the model can copy words of the records
    (as the pointer of See et al., arXiv 1704.04368). The media of the records are not read.

    Args:
        width: ``D``, the decoder's hidden size.
        before: whether the word before follows each token, for keys only, see `CrossReader`.

    Examples:
        >>> network = ContextWords(64, ContextConfig(latents="all")).eval()
        >>> embeddings, scores, words = torch.randn(1, 1, 3, 16), torch.ones(1, 1, 3), torch.randn(1, 1, 3, 5, 64)
        >>> network(embeddings, scores, torch.ones(1, 1, 3, 5, dtype=torch.bool), words).shape
        torch.Size([1, 1, 15, 64])
    """

    def __init__(self, width: int, config: ContextConfig, *, before: bool = False) -> None:
        super().__init__(config, 2 * width if before else width)
        # The word before the first one of a text.
        self.start = nn.Parameter(torch.randn(width)) if before else None
        # Zeros: a context token starts as its word.
        self.score, self.position = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, embeddings: Tensor, scores: Tensor, present: Tensor, words: Tensor) -> Tensor:
        """Return context tokens, [B, M, K * S, D or 2 * D]; rows of zeros for padding."""
        dtype = self.score.dtype
        waves = add_positions(torch.zeros(words.shape[-2:])).to(words.device, dtype)
        words = F.rms_norm(words, words.shape[-1:], eps=1e-6).to(dtype)
        tokens = words + waves * self.position
        tokens = tokens + (scores.to(dtype) / SCORE_SCALE)[..., None, None] * self.score
        present = present & embeddings.any(-1, keepdim=True)
        if self.start is not None:
            before = torch.cat([self.start.expand_as(words[..., :1, :]), words[..., :-1, :]], -2)
            tokens = torch.cat([tokens, before], -1)
        return torch.where(present.unsqueeze(-1), tokens, 0).flatten(2, 3)


def build_context(embedding_size: int, width: int, config: ContextConfig, kind: str) -> ContextNetwork:
    """Return the network of the form that the config names, for a kind of injection; else as `ContextPerceivers`."""
    if config.latents == "all":
        # Only kind `cross` has keys of its own.
        return ContextWords(width, config, before=kind == "cross")
    return ContextPerceivers(embedding_size, width, config)


def _masked(present: Tensor) -> Tensor:
    """Return which of the tokens [G, n] do not count, [G, 1, n]; none of a group without tokens, to avoid NaN."""
    return (~present & present.any(1, keepdim=True)).unsqueeze(1)
