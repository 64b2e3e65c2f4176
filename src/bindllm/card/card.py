"""Write the model card of a checkpoint: text, metadata of the Hub, results for leaderboards, bill of materials.

Every number comes from a file: the checkpoint's own, or an evaluation of the same weights. https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, try_to_load_from_cache
from huggingface_hub import eval_result_entries_to_yaml as entries_to_dicts

from bindllm.atomic import atomic_file, read_object, read_recipe, write_json
from bindllm.card.bill import BILL_FILE, bill_of_materials
from bindllm.card.evidence import EVALUATION, Evidence, is_finite, read_evaluation, read_held_out
from bindllm.card.licenses import Combined, Licensed, combine, license_parts
from bindllm.card.limits import CONTROLS, cell, limits, not_measured
from bindllm.card.overlap import Overlap
from bindllm.errors import UsageError
from bindllm.evaluation.task import MODEL
from bindllm.imports import resolve_path
from bindllm.model.card import USE, describe, parts_of
from bindllm.model.checkpoint import home_of, read_manifest
from bindllm.report.report import FACTS_FILE

CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE.md"
RESULTS_FOLDER = ".eval_results"
RECIPE_FILE = "recipe.yaml"

START = "<!-- Written by bindllm card. Changes above the last comment are lost when it is written again. -->"
END = "<!-- End of the generated card. Text below this line is kept when it is written again. -->"

_WRITTEN = "# Written by bindllm card\n"
# The task of the Hub for a model that reads texts and these media; the first one that was trained counts.
_TASKS = {"image": "image-text-to-text", "video": "video-text-to-text", "audio": "audio-text-to-text"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardOptions:
    """What no file of a checkpoint says.

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
class Written:
    """What `write_model_card` has written.

    Attributes:
        files: the files.
        warnings: sentences about licenses, and results that no leaderboard can show.
        not_measured: the checks without a measurement, as in the card.
    """

    files: list[Path]
    warnings: list[str]
    not_measured: list[str]


def write_model_card(
    folder: str | Path,
    evaluations: Sequence[Path] = (),
    options: CardOptions = CardOptions(),
    *,
    advance: Callable[[], Any] = lambda: None,
) -> Written:
    """Write the card of a checkpoint folder; an earlier one is replaced, and text of its owner is kept.

    Args:
        folder: a checkpoint folder.
        evaluations: folders of evaluations of this checkpoint.
        options: facts that no file of the checkpoint says.
        advance: called after each file that was compared with the training media.

    Raises:
        CheckpointError: not a checkpoint folder.
        InputError: a damaged file, or an evaluation of other weights.
        UsageError: an option for a part or a benchmark that does not exist.
    """
    folder = Path(folder)
    facts = _read_facts(folder, evaluations, options, advance)
    combined, entries = combine(facts.rows), facts.leaderboard()
    unmeasured = facts.not_measured()
    # Everything was read and checked: from here on, files are written.
    bill = bill_of_materials(facts.name, facts.manifest, facts.rows, combined)
    write_json(folder / BILL_FILE, bill)
    _write(folder / LICENSE_FILE, "\n".join(["# License", "", *_license_lines(facts.rows, combined)]) + "\n")
    files = _write_results(folder / RESULTS_FOLDER, entries)
    _write(folder / CARD_FILE, _card(facts, combined, unmeasured, notes=_notes(folder / CARD_FILE)))
    without = [one.name for one in facts.evaluated if one.name not in entries]
    warnings = combined.warnings + [
        f"{name}: not in {RESULTS_FOLDER}, as its data set on the Hub is not named (--dataset {name}=ORG/NAME)."
        for name in without
    ]
    return Written(
        [folder / CARD_FILE, folder / LICENSE_FILE, folder / BILL_FILE, *files], warnings, unmeasured
    )


@dataclass(frozen=True)
class _Facts:
    """Everything that a card is written from."""

    name: str
    manifest: Mapping[str, Any]
    recipe: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rows: Sequence[Licensed]
    evidence: Sequence[Evidence]
    overlap: Overlap | None
    options: CardOptions

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The data sources of the training run, with their counts."""
        return self.run.get("data", {}).get("sources", [])

    @property
    def modalities(self) -> list[str]:
        """The modalities of the training media."""
        return sorted({name for source in self.sources for name in source.get("media", {})})

    @property
    def evaluated(self) -> list[Evidence]:
        """The evaluations, without the held-out rows of the training run."""
        return [one for one in self.evidence if one.file.endswith(EVALUATION)]

    def leaderboard(self) -> dict[str, list[EvalResultEntry]]:
        """Return the results that a leaderboard of the Hub can show, by benchmark."""
        known = {one.name: one for one in self.evaluated}
        found = {}
        for name, dataset in self.options.datasets.items():
            if name not in known:
                raise UsageError(
                    f"--dataset {name}: no evaluation of it; there are {', '.join(known) or 'none'}"
                )
            one, (hub_id, _, task) = known[name], dataset.partition(":")
            figure = one.scores[MODEL][one.main]
            if not _HUB_ID.fullmatch(hub_id):
                raise UsageError(f"--dataset {name}={dataset}: expected ORG/NAME or ORG/NAME:TASK")
            if is_finite(figure):
                notes = f"bindllm; {one.main}, 95 % interval {figure.low} to {figure.high}, {figure.n} items"
                found[name] = [EvalResultEntry(hub_id, task or "default", figure.value, notes=notes)]
        return found

    def not_measured(self) -> list[str]:
        """Return the checks without a measurement."""
        extra = [] if self.overlap else ["Overlap of training and test media: the folder has no recipe."]
        extra += [f"Overlap with {problem}" for problem in (self.overlap.problems if self.overlap else ())]
        extra += [f"{problem}: {reason}" for problem, reason in self.run.get("problems", {}).items()]
        if not self.evaluated:
            extra.append("Any published benchmark.")
        return not_measured(self.evidence, extra=map(cell, extra), measured=())


def _read_facts(
    folder: Path, evaluations: Sequence[Path], options: CardOptions, advance: Callable[[], Any]
) -> _Facts:
    manifest = read_manifest(folder)
    home, recipe_file = home_of(folder, manifest), folder / RECIPE_FILE
    recipe = read_recipe(recipe_file) if recipe_file.is_file() else {}
    evidence = [*read_held_out(folder), *(read_evaluation(path, manifest) for path in evaluations)]
    sources = (recipe.get("data") or {}).get("sources") or []
    parts = parts_of(dict(manifest), data=[source["path"] for source in sources])
    folders = {part.folder: Path(resolve_path(part.folder, home)) for part in parts}
    rows = license_parts(parts, folders, origin=manifest.get("origin", ""), given=options.licenses)
    return _Facts(
        name=folder.resolve().name,
        manifest=manifest,
        recipe=recipe,
        run=read_object(folder / FACTS_FILE),
        metrics=read_object(folder / "metrics.json"),
        rows=rows,
        evidence=evidence,
        overlap=Overlap(sources, home, advance) if sources else None,
        options=options,
    )


def _card(facts: _Facts, combined: Combined, unmeasured: list[str], *, notes: str) -> str:
    """Return the text of the card, with the headings of the Hub's template."""
    sections = {
        "Uses": _use_lines(facts, combined),
        "Bias, risks, and limitations": _limit_lines(facts, unmeasured),
        "Training details": _training_lines(facts),
        "Evaluation": _result_lines(facts.evidence),
        "License": _license_lines(facts.rows, combined),
    }
    rows = [{"part": row.part, "name": row.name, "license": row.expression} for row in facts.rows]
    lines = [
        f"# {facts.name}",
        "",
        START,
        "",
        "## Model details",
        "",
        *describe(dict(facts.manifest), rows),
        "",
    ]
    for title, found in sections.items():
        lines += [f"## {title}", "", *found, ""]
    return f"---\n{_metadata(facts, combined).to_yaml()}\n---\n\n" + "\n".join(lines) + f"{END}\n{notes}"


def _metadata(facts: _Facts, combined: Combined) -> ModelCardData:
    """Return the metadata of the Hub; a key without a fact is left out."""
    task = next((task for name, task in _TASKS.items() if name in facts.modalities), None)
    names = [
        facts.manifest["decoder"]["name"],
        *(e["init_args"].get("name") for e in facts.manifest["encoders"]),
    ]
    # A local path may look like a name on the Hub; a decoder from there is in its cache.
    on_hub = [
        name
        for name in names
        if name and _HUB_ID.fullmatch(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    ]
    bases = list(facts.options.base_models) or on_hub
    hub_data = [
        source["path"].removeprefix("hf://") for source in facts.sources if source["path"].startswith("hf://")
    ]
    results = [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=facts.options.datasets.get(one.name, one.name).partition(":")[0].replace(" ", "-"),
            dataset_name=one.name,
            metric_type=metric,
            metric_value=figure.value,
            metric_name=f"{metric} {figure}, {figure.n} items",
        )
        for one in facts.evidence
        for metric, figure in one.scores[MODEL].items()
        if is_finite(figure)
    ]
    values = {
        "language": list(facts.options.languages),
        **combined.hub,
        "library_name": "bindllm",
        "pipeline_tag": task,
        "tags": ["bindllm", *facts.modalities],
        "datasets": hub_data,
        "metrics": sorted({result.metric_type for result in results}),
        "base_model": bases,
        "base_model_relation": "adapter" if bases else None,
    }
    given = {key: value for key, value in values.items() if value}
    return ModelCardData(**given, model_name=facts.name, eval_results=results or None)


def _use_lines(facts: _Facts, combined: Combined) -> list[str]:
    trained = ", ".join(facts.modalities)
    return [
        "### Direct use",
        "",
        *([f"Questions about {trained} media, as in the training data."] if trained else []),
        "",
        *USE,
        "",
        "### Out-of-scope use",
        "",
        "- Decisions in which a wrong answer can hurt someone: answers are likely ones, and nothing verifies them.",
        *([f"- Media other than {trained}: none were in the training data."] if trained else []),
        *(f"- {condition}" for condition in combined.conditions if "commercial" in condition),
    ]


def _limit_lines(facts: _Facts, unmeasured: list[str]) -> list[str]:
    lines = ["Each sentence is a measurement of these weights. Intervals are 95 %.", ""]
    lines += limits(facts.evidence)
    if facts.overlap and (found := facts.overlap.held_out()):
        lines += ["### Overlap of training and test", ""]
        for split, (common, total) in found.items():
            lines.append(
                f"- {common:,} of {total:,} media of the {split} split are training media too, by content."
            )
        lines.append("")
    return [*lines, "### Not measured", "", "No file holds a measurement of these:", "", *unmeasured]


def _training_lines(facts: _Facts) -> list[str]:
    """Return data, settings and time of the training run."""
    if not facts.recipe:
        return ["The folder has no recipe, so the training is not known here."]
    lines = [
        "### Training data",
        "",
        "| source | format | media | rows | skipped rows |",
        "|---|---|---|---|---|",
    ]
    for source in facts.sources:
        media = ", ".join(f"{count:,} {name}" for name, count in source.get("media", {}).items())
        skipped = sum(source.get("skipped", {}).get("counts", {}).values())
        lines.append(
            f"| `{cell(source['path'])}` | {source['format']} | {media} | {source['num_rows']:,} | {skipped:,} |"
        )
    rows = facts.run.get("data", {}).get("rows", {})
    if rows:
        lines += ["", "Rows: " + ", ".join(f"{count:,} {split}" for split, count in rows.items()) + "."]
    model, trainer, data = (facts.recipe.get(key) or {} for key in ("model", "trainer", "data"))
    objective = model.get("objective") or {}
    settings = {
        "objective": objective.get("class_path") or "next-token loss",
        "trained groups": ", ".join(model.get("trainable") or []),
        "trained parameters": f"{number:,}"
        if (number := facts.metrics.get("trainable_parameters"))
        else None,
        "epochs (at most)": trainer.get("max_epochs"),
        "batch size": data.get("batch_size"),
        "accumulated batches": trainer.get("accumulate_grad_batches"),
        "longest row": f"{data['max_length']} tokens" if data.get("max_length") else None,
        **{f"optimizer: {key}": value for key, value in (model.get("optim") or {}).items()},
        "precision": trainer.get("precision"),
        "seed": facts.recipe.get("seed_everything"),
        "started from": model.get("init_from"),
        **{f"seconds: {key}": value for key, value in facts.metrics.get("seconds", {}).items()},
        "device": facts.run.get("device"),
        **{f"version: {key}": value for key, value in facts.run.get("software", {}).items()},
        "git revision": facts.run.get("revision"),
    }
    given = [(key, value) for key, value in settings.items() if value not in (None, "")]
    lines += ["", "### Training procedure", "", "| setting | value |", "|---|---|"]
    return (
        lines
        + [f"| {key} | {cell(value)} |" for key, value in given]
        + ["", f"All settings: `{RECIPE_FILE}`."]
    )


def _result_lines(evidence: Sequence[Evidence]) -> list[str]:
    """Return a table for each evaluation: a row for each variant, with intervals."""
    if not evidence:
        return ["No evaluation was made."]
    lines = []
    for one in evidence:
        metrics = list(one.scores[MODEL])
        counts = ", ".join(
            f"{value:,} {name.replace('_', ' ')}" for name, value in one.counts.items() if value is not None
        )
        lines += [f"### {one.name}", "", f"{counts}. From `{cell(one.file)}`.", ""]
        lines += [f"| variant | {' | '.join(metrics)} | items |", "|---" * (len(metrics) + 2) + "|"]
        for variant, found in one.scores.items():
            name = f"`{variant}`" + (f": {CONTROLS[variant]}" if variant in CONTROLS else "")
            cells = [str(found[metric]) if metric in found else "-" for metric in metrics]
            number = next((figure.n for figure in found.values() if figure.n is not None), None)
            lines.append(f"| {name} | {' | '.join(cells)} | {'-' if number is None else f'{number:,}'} |")
        shown = {key: value for key, value in one.settings.items() if isinstance(value, str | int | float)}
        if shown:
            lines += [
                "",
                "Settings: " + ", ".join(f"{key} {cell(value)}" for key, value in shown.items()) + ".",
            ]
        lines.append("")
    return lines[:-1]


def _license_lines(rows: Sequence[Licensed], combined: Combined) -> list[str]:
    return [
        f"`{combined.expression}`",
        "",
        "The weights derive from these parts, so the terms of all of them hold. This is read from their files, and is "
        "not legal advice.",
        "",
        "| part | is | license | SPDX |",
        "|---|---|---|---|",
        *(
            f"| {row.part} | `{cell(row.name)}` | {cell(row.license) or '-'} | {row.expression} |"
            for row in rows
        ),
        "",
        *(f"- {sentence}" for sentence in (*combined.conditions, *combined.warnings)),
    ]


def _notes(file: Path) -> str:
    """Return the text of the owner: below the last comment of an earlier card, or a whole page that is not ours."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if END in text:
        return text.partition(END)[2].lstrip("\n")
    return "" if "Trained parts of a [bindllm]" in text else text


def _write_results(folder: Path, entries: Mapping[str, Sequence[EvalResultEntry]]) -> list[Path]:
    """Write a file for each benchmark, and remove those of an earlier card."""
    files = []
    for name, found in entries.items():
        folder.mkdir(exist_ok=True)
        files.append(folder / f"{name}.yaml")
        _write(files[-1], _WRITTEN + yaml.safe_dump(entries_to_dicts(list(found)), sort_keys=False))
    for file in folder.glob("*.yaml"):
        # Results of another weight would be shown as those of this one.
        if file not in files and file.read_text(encoding="utf-8", errors="replace").startswith(_WRITTEN):
            file.unlink()
    return files


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        # Names of files may hold bytes that are not UTF-8.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
