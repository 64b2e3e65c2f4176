"""``bindllm convert``: published weights become folders of ours, every tensor accounted for."""

from __future__ import annotations

from bindllm.cli.usage import Arguments, UsageError
from bindllm.convert import KINDS, TOKENIZER, ConvertOptions
from bindllm.errors import InputError, known_names


def convert(args: list[str]) -> int:
    """Convert one published file, and print the outcome for its tensors."""
    parser = Arguments("convert", "Turn published weights into a folder of ours, every tensor accounted for.")
    parser.add_argument(
        "what",
        nargs="+",
        metavar="[KIND] FILE",
        help=f"the published file; before it {', '.join(KINDS)}, if the file holds more than one of them",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a folder that does not exist yet, or is empty"
    )
    texts = parser.add_argument_group("imagebind")
    texts.add_argument(
        "--tokenizer",
        metavar="FILE",
        help=f"tokenizer.json of CLIP, or its packed list of merges; default: {TOKENIZER}, which bindllm fetch "
        "clip-vocabulary makes; 'none' to convert without texts",
    )
    adapter = parser.add_argument_group("imagebind-llm")
    adapter.add_argument(
        "--base", metavar="FOLDER", help="Hugging Face folder of the LLaMA that it was trained on"
    )
    adapter.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="FOLDER",
        help="converted ImageBind or Point-Bind, or the import path of another encoder; may be repeated",
    )
    adapter.add_argument(
        "--accept_base",
        action="store_true",
        help="convert although the base's weights differ from those in training",
    )
    chosen = parser.parse_args(args)
    *kind, file = chosen.what
    if len(kind) > 1:
        parser.error(f"one file at a time, not {len(kind)}")
    if kind and kind[0] not in KINDS:
        raise UsageError(f"unknown kind {kind[0]!r}. {known_names(kind[0], KINDS)}")
    options = ConvertOptions(
        kind[0] if kind else None, chosen.tokenizer, chosen.base, chosen.encoder, chosen.accept_base
    )
    from bindllm.convert.published import convert_published

    try:
        convert_published(file, chosen.output, options)
    except InputError as error:
        raise UsageError(str(error)) from error
    return 0
