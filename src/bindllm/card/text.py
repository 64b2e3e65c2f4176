"""The text of a card, section by section, with the headings of the Hub's template."""

from __future__ import annotations

from collections.abc import Sequence

from bindllm.card.evidence import number_text
from bindllm.card.facts import RECIPE_FILE, Facts
from bindllm.card.licenses import Combined, Licensed
from bindllm.card.limits import CONTROLS, cell, limits
from bindllm.evaluation.task import MODEL
from bindllm.model.card import USE, describe

START = "<!-- Written by bindllm card. Changes above the last comment are lost when it is written again. -->"
END = "<!-- End of the generated card. Text below this line is kept when it is written again. -->"


def card_text(facts: Facts, combined: Combined, unmeasured: Sequence[str]) -> str:
    """Return the text of the card, up to the line after which the owner may write."""
    rows = [{"part": row.part, "name": row.name, "license": row.expression} for row in facts.rows]
    sections = {
        "Model details": describe(dict(facts.manifest), rows),
        "Uses": _use_lines(facts, combined),
        "Bias, risks, and limitations": _limit_lines(facts, unmeasured),
        "Training details": _training_lines(facts),
        "Evaluation": [*_held_out_lines(facts), *_result_lines(facts)] or ["No evaluation was made."],
        "License": license_lines(facts.rows, combined),
    }
    lines = [f"# {facts.name}", "", START, ""]
    for title, found in sections.items():
        lines += [f"## {title}", "", *found, *([""] if found[-1] else [])]
    return "\n".join(lines) + f"{END}\n"


def _use_lines(facts: Facts, combined: Combined) -> list[str]:
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


def _limit_lines(facts: Facts, unmeasured: Sequence[str]) -> list[str]:
    lines = ["Each sentence is a measurement of these weights. Intervals are 95 %.", ""]
    lines += limits(facts.evaluations)
    if facts.held_out.sentences:
        lines += ["### Held-out rows of the training data", ""]
        lines += [*(f"- {sentence}" for sentence in facts.held_out.sentences), ""]
    if facts.overlaps:
        lines += ["### Overlap of training and test", ""]
        lines += [
            f"- {name}: {common:,} of {total:,} media are training media too, by content."
            for name, (common, total) in facts.overlaps.items()
        ]
        lines.append("")
    return [*lines, "### Not measured", "", "No file holds a measurement of these:", "", *unmeasured]


def _training_lines(facts: Facts) -> list[str]:
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
        "steps (at most)": steps if (steps := trainer.get("max_steps") or -1) > 0 else None,
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


def _held_out_lines(facts: Facts) -> list[str]:
    """Return a table for each task of the training run, without intervals."""
    lines = []
    for task, variants in facts.held_out.scores.items():
        metrics = list(variants[MODEL])
        lines += [
            f"### Held-out {task}",
            "",
            f"{facts.held_out.counts[task]:,} rows, measured by `bindllm fit`.",
            "",
        ]
        lines += [f"| variant | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
        for variant, found in variants.items():
            cells = [number_text({"value": found.get(metric)}) for metric in metrics]
            lines.append(f"| {_variant(variant)} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _result_lines(facts: Facts) -> list[str]:
    """Return a table for each evaluation: a row for each variant, with intervals."""
    lines = []
    for one in facts.evaluations:
        scores, counts = one.facts["scores"], one.facts["counts"]
        metrics = list(scores[MODEL])
        lines += [f"### {one.facts['title']}", ""]
        lines += [
            f"{counts['items']:,} of {counts['listed']:,} questions ({counts['missing_media']:,} without their media), "
            f"{counts['unparsed']:,} answers that could not be read. 95 % intervals.",
            "",
        ]
        lines += [f"| variant | {' | '.join(metrics)} | items |", "|---" * (len(metrics) + 2) + "|"]
        for variant, found in scores.items():
            cells = [number_text(found.get(metric)) for metric in metrics]
            lines.append(f"| {_variant(variant)} | {' | '.join(cells)} | {len(one.lines[variant]):,} |")
        settings = {key: value for key, value in one.facts["settings"].items() if value is not None}
        lines += [
            "",
            "Settings: " + ", ".join(f"{key} `{cell(value)}`" for key, value in settings.items()) + ".",
        ]
        lines += [f"Note: {cell(note)}." for note in one.facts["notes"]]
        lines.append("")
    return lines


def _variant(name: str) -> str:
    return f"`{name}`" + (f": {CONTROLS[name]}" if name in CONTROLS else "")


def license_lines(rows: Sequence[Licensed], combined: Combined) -> list[str]:
    """Return the license of the whole, that of each part, and the conditions that follow."""
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
