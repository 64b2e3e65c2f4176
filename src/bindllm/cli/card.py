"""``bindllm card``: the model card of a checkpoint, its licenses, and its bill of materials."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bindllm.errors import UsageError, printable_lines

# bindllm evaluate writes there, into a folder for each checkpoint.
_EVALUATIONS = Path("runs", "eval")


def card(
    checkpoint: Path,
    *,
    evaluation: tuple[Path, ...] = (),
    license: tuple[str, ...] = (),
    language: tuple[str, ...] = (),
    base_model: tuple[str, ...] = (),
    dataset: tuple[str, ...] = (),
) -> int:
    """Write the model card of a checkpoint: README.md, LICENSE.md, bom.cdx.json and .eval_results (docs/cards.md).

    Every number in it comes from a file: of the checkpoint, or of an
    evaluation of the same weights. The card lists what no file measures.

    Args:
        checkpoint: folder that bindllm fit wrote
        evaluation: folder of an evaluation of this checkpoint, or of several; may be repeated (default:
            runs/eval/CHECKPOINT, if it exists)
        license: PART=EXPRESSION, the SPDX license of a part whose folder names none, as in decoder=Apache-2.0; may be
            repeated
        language: ISO code of a language that the model answers in, such as en; may be repeated
        base_model: name on the Hub of the decoder or of an encoder; may be repeated
        dataset: BENCHMARK=ORG/NAME, the data set of an evaluation on the Hub, whose leaderboard shows the result; may
            be repeated

    Example:
        bindllm card checkpoints/scenes --language en
    """
    licenses, datasets = _pairs("license", license), _pairs("dataset", dataset)

    from rich.progress import Progress

    from bindllm.card.card import write_model_card
    from bindllm.card.facts import CardOptions

    options = CardOptions(licenses, language, base_model, datasets)
    default = _EVALUATIONS / checkpoint.resolve().name
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("comparing training and test media", total=None)
        folders = evaluation or ((default,) if default.is_dir() else ())
        written = write_model_card(checkpoint, folders, options, advance=lambda: bar.advance(task))
    for file in written.files:
        print(printable_lines(f"written: {file}"))
    for line in written.warnings:
        print(printable_lines(f"warning: {line}"))
    print(f"not measured: {len(written.not_measured)} checks, listed in the card")
    return 0


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE options."""
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--{option} {text}: expected NAME=VALUE")
        if name in pairs:
            raise UsageError(f"--{option} {name} was given twice")
        pairs[name] = value
    return pairs
