"""``bindllm convert``: published weights become folders of ours, every tensor accounted for."""

from __future__ import annotations

from bindllm.convert import KINDS, ConvertOptions
from bindllm.errors import InputError, UsageError, did_you_mean


def convert(
    what: tuple[str, ...],
    *,
    output: str,
    tokenizer: str | None = None,
    base: str | None = None,
    encoder: tuple[str, ...] = (),
    accept_base: bool = False,
) -> int:
    """Convert published weights of ImageBind, Point-Bind or ImageBind-LLM.

    Every tensor is accounted for: converted, or dropped by a rule. The
    report is conversion.tsv in the output folder.

    Args:
        what: the published FILE; before it its kind (imagebind, pointbind or imagebind-llm), if the file holds several
        output: a folder that does not exist yet, or an empty one
        tokenizer: for imagebind: tokenizer.json of CLIP, or its packed list of merges, or none to convert without
            texts (default: checkpoints/clip-vocabulary/tokenizer.json, which bindllm fetch clip-vocabulary makes)
        base: for imagebind-llm: Hugging Face folder of the LLaMA that it was trained on
        encoder: for imagebind-llm: folder of a converted ImageBind or Point-Bind, or import path of another encoder;
            may be repeated
        accept_base: for imagebind-llm: convert although the base's weights differ from those in training

    Example:
        bindllm convert imagebind_huge.pth --output checkpoints/imagebind
    """
    *kind, file = what
    if len(kind) > 1:
        raise UsageError(f"one file at a time, not {len(kind)}")
    if kind and kind[0] not in KINDS:
        raise UsageError(f"unknown kind {kind[0]!r}. {did_you_mean(kind[0], KINDS)}")

    from bindllm.convert.published import convert_published

    options = ConvertOptions(kind[0] if kind else None, tokenizer, base, encoder, accept_base)
    try:
        convert_published(file, output, options)
    except InputError as error:
        raise UsageError(str(error)) from error
    return 0
