"""The page of an evaluation: scores with intervals, controls and groups, and questions with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bindllm.atomic import atomic_file
from bindllm.errors import BindLLMError
from bindllm.evaluation.benchmarks.bootstrap import interval_text
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.evaluation.benchmarks.metrics import Line
from bindllm.evaluation.task import MAJORITY_ANSWER, MODEL, NEAREST_CAPTION, NO_MEDIA, SHUFFLED_MEDIA
from bindllm.media import SUFFIXES
from bindllm.report.page import page_templates, shown_rows, thumbnail

PAGE = "evaluation.html"

# A card is narrow.
_SHORT = {NO_MEDIA: "none", SHUFFLED_MEDIA: "wrong", MAJORITY_ANSWER: "majority", NEAREST_CAPTION: "nearest"}


def write_page(evaluation: Evaluation) -> Path:
    """Write the page of an evaluation of this process into its folder, and return its path.

    The images of the questions on it are opened, and are inside the page.
    """
    facts, scores = evaluation.facts, evaluation.facts["scores"]
    answers = {name: {line["id"]: line["answer"] for line in part} for name, part in evaluation.lines.items()}
    lines = evaluation.lines[MODEL]
    page = (
        page_templates()
        .get_template("evaluation.html.j2")
        .render(
            facts=facts,
            head=["metric", *scores],
            scores=[
                (metric, *(interval_text(own.get(metric)) for own in scores.values()))
                for metric in scores[MODEL]
            ],
            groups=[
                (label, ["value", "questions", *scores[MODEL]], list(_group_rows(values)))
                for label, values in facts["groups"].items()
            ],
            cards=[_card(line, answers, evaluation.home) for line in shown_rows(lines)],
            total=len(lines),
            run=[(name.replace("_", " "), str(value)) for name, value in facts["settings"].items()],
            skipped=[(reason, f"{count:,}") for reason, count in facts["skipped"].items()],
        )
    )
    path = evaluation.folder / PAGE
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _group_rows(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for value, numbers in values.items():
        count = next(iter(numbers.values()))["n"]
        yield value, f"{count:,}", *(interval_text(number) for number in numbers.values())


def _card(line: Line, answers: Mapping[str, Mapping[str, str]], root: Path) -> dict[str, Any]:
    """Return a card: the media, the question, the true answers, and the answer of each variant that has one."""
    target = line["target"] if isinstance(line["target"], str) else " / ".join(dict.fromkeys(line["target"]))
    lines = [("asked", line["question"], ""), ("true", target, "")]
    for variant, own in answers.items():
        if line["id"] in own:
            kind = "model" if variant == MODEL else ""
            lines.append((_SHORT.get(variant, variant), own[line["id"]], kind))
    lines.append(("score", "unparsed" if line["parsed"] is None else f"{line['score']:.2g}", ""))
    # A score with sums of its own, such as CIDEr-D, may be above 1 for a wrong caption.
    is_right = line["score"] == 1 and "stats" not in line
    return {"tiles": [_tile(name, root) for name in line["media"]], "lines": lines, "right": is_right}


def _tile(name: str, root: Path) -> dict[str, str]:
    """Return an image, or the name of other media and of an image that cannot be read."""
    source, short = "", Path(name).name
    if Path(name).suffix.lower() in SUFFIXES["image"]:
        with suppress(BindLLMError):
            source = thumbnail(str(root / name))
    return {"src": source, "name": short, "title": short}
