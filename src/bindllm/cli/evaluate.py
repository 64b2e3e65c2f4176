"""``bindllm evaluate``: classify and retrieve across modalities, from embeddings alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.cli.usage import Arguments, UsageError, add_allow, read_number

if TYPE_CHECKING:
    from bindllm.cache.visual_cache import VisualCache
    from bindllm.evaluation.layouts import Choice, Column

STORE = "data/store"


def evaluate(args: list[str]) -> int:
    """Print how well encoders do on a data set, and what of it could not be measured."""
    parser = _parser()
    chosen, options = parser.parse_known_args(args)
    if options and not options[0].startswith("--encoder."):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if options and len(chosen.encoder) != 1:
        parser.error(f"{options[0]} needs exactly one --encoder, to which it belongs")
    if not (chosen.encoder or chosen.checkpoint):
        parser.error("no encoder to evaluate: name one with --encoder, or a trained folder with --checkpoint")

    from rich.console import Console

    from bindllm.cli.encode import checkpoint_encoders, find_device
    from bindllm.cli.media import build_encoder
    from bindllm.evaluation.layouts import read_layout
    from bindllm.evaluation.zero_shot import evaluate_zero_shot

    templates = _templates(chosen)
    device = find_device(chosen.device)
    dataset = read_layout(_known_layout(chosen.layout), chosen.folder, _choice(chosen))
    if chosen.limit is not None:
        dataset.limit(chosen.limit)
    encoders = checkpoint_encoders(chosen.checkpoint, chosen.allow) if chosen.checkpoint else []
    encoders += [build_encoder(text, options, allow=chosen.allow) for text in chosen.encoder]
    result = evaluate_zero_shot(
        dataset,
        encoders,
        store=chosen.store,
        device=device,
        templates=templates,
        cache=_cache(chosen),
        progress=sys.stderr.isatty(),
    )
    result.layout, result.folder = chosen.layout, str(chosen.folder)
    Console(highlight=False, soft_wrap=True).print(result)
    if chosen.output:
        result.save(chosen.output)
        print(f"written to {chosen.output}")
    return 0


def _parser() -> Arguments:
    from bindllm.evaluation.layouts import LAYOUTS

    parser = Arguments(
        "evaluate",
        "Classify and retrieve across modalities, from the embeddings of encoders alone. See docs/zero-shot.md.",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = "\n".join(f"  {name:<11}{layout.purpose}" for name, layout in LAYOUTS.items())
    example = "bindllm evaluate esc50 data/ESC-50-master --encoder checkpoints/imagebind --fold 1"
    parser.epilog = f"layouts:\n{lines}\n\nexample: {example}"
    parser.add_argument("layout", help="how the data set lies on the disk: one of the list below")
    parser.add_argument("folder", type=Path, help="where it is")
    _add_encoders(parser)
    _add_data(parser)
    _add_measuring(parser)
    return parser


def _add_encoders(parser: Arguments) -> None:
    group = parser.add_argument_group("encoders")
    group.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="CLASS_OR_FOLDER",
        help="import path or folder of an encoder; may be repeated. --encoder.NAME VALUE are arguments of its "
        "constructor",
    )
    group.add_argument("--checkpoint", metavar="FOLDER", help="take the encoders of a folder of bindllm fit")
    add_allow(group)
    group.add_argument("--device", help="cpu, cuda, ...: by default the accelerator that torch finds")


def _add_data(parser: Arguments) -> None:
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    group = parser.add_argument_group("what of the data set")
    group.add_argument("--split", help="the split; by default the one that is usually reported")
    group.add_argument(
        "--fold", type=count, action="append", default=[], help="a fold of ESC-50; may be repeated"
    )
    group.add_argument("--limit", type=count, metavar="N", help="only N media, chosen by hash")
    group.add_argument("--captions", type=count, metavar="N", help="only the first N captions of each media")
    group.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the classes: .json, .tsv or .txt"
    )
    group.add_argument("--modality", help="what the files are, where their endings do not tell")
    group.add_argument(
        "--from",
        dest="source",
        metavar="MODALITY[:COLUMN]",
        help="column of a table that holds the media, as in audio:sound",
    )
    group.add_argument(
        "--to", dest="target", metavar="MODALITY[:COLUMN]", help="column that holds what belongs to them"
    )


def _add_measuring(parser: Arguments) -> None:
    count = read_number(int, "a whole number of at least 1", lambda value: value >= 1)
    share = read_number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
    group = parser.add_argument_group("measuring")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help='such as "a photo of a {}."; may be repeated'
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt a line")
    group.add_argument("--cache", metavar="FOLDER", help="blend each query with this visual cache first")
    group.add_argument("--cache_weight", type=share, help="share of its pictures that is mixed in")
    group.add_argument("--cache_top_k", type=count, help="number of its pictures that are mixed in")
    group.add_argument(
        "--store", default=STORE, metavar="FOLDER", help="where embeddings are kept (%(default)s)"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON, too")


def _known_layout(name: str) -> str:
    from bindllm.errors import known_names
    from bindllm.evaluation.layouts import LAYOUTS

    if name not in LAYOUTS:
        raise UsageError(f"unknown layout {name!r}. {known_names(name, LAYOUTS)}")
    return name


def _choice(chosen: Any) -> Choice:
    """Return what of the data set the command line asks for."""
    from bindllm.evaluation.layouts import Choice

    return Choice(
        split=chosen.split,
        folds=tuple(chosen.fold),
        modality=chosen.modality,
        classes=chosen.classes,
        source=_column("--from", chosen.source),
        target=_column("--to", chosen.target),
        captions=chosen.captions,
    )


def _column(option: str, text: str | None) -> Column | None:
    """Return the modality and the column that an option names; the column is called like the modality otherwise."""
    from bindllm.evaluation.layouts import Column
    from bindllm.media import is_modality

    if text is None:
        return None
    modality, _, name = text.partition(":")
    if not is_modality(modality):
        raise UsageError(f"{option} {text}: expected a modality and a column, such as audio:sound")
    return Column(modality, name or ("caption" if modality == "text" else modality))


def _templates(chosen: Any) -> Sequence[str] | None:
    from bindllm.evaluation.prompts import check_template, read_templates

    if chosen.prompts is not None:
        return read_templates(chosen.prompts)
    if chosen.prompt is not None:
        return [check_template(template, where="--prompt: ") for template in chosen.prompt]
    return None


def _cache(chosen: Any) -> VisualCache | None:
    """Open the cache that the command line names."""
    settings = {"weight": chosen.cache_weight, "top_k": chosen.cache_top_k}
    settings = {name: value for name, value in settings.items() if value is not None}
    if chosen.cache is None:
        if settings:
            raise UsageError(f"--cache_{next(iter(settings))} needs a visual cache: give --cache FOLDER")
        return None
    from bindllm.cache.visual_cache import VisualCache, open_index

    return VisualCache(open_index(chosen.cache), **settings)
