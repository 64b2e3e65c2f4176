"""How several media of one message become one embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bindllm.encoders import Encoder, check_members
from bindllm.errors import InputError
from bindllm.media import Media

# A weighted mean of unit embeddings below this length has lost its direction: they point opposite ways.
_SHORTEST_MEAN = 1e-4
# The released ImageBind-LLM divides by the sum of the weights plus this.
_PUBLISHED_EPS = 1e-6


def fuse(embeddings: Tensor, weights: Tensor, *, normalize: bool = True) -> Tensor:
    """Fuse the embeddings of one media group: their weighted mean, normalized again.

    The bind network sees unit embeddings in training, and a mean of unit vectors is shorter: without the second
    normalization two orthogonal embeddings would arrive at 0.7 of their length.

    Args:
        embeddings: unit norm, [K, E], K at least 1. A single embedding is returned as it is.
        weights: share of each, above 0, [K]; only their ratios count.
        normalize: False gives the mean as the released ImageBind-LLM (arXiv 2309.03905) computes it, for its
            converted weights: not normalized, each share being ``weight / (sum of weights + 1e-6)``; so a single
            embedding is a millionth shorter.

    Returns:
        The fused embedding, unit norm (if normalized), [E], in the dtype of ``embeddings``.

    Raises:
        InputError: the shapes do not fit, a weight is not finite and above 0, or the embeddings cancel out.

    Examples:
        >>> fuse(torch.eye(2), torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
        >>> fuse(torch.eye(2), torch.tensor([3.0, 1.0]), normalize=False)
        tensor([0.7500, 0.2500])
    """
    # Wrong shapes would broadcast into a wrong mean.
    if embeddings.dim() != 2 or len(embeddings) == 0 or weights.shape != embeddings.shape[:1]:
        raise InputError(
            f"expected embeddings [K, E] and weights [K], got {list(embeddings.shape)} and {list(weights.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise InputError(
            f"the weights of fused media must be finite and above 0, not {weights.tolist()}; leave out a media that "
            "shall not count"
        )
    # How to read this: the published mean for converted weights, else the unit mean.
    if not normalize:
        weights = weights.double()
        return (weights / (weights.sum() + _PUBLISHED_EPS)).to(embeddings) @ embeddings
    if len(embeddings) == 1:
        return embeddings[0]
    # Divided by the largest first, so that the sum of huge weights stays finite.
    weights = weights.double() / weights.max()
    shares = (weights / weights.sum()).to(embeddings)
    mean = shares @ embeddings
    if mean.norm() < _SHORTEST_MEAN:
        raise InputError(
            f"the {len(embeddings)} media of one message cancel out: their weighted mean is zero; "
            "change the weights, or give each media a message of its own"
        )
    return torch.nn.functional.normalize(mean, dim=0)


def fuse_groups(embeddings: Tensor, groups: Sequence[Sequence[Media]], *, normalize: bool = True) -> Tensor:
    """Fuse the embeddings of each media group by the weights of its media.

    Args:
        embeddings: of all media, group after group, unit norm, [M, E].
        groups: N groups of at least one media each, M media together.

    Returns:
        One embedding for each group, [N, E].
    """
    pieces = embeddings.split([len(group) for group in groups])
    weights = [torch.tensor([media.weight for media in group], dtype=torch.float64) for group in groups]
    return torch.stack([fuse(*pair, normalize=normalize) for pair in zip(pieces, weights, strict=True)])


def common_size(encoders: Sequence[Encoder]) -> int:
    """Return the embedding size E that all encoders of a model share.

    Raises:
        InputError: the list is empty, or the sizes differ.
        EncoderError: the members of one are wrong. Found here, it costs no training.
    """
    for encoder in encoders:
        check_members(encoder)
    sizes = [encoder.embedding_size for encoder in encoders]
    if len(set(sizes)) != 1:
        found = ", ".join(f"{type(encoder).__name__} {encoder.embedding_size}" for encoder in encoders)
        raise InputError(
            f"the encoders must share one embedding size, got {found or 'no encoder'}; one bind network serves them "
            "all. To use several widths, give each a part of a wider vector: bindllm.encoders.Padded"
        )
    return sizes[0]
