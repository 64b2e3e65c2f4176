"""Convert the published ImageBind checkpoint: rename its tensors and split them into one file per trunk.

The published file is a plain state dict (https://arxiv.org/abs/2305.05665); Point-Bind's checkpoints hold the same
tensors with the prefix ``bind.``. A converted folder holds:

    config.json           sizes of the trunks
    TRUNK.safetensors     one file for each of vision, text, audio, depth, thermal, imu; with its head and its scale
    tokenizer.json        byte-pair encoding of the texts
    conversion.tsv        outcome for every tensor of the published file
    README.md             card with the license; SOURCE.json  the same for programs
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.convert.keymap import ConversionReport, Rule, rename, require_weights, write_encoder
from bindllm.encoders import shape_problems
from bindllm.encoders.imagebind.config import HUGE, KIND, TRUNKS, TrunkConfig
from bindllm.encoders.imagebind.network import Trunk
from bindllm.errors import CheckpointError, listed

LICENSE = "CC-BY-NC 4.0 (no commercial use)"

_CARD = """\
# ImageBind

Weights of ImageBind (https://arxiv.org/abs/2305.05665) as published by its authors, converted for bindllm: tensors
renamed, one file for each trunk, no value changed. `conversion.tsv` lists the outcome for every published tensor.

**License of the weights: {license}**, given by their authors. It holds for this folder and everything derived
from it; the Apache-2.0 license of bindllm's code does not change that.

Trunks: {trunks}.

```python
from bindllm.encoders import ImageBind

encoder = ImageBind("THIS_FOLDER")
```
"""


# The published tensors have leading dimensions of 1 for broadcasting; ours do not.
def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def _rules() -> tuple[Rule, ...]:
    """Return the table; the first regex group of every pattern is the trunk."""
    start, inputs, trunk, head = "(?:bind[.])?", "modality_preprocessors", "modality_trunks", "modality_heads"
    # `(\w+)` captures the trunk; \2 and on are the number of a block and the part of a layer.
    block = rf"{start}{trunk}[.](\w+)[.]blocks[.](\d+)"
    # How to read this: published name, a pattern over all trunks -> trunk and our name; the first match decides.
    return (
        Rule(
            rf"{start}{inputs}[.](text)[.]mask",
            None,
            "the causal mask, which follows from the order of the tokens",
        ),
        Rule(rf"{start}{inputs}[.](text)[.]token_embedding[.]weight", r"\1.stem.embedding.weight"),
        Rule(rf"{start}{inputs}[.](\w+)[.]cls_token", r"\1.stem.class_token", change=_flat),
        Rule(
            rf"{start}{inputs}[.](\w+)[.](?:pos_embedding_helper[.])?pos_embed",
            r"\1.stem.positions",
            change=lambda tensor: tensor.squeeze(0),
        ),
        Rule(
            rf"{start}{inputs}[.](\w+)[.](?:rgbt|depth|imu)_stem[.]proj[.](?:1[.])?weight", r"\1.stem.weight"
        ),
        Rule(
            rf"{start}{inputs}[.](\w+)[.](?:rgbt|depth|imu)_stem[.]norm_layer[.](weight|bias)",
            r"\1.stem.norm.\2",
        ),
        Rule(rf"{start}{trunk}[.](vision)[.]pre_transformer_layer[.]0[.](weight|bias)", r"\1.input_norm.\2"),
        Rule(rf"{block}[.]attn[.]in_proj_(weight|bias)", r"\1.blocks.\2.attention.qkv.\3"),
        Rule(rf"{block}[.]attn[.]out_proj[.](weight|bias)", r"\1.blocks.\2.attention.out.\3"),
        Rule(rf"{block}[.]attn[.]bias_k", r"\1.blocks.\2.attention.bias_key", change=_flat),
        Rule(rf"{block}[.]attn[.]bias_v", r"\1.blocks.\2.attention.bias_value", change=_flat),
        Rule(rf"{block}[.](norm_[12])[.](weight|bias)", r"\1.blocks.\2.\3.\4"),
        Rule(rf"{block}[.]mlp[.]fc1[.](weight|bias)", r"\1.blocks.\2.up.\3"),
        Rule(rf"{block}[.]mlp[.]fc2[.](weight|bias)", r"\1.blocks.\2.down.\3"),
        Rule(rf"{start}{head}[.](\w+)[.](?:proj[.])?0[.](weight|bias)", r"\1.head.norm.\2"),
        Rule(rf"{start}{head}[.](\w+)[.](?:proj[.]1|2|3)[.]weight", r"\1.head.project.weight"),
        Rule(rf"{start}modality_postprocessors[.](\w+)[.]1[.]log_logit_scale", r"\1.log_scale"),
    )


RULES = _rules()
"""Published name -> ``TRUNK.our_name``."""


def convert_imagebind(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    tokenizer_file: Path | None,
    heads: Mapping[str, int] | None = None,
    rules: Sequence[Rule] = (),
    source: str = "the checkpoint",
) -> ConversionReport:
    """Write a converted folder; an earlier one is replaced, in one step.

    Args:
        state: the published tensors, all of them; trunks may be missing as a whole.
        tokenizer_file: ``tokenizer.json`` for the texts; None: the folder embeds only token ids.
        heads: attention heads of each trunk; None: as in the published model, by its widths.
        rules: tried before `RULES`, for the tensors of a larger checkpoint that are not ImageBind's.

    Returns:
        the outcome for every tensor.

    Raises:
        CheckpointError: unknown, missing or misshapen tensors, values that are not finite floating-point numbers, an
            unknown size without ``heads``, or a folder that holds something else; nothing was written.
    """
    renamed, report = rename(state, [*rules, *RULES])
    report.require_complete(source)
    # One file per trunk: an encoder of images never reads the weights of the five other trunks.
    trunks: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in renamed.items():
        trunk, _, inner = name.partition(".")
        trunks[trunk][inner] = tensor
    _check_shapes(trunks, source)
    require_weights(renamed, source=source)
    config = _describe(trunks, heads or {}, source)
    write_encoder(
        folder,
        {f"{trunk}.safetensors": tensors for trunk, tensors in trunks.items()},
        config=config,
        package={"name": "ImageBind (weights)", "license": LICENSE},
        card=_CARD.format(license=LICENSE, trunks=", ".join(config["trunks"])),
        report=report,
        files={} if tokenizer_file is None else {"tokenizer.json": tokenizer_file},
    )
    return report


def _check_shapes(trunks: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Raise if a trunk has missing or unexpected tensors, or tensors of other shapes than our network of its size."""
    problems = [] if trunks else ["it holds no tensor of ImageBind"]
    for trunk, tensors in trunks.items():
        found = {f"{trunk}.{name}": tensor.shape for name, tensor in tensors.items()}
        # Sizes are read from the file itself, then all its names and shapes must follow from them.
        *_, width = 1, *found.get(f"{trunk}.stem.positions", ())
        out, *_ = *found.get(f"{trunk}.head.project.weight", ()), 1
        blocks = {name.split(".")[2] for name in found if ".blocks." in name}
        expected: dict[str, Tensor] = {}
        if trunk in TRUNKS:
            # The number of heads changes no shape.
            size = TrunkConfig(max(width, 1), num_blocks=len(blocks), num_heads=1)
            with torch.device("meta"):
                expected = Trunk(trunk, size, max(out, 1)).state_dict()
        problems += shape_problems({f"{trunk}.{name}": x.shape for name, x in expected.items()}, found)
    if problems:
        raise CheckpointError(
            f"{source} is not the published ImageBind: {listed(problems, 20, separator='; ')}. Nothing was converted"
        )


def _describe(
    trunks: Mapping[str, Mapping[str, Tensor]], heads: Mapping[str, int], source: str
) -> dict[str, Any]:
    """Return ``config.json``, read from the tensors' shapes."""
    sizes, outs = {}, {}
    for trunk in (name for name in TRUNKS if name in trunks):
        tensors, published = trunks[trunk], HUGE.trunks[trunk]
        outs[trunk], width = tensors["head.project.weight"].shape
        # Shapes give every size of a model except the number of attention heads.
        num_heads = heads.get(trunk) or (published.num_heads if width == published.width else None)
        if num_heads is None or width % num_heads:
            raise CheckpointError(
                f"{source}: its {trunk} trunk is {width} wide, and shapes do not determine the number of attention "
                f"heads ({num_heads} given); pass heads={{{trunk!r}: ...}}"
            )
        blocks = sum(name.endswith("attention.qkv.weight") for name in tensors)
        sizes[trunk] = {"width": width, "num_blocks": blocks, "num_heads": num_heads}
    if len(set(outs.values())) != 1:
        raise CheckpointError(
            f"{source}: its trunks end in different widths, {outs}; they must share one joint space"
        )
    return {"model": KIND, "embedding_size": next(iter(outs.values())), "trunks": sizes}
