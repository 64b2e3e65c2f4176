"""Read the adapter files of ImageBind-LLM (arXiv 2309.03905): find the phase and sizes, and rename the tensors.

Four kinds have the same names: after the first stage (bind network, queries and gates) or the second (LoRA, biases and
norms as well), with the bridge of the paper or the older one (LayerNorm and biases). A training checkpoint holds the
encoder and the base LLaMA too; they are not converted.

The published LLaMA rotates adjacent components of each head, Hugging Face rotates the two halves of a head. So the
rows of everything that makes queries and keys are reordered, including the LoRA and the bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bindllm.convert.keymap import ConversionReport, Rule, rename, require_weights
from bindllm.errors import CheckpointError

LICENSE = (
    "the weights of ImageBind-LLM are published next to code under GPL-3, without a license of their own; they derive "
    "from LLaMA and ImageBind (CC-BY-NC 4.0), both for non-commercial use: ask the authors before any other"
)
SOURCE = "the ImageBind-LLM checkpoint"

# The authors misspelled "llama" in some files.
_LAYER = r"lla?ma[.]layers[.](\d+)[.]"
# {} is empty in the names of the base's own tensors, and "lora_" in those of its LoRA.
_PROJECTIONS = {
    "attention[.]{}wq": "self_attn.q_proj",
    "attention[.]{}wk": "self_attn.k_proj",
    "attention[.]{}wv": "self_attn.v_proj",
    "attention[.]{}wo": "self_attn.o_proj",
    "feed_forward[.]{}w1": "mlp.gate_proj",
    "feed_forward[.]{}w2": "mlp.down_proj",
    "feed_forward[.]{}w3": "mlp.up_proj",
}
_UNBIASED = ("self_attn.k_proj", "self_attn.v_proj")
_NORMS = {
    rf"{_LAYER}attention_norm": r"model.layers.\1.input_layernorm",
    rf"{_LAYER}ffn_norm": r"model.layers.\1.post_attention_layernorm",
    r"lla?ma[.]norm": "model.norm",
}
_ENDS = {r"lla?ma[.]tok_embeddings": "model.embed_tokens", r"lla?ma[.]output": "lm_head"}
# LLaMA's names of the gate, down and up projections of SwiGLU.
_PARTS = {"norm": "norm", "f1": "gate", "f2": "down", "f3": "up"}
_ADAPTER = "adapter.base_model.model."


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, read from the tensors of an adapter file.

    Attributes:
        embedding_size: embedding size E of the encoder.
        width: width D of the decoder.
        num_layers: number of layers L of the decoder.
        num_heads: number of attention heads H of the decoder.
        served: number of layers, counted from the last, that have a query.
        depth: number of residual blocks of the bind network.
        expansion: inner width of the blocks divided by the decoder's width.
        legacy: whether the blocks are the older kind, with LayerNorm and biases.
        rank: rank of the LoRA; None after the first stage.
        bias: whether the projections have biases.
    """

    embedding_size: int
    width: int
    num_layers: int
    num_heads: int
    served: int
    depth: int
    expansion: int
    legacy: bool
    rank: int | None
    bias: bool

    @property
    def phase(self) -> str:
        """``pretrain`` or ``finetune``: the training stage after which the file was saved."""
        return "pretrain" if self.rank is None else "finetune"


@dataclass(frozen=True)
class Adapted:
    """A published adapter in our terms.

    Attributes:
        shape: sizes of the model.
        tensors: all trained tensors by our names.
        base: the decoder's own tensors in the file by Hugging Face's names, for comparison: always the norms, in a
            training checkpoint all of them.
        report: the outcome for every tensor.
    """

    shape: Shape
    tensors: dict[str, Tensor]
    base: dict[str, Tensor]
    report: ConversionReport


def is_imagebind_llm(state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are those of an ImageBind-LLM adapter or training checkpoint."""
    return "prefix_query.weight" in state and "image_bind_proj.weight" in state


def read_imagebind_llm(state: Mapping[str, Tensor]) -> Adapted:
    """Rename the tensors of a published checkpoint.

    Args:
        state: the tensors by their published names.

    Raises:
        CheckpointError: unknown tensors, missing or misshapen tensors that determine the sizes, or values that are
            not finite floating-point numbers.
    """
    shape = read_shape(state)
    renamed, report = rename(state, _rules(shape))
    report.require_complete(SOURCE)
    # Published gates are one tensor per layer; ours are one [L, H] for the layers that have a query.
    gates = [
        renamed.pop(f"injection.gates.{n}") for n in range(shape.num_layers - shape.served, shape.num_layers)
    ]
    renamed["injection.gates"] = torch.stack(gates)
    # PEFT gives all projections a bias or none, so the missing ones are zero.
    if shape.bias:
        for name in [name for name in renamed if name.endswith("lora_B.weight")]:
            bias = name.removesuffix("weight") + "bias"
            if any(part in name for part in _UNBIASED):
                # The published keys and values have no bias.
                renamed[bias] = renamed[name].new_zeros(len(renamed[name]))
    require_weights(renamed, source=SOURCE)
    return Adapted(shape, renamed, rename(state, _base_rules(shape))[0], report)


def read_shape(state: Mapping[str, Tensor]) -> Shape:
    """Return phase and sizes, read from names and shapes.

    Raises:
        CheckpointError: a tensor that determines them is missing, or two contradict each other.
    """
    gates = {
        int(match[1]): name for name in state if (match := re.fullmatch(rf"{_LAYER}attention[.]gate", name))
    }
    blocks = [name for name in state if re.fullmatch(r"image_bind_norm_\d+[.]weight", name)]
    needed = ["image_bind_proj.weight", "prefix_query.weight", "image_bind_f1_1.weight"]
    missing = [name for name in needed if name not in state]
    # Layers are counted from 0: a missing gate would shift all later ones.
    if missing or not gates or sorted(gates) != list(range(len(gates))):
        lacks = (
            ", ".join([*missing, *(() if gates else ["layers.0.attention.gate"])]) or "gates of some layers"
        )
        raise CheckpointError(
            f"{SOURCE} lacks {lacks}; a whole file has the bind network, the queries and all gates"
        )
    # One projection is enough: all LoRA matrices have the same rank.
    ranks = [name for name in state if re.fullmatch(rf"{_LAYER}attention[.]lora_wq_l1[.]weight", name)]
    for name in [*needed, *ranks]:
        if state[name].dim() != 2 or not state[name].numel():
            raise CheckpointError(
                f"{SOURCE}: {name} has shape {list(state[name].shape)}, expected a matrix; it is damaged"
            )
    heads = sorted({state[name].numel() for name in gates.values()})
    if len(heads) != 1 or not heads[0]:
        raise CheckpointError(
            f"{SOURCE} has gates for {' and '.join(map(str, heads))} heads: expected the same number in each layer"
        )
    width, embedding_size = state["image_bind_proj.weight"].shape
    served = len(state["prefix_query.weight"])
    if served > len(gates):
        raise CheckpointError(
            f"{SOURCE} has {served} queries for {len(gates)} layers: expected at most one for each"
        )
    return Shape(
        embedding_size=embedding_size,
        width=width,
        num_layers=len(gates),
        num_heads=heads[0],
        served=served,
        depth=len(blocks),
        expansion=len(state["image_bind_f1_1.weight"]) // width,
        legacy="image_bind_norm_1.bias" in state,
        rank=len(state[ranks[0]]) if ranks else None,
        bias=any(re.fullmatch(rf"{_LAYER}.*[.]bias", name) for name in state),
    )


def halve_rotation(rows: Tensor, *, num_heads: int) -> Tensor:
    """Reorder the rows of every head from adjacent pairs to pairs of halves: even components first, then the odd.

    Args:
        rows: [H * head size, ...], the weight or bias of a projection to queries or keys.
        num_heads: number of heads H.

    Examples:
        >>> halve_rotation(torch.arange(8), num_heads=2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    # [H, pairs, 2, ...] -> [H, 2, pairs, ...]: adjacent components become two halves.
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rotation(ours: str, shape: Shape) -> partial[Tensor] | None:
    """Return the change of a projection's rows; published models have as many key heads as query heads."""
    if ours in ("self_attn.q_proj", "self_attn.k_proj"):
        return partial(halve_rotation, num_heads=shape.num_heads)
    return None


def _rules(shape: Shape) -> list[Rule]:
    # Queries serve the last layers; the gates of earlier layers have no effect.
    unserved = shape.num_layers - shape.served
    # How to read this: bind network, queries, gates, LoRA with biases, norms, and then the tensors that are dropped.
    rules = [Rule(r"image_bind_proj[.](weight|bias)", r"bind.projection.\1")]
    for number in range(1, shape.depth + 1):
        rules += [
            Rule(rf"image_bind_{theirs}_{number}[.](weight|bias)", rf"bind.blocks.{number - 1}.{ours}.\1")
            for theirs, ours in _PARTS.items()
        ]
    rules += [Rule(r"prefix_query[.]weight", "injection.queries")]
    if unserved:
        numbers = "|".join(map(str, range(unserved)))
        why = f"no query serves the layer: there are {shape.served}, for the last layers"
        rules.append(Rule(rf"lla?ma[.]layers[.](?:{numbers})[.]attention[.]gate", None, why))
    rules.append(Rule(rf"{_LAYER}attention[.]gate", r"injection.gates.\1", change=torch.flatten))
    for theirs, ours in _PROJECTIONS.items():
        place, change = rf"{_ADAPTER}model.layers.\1.{ours}", _rotation(ours, shape)
        rules.append(Rule(_LAYER + rf"{theirs.format('lora_')}_l1[.]weight", f"{place}.lora_A.weight"))
        # Rows of lora_B are components of a head; lora_A reads the input, whose order stays.
        rules.append(
            Rule(_LAYER + rf"{theirs.format('lora_')}_l2[.]weight", f"{place}.lora_B.weight", change=change)
        )
        if ours not in _UNBIASED:
            rules.append(Rule(_LAYER + rf"{theirs.format('')}[.]bias", f"{place}.lora_B.bias", change=change))
    # Only the second stage tunes the norms.
    if shape.rank is not None:
        rules += [Rule(rf"{theirs}[.]weight", f"{_ADAPTER}{ours}.weight") for theirs, ours in _NORMS.items()]
    compared = "the base model's own: compared with the given one, not converted"
    return [
        *rules,
        *(Rule(rule.pattern, None, compared) for rule in _base_rules(shape)),
        Rule(r"(?:lla?ma[.])?rope[.]freqs", None, "computed from the configuration"),
        Rule(r"(?:lla?ma[.])?prefix_projector_norm[.].*", None, "left over from another model, unused"),
        Rule(r"image_bind[.].*", None, "the encoder: converted from its own file"),
    ]


def _base_rules(shape: Shape) -> list[Rule]:
    """Rules from the base model inside a checkpoint to the names of a Hugging Face copy."""
    matrices = [
        Rule(
            _LAYER + rf"{theirs.format('')}[.]weight",
            rf"model.layers.\1.{ours}.weight",
            change=_rotation(ours, shape),
        )
        for theirs, ours in _PROJECTIONS.items()
    ]
    return [
        *matrices,
        *(Rule(rf"{theirs}[.]weight", f"{ours}.weight") for theirs, ours in (_NORMS | _ENDS).items()),
    ]
