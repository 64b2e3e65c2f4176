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

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bindllm.convert.keymap import ConversionReport, Rule, rename, require_weights, write_encoder
from bindllm.errors import CheckpointError

LICENSE = "CC-BY-NC 4.0 (no commercial use)"
TRUNKS = ("vision", "text", "audio", "depth", "thermal", "imu")

# Shapes give every size of the published model except the number of attention heads.
_HEADS = {
    ("vision", 1280): 16,
    ("text", 1024): 16,
    ("audio", 768): 12,
    ("depth", 384): 8,
    ("thermal", 768): 12,
    ("imu", 512): 8,
}
# Positions of each trunk: 16 x 16 + 1 patches, 77 tokens, 12 x 19 + 1, 14 x 14 + 1 and 250 + 1 patches.
_TOKENS = {"vision": 257, "text": 77, "audio": 229, "depth": 197, "thermal": 197, "imu": 251}
# First layer and its kernel: 2 frames of 14 x 14 pixels, 16 x 16 pixels, or 8 readings of 6 axes.
_STEMS = {
    "vision": ("rgbt_stem.proj.1", (3, 2, 14, 14)),
    "audio": ("rgbt_stem.proj", (1, 16, 16)),
    "depth": ("depth_stem.proj", (1, 16, 16)),
    "thermal": ("rgbt_stem.proj", (1, 16, 16)),
    "imu": ("imu_stem.proj", (48,)),
    "text": ("token_embedding", ()),
}
_VOCABULARY = 49_408
_SHOWN = 20

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


def _table(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0)


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
            change=_table,
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
        folder: the folder to write.
        tokenizer_file: ``tokenizer.json`` for the texts; None: the folder embeds only token ids.
        heads: attention heads of each trunk; None: as in the published model, by its widths.
        rules: tried before `RULES`, for the tensors of a larger checkpoint that are not ImageBind's.
        source: name of the checkpoint in messages.

    Returns:
        the outcome for every tensor.

    Raises:
        CheckpointError: unknown, missing or misshapen tensors, values that are not finite floating-point numbers, an
            unknown size without ``heads``, or a folder that holds something else; nothing was written.
    """
    renamed, report = rename(state, [*rules, *RULES])
    report.require_complete(source)
    _require_published(report, source)
    require_weights(renamed, source=source)
    # One file per trunk: an encoder of images never reads the weights of the five other trunks.
    trunks: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in renamed.items():
        trunk, _, inner = name.partition(".")
        trunks[trunk][inner] = tensor
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


def published_shapes(trunk: str, *, width: int, blocks: int, out: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a trunk's tensors in the published file, without the text mask."""
    stem, kernel = _STEMS[trunk]
    inputs, head = f"modality_preprocessors.{trunk}", f"modality_heads.{trunk}"
    helper = "" if trunk in ("text", "imu") else "pos_embedding_helper."
    # Positions of text and IMU are stored directly, those of the other trunks inside a helper module.
    shapes: dict[str, tuple[int, ...]] = {f"{inputs}.{helper}pos_embed": (1, _TOKENS[trunk], width)}
    shapes[f"{inputs}.{stem}.weight"] = (_VOCABULARY, width) if trunk == "text" else (width, *kernel)
    if trunk != "text":
        shapes[f"{inputs}.cls_token"] = (1, 1, width)
    # Texts have no norm after the stem, and vision has it as a layer of its own.
    if trunk not in ("text", "vision"):
        norm = stem.partition(".")[0]
        shapes |= {f"{inputs}.{norm}.norm_layer.{part}": (width,) for part in ("weight", "bias")}
    if trunk == "vision":
        norm = "modality_trunks.vision.pre_transformer_layer.0"
        shapes |= {f"{norm}.{part}": (width,) for part in ("weight", "bias")}
    for number in range(blocks):
        shapes |= _block_shapes(f"modality_trunks.{trunk}.blocks.{number}", trunk, width)
    # The indices differ because layers without weights lie between norm and projection.
    first, last = {"text": ("proj.0", "proj.1"), "imu": ("0", "3")}.get(trunk, ("0", "2"))
    shapes |= {f"{head}.{first}.{part}": (width,) for part in ("weight", "bias")}
    shapes[f"{head}.{last}.weight"] = (out, width)
    # Vision has no learned scale in the published file.
    if trunk != "vision":
        shapes[f"modality_postprocessors.{trunk}.1.log_logit_scale"] = ()
    return shapes


def _block_shapes(name: str, trunk: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    layers = (
        # Query, key and value are one matrix.
        ("attn.in_proj_", 3 * width, width),
        ("attn.out_proj.", width, width),
        ("mlp.fc1.", 4 * width, width),
        ("mlp.fc2.", width, 4 * width),
    )
    for layer, rows, columns in layers:
        shapes |= {f"{name}.{layer}weight": (rows, columns), f"{name}.{layer}bias": (rows,)}
    for norm in ("norm_1", "norm_2"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    # These trunks have a learned key and value that every token can attend to.
    if trunk not in ("vision", "text"):
        shapes |= {f"{name}.attn.bias_{part}": (1, 1, width) for part in "kv"}
    return shapes


def _require_published(report: ConversionReport, source: str) -> None:
    """Raise if a trunk has missing or unexpected tensors, or tensors of other shapes than published."""
    found: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for old, new, shape in report.mapped:
        found[new.partition(".")[0]][old.removeprefix("bind.")] = shape
    problems = [] if found else ["it holds no tensor of ImageBind"]
    for trunk, shapes in found.items():
        if trunk not in TRUNKS:
            problems.append(f"unknown trunk {trunk}")
            continue
        # Sizes are read from the file itself, then all its names and shapes must follow from them.
        numbers = {int(match[1]) for name in shapes if (match := re.search(r"[.]blocks[.](\d+)[.]", name))}
        width = next((shape[-1] for name, shape in shapes.items() if name.endswith("pos_embed") and shape), 0)
        head = next(
            (shape[0] for name, shape in shapes.items() if name.startswith("modality_heads") and shape[1:]), 0
        )
        expected = published_shapes(trunk, width=width, blocks=len(numbers), out=head)
        problems += [f"missing {name}" for name in expected if name not in shapes]
        problems += [f"unexpected {name}" for name in shapes if name not in expected]
        problems += [
            f"{name} has shape {list(shapes[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{source} is not the published ImageBind: {'; '.join(problems[:_SHOWN])}{more}. Nothing was converted"
        )


def _describe(
    trunks: Mapping[str, Mapping[str, Tensor]], heads: Mapping[str, int], source: str
) -> dict[str, Any]:
    """Return ``config.json``, read from the tensors' shapes."""
    sizes, outs = {}, {}
    for trunk in (name for name in TRUNKS if name in trunks):
        tensors = trunks[trunk]
        outs[trunk], width = tensors["head.project.weight"].shape
        num_heads = heads.get(trunk) or _HEADS.get((trunk, width))
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
    return {"model": "imagebind", "embedding_size": next(iter(outs.values())), "trunks": sizes}
