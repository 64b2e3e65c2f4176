"""Everything that a card is written from: the files of a checkpoint, its evaluations, and the options of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bindllm.atomic import read_object, read_recipe
from bindllm.card.evidence import HeldOut, read_evaluations, read_held_out
from bindllm.card.licenses import Licensed, license_parts
from bindllm.card.limits import cell, not_measured
from bindllm.card.overlap import Overlap
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.imports import resolve_path
from bindllm.model.card import parts_of
from bindllm.model.checkpoint import fingerprint_checkpoint, home_of, read_manifest, read_weights
from bindllm.report.report import FACTS_FILE, METRICS_FILE

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class CardOptions:
    """Facts that no file of a checkpoint has.

    Args:
        licenses: SPDX expression of a part whose folder names none, by the part or its name.
        languages: ISO codes of the languages that the model answers in.
        base_models: names on the Hub of the decoder and the encoders.
        datasets: name on the Hub of a benchmark's data set, by benchmark; with a task as ``ORG/NAME:TASK``.
    """

    licenses: Mapping[str, str] = field(default_factory=dict)
    languages: Sequence[str] = ()
    base_models: Sequence[str] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """The facts.

    Args:
        recipe: content of ``recipe.yaml``; may be empty.
        metrics: content of ``metrics.json``; may be empty.
        overlap: training and test media, compared; None: the folder has no recipe.
    """

    name: str
    manifest: Mapping[str, Any]
    recipe: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rows: Sequence[Licensed]
    held_out: HeldOut
    evaluations: Sequence[Evaluation]
    overlap: Overlap | None
    options: CardOptions

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The data sources of the training run, with their counts."""
        return _sources(self.run)

    @property
    def modalities(self) -> list[str]:
        """The modalities of the training media."""
        return _modalities(self.run)

    @cached_property
    def overlaps(self) -> dict[str, tuple[int, int]]:
        """The number of test media that are training media too, and of all of them, by test set."""
        if self.overlap is None:
            return {}
        found = {f"{split} split": counts for split, counts in self.overlap.held_out().items()}
        return found | {
            one.name: counts for one in self.evaluations if (counts := self.overlap.of(one)) is not None
        }

    def not_measured(self) -> list[str]:
        """Return the checks without a measurement, as a list of Markdown."""
        if self.overlap is None:
            extra = ["Overlap of training and test media: the folder has no recipe."]
        else:
            extra = [f"Overlap of training and test media: {problem}" for problem in self.overlap.problems]
            without = [one.name for one in self.evaluations if one.name not in self.overlaps]
            extra += [
                f"Overlap of training media and those of {name}: none of its files is here."
                for name in without
            ]
        extra += [f"{name}: {reason}" for name, reason in self.run.get("problems", {}).items()]
        if not self.evaluations:
            extra.append("Any published benchmark.")
        variants = (name for found in self.held_out.scores.values() for name in found)
        return not_measured(self.evaluations, variants, extra=map(cell, extra))


def read_facts(
    folder: Path, evaluations: Sequence[Path], options: CardOptions, advance: Callable[[], Any]
) -> Facts:
    """Read the facts; arguments as for `bindllm.card.card.write_model_card`."""
    manifest = read_manifest(folder)
    home, recipe_file = home_of(folder, manifest), folder / RECIPE_FILE
    recipe = read_recipe(recipe_file) if recipe_file.is_file() else {}
    run = read_object(folder / FACTS_FILE)
    sources = (recipe.get("data") or {}).get("sources") or []
    parts = parts_of(manifest, data=[source["path"] for source in sources])
    folders = {part.folder: Path(resolve_path(part.folder, home)) for part in parts}
    # The weights are read only if there is something to compare with them.
    own = fingerprint_checkpoint(manifest, read_weights(folder, manifest)) if evaluations else ""
    return Facts(
        name=folder.resolve().name,
        manifest=manifest,
        recipe=recipe,
        run=run,
        metrics=read_object(folder / METRICS_FILE),
        rows=license_parts(parts, folders, origin=manifest.get("origin", ""), given=options.licenses),
        held_out=read_held_out(folder, _modalities(run)),
        evaluations=read_evaluations(evaluations, own),
        overlap=Overlap(sources, home, advance) if sources else None,
        options=options,
    )


def _sources(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return run.get("data", {}).get("sources", [])


def _modalities(run: Mapping[str, Any]) -> list[str]:
    return sorted({name for source in _sources(run) for name in source.get("media", {})})
