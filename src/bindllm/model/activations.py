"""What a training step keeps between its forward and its backward pass, in bytes, worked out from shapes alone.

Letters: `B` rows, `T` tokens, `D` decoder width, `H` heads, `L` layers, `V` vocabulary, `N` supervised tokens.

Autograd keeps what a backward needs and nothing else. Of a frozen linear layer that is its weight, which is there
anyway, and not its input; of a product both factors; of a norm its input, in float32; of attention queries, keys,
values, the output and one number per head and token (FlashAttention, arXiv 2205.14135, section 3.1), so no scores.
A trained low-rank matrix needs its input as well, in its own precision. Where no gradient passes, nothing is kept:
of the layers below the first one that the injection serves, and of the attention in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import nn
from transformers import PreTrainedModel

from bindllm.errors import DecoderError
from bindllm.model.adapter import TARGETS, AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.injection import InjectConfig

FLOAT = 4
"""Bytes of a number of everything that is trained, and of what norms and the loss compute with."""

_INDEX = 8
_NORMS_OF_HEADS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class TrainingStep:
    """The batch of one step, and how it is run.

    Args:
        rows: rows of a batch, B; a preference pair is two rows.
        tokens: tokens of a row with its padding, T.
        supervised: supervised tokens of the whole batch, N.
        groups: media groups of a row.
        checkpointing: whether only each layer's input is kept, and the rest is computed again.
    """

    rows: int
    tokens: int
    supervised: int
    groups: int = 1
    checkpointing: bool = False

    @property
    def positions(self) -> int:
        """Tokens of the batch, padding among them: B * T."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder that activations have.

    Args:
        width: of the residual stream, D.
        inner: of the feed-forward layer.
        queries: of all query heads together.
        keys: of all key heads together; the values have the same.
        heads: number of query heads, H.
        layers: L.
        vocabulary: V.
        norms: norms of a layer over the residual stream.
        head_norms: whether queries and keys are normalised head by head (Qwen3).
    """

    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    layers: int
    vocabulary: int
    norms: int
    head_norms: bool

    @classmethod
    def of(cls, decoder: PreTrainedModel) -> Self:
        """Read them off a decoder without adapter and injection; its weights may be on the meta device.

        Raises:
            DecoderError: its layers lack a projection, or hold several feed-forward layers (a mixture of experts).
        """
        config, layers = decoder.config.get_text_config(), decoder.get_decoder().layers
        linear: dict[str, list[nn.Module]] = {name: [] for name in TARGETS}
        norms = []
        for path, module in layers[0].named_modules():
            name = path.rpartition(".")[2]
            if name in linear:
                linear[name].append(module)
            if type(module).__name__.endswith("Norm"):
                norms.append(name)
        if odd := [name for name, found in linear.items() if len(found) != 1]:
            raise DecoderError(
                f"the memory of {type(decoder).__name__} cannot be estimated: a layer has not exactly one "
                f"{', '.join(odd)}. Decoders of the LLaMA shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2, ...) have"
            )
        size = {name: found[0].out_features for name, found in linear.items()}
        return cls(
            width=config.hidden_size,
            inner=size["gate_proj"],
            queries=size["q_proj"],
            keys=size["k_proj"],
            heads=config.num_attention_heads,
            layers=len(layers),
            vocabulary=config.vocab_size,
            norms=sum(name not in _NORMS_OF_HEADS for name in norms),
            head_norms="q_norm" in norms,
        )


@dataclass(frozen=True)
class Activations:
    """Works out the bytes of the activations of one model.

    Args:
        widths: of the decoder.
        number: bytes of a number of the decoder: 4 for float32, 2 for bfloat16 and float16.
        step: the batch.
        bind: shape of the bind network.
        embedding_size: E.
        inject: which layers are served, and how.
        adapter: what of the decoder is tuned; None: nothing.
        trainable: names of the trained groups.
        inputs: whether frozen layers keep their inputs all the same, as those of int8 do.
    """

    widths: Widths
    number: int
    step: TrainingStep
    bind: BindConfig
    embedding_size: int
    inject: InjectConfig
    adapter: AdapterConfig | None
    trainable: frozenset[str]
    inputs: bool = False

    def kept(self) -> int:
        """Bytes kept at the end of the forward pass, those of the loss left out."""
        size, step = self.widths, self.step
        if step.checkpointing:
            layers = self._layers * step.positions * size.width * self.number
        else:
            layers = self._layers * self.layer() - self._spared()
        rotary = 2 * step.tokens * (size.queries // size.heads) * self.number
        # The supervised tokens, and where they are: row and column.
        places = 3 * _INDEX * step.supervised
        return layers + step.positions * self._norm(size.width) + rotary + places + self._bound()

    def layer(self) -> int:
        """Bytes that one layer keeps when nothing is computed again."""
        size = self.widths
        others = self._norm(size.width) * (size.norms - 1)
        feed_forward = 3 * size.inner * self.number
        return self.step.positions * (self._attention() + others + feed_forward + self._inputs())

    def working(self) -> int:
        """Bytes that the backward pass of one layer needs for the gradients it is computing."""
        size = self.widths
        # The product of the feed-forward layer hands its gradient on to both factors.
        products = 3 * size.inner * self.number
        if self._tuned and self.number != FLOAT:
            # What reaches the input of a low-rank matrix is cast back, and added to what the frozen layer gives.
            products = max(products, (FLOAT + 2 * self.number) * size.inner)
        work = self.step.positions * (products + 2 * size.width * self.number)
        if self._tuned and self.adapter.dora:
            # peft measures the rows of a whole matrix: the frozen one, the low-rank one and their sum, of which it
            # makes the second with an identity matrix as wide as the input.
            work += FLOAT * (3 * size.width * size.inner + size.inner**2)
        return work

    def logits(self) -> int:
        """Numbers of the logits: N * V."""
        return self.step.supervised * self.widths.vocabulary

    @property
    def _tuned(self) -> bool:
        return self.adapter is not None and "adapter" in self.trainable

    @property
    def _bound_trained(self) -> bool:
        return bool({"bind", "inject"} & self.trainable)

    @property
    def _served(self) -> int:
        return self.widths.layers if self.inject.layers is None else self.inject.layers

    @property
    def _layers(self) -> int:
        """Number of layers that a gradient passes."""
        return self.widths.layers if self._tuned else self._served

    def _norm(self, width: int, count: int = 1) -> int:
        """Bytes of a norm for one token: its input and one factor; a tuned one keeps the normalised input too."""
        tuned = self._tuned and self.adapter.norm
        return FLOAT * (width + count) + (self.number * width if tuned else 0)

    def _attention(self) -> int:
        """Bytes of attention and of the norm ahead of it, for one token."""
        size = self.widths
        heads = 0
        if size.head_norms:
            per_key = size.heads * size.keys // size.queries
            heads = self._norm(size.queries, size.heads) + self._norm(size.keys, per_key)
        kept = (2 * size.queries + 2 * size.keys) * self.number + FLOAT * size.heads
        return self._norm(size.width) + heads + kept

    def _inputs(self) -> int:
        """Bytes for one token of the inputs of linear layers: those of the low-rank matrices, and those of int8."""
        size = self.widths
        # Into queries, keys and values; into the output; into gate and up; into down.
        shared = 2 * size.width + size.queries + size.inner
        own = 5 * size.width + size.queries + size.inner
        kept = shared * self.number if self.inputs else 0
        if self._tuned:
            # In float32 the layers share an input; a lower precision is cast for each of them.
            kept += FLOAT * (own if self.number != FLOAT else 0 if self.inputs else shared)
            kept += FLOAT * len(TARGETS) * self.adapter.rank
            if self.adapter.dora:
                # What the frozen and the low-rank matrices gave: both are scaled by a trained length.
                outputs = size.queries + 2 * size.keys + 2 * size.width + 2 * size.inner
                kept += (FLOAT + self.number) * outputs
        return kept

    def _spared(self) -> int:
        """Bytes that the first layer with a gradient does without: its input has none."""
        if self._tuned:
            return self.step.positions * FLOAT * (self.widths.width + 1)
        return self.step.positions * self._attention() if self.inject.kind == "value" else 0

    def _bound(self) -> int:
        """Bytes kept of bind network and injection: they run once for each media group, so this is little."""
        size, groups = self.widths, self.step.rows * self.step.groups
        if not self._bound_trained:
            return 0
        term = size.keys * self.number if self.inject.kind == "value" else size.width * FLOAT
        kept = self._served * term
        if "bind" in self.trainable:
            block = 4 * self.bind.expansion * size.width + 3 * size.width
            kept += FLOAT * (self.bind.depth * block + self.embedding_size)
        return groups * (kept + self.step.tokens * self.number)
