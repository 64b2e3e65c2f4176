"""A tuned decoder as a plain Hugging Face folder, for programs without bindllm: its adapter merged, or its weights.

The effect of the adapter on text is folded into the weights (``W + scale * B A``, in float32, rounded once), so the
logits of the folder are those of the checkpoint without media, to that rounding. Bind network and injection cannot be
merged: no plain model has an input for media. The folder cannot be their base either: injection kind ``value`` uses the
decoder's own value projection without the adapter, and the folder no longer holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bindllm import __version__
from bindllm.atomic import atomic_folder, check_replaceable, not_finite, write_json
from bindllm.errors import CheckpointError, InputError, check_choice
from bindllm.model.adapter import (
    TARGETS,
    Adapter,
    AdapterConfig,
    choose_targets,
    enable_biases,
    lacking_biases,
)
from bindllm.model.card import license_of
from bindllm.model.checkpoint import ADAPTER_PREFIX, check_keys, read_manifest, read_tuned, read_weights
from bindllm.model.decoder import (
    DTYPES,
    DecoderConfig,
    load_decoder,
    load_tokenizer,
    read_config,
    without_weights,
)
from bindllm.model.generation import answer_settings
from bindllm.model.groups import DECODER
from bindllm.model.pretrained import read_configs, read_decoder

# An output folder with this file may be replaced, any other content may not.
RECORD = "bindllm_export.json"
"""Marks an exported folder, and names its checkpoint and decoder."""

# Usual size of a shard on the Hugging Face hub.
_SHARD = "5GB"


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Attributes:
        num_merged: number of projections that an adapter was merged into.
        num_replaced: number of the decoder's norms that were replaced by tuned ones.
        quantized: how the decoder was quantized in training, or None.
    """

    folder: Path
    dtype: str
    num_merged: int
    num_replaced: int
    quantized: str | None


def export_decoder(
    checkpoint: str | Path, output: str | Path, *, decoder: str | None = None, dtype: str | None = None
) -> Export:
    """Write the tuned decoder of a checkpoint as one plain Hugging Face folder, in one step; no GPU is needed.

    The adapter is merged into the decoder's own files, even if training held them in 4 or 8 bits.

    Args:
        checkpoint: a checkpoint folder with an adapter, or a decoder that was tuned as a whole; its encoders are not
            needed.
        output: the output folder. An earlier export there is replaced, any other non-empty folder is refused.
        decoder: folder of the decoder, if it is not at the path that the checkpoint names.
        dtype: a name of `bindllm.model.decoder.DTYPES`; None: that of the decoder's files.

    Raises:
        CheckpointError: the checkpoint has no tuned decoder, has biases that this family of decoders cannot hold, names
            another decoder, is damaged, or has weights outside the range of the dtype.
        InputError: an unknown dtype, or an output folder that holds something else.
    """
    output = Path(output)
    # How to read this: every check runs before the decoder is loaded, which may take minutes.
    manifest = read_manifest(checkpoint)
    adapter = read_configs(checkpoint, manifest)["adapter"]
    config = read_decoder(checkpoint, manifest, decoder=decoder)
    # The decoder may be an earlier export, and the checkpoint still needs it.
    if output.resolve() in (Path.cwd(), Path(checkpoint).resolve(), config.folder().resolve()):
        raise InputError(f"{output} cannot be the output: name a folder that is not there yet")
    check_replaceable(output, RECORD, InputError, kind="an earlier export")
    _check_tuned(checkpoint, config, adapter)
    plain = _plain_config(config, adapter, checkpoint)
    of_files, dtype = _choose_dtypes(dtype, plain)
    tokenizer = load_tokenizer(config)
    # Always the full-precision files: merging into packed weights would round twice.
    network = load_decoder(replace(config, dtype=of_files, quantize=None), device="cpu")
    # Bind network and injection stay behind; a plain folder has no input for media.
    tensors = {k: v for k, v in read_weights(checkpoint, manifest).items() if k.startswith(ADAPTER_PREFIX)}
    if config.tuned:
        _take_weights(network.float(), read_tuned(checkpoint, manifest, DECODER), source=str(checkpoint))
    num_merged, num_replaced = merge(network, adapter, tensors, DTYPES[dtype], source=str(checkpoint))
    _take_config(network, has_biases=adapter is not None and bool(adapter.bias))
    # The end of an answer is the template's, and recommendations for the plain decoder do not hold for a tuned one.
    network.generation_config = answer_settings(network, tokenizer)
    for part in (network.config, network.config.get_text_config()):
        part.eos_token_id = network.generation_config.eos_token_id
    done = Export(output, dtype, num_merged, num_replaced, manifest["decoder"].get("quantize"))
    with atomic_folder(output) as part:
        network.save_pretrained(part, max_shard_size=_SHARD)
        tokenizer.save_pretrained(part)
        write_json(part / RECORD, _record(checkpoint, manifest, done))
        (part / "README.md").write_text(_card(config, checkpoint, manifest, done), encoding="utf-8")
    return done


def _take_weights(decoder: PreTrainedModel, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Replace the weights of a plain decoder by tuned ones."""
    own = dict(decoder.named_parameters())
    check_keys(own, tensors, source=source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def merge(
    decoder: PreTrainedModel,
    config: AdapterConfig | None,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    source: str,
) -> tuple[int, int]:
    """Fold an adapter into a plain decoder.

    Args:
        decoder: without adapter, injection or quantization; changed in place.
        config: the adapter's config; None: the decoder has no adapter, and only its dtype changes.

    Returns:
        the numbers of merged projections and of replaced norms.

    Raises:
        CheckpointError: tensors that do not fit, or merged weights that are outside the range of the dtype.
    """
    # peft builds its layers around the plain ones, and its own merge computes W + scale * B A.
    parameters = {} if config is None else Adapter(decoder, config).parameters()
    check_keys(parameters, dict(tensors), source=source)
    num_merged = num_replaced = 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        # A list, since submodules are replaced while iterating.
        for name, module in list(decoder.named_modules()):
            parts = dict(module.named_children())
            if "lora_A" in parts:
                num_merged += 1
                # The wrappers of several tensors of one module are nested, and are merged with the outer one.
                if not name.endswith(".base_layer"):
                    decoder.set_submodule(name, _merged(module).to(dtype))
            elif "modules_to_save" in parts:
                # peft keeps a tuned copy next to each norm; the copy replaces the original.
                (norm,) = module.modules_to_save.values()
                decoder.set_submodule(name, norm)
                num_replaced += 1
    decoder.to(dtype).requires_grad_(False)
    # float16 ends at 65504, and larger weights become infinite.
    if wrong := not_finite(decoder.state_dict()):
        raise CheckpointError(
            f"{source}: merged weights are infinite in {str(dtype).removeprefix('torch.')}: {wrong}. Give another "
            "dtype (bfloat16 has the range of float32), or export an earlier checkpoint"
        )
    return num_merged, num_replaced


def _merged(layer: nn.Module) -> nn.Module:
    """Return the projection, or the experts, with the adapter added, in float32, so that the sum is rounded once."""
    # In float32: in bfloat16 each addition would round.
    linear = layer.get_base_layer().float()
    if not isinstance(linear, nn.Linear | Conv1D):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    # A plain projection without bias gets one for peft to add the adapter's bias to.
    if linear.bias is None and any(layer.lora_bias.values()):
        linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    layer.merge()
    return linear


def _check_tuned(checkpoint: str | Path, config: DecoderConfig, adapter: AdapterConfig | None) -> None:
    """Raise a `CheckpointError` if a checkpoint has no tuned decoder, or one whose adapter cannot be merged."""
    if adapter is None and not config.tuned:
        raise CheckpointError(
            f"{checkpoint} has no adapter and no tuned decoder: its decoder is as it was, so {config.name} is the "
            "plain folder already. What was trained, bind network and injection, cannot be part of one: "
            f"BindLLM.from_pretrained({str(checkpoint)!r}) loads it"
        )
    if adapter is not None and adapter.media_only:
        raise CheckpointError(
            f"the adapter of {checkpoint} serves only tokens that listen to media (adapter.media_only), and a plain "
            "folder would apply it to all: use the checkpoint as it is (BindLLM.from_pretrained)"
        )


def _plain_config(
    config: DecoderConfig, adapter: AdapterConfig | None, checkpoint: str | Path
) -> PretrainedConfig:
    """Return the config of the merged decoder, with biases switched on if the adapter has them.

    Raises:
        CheckpointError: the family has no such biases, or the decoder's files are quantized.
    """
    folder = config.folder()
    plain = read_config(folder)
    if plain.to_dict().get("quantization_config"):
        raise CheckpointError(
            f"the files of {config.name} are quantized themselves: nothing can be merged into them. Load the "
            "checkpoint as it is (BindLLM.from_pretrained)"
        )
    if adapter is None or not adapter.bias:
        return plain
    enable_biases(plain)
    targets = choose_targets(without_weights(folder, plain), adapter)
    if lacking := lacking_biases(plain, targets):
        raise CheckpointError(
            f"the adapter of {checkpoint} has biases for all projections, and a plain {plain.model_type} model has "
            f"none for {', '.join(lacking)}, nor a setting for them, so they cannot be merged. Load the "
            f"checkpoint as it is (BindLLM.from_pretrained, or peft with {Path(checkpoint) / 'adapter'} on the plain "
            "decoder), or train with model.adapter.bias: false, which can be merged into every decoder"
        )
    return plain


def _take_config(network: PreTrainedModel, *, has_biases: bool) -> None:
    """Give a merged decoder the settings that its biases need, and check that they are all it has."""
    if has_biases:
        enable_biases(network.config)
        # The config knows biases of all layers or of none, and an adapter may leave layers out.
        for path, module in network.get_decoder().named_modules():
            if path.rpartition(".")[2] in TARGETS and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
    # A folder whose config and tensors disagree would load with random biases.
    expected = without_weights(network.name_or_path, network.config).state_dict()
    check_keys(expected, network.state_dict(), source="the merged decoder")


def _record(checkpoint: str | Path, manifest: dict[str, Any], done: Export) -> dict[str, Any]:
    """Return the content of `RECORD`: where the folder is from, and the parts that were skipped."""
    return {
        "bindllm": __version__,
        "checkpoint": str(checkpoint),
        "decoder": manifest["decoder"],
        "adapter": manifest["adapter"],
        **{name: manifest.get(name) for name in ("adapter_sha256", "decoder_sha256")},
        "dtype": done.dtype,
        "skipped": ["bind network", "injection"],
    }


def _card(config: DecoderConfig, checkpoint: str | Path, manifest: dict[str, Any], done: Export) -> str:
    """Return the text of the folder's model card."""
    name = config.name.rstrip("/").rsplit("/", 1)[-1]
    parts = ["the weights"] if config.tuned else []
    if manifest.get("adapter"):
        parts.append(f"the adapter ({done.num_merged} projections, {done.num_replaced} norms)")
    sentences = [
        f"A plain Hugging Face folder: `{config.name}` (license: {license_of(config.name)}) with {' and '.join(parts)} "
        f"of the bindllm checkpoint `{Path(checkpoint).name}`, in {done.dtype}.",
    ]
    if done.quantized:
        sentences.append(f"Training held the decoder in {done.quantized}; this is the full one.")
    sentences += [
        "It reads only text. The bind network and the injection, which bring images, audio and other media in, are "
        "not part of it and cannot be put on top of it: for media, load the checkpoint with bindllm "
        "(`BindLLM.from_pretrained`).",
    ]
    if manifest.get("origin"):
        sentences.append(manifest["origin"])
    return "\n\n".join([f"# {name}, tuned", *sentences]) + "\n"


def _choose_dtypes(asked: str | None, plain: PretrainedConfig) -> tuple[str, str]:
    """Return the precision of the decoder's files, and the one that is written."""
    if asked is not None:
        check_choice("dtype", asked, DTYPES)
    of_files = str(plain.dtype).removeprefix("torch.")
    of_files = of_files if of_files in DTYPES else "float32"
    return of_files, asked or of_files
