"""Published ImageBind-LLM adapters become checkpoint folders, given the base LLaMA and the encoders.

The base is never loaded: its sizes come from its config, and its numbers are compared tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bindllm.convert.base_model import check_base
from bindllm.convert.imagebind_llm import Shape, read_imagebind_llm
from bindllm.convert.keymap import Accounting
from bindllm.encoders import Encoder
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.card import write_card
from bindllm.model.checkpoint import REPORT, check_keys, write_checkpoint
from bindllm.model.decoder import DecoderConfig, find_folder, load_tokenizer, without_weights
from bindllm.model.injection import InjectConfig
from bindllm.model.pretrained import describe

LICENCE = (
    "the weights of ImageBind-LLM are published beside code under GPL-3, without a licence of their own; they derive "
    "from LLaMA and ImageBind (CC-BY-NC 4.0), both for non-commercial use: ask the authors before any other"
)

_ORIGIN = f"""\
Converted by bindllm from the published weights of ImageBind-LLM (https://arxiv.org/abs/2309.03905), {{phase}} phase;
`{REPORT}` of the converted folder tells what became of each of their tensors. Several media are fused as there, by
their plain weighted mean. Licence: {LICENCE}."""


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        shape: phase and sizes of the published file.
        accounting: what became of every tensor.
    """

    shape: Shape
    accounting: Accounting


def convert_imagebind_llm(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    base: DecoderConfig,
    encoders: Sequence[Encoder],
    accept_base: bool = False,
) -> Conversion:
    """Write a published adapter as a checkpoint folder.

    Args:
        state: the tensors by their published names.
        folder: where it goes.
        base: the Hugging Face copy of the LLaMA that it was trained on; where it names no template, it gets ``alpaca``,
            that of the published weights.
        encoders: the frozen encoders, of the adapter's embedding size.
        accept_base: go on although the base's numbers differ from those that the file was trained with.

    Raises:
        CheckpointError: unknown or missing tensors, another base, encoders of another size, or a folder that holds
            something else.
        DecoderError: the base's folder, config or tokenizer cannot be used.
    """
    adapted = read_imagebind_llm(state)
    check_base(adapted, find_folder(base), accept=accept_base)
    if (size := common_size(encoders)) != adapted.shape.embedding_size:
        raise CheckpointError(
            f"the adapter takes embeddings of size {adapted.shape.embedding_size}, the encoders give {size}: it was "
            "trained with ImageBind; give the folder of the converted imagebind_w3D.pth or imagebind_huge.pth"
        )
    model = _empty_model(adapted.shape, base, encoders)
    check_keys(model.trainable_state(), adapted.tensors, source="the published file")
    model.origin = _ORIGIN.format(phase=adapted.shape.phase)
    manifest = describe(model)
    write_checkpoint(
        folder,
        manifest,
        adapted.tensors,
        write_card(manifest),
        adapter_config=None if model.adapter is None else model.adapter.peft_config(),
        report=adapted.accounting,
    )
    return Conversion(adapted.shape, adapted.accounting)


def _empty_model(shape: Shape, base: DecoderConfig, encoders: Sequence[Encoder]) -> BindLLM:
    """Return the model that would load the tensors: names and shapes alone, and a tokenizer that has been tried."""
    decoder = replace(base, template=base.template or "alpaca")
    tokenizer = load_tokenizer(decoder)
    network = without_weights(find_folder(base))
    with torch.device("meta"):
        return BindLLM(
            network,
            tokenizer,
            decoder,
            encoders=encoders,
            bind=BindConfig(
                depth=shape.depth,
                expansion=shape.expansion,
                norm="layer" if shape.legacy else "rms",
                bias=shape.legacy,
                fusion="mean",
            ),
            inject=InjectConfig(layers=None if shape.served == shape.num_layers else shape.served),
            adapter=None if shape.rank is None else AdapterConfig(rank=shape.rank, bias=shape.bias),
        )
