"""Point-Bind's published checkpoints: find the point encoder inside, rename its tensors, and write its folder.

Three published files hold one: `pointbind_i2pmae.pt`, `pointbind_pointbert.pt` (each with a whole ImageBind under
``bind.``) and the `imagebind_w3D.pth` that ImageBind-LLM uses (Point-BERT next to ImageBind's own names).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bindllm.convert.keymap import ConversionReport, Rule, rename, require_weights, write_encoder
from bindllm.encoders.pointbind.networks import GroupNetwork, build_network
from bindllm.errors import CheckpointError
from bindllm.model.checkpoint import check_keys

LICENSE = "published with MIT-licensed code; made from ImageBind, whose weights are CC-BY-NC 4.0 (no commercial use)"

# A tensor that only this variant has.
_MARKS = {"i2p-mae": "point_encoder.h_encoder.", "point-bert": "point_encoder.cls_token"}

# ImageBind's own tensors, with or without the prefix of Point-Bind's files; its point head is Point-Bind's.
_IMAGEBIND = r"(?:bind[.])?(modality_(?:preprocessors|trunks|heads|postprocessors)[.](?!point[.]).*)"
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_ENCODER = r"(?:point_trunk[.])?point_encoder[.]"


def _without_kernel(weight: Tensor) -> Tensor:
    """Turn a convolution over single points into a matrix: [out, in, 1] -> [out, in]."""
    return weight.squeeze(-1)


def _group_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of the network over a group; ``ours`` refers to the regex groups of ``theirs``."""
    rules = [Rule(rf"{theirs}(?:first|second)_conv[.]1[.]num_batches_tracked", None, "counts training steps")]
    # Layers 0 and 3 are convolutions, 1 is the batch norm after the first of them.
    for place, name in (("first_conv[.]0", "first"), ("first_conv[.]3", "second"),
                        ("second_conv[.]0", "third"), ("second_conv[.]3", "fourth")):  # fmt: skip
        rules.append(Rule(rf"{theirs}{place}[.]weight", f"{ours}{name}.weight", change=_without_kernel))
        rules.append(Rule(rf"{theirs}{place}[.]bias", f"{ours}{name}.bias"))
    for place, name in (("first_conv[.]1", "first_norm"), ("second_conv[.]1", "third_norm")):
        rules += [Rule(rf"{theirs}{place}[.]{part}", f"{ours}{name}.{part}") for part in _NORM_PARTS]
    return rules


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of a transformer block."""
    names = {
        "norm1": "attention_norm", "attn[.]qkv": "qkv", "attn[.]proj": "output",
        "norm2": "mlp_norm", "mlp[.]fc1": "widen", "mlp[.]fc2": "narrow",
    }  # fmt: skip
    return [
        Rule(rf"{theirs}{place}[.]{part}", f"{ours}{name}.{part}")
        for place, name in names.items()
        for part in ("weight", "bias")
    ]


# How to read a rule: published name (a pattern over all three files) -> our name, or None and why it is dropped.
_RULES = [
    Rule(r"logit_scale", None, "temperature of the training loss"),
    Rule(
        r"(?:bind[.])?modality_postprocessors?[._]point[.]1[.]log_logit_scale",
        None,
        "scale of the published output, which is 1; embeddings here have unit norm",
    ),
    Rule(r"(?:point_trunk[.])?pc_projection", "head.projection"),
    Rule(r"(?:bind[.]modality_head_point|modality_heads[.]point)[.]0[.](weight|bias)", r"head.norm.\1"),
    Rule(r"(?:bind[.]modality_head_point|modality_heads[.]point)[.]2[.]weight", "head.linear.weight"),
    Rule(rf"{_ENCODER}norm[.](weight|bias)", r"norm.\1"),
    # Point-BERT
    Rule(rf"{_ENCODER}cls_token", "class_token"),
    Rule(rf"{_ENCODER}cls_pos", "class_position"),
    Rule(rf"{_ENCODER}reduce_dim[.](weight|bias)", r"reduce.\1"),
    Rule(rf"{_ENCODER}pos_embed[.]([02])[.](weight|bias)", r"position.\1.\2"),
    *_group_rules(rf"{_ENCODER}encoder[.]", "groups."),
    *_block_rules(rf"{_ENCODER}blocks[.]blocks[.](\d+)[.]", r"blocks.\1."),
    # I2P-MAE
    Rule(
        rf"{_ENCODER}h_encoder[.]encoder_pos_embeds[.](\d)[.]([02])[.](weight|bias)",
        r"scales.\1.position.\2.\3",
    ),
    *_group_rules(rf"{_ENCODER}h_encoder[.]token_embed[.](\d)[.]", r"scales.\1.groups."),
    *_block_rules(
        rf"{_ENCODER}h_encoder[.]encoder_blocks[.](\d)[.]blocks[.](\d+)[.]", r"scales.\1.blocks.\2."
    ),
    Rule(_IMAGEBIND, None, "part of ImageBind, which has a folder of its own"),
]


def find_variant(state: Mapping[str, Tensor]) -> str | None:
    """Return "i2p-mae" or "point-bert", or None if a state dict holds no point encoder."""
    found = [
        variant
        for variant, mark in _MARKS.items()
        if any(name.removeprefix("point_trunk.").startswith(mark) for name in state)
    ]
    # A file with the marks of both variants is neither.
    return found[0] if len(found) == 1 else None


def imagebind_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ImageBind inside a checkpoint of Point-Bind, by ImageBind's own names; empty if it has none."""
    return rename(state, [Rule(_IMAGEBIND, r"\1")])[0]


def rename_pointbind(
    state: Mapping[str, Tensor], *, source: str = "the checkpoint"
) -> tuple[str, dict[str, Tensor], ConversionReport]:
    """Return the variant, the tensors of its encoder by our names, and the outcome for every tensor.

    Raises:
        CheckpointError: no point encoder inside, unknown, missing or misshapen tensors, or values that are not finite
            floating-point numbers.
    """
    variant = find_variant(state)
    if variant is None:
        raise CheckpointError(
            f"{source} is not a checkpoint of Point-Bind: none of its {len(state)} tensors belongs to a point encoder. "
            "Expected pointbind_i2pmae.pt, pointbind_pointbert.pt or imagebind_w3D.pth"
        )
    tensors, report = rename(state, _RULES)
    report.require_complete(source)
    check_keys(_expected(variant), tensors, source=source)
    require_weights(tensors, source=source)
    return variant, tensors, report


def convert_pointbind(
    state: Mapping[str, Tensor], folder: str | Path, *, source: str = "the checkpoint"
) -> ConversionReport:
    """Write the point encoder of a published checkpoint as a folder that `bindllm.encoders.PointBind` reads.

    Args:
        folder: the folder to write; an earlier conversion there is replaced.

    Returns:
        the outcome for every tensor, as in ``conversion.tsv``.

    Raises:
        CheckpointError: this is not a checkpoint of Point-Bind, or the folder holds something else.
    """
    variant, tensors, report = rename_pointbind(state, source=source)
    write_encoder(
        folder,
        {"model.safetensors": tensors},
        config={"model": "pointbind", "variant": variant},
        package={"name": f"Point-Bind (weights, {variant})", "license": LICENSE},
        card=_CARD.format(variant=variant),
        report=report,
    )
    return report


_CARD = """\
# Point-Bind's point encoder ({variant})

Converted by bindllm from the published weights of Point-Bind (https://arxiv.org/abs/2309.00615); `conversion.tsv`
lists the outcome for each of their tensors.

```python
from bindllm import Media
from bindllm.encoders import PointBind

encoder = PointBind("THIS_FOLDER")
encoder.embed("point", [encoder.prepare(Media.point("chair.ply"))])  # [1, 1024], in the space of ImageBind
```

## License

The code of Point-Bind is published under the MIT license. Its weights were trained towards the embeddings of
ImageBind, whose own weights are for non-commercial use only (CC-BY-NC 4.0). Ask the authors before any use beyond that.
"""


def _expected(variant: str) -> dict[str, Tensor]:
    """Return the tensors of a published encoder, on the meta device: the network's, with norms not yet folded."""
    network = build_network({"variant": variant}, source=variant)
    expected = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, GroupNetwork):
            # A norm has a number for each output of its layer, as the layer's bias does.
            for layer, bias in (("first", module.first.bias), ("third", module.third.bias)):
                expected |= dict.fromkeys((f"{name}.{layer}_norm.{part}" for part in _NORM_PARTS), bias)
    return expected
