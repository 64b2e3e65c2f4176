"""Adapter files of ImageBind-LLM (arXiv 2309.03905): with base LLaMA and encoders they become checkpoint folders.

Four kinds have the same names: after the first stage (bind network, queries and gates) or the second (LoRA, biases and
norms as well), with the bridge of the paper or the older one (LayerNorm and biases). A training checkpoint holds the
encoder and the base LLaMA too; they are not converted.

The published LLaMA rotates adjacent components of each head, Hugging Face rotates the two halves of a head. So the
rows of everything that makes queries and keys are reordered, including the LoRA and the bias.

The base is never loaded: its sizes come from its config, and its weights are compared tensor by tensor. An adapter
on another base loads without an error and gives nonsense answers, so other bases are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bindllm.convert.foreign import SafetensorsFolder
from bindllm.convert.keymap import REPORT, ConversionReport, Rule, rename, require_weights
from bindllm.encoders import Encoder
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.card import write_card
from bindllm.model.checkpoint import ADAPTER_PREFIX, check_keys, write_checkpoint
from bindllm.model.decoder import DecoderConfig, check_weights, load_tokenizer, read_config
from bindllm.model.injection import InjectConfig

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
_ADAPTER = f"{ADAPTER_PREFIX}base_model.model."

ROUNDING = 2.0**-8
"""Largest relative difference between two copies of a tensor in different precisions (bfloat16 keeps 8 bits)."""

SMALLEST_CORRELATION = 0.5
"""Median correlation, over the norms, that a fine-tuned copy must keep with its base.

The second stage moves each weight of a norm by about 0.01 to 0.05 (AdamW at 1.25e-4 and falling, no decay). This
shifts and roughens the pattern over the channels but does not replace it. The patterns of two models that were trained
independently are uncorrelated. A base that was itself tuned from the right one cannot be recognized this way.
"""

_ACCEPT = "Give the right base; to convert onto this one anyway, add --accept_base"
_ORIGIN = f"""\
Converted by bindllm from the published weights of ImageBind-LLM (https://arxiv.org/abs/2309.03905), {{phase}} phase;
`{REPORT}` of the converted folder lists the outcome for each of their tensors. Several media are fused as there, by
their plain weighted mean. License: {LICENSE}."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, read from the tensors of an adapter file.

    Attributes:
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
        tensors: all trained tensors by our names.
        base: the decoder's own tensors in the file by Hugging Face's names, for comparison: always the norms, in a
            training checkpoint all of them.
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

    Raises:
        CheckpointError: unknown tensors, missing or misshapen tensors that determine the sizes, or values that are
            not finite floating-point numbers.
    """
    shape = read_shape(state)
    renamed, report = rename(state, _rules(shape))
    report.require_complete(SOURCE)
    # Before the gates are joined: the whole would hide the type of one.
    require_weights(renamed, source=SOURCE)
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
                renamed[bias] = renamed[name].new_zeros(renamed[name].shape[:1])
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
        # At least 1, so that a file with fewer rows is refused by the name of the tensor.
        expansion=max(1, len(state["image_bind_f1_1.weight"]) // width),
        legacy="image_bind_norm_1.bias" in state,
        rank=len(state[ranks[0]]) if ranks else None,
        bias=any(re.fullmatch(rf"{_LAYER}.*[.]bias", name) for name in state),
    )


def halve_rotation(rows: Tensor, *, num_heads: int) -> Tensor:
    """Reorder the rows of every head from adjacent pairs to pairs of halves: even components first, then the odd.

    Args:
        rows: [H * head size, ...], the weight or bias of a projection to queries or keys.

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


def convert_imagebind_llm(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    base: DecoderConfig,
    encoders: Sequence[Encoder],
    accept_base: bool = False,
) -> Adapted:
    """Write a published adapter as a checkpoint folder.

    Args:
        base: the Hugging Face copy of the LLaMA that the adapter was trained on; without a template it gets
            ``alpaca``, the template of the published weights.
        encoders: the frozen encoders, of the adapter's embedding size.
        accept_base: convert although the base's weights differ from those that the file was trained with.

    Returns:
        the adapter as it was read: its sizes, tensors and report.

    Raises:
        CheckpointError: unknown or missing tensors, another base, encoders of another size, or a folder that holds
            something else.
        DecoderError: the base's folder, config or tokenizer cannot be used.
    """
    adapted = read_imagebind_llm(state)
    _check_base(adapted, base.folder(), accept=accept_base)
    if (size := common_size(encoders)) != adapted.shape.embedding_size:
        raise CheckpointError(
            f"the adapter takes embeddings of size {adapted.shape.embedding_size}, the encoders give {size}: it was "
            "trained with ImageBind; give the folder of the converted imagebind_w3D.pth or imagebind_huge.pth"
        )
    # On the meta device: names and shapes are enough, and a base of 7B parameters takes no memory.
    model = _empty_model(adapted.shape, base, encoders)
    # Before anything is written: each tensor has a place in the model, and each place a tensor.
    check_keys(model.trainable_state(), adapted.tensors, source=SOURCE)
    model.origin = _ORIGIN.format(phase=adapted.shape.phase)
    manifest = model.describe()
    write_checkpoint(
        folder,
        manifest,
        adapted.tensors,
        write_card(manifest),
        adapter_config=None if model.adapter is None else model.adapter.peft_config(),
        files={REPORT: adapted.report.text()},
    )
    return adapted


def _empty_model(shape: Shape, base: DecoderConfig, encoders: Sequence[Encoder]) -> BindLLM:
    """Return the model that would load the tensors: on the meta device, but with a tokenizer that has been tried."""
    # The published weights were trained on Alpaca's texts.
    decoder = replace(base, template=base.template or "alpaca")
    tokenizer = load_tokenizer(decoder)
    return BindLLM.build_empty(
        decoder,
        tokenizer,
        encoders=encoders,
        bind=BindConfig(
            depth=shape.depth,
            expansion=shape.expansion,
            # The older bridge has LayerNorm and biases, the bridge of the paper RMSNorm without biases.
            norm="layer" if shape.legacy else "rms",
            bias=shape.legacy,
            # As in the released code: the weighted mean, not scaled to unit length.
            fusion="mean",
        ),
        inject=InjectConfig(layers=None if shape.served == shape.num_layers else shape.served),
        adapter=None if shape.rank is None else AdapterConfig(rank=shape.rank, bias=shape.bias),
    )


def _check_base(adapted: Adapted, folder: Path, *, accept: bool) -> None:
    """Raise if a base model does not belong to an adapter: not a LLaMA, other sizes, or other weights."""
    config = read_config(folder)
    if config.model_type != "llama":
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}; the adapter belongs to a LLaMA: give its "
            "Hugging Face folder"
        )
    # Even if the weights are accepted: other sizes cannot work.
    _check_sizes(adapted, config, folder)
    check_weights(folder)
    if not accept:
        _check_weights(adapted, SafetensorsFolder(folder), folder)


def _check_sizes(adapted: Adapted, config: PretrainedConfig, folder: Path) -> None:
    shape, tensors = adapted.shape, adapted.tensors
    found = {
        "width": (shape.width, config.hidden_size),
        "layers": (shape.num_layers, config.num_hidden_layers),
        "heads": (shape.num_heads, config.num_attention_heads),
        # Grouped keys and values are newer than these adapters.
        "key/value heads": (shape.num_heads, config.num_key_value_heads),
    }
    # The inner width shows in the LoRA, or in the base's own weights if the file holds them.
    inner = [tensor for name, tensor in tensors.items() if name.endswith("gate_proj.lora_B.weight")]
    inner += [tensor for name, tensor in adapted.base.items() if name.endswith("gate_proj.weight")]
    if inner:
        found["inner width"] = (len(inner[0]), config.intermediate_size)
    if "model.embed_tokens.weight" in adapted.base:
        found["vocabulary"] = (len(adapted.base["model.embed_tokens.weight"]), config.vocab_size)
    wrong = [
        f"{size} {theirs} in the adapter, {ours} in the base"
        for size, (theirs, ours) in found.items()
        if theirs != ours
    ]
    if wrong:
        raise CheckpointError(f"{folder} is not the base model of this adapter: {'; '.join(wrong)}")


def _check_weights(adapted: Adapted, base: SafetensorsFolder, folder: Path) -> None:
    """Compare every tensor of the decoder that the file holds; the second stage tuned the norms."""
    tuned = adapted.shape.phase == "finetune"
    correlations = []
    for name, theirs in adapted.base.items():
        # Tied models keep one matrix for both ends.
        ours = base["model.embed_tokens.weight" if name == "lm_head.weight" and name not in base else name]
        # The second stage tuned the norms, so they can only be similar; everything else must be equal.
        is_norm = name.endswith("norm.weight")
        if tuned and is_norm:
            correlations.append(_correlation(theirs, ours))
        elif not _same(theirs, ours):
            raise CheckpointError(
                f"{folder} is not the base model of this adapter: {name} differs from the one in training "
                f"{_difference(theirs, ours)}. {_ACCEPT}"
            )
    # The median, because training may move a few norms far.
    if correlations and (median := torch.tensor(correlations).median().item()) < SMALLEST_CORRELATION:
        raise CheckpointError(
            f"{folder} is not the base model of this adapter: its norms and the tuned ones of the file have a median "
            f"correlation of {median:.2f}, expected at least {SMALLEST_CORRELATION}. {_ACCEPT}"
        )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(
        theirs.float(), ours.float(), rtol=ROUNDING, atol=1e-6
    )


def _difference(theirs: Tensor, ours: Tensor) -> str:
    if theirs.shape != ours.shape:
        return f"in shape: {list(ours.shape)}, expected {list(theirs.shape)}"
    return f"by up to {(theirs.float() - ours.float()).abs().max().item():.2g}"


def _correlation(theirs: Tensor, ours: Tensor) -> float:
    """Return the correlation over the channels; for constant norms, 1 if they are equal, else 0."""
    if theirs.shape != ours.shape:
        return 0.0
    a, b = (tensor.double() - tensor.double().mean() for tensor in (theirs, ours))
    size = (a.norm() * b.norm()).item()
    # Differences of a few units in the last place are rounding, not a pattern.
    if size <= 1e-6 * len(a):
        return float(_same(theirs, ours))
    return ((a @ b) / size).item()
