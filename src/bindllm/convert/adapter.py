"""An ImageBind-LLM adapter with its base LLaMA and its encoders becomes a checkpoint folder.

The base is never loaded: its sizes come from its config, and its weights are compared tensor by tensor. An adapter
on another base loads without an error and gives nonsense answers, so other bases are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.atomic import read_json
from bindllm.convert.foreign import SafetensorsFolder
from bindllm.convert.imagebind_llm import LICENSE, SOURCE, Adapted, Shape, read_imagebind_llm
from bindllm.convert.keymap import REPORT
from bindllm.encoders import Encoder
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import check_keys, write_card, write_checkpoint
from bindllm.model.decoder import DecoderConfig, check_weights, load_tokenizer
from bindllm.model.injection import InjectConfig

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
        state: the tensors by their published names.
        folder: the checkpoint folder to write.
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
    check_base(adapted, base.folder(), accept=accept_base)
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


def check_base(adapted: Adapted, folder: str | Path, *, accept: bool = False) -> None:
    """Raise if a base model does not belong to an adapter.

    Args:
        adapted: the adapter as read from the published file.
        folder: the base model's Hugging Face folder.
        accept: accept other weights; the sizes must fit in any case.

    Raises:
        CheckpointError: not a LLaMA, other sizes, or other weights; the message names them.
        DecoderError: the base lacks weights.
    """
    config = _read_config(Path(folder))
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"{folder} holds a model of type {config.get('model_type')!r}; the adapter belongs to a LLaMA: give its "
            "Hugging Face folder"
        )
    # Even if the weights are accepted: other sizes cannot work.
    _check_sizes(adapted, config, folder)
    check_weights(Path(folder))
    if not accept:
        _check_weights(adapted, SafetensorsFolder(folder), folder)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(
        folder / "config.json", CheckpointError, "give the Hugging Face folder of the base model"
    )
    return config if isinstance(config, dict) else {}


def _check_sizes(adapted: Adapted, config: dict[str, Any], folder: str | Path) -> None:
    shape, tensors = adapted.shape, adapted.tensors
    found = {
        "width": (shape.width, config.get("hidden_size")),
        "layers": (shape.num_layers, config.get("num_hidden_layers")),
        "heads": (shape.num_heads, config.get("num_attention_heads")),
        # Grouped keys and values are newer than these adapters.
        "key/value heads": (
            shape.num_heads,
            config.get("num_key_value_heads", config.get("num_attention_heads")),
        ),
    }
    # The inner width shows in the LoRA, or in the base's own weights if the file holds them.
    inner = [tensor for name, tensor in tensors.items() if name.endswith("gate_proj.lora_B.weight")]
    inner += [tensor for name, tensor in adapted.base.items() if name.endswith("gate_proj.weight")]
    if inner:
        found["inner width"] = (len(inner[0]), config.get("intermediate_size"))
    if "model.embed_tokens.weight" in adapted.base:
        found["vocabulary"] = (len(adapted.base["model.embed_tokens.weight"]), config.get("vocab_size"))
    wrong = [
        f"{size} {theirs} in the adapter, {ours} in the base"
        for size, (theirs, ours) in found.items()
        if theirs != ours
    ]
    if wrong:
        raise CheckpointError(f"{folder} is not the base model of this adapter: {'; '.join(wrong)}")


def _check_weights(adapted: Adapted, base: SafetensorsFolder, folder: str | Path) -> None:
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
                f"{folder} is not the base model of this adapter: {name} differs from the one in training by up to "
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
        return f"its shape ({list(ours.shape)} for {list(theirs.shape)})"
    return f"{(theirs.float() - ours.float()).abs().max().item():.2g}"


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
