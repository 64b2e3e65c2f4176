"""Tokens of encoders: at most `MOST_TOKENS` of each media, of one scale, with their position added.

The pooled embedding of a media lies in a joint space; its tokens do not. They are the output of a trunk on a grid,
[*grid, C] (see `bindllm.encoders.Embedded`), and trunks differ in scale and in the number of tokens. Two steps make
them alike. `reduce_tokens` makes the form that stores keep, and `add_positions` is applied when tokens are read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bindllm.encoders import Encoder, HasTokens, encoder_for
from bindllm.errors import InputError

MOST_TOKENS = 256
"""Tokens that are kept of one media; larger grids are averaged."""

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_EPSILON = 1e-12
# The longest wavelength of positions, in units of 2 pi, as in https://arxiv.org/abs/1706.03762, section 3.5.
_LONGEST = 10_000.0


def token_size(encoders: Sequence[Encoder], modalities: Collection[str]) -> int:
    """Return C, the width that the tokens of all the modalities share.

    Args:
        encoders: encoders of a model; the first that serves a modality gives its tokens.

    Raises:
        InputError: no modality, one without tokens (the message lists those that have them), or several widths.
    """
    sizes: dict[str, int] = {}
    for modality in modalities:
        encoder = encoder_for(modality, encoders)
        if not isinstance(encoder, HasTokens) or modality not in encoder.token_sizes:
            known = "; ".join(
                f"{type(each).__name__} for {', '.join(each.token_sizes)}"
                for each in encoders
                if isinstance(each, HasTokens) and each.token_sizes
            )
            raise InputError(
                f"{type(encoder).__name__} has no tokens of {modality} media, which more than one bind token needs. "
                f"Encoders of this model with tokens: {known or 'none'}. Change token_modalities or the encoder, or "
                "set the number of bind tokens to 1"
            )
        sizes[modality] = encoder.token_sizes[modality]
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{modality} {size}" for modality, size in sizes.items())
        raise InputError(
            f"the tokens of all token_modalities must have one width, not: {found or 'no modality'}. Name modalities "
            "of one width"
        )
    return sizes[next(iter(sizes))]


def reduce_tokens(tokens: Tensor) -> Tensor:
    """Return the tokens of one media in the form that stores keep: few, of unit scale, in half precision.

    A grid of more than `MOST_TOKENS` is averaged to the largest one that fits: its longest axes are cut to one length.
    Each token is divided by its root mean square, as trunks differ in scale by far.

    Args:
        tokens: [*grid, C], a grid of one to three axes.

    Returns:
        [*smaller grid, C], float16, on the CPU; with a gradient, the same numbers in float32.

    Examples:
        >>> reduce_tokens(torch.randn(15, 16, 16, 8)).shape
        torch.Size([6, 6, 6, 8])
    """
    # Stores hold this form, and the encoder's fingerprint does not cover it: a change needs a new kind of shard.
    tokens = tokens.float()
    grid = tokens.shape[:-1]
    if math.prod(grid) > MOST_TOKENS:
        # Short axes, such as a few clips, stay whole.
        side = next(
            n for n in range(MOST_TOKENS, 0, -1) if math.prod(min(n, axis) for axis in grid) <= MOST_TOKENS
        )
        channels_first = tokens.movedim(-1, 0).unsqueeze(0)
        pooled = _POOLS[len(grid)](channels_first, tuple(min(side, axis) for axis in grid))
        tokens = pooled[0].movedim(0, -1)
    exact = F.rms_norm(tokens, tokens.shape[-1:], eps=_EPSILON)
    # In half precision a number of unit scale keeps three digits and cannot overflow. A gradient would underflow.
    rounded = exact.detach().half()
    return (exact + (rounded.float() - exact.detach()) if exact.requires_grad else rounded).cpu()


def add_positions(tokens: Tensor) -> Tensor:
    """Return reduced tokens as a list with their positions added.

    Positions are sines and cosines of the coordinates on the grid; the axes share the channels evenly.

    Args:
        tokens: from `reduce_tokens`, [*grid, C].

    Returns:
        [n, C], float32; no row is zero.
    """
    return tokens.float().flatten(0, -2) + _positions(tokens.shape[:-1], tokens.shape[-1])


def flatten_tokens(tokens: Tensor) -> Tensor:
    """Return the tokens of one media as a model takes them: at most `MOST_TOKENS`, of unit scale, with positions.

    Returns:
        [n, C], float32, on the CPU.

    Examples:
        >>> flatten_tokens(torch.randn(7, 7, 1280)).shape
        torch.Size([49, 1280])
    """
    # Through half precision, so that a request gets the same bits as a store.
    return add_positions(reduce_tokens(tokens))


def group_tokens(tokens: Sequence[Tensor | None], sizes: Sequence[int], width: int) -> Tensor:
    """Return the tokens of each media group, those of its media one after the other.

    Args:
        tokens: for all media, group after group: reduced tokens [*grid, C], or None for media without tokens.
        sizes: number of media of each of the N groups.

    Returns:
        [N, n, C], float32; n is the number of tokens of the longest group, at least 1. Rows of zeros are no tokens.
    """
    groups, waiting = [], iter(tokens)
    for size in sizes:
        own = [add_positions(item) for item in (next(waiting) for _ in range(size)) if item is not None]
        groups.append(torch.cat(own) if own else torch.zeros(0, width))
    padded = torch.zeros(len(groups), max([1, *map(len, groups)]), width)
    for number, own in enumerate(groups):
        padded[number, : len(own)] = own
    return padded


# Grids repeat from media to media. A tensor made in inference mode could never take part in training.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Return sines and cosines of the coordinates, [n, C]; channels that no axis gets are zero."""
    pairs = width // (2 * len(grid))
    frequencies = _LONGEST ** (-np.arange(pairs) / max(1, pairs))
    coordinates = np.indices(grid).reshape(len(grid), -1)  # [axes, n]
    angles = (coordinates[..., None] * frequencies).transpose(1, 0, 2)  # [n, axes, pairs]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, 2 * pairs * len(grid))
    return torch.from_numpy(np.pad(waves, ((0, 0), (0, width - waves.shape[1])))).float()
