"""The bind network: from the joint space of the encoders to the width of the decoder.

A projection, then residual blocks of RMSNorm and SwiGLU, as in ImageBind-LLM section 3.2 (arXiv 2309.03905). It runs on
one vector per media group, so its cost is small compared with the decoder's.

With more than one bind token per group, the others are made of the tokens of the encoder (patches, frames): a fixed
number by a resampler, or one of each by a projector. The pooled embedding stays bind token 0: it is aligned across
modalities, and the tokens of an encoder are not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bindllm.errors import InputError, check_choice

MOST_DEPTH = 1000
"""Largest depth and expansion: a damaged checkpoint cannot ask for more."""

MOST_BIND_TOKENS = 4096
"""Largest number of bind tokens of a media group that are made by a resampler, for the same reason."""

RESAMPLER_DEPTH = 2
"""Blocks of the resampler."""

_HEADS = 8

NORMS = ("rms", "layer")
FUSIONS = ("unit", "mean")


@dataclass
class BindConfig:
    """Shape of the bind network, and how its input is made."""

    depth: int = 3
    """Number of residual blocks after the projection; 3 in the paper, 0 leaves only the projection."""

    expansion: int = 4
    """Inner width of a block as a multiple of the decoder's width."""

    norm: Literal["rms", "layer"] = "rms"
    """`rms` as in the paper; `layer` (LayerNorm with bias) for the first released weights."""

    bias: bool = False
    """Whether the layers of a block have biases, as in the first released weights."""

    fusion: Literal["unit", "mean"] = "unit"
    """How several media become one embedding: their mean at `unit` length, or the released weights' plain `mean`."""

    tokens: int | Literal["all"] = 1
    """Number of bind tokens of a media group: one from the pooled embedding, the others from the encoder's tokens
    through a resampler; `all`: one of each token of the encoder, through a projector. More than 1 needs `inject.kind`
    `attend` or `cross`."""

    token_modalities: list[str] = field(default_factory=lambda: ["image"])
    """Modalities whose encoder tokens are read if `tokens` is more than 1. All others have bind token 0 only."""

    def __post_init__(self) -> None:
        check_choice("bind norm", self.norm, NORMS)
        check_choice("bind fusion", self.fusion, FUSIONS)
        is_whole = isinstance(self.depth, int) and isinstance(self.expansion, int)
        if not is_whole or not 0 <= self.depth <= MOST_DEPTH or not 1 <= self.expansion <= MOST_DEPTH:
            raise InputError(
                f"bind network with depth {self.depth} and expansion {self.expansion}: depth must be 0 to "
                f"{MOST_DEPTH}, expansion 1 to {MOST_DEPTH}, and both whole numbers"
            )
        is_number = isinstance(self.tokens, int) and 1 <= self.tokens <= MOST_BIND_TOKENS
        if not is_number and self.tokens != "all":
            raise InputError(
                f"bind.tokens is {self.tokens!r}, expected a whole number from 1 to {MOST_BIND_TOKENS}, or all"
            )
        named = self.token_modalities
        if isinstance(named, str) or not all(isinstance(name, str) for name in named) or not named:
            raise InputError(
                f"bind.token_modalities is {named!r}, expected a list of modalities, such as [image]"
            )
        # Lists and tuples of the same words are equal settings.
        self.token_modalities = list(named)

    @property
    def reads_tokens(self) -> bool:
        """Whether bind tokens are made of encoder tokens."""
        return self.tokens != 1


class SwiGLUBlock(nn.Module):
    """One residual block: ``z + down(silu(gate(n)) * up(n))`` with ``n = norm(z)``."""

    def __init__(self, width: int, config: BindConfig) -> None:
        super().__init__()
        inner, bias = config.expansion * width, config.bias
        # The published constants; neither follows the decoder's own.
        self.norm = nn.RMSNorm(width, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z`` with the block added: [..., D] to [..., D]."""
        # Pre-norm residual block, as in LLaMA: the stream itself is never normalized.
        n = self.norm(z)
        return z + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class LatentBlock(nn.Module):
    """Latents read tokens: ``z + out(attention(norm(z), tokens))``, then a `SwiGLUBlock`."""

    def __init__(self, width: int, inner: int, config: BindConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(inner, inner, bias=False)
        self.value = nn.Linear(inner, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        # Not the expansion of the bind network, whose blocks see one vector and not N.
        self.block = SwiGLUBlock(width, replace(config, expansion=1))

    def forward(self, z: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
        """Return the latents [G, N, D] after the block.

        Args:
            z: [G, N, D], or [1, N, D] if all G groups have the same.
            tokens: in the width of attention, [G, n, A].
            masked: which tokens do not count, [G, 1, n]; not all of a group.
        """
        query, key, value = (
            y.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for y in (self.query(self.norm(z)), self.key(tokens), self.value(tokens))
        )
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        read = scores.masked_fill(masked[:, None], -torch.inf).softmax(-1) @ value
        return self.block(z + self.out(read.transpose(1, 2).flatten(2)))


class Resampler(nn.Module):
    """Learned latents that read the tokens of an encoder (Perceiver resampler, arXiv 2204.14198, section 3.1.1).

    Latents never see each other, so the first few are the same however many are computed.

    Args:
        token_size: ``C``, width of the encoder's tokens.
        width: ``D``, the decoder's hidden size.

    Examples:
        >>> resampler = Resampler(1280, 64, BindConfig(tokens=4))
        >>> resampler(torch.randn(2, 49, 1280), 3).shape
        torch.Size([2, 3, 64])
    """

    def __init__(self, token_size: int, width: int, config: BindConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.tokens - 1, width))
        # Half the width of the decoder, at most 512 as in Flamingo: tokens are many, and every step projects them.
        inner = _HEADS * min(64, max(1, width // (2 * _HEADS)))
        self.projection = nn.Linear(token_size, inner)
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.blocks = nn.ModuleList(LatentBlock(width, inner, config) for _ in range(RESAMPLER_DEPTH))
        self.output_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor, count: int) -> Tensor:
        """Return the first ``count`` latents, [..., count, D]; zeros for a group without tokens.

        Args:
            tokens: with their positions, [..., n, C]; a row of zeros is not a token.
            count: at most ``bind.tokens - 1``.
        """
        groups = tokens.flatten(0, -3)
        present = groups.any(-1).unsqueeze(1)  # [G, 1, n]
        has_tokens = present.any(-1, keepdim=True)
        # A group without tokens reads all rows, and its result is dropped: a softmax over nothing would be NaN.
        masked = ~present & has_tokens
        projected = self.norm(self.projection(groups.to(self.latents.dtype)))
        z = self.latents[None, :count]
        for block in self.blocks:
            z = block(z, projected, masked)
        return torch.where(has_tokens, self.output_norm(z), 0).unflatten(0, tokens.shape[:-2])


class Projector(nn.Module):
    """One bind token of each token of an encoder, which keeps its position: ``norm(out(silu(norm(in(x)))))``.

    A multilayer perceptron as in LLaVA-1.5 (arXiv 2310.03744, section 3.3), without attention over the tokens.

    Args:
        width: ``D``, the decoder's hidden size.

    Examples:
        >>> Projector(1280, 64)(torch.randn(2, 49, 1280)).shape
        torch.Size([2, 49, 64])
    """

    def __init__(self, token_size: int, width: int) -> None:
        super().__init__()
        # Half the width of the decoder, at most 512, as inside the resampler.
        inner = min(512, max(1, width // 2))
        self.projection = nn.Linear(token_size, inner)
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out = nn.Linear(inner, width)
        self.output_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor, count: int | None = None) -> Tensor:
        """Return a bind token of each of the first ``count`` tokens (None: of all), [..., count, D].

        Args:
            tokens: with their positions, [..., n, C]; a row of zeros is not a token and gives zeros.
        """
        tokens = tokens[..., :count, :]
        x = self.out(nn.functional.silu(self.norm(self.projection(tokens.to(self.projection.weight.dtype)))))
        return torch.where(tokens.any(-1, keepdim=True), self.output_norm(x), 0)


class BindNetwork(nn.Module):
    """Maps unit embeddings to decoder-wide vectors (ImageBind-LLM section 3.2).

    Args:
        embedding_size: ``E``, width of the joint space.
        width: ``D``, the decoder's hidden size.
        config: depth, expansion, kind of norm, biases, number of bind tokens.
        token_size: ``C``, width of the encoder's tokens; only read if ``config.tokens`` is not 1.

    Attributes:
        drops_tokens: whether training drops bind tokens at random, so that one model serves any smaller number. False
            for objectives that compare two passes over the same rows.

    Examples:
        >>> network = BindNetwork(1024, 64, BindConfig(depth=2))
        >>> network(torch.nn.functional.normalize(torch.randn(5, 1, 1024), dim=-1)).shape
        torch.Size([5, 1, 64])
    """

    def __init__(
        self, embedding_size: int, width: int, config: BindConfig, token_size: int | None = None
    ) -> None:
        super().__init__()
        # The projection has no norm before it: its input has unit length already.
        self.projection = nn.Linear(embedding_size, width)
        self.blocks = nn.ModuleList(SwiGLUBlock(width, config) for _ in range(config.depth))
        self.takes_all = config.tokens == "all"
        # A group of many images may have any number of encoder tokens, and `all` is all of them.
        self.most_tokens = self._num_tokens = sys.maxsize if self.takes_all else config.tokens
        self.drops_tokens = True
        self.resampler = self.projector = None
        if config.reads_tokens and token_size is None:
            raise InputError(
                f"bind.tokens is {config.tokens}, so the width of the encoder's tokens is needed"
            )
        if self.takes_all:
            self.projector = Projector(token_size, width)
        elif config.reads_tokens:
            self.resampler = Resampler(token_size, width, config)
        start_at_unit_size(self, self.projection)

    @property
    def num_tokens(self) -> int:
        """Most bind tokens of a media group outside training; fewer than in the config are their first ones."""
        return self._num_tokens

    @num_tokens.setter
    def num_tokens(self, count: int) -> None:
        if self.takes_all and count not in (1, self.most_tokens):
            # The first few tokens of a grid are its upper edge.
            raise InputError(
                f"{count} bind tokens were asked for, and this model makes one of each token of the encoder "
                "(bind.tokens: all): give 1 for the pooled embedding only, or leave the number out"
            )
        if not 1 <= count <= self.most_tokens:
            raise InputError(
                f"{count} bind tokens were asked for, and this model was built with bind.tokens {self.most_tokens}: "
                f"give a number from 1 to {self.most_tokens}"
            )
        self._num_tokens = count

    def forward(self, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Map embeddings to bind vectors.

        Args:
            embedding: unit-norm (shorter with fusion ``mean``), [..., E].
            tokens: tokens of the encoder with their positions, [..., n, C]; a row of zeros is not a token. None: none.

        Returns:
            bind vectors in the dtype of the network's weights, [..., D]. With ``bind.tokens`` not 1: [..., N, D], N
            being `num_tokens` or 1 more than there are tokens, fewer in some steps of training, and 1 without tokens.
            Row 0 is from the embedding; the others are zeros for a group without tokens.

        Raises:
            InputError: tokens of another shape, or for a network that reads none.
        """
        # Embeddings are float32; the network may run in another dtype.
        z = self.projection(embedding.to(self.projection.weight.dtype))
        for block in self.blocks:
            z = block(z)
        reader = self.resampler or self.projector
        if reader is None:
            if tokens is not None:
                raise InputError("this model has one bind token (bind.tokens: 1) and reads no encoder tokens")
            return z
        size = reader.projection.in_features
        if tokens is not None and (*tokens.shape[:-2], tokens.shape[-1]) != (*embedding.shape[:-1], size):
            raise InputError(
                f"tokens {list(tokens.shape)} for embeddings {list(embedding.shape)}: expected "
                f"{[*embedding.shape[:-1], 'n', size]}"
            )
        if not self.training:
            # Without tokens the others would be zeros, which attention skips.
            others = tokens is not None and self.num_tokens > 1
            found = [reader(tokens, self.num_tokens - 1)] if others else []
            return torch.cat([z.unsqueeze(-2), *found], dim=-2)
        # Without gradients nothing is trained: GRPO samples answers in training mode.
        drops = self.drops_tokens and torch.is_grad_enabled()
        if self.takes_all and tokens is not None:
            found = reader(tokens)
            if drops:
                found = found.masked_fill(draw_alone(z.shape[:-1]).to(z.device)[..., None, None], 0)
            return torch.cat([z.unsqueeze(-2), found], dim=-2)
        count = draw_count(self.most_tokens) if drops else self.most_tokens
        # One latent and one row of tokens at least, so that every trained tensor has a gradient: DDP waits for it.
        tokens = z.new_zeros(*z.shape[:-1], 1, size) if tokens is None else tokens
        found = reader(tokens, max(count, 2) - 1)
        return torch.cat([z.unsqueeze(-2), found if count > 1 else found * 0], dim=-2)


@torch.no_grad()
def start_at_unit_size(network: nn.Module, projection: nn.Linear) -> None:
    """Draw the linear layers of a network so that its outputs start at unit size; ``projection`` takes unit vectors."""
    for linear in (module for module in network.modules() if isinstance(module, nn.Linear)):
        # Variance 1 / fan-in keeps the variance of activations. The input of the projection is a unit vector, so rows
        # of unit variance give outputs of variance 1, whatever E is.
        std = 1 if linear is projection else linear.in_features**-0.5
        nn.init.normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def draw_count(most: int) -> int:
    """Draw the number of bind tokens of a training step: all in half of the steps, else log-uniform from 1 to most - 1.

    One token has to be seen often enough for modalities without encoder tokens, and all of them for the last latents.
    """
    share, position = torch.rand(2, device="cpu").tolist()
    return most if share < 0.5 else int(most**position)


def draw_alone(shape: torch.Size) -> Tensor:
    """Draw which media groups of a training step have bind token 0 only, or no records: one in eight."""
    return torch.rand(shape, device="cpu") < 1 / 8
