"""The projections of a decoder's attention: the modules that make queries, keys and values, and their layout.

Each line of `SHAPES` is one shape of attention, shared by many families. A new one needs a line here;
`make test-families` compares it with the queries, keys and values that the attention itself computes.

Letters: `D` decoder width, `H` query heads, `Hkv` key/value heads, `d` size of values, `k` size of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from bindllm.errors import DecoderError

_PARTS = ("query", "key", "value")
_NORMS = {
    "query": ("q_norm", "q_layernorm", "query_layernorm"),
    "key": ("k_norm", "k_layernorm", "key_layernorm"),
    "value": ("v_norm",),
}
# The latent vector of keys and values in the DeepSeek family, and its norm.
_LATENT, _LATENT_NORM = "kv_a_proj_with_mqa", "kv_a_layernorm"


def _separate(features: Tensor, part: str, num_heads: int, size: int) -> Tensor:
    """A projection of its own for queries, keys and values."""
    return features.unflatten(-1, (num_heads, -1) if part == "query" else (-1, size))


def _blocks(features: Tensor, part: str, num_heads: int, size: int) -> Tensor:
    """All queries, then all keys, then all values: (H + 2 * Hkv) * d features."""
    heads = features.unflatten(-1, (-1, size))
    rest = (heads.shape[-2] - num_heads) // 2
    return heads.split([num_heads, rest, rest], -2)[_PARTS.index(part)]


def _groups(features: Tensor, part: str, num_heads: int, size: int) -> Tensor:
    """For each key/value head the queries that share it, its key, and its value."""
    num_groups = (features.shape[-1] // size - num_heads) // 2
    heads = features.unflatten(-1, (num_groups, -1, size))
    return heads.tensor_split([-2, -1], -2)[_PARTS.index(part)].flatten(-3, -2)


def _latent(features: Tensor, part: str, num_heads: int, size: int) -> Tensor:
    """For each head its key, without the part that all heads share, and its value."""
    heads = features.unflatten(-1, (num_heads, -1))
    return heads if part == "query" else heads.tensor_split([-size], -1)[part == "value"]


@dataclass(frozen=True)
class Shape:
    """Paths of the projections below one module of a layer.

    Attributes:
        output: the output projection, which mixes the heads.
        split: takes queries, keys or values [..., heads, size] out of the features of their projection.
    """

    output: str
    query: str
    key: str
    value: str
    split: Callable[[Tensor, str, int, int], Tensor] = _separate


SHAPES = (
    # Llama and most others; OPT, GPT-J, LFM2; Phi; Moshi; BERT.
    Shape("o_proj", "q_proj", "k_proj", "v_proj"),
    Shape("out_proj", "q_proj", "k_proj", "v_proj"),
    Shape("dense", "q_proj", "k_proj", "v_proj"),
    Shape("o_proj.linear", "q_proj.linear", "k_proj.linear", "v_proj.linear"),
    Shape("output.dense", "self.query", "self.key", "self.value"),
    # DeepSeek V2 and V3, Kimi, MiniCPM3, GLM-4-MoE-lite: with latent queries, and without.
    Shape("o_proj", "q_b_proj", "kv_b_proj", "kv_b_proj", _latent),
    Shape("o_proj", "q_proj", "kv_b_proj", "kv_b_proj", _latent),
    # Phi-3; GPT-2; MPT and DBRX.
    Shape("o_proj", "qkv_proj", "qkv_proj", "qkv_proj", _blocks),
    Shape("c_proj", "c_attn", "c_attn", "c_attn", _blocks),
    Shape("out_proj", "Wqkv", "Wqkv", "Wqkv", _blocks),
    # GPT-NeoX, BLOOM, Falcon, Persimmon.
    Shape("dense", "query_key_value", "query_key_value", "query_key_value", _groups),
    # Layers of Gemma 4 whose keys are their values too.
    Shape("o_proj", "q_proj", "k_proj", "k_proj"),
)


def plain_projection(projection: nn.Module) -> nn.Module:
    """Return a projection without its adapter: the published weights were trained with the base projection."""
    return dict(projection.named_children()).get("base_layer", projection)


def tuned_norm(norm: nn.Module) -> nn.Module:
    """Return a norm as the adapter has tuned it, without the hooks of the adapter, which expect tokens of the text."""
    copies = dict(norm.named_children()).get("modules_to_save")
    return norm if copies is None else next(iter(copies.values()))


def input_width(projection: nn.Module) -> int:
    """Return the number of features that a projection takes."""
    plain = plain_projection(projection)
    return plain.nx if isinstance(plain, Conv1D) else plain.in_features


class Heads:
    """The projections of one attention.

    Args:
        config: the config of the text model, for an attention that does not name the size of its heads.

    Attributes:
        output: the output projection; its input is the heads, side by side, [..., H * d].
        query: the projection whose features `queries` takes.
        source: the projection that reads the vectors that values are made of.
        size: ``d``.
        num_heads: ``H``.
    """

    def __init__(self, attention: nn.Module, shape: Shape, config: PretrainedConfig) -> None:
        self._attention, self._shape = attention, shape
        self.output, self.query = map(attention.get_submodule, (shape.output, shape.query))
        self.source = attention.get_submodule(_LATENT if shape.split is _latent else shape.value)
        children, own = dict(attention.named_children()), vars(attention)
        self._norms = {part: children[name] for part in _PARTS for name in _NORMS[part] if name in children}
        width = input_width(self.output)
        self.size = own.get("v_head_dim") or own.get("head_dim") or width // config.num_attention_heads
        self.num_heads, rest = divmod(width, self.size)
        if rest:
            raise DecoderError(
                f"its output projection takes {width} features, which heads of {self.size} do not divide"
            )
        # Families that scale differently (Gemma, Granite) keep their factor here.
        self._scaling = own.get("scaling")

    def values(self, x: Tensor) -> Tensor:
        """Return the values of vectors [..., D], [..., Hkv, d]."""
        return self._normalized("value", self._project("value", x))

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys of vectors [..., D] before the rotary embedding, times the scale of scores, [..., Hkv, k]."""
        key = self._project("key", x)
        if self._shape.split is _latent:
            # All heads share the part that would be rotated.
            latent = plain_projection(self.source).forward(x)
            rotated = latent[..., input_width(self._attention.get_submodule(self._shape.key)) :].unsqueeze(-2)
            key = torch.cat([key, rotated.expand(*key.shape[:-1], -1)], -1)
        scaling = key.shape[-1] ** -0.5 if self._scaling is None else self._scaling
        return self._normalized("key", key) * scaling

    def queries(self, features: Tensor, size: int) -> Tensor:
        """Return the queries in the features of their projection, before the rotary embedding, [..., H, k].

        Args:
            features: output of `query`, adapter included.
            size: ``k``; some families make an output gate with the same projection, behind the query of each head.
        """
        query = self._shape.split(features, "query", self.num_heads, self.size)
        return self._normalized("query", query[..., :size])

    def _project(self, part: str, x: Tensor) -> Tensor:
        """Return keys or values of the plain projections."""
        path = {"key": self._shape.key, "value": self._shape.value}[part]
        projection = plain_projection(self._attention.get_submodule(path))
        if self._shape.split is _latent:
            latent = plain_projection(self.source).forward(x)
            norm = tuned_norm(self._attention.get_submodule(_LATENT_NORM))
            x = norm(latent[..., : input_width(projection)]).to(latent.dtype)
            # LongCat.
            x = x * vars(self._attention).get("mla_scale_kv_lora", 1)
        # MiMo has keys of another size than its values.
        is_own = part == "key" and self._shape.split is _separate
        size = (is_own and vars(self._attention).get("head_dim")) or self.size
        # Not a call, whose hooks would take bind tokens for tokens of the text if one projection makes all three.
        return self._shape.split(projection.forward(x), part, self.num_heads, size)

    def _normalized(self, part: str, heads: Tensor) -> Tensor:
        """Apply a family's norm to heads [..., H, k]: to each (Qwen3), or to all as one (OLMo 2)."""
        norm = self._norms.get(part)
        if norm is None:
            return heads
        if part != "query":
            norm = tuned_norm(norm)
        # A norm over all heads has one weight of their joint width.
        joint = any(weight.shape == (heads.shape[-2] * heads.shape[-1],) for weight in norm.parameters())
        found = norm(heads.flatten(-2)).unflatten(-1, heads.shape[-2:]) if joint else norm(heads)
        return found.to(heads.dtype)


def find_heads(layer: nn.Module, config: PretrainedConfig) -> Heads | None:
    """Return the projections of a layer's attention to its own tokens, or None if it has no attention of this kind."""
    parts = dict(layer.named_modules())

    def is_projection(path: str) -> bool:
        # A few families have projections of their own, with other weights for each position.
        return path in parts and isinstance(plain_projection(parts[path]), nn.Linear | Conv1D)

    for path, module in parts.items():
        # Attention to an encoder, and layers of hybrids that keep a state: they have no softmax over these tokens.
        if any(name in path for name in ("cross", "encoder_attn", "linear_attn")):
            continue
        lead = f"{path}." if path else ""
        for shape in SHAPES:
            source = _LATENT if shape.split is _latent else shape.value
            if (
                all(
                    is_projection(lead + p)
                    for p in (shape.output, shape.query, shape.key, shape.value, source)
                )
                # Zamba's attention reads two vectors side by side.
                and input_width(parts[lead + source]) == config.hidden_size
            ):
                return Heads(module, shape, config)
    return None
