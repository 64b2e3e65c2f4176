"""Gated cross-attention of a layer to bind tokens that are added as they are: injection kind ``cross``.

The other kinds read a bind token through the decoder's own value projections, which the bind network has to learn to
invert. Here a bind token is a vector of the residual stream itself. A token that points to the output embedding of a
word raises the logit of that word. Bag-of-words pretraining (`bindllm.training.bag_of_words`) makes bind tokens point
there before the run starts.

Gated cross-attention is from Flamingo (arXiv 2204.14198, section 3.1.2), with learned values and outputs. Bind tokens
near word embeddings are from AlignVLM (arXiv 2502.01341).

Letters: `B` batch, `T` tokens, `M` media groups, `N` bind tokens of a group, `D` decoder width, `L` layers, `R` heads
of this attention, `d` their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 2
HEAD_SIZE = 64

_GATE_SCALE = 10.0
"""A gate of 0.01 adds a tenth of the size of a hidden state: about ten steps of Adam with the usual learning rate."""

_EPS = 1e-6


class CrossReader(nn.Module):
    """The queries and keys of all served layers.

    Args:
        key_width: ``K``, of the tokens that are read; the rest behind their first ``D`` entries is for keys only. It
            is the word before, and queries get the word of their own token: those of the same word point to each other
            from the start, so a token finds what followed its own word (induction; Olsson et al., arXiv 2209.11895).
        has_sink: whether a further key and value of zeros take attention that no token deserves. So a reader can add
            nothing ("softmax off by one"; the attention sinks of Xiao et al., arXiv 2309.17453).

    Attributes:
        query: query projections, [L, R, K, d]. Zeros at the start, so that each bind token counts the same; behind
            their first ``D`` entries a copy of those of the keys.
        key: key projections, [L, R, K, d].
    """

    def __init__(
        self, num_layers: int, width: int, key_width: int | None = None, *, has_sink: bool = False
    ) -> None:
        super().__init__()
        key_width = width if key_width is None else key_width
        self.width, self.has_sink, self.reads_words = width, has_sink, key_width > width
        self.key = nn.Parameter(torch.randn(num_layers, HEADS, key_width, HEAD_SIZE) * key_width**-0.5)
        same = [torch.zeros(num_layers, HEADS, width, HEAD_SIZE), self.key.detach()[:, :, width:]]
        self.query = nn.Parameter(torch.cat(same, 2))

    def keys_and_values(self, bind: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return for each layer scaled keys [B, R, d, M * N] and values [B, 1, M * N, D].

        All layers read the same tokens, so these are normalized once, and one product makes the keys of all.

        Args:
            bind: bind tokens, [B, M, N, K].
        """
        values, rest = bind.flatten(1, 2).float().tensor_split([self.width], -1)
        values = nn.functional.rms_norm(values, (self.width,), eps=_EPS)
        sources, values = torch.cat([values, rest], -1).to(dtype), values.to(dtype)
        keys = torch.einsum("bnd,lrde->lbren", sources, self.key.to(dtype) * HEAD_SIZE**-0.5)
        return [(own, values.unsqueeze(1)) for own in keys.unbind()]

    def forward(
        self,
        index: int,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor,
        masked: Tensor | None,
        words: Tensor | None = None,
    ) -> Tensor:
        """Return what layer ``index`` adds to hidden states, [B, T, D].

        ``10 * rms(h) * sum_r gate[l,r] * sum_n softmax_n(q[r] . k[n,r]) * v[n]``: the gate is relative to the size of
        the hidden state, since the residual stream grows from layer to layer.

        Args:
            hidden: output of the layer, [B, T, D].
            gates: of the layer, [R].
            masked: bind tokens that a token does not attend to, [B, 1, T, M * N], or None.
            words: word embeddings of the tokens at unit scale, [B, T, D]; for keys that are wider than values.
        """
        size = hidden.float().pow(2).mean(-1, keepdim=True).add(_EPS).sqrt()
        source = (hidden / size).to(values.dtype)
        if words is not None:
            source = torch.cat([source, words.to(values.dtype)], -1)
        query = torch.einsum("btd,rde->brte", source, self.query[index].to(values.dtype))
        scores = query @ keys
        if masked is not None:
            scores = scores.masked_fill(masked, -torch.inf)
        if self.has_sink:
            scores = nn.functional.pad(scores, (0, 1))
        shares = scores.softmax(-1, dtype=torch.float32)[..., : values.shape[2]]
        # One product for all heads: they read the same values.
        weights = torch.einsum("brtn,r->btn", shares, _GATE_SCALE * gates.float())
        return (size * (weights.to(values.dtype) @ values.squeeze(1))).to(hidden.dtype)
