"""The limits and bias report of a card: each sentence is computed from the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bindllm.card.evidence import is_inside, mean, number_text, percent, share
from bindllm.evaluation.benchmarks.bootstrap import Number
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.evaluation.benchmarks.metrics import Line
from bindllm.evaluation.task import MODEL, NO_MEDIA, SHUFFLED_MEDIA

CONTROLS = {NO_MEDIA: "without media", SHUFFLED_MEDIA: "with media that conflict with the question"}
"""Variants of the model that take its media away, in words."""

LENGTHS = ((1, "1 word"), (3, "2 to 3 words"), (8, "4 to 8 words"), (None, "9 words or more"))
"""Groups of items by the words of the true answer: the largest number of words, and the name."""

_FEW = 30
"""A group of fewer items is marked."""
_BINS = 10
"""Bins of equal width in which probabilities are compared with the share of right answers."""
_LARGEST = 20
"""Groups of a label that the table shows, the largest ones."""

_CHECKS = {
    "media": "Answers without media.",
    "conflict": "Answers to media that conflict with the question.",
    "yes": "Bias towards yes, and objects that are named and not there (POPE measures both).",
    "modality": "Scores by modality.",
    "language": "Scores by language.",
    "probes": "Counterfactual pairs: the same question with one attribute swapped.",
    "people": "Differences between groups of people, beyond the groups above.",
    "calibration": "Calibration: whether probabilities of answers are shares of right ones (`--choose likelihood`).",
    "harm": "Harmful, stereotyped or toxic answers, refusals, and attacks by text or media.",
    "energy": "Energy and emissions of the training.",
}


def limits(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the report as lines of Markdown."""
    sections: tuple[tuple[str, Callable[[Evaluation], list[str]]], ...] = (
        ("Dependence on the media", media_lines),
        ("Baselines", baseline_lines),
        ("Counterfactual pairs", pair_lines),
        ("Calibration", calibration_lines),
        ("Bias towards yes", yes_lines),
        ("Answers that could not be read", unparsed_lines),
        ("Scores by group", group_lines),
    )
    lines = []
    for title, make in sections:
        if found := [line for one in evaluations for line in make(one)]:
            lines += [f"### {title}", "", *found, *([""] if found[-1] else [])]
    return lines


def media_lines(one: Evaluation) -> list[str]:
    """Return whether the score needs the media, and how often the answers are the same without them."""
    lines = [f"- {one.name}: {one.facts['media']}"]
    own = {line["id"]: line for line in one.lines[MODEL]}
    for variant, words in CONTROLS.items():
        if other := one.lines.get(variant):
            same = share(other, [_answer(line) == _answer(own[line["id"]]) for line in other])
            lines.append(f"- {one.name}: {percent(same)} of {len(other):,} answers stay the same {words}.")
    return lines


def _answer(line: Line) -> str:
    """Return an answer for comparison; one that could not be parsed counts as it is."""
    return str(line["answer"] if line["parsed"] is None else line["parsed"]).strip().lower()


def baseline_lines(one: Evaluation) -> list[str]:
    """Compare the model with the variants that need no model, such as the most frequent answer."""
    main, lines = one.metric.main, []
    own = one.facts["scores"][MODEL][main]
    for variant in one.facts["scores"].keys() - {MODEL, *CONTROLS}:
        other = one.facts["scores"][variant][main]
        if None not in (own["value"], other["value"]):
            verdict = (
                "better than the model" if other["value"] > own["value"] else "not better than the model"
            )
            lines.append(
                f"- {one.name}: {main} of `{variant}` is {number_text(other)}, {verdict} with {number_text(own)}."
            )
    return sorted(lines)


def pair_lines(one: Evaluation) -> list[str]:
    """Return how often an answer changes with an attribute that the true answer does not depend on."""
    found = {"": one.facts["scores"][MODEL], **one.facts["groups"].get("attribute", {})}
    return [
        f"- {one.name}{name and f', {cell(name)}'}: the answer changes in {percent(rate)} of the pairs, though the "
        "true answer is the same."
        for name, numbers in found.items()
        if (rate := numbers.get("flip_rate")) and rate["value"] is not None
    ]


def calibration_lines(one: Evaluation) -> list[str]:
    """Compare the probabilities of the chosen options with the share of right ones."""
    lines = [line for line in one.lines[MODEL] if "probability" in line]
    if not lines:
        return []
    right, sure = mean(lines), mean([{**line, "score": line["probability"]} for line in lines])["value"]
    bins: dict[int, list[float]] = {}
    for line in lines:
        # A probability of 1 belongs to the last bin.
        place = min(int(line["probability"] * _BINS), _BINS - 1)
        bins.setdefault(place, []).append(line["score"] - line["probability"])
    error = sum(abs(sum(gaps)) for gaps in bins.values()) / len(lines)
    if is_inside(sure, right):
        verdict = "neither too sure nor too unsure is shown"
    else:
        verdict = f"the model is too {'sure' if sure > right['value'] else 'unsure'}"
    return [
        f"- {one.name}: the mean probability of {len(lines):,} chosen options is {sure:.1%}, and {percent(right)} are "
        f"right: {verdict}. Expected calibration error: {error:.3f}, in {_BINS} bins."
    ]


def yes_lines(one: Evaluation) -> list[str]:
    """Compare the share of yes among the answers with that among the true answers."""
    asked = [line for line in one.lines[MODEL] if _targets(line) in (["yes"], ["no"])]
    if not asked:
        return []
    given = share(asked, [_answer(line) == "yes" for line in asked])
    true = sum(_targets(line) == ["yes"] for line in asked) / len(asked)
    if is_inside(true, given):
        verdict = "no bias is shown"
    else:
        verdict = f"the model says yes too {'often' if given['value'] > true else 'rarely'}"
    return [
        f"- {one.name}: the model answers yes to {percent(given)} of {len(asked):,} questions; yes is true for "
        f"{true:.1%}: {verdict}."
    ]


def _targets(line: Line) -> list[str]:
    target = line["target"]
    return [str(text).strip().lower() for text in (target if isinstance(target, list) else [target])]


def unparsed_lines(one: Evaluation) -> list[str]:
    """Return the share of answers that the parser could not read."""
    lines = one.lines[MODEL]
    unread = share(lines, [line["parsed"] is None for line in lines])
    parser, counted = (one.facts["settings"][key] for key in ("parser", "unparsed"))
    return [
        f"- {one.name}: {percent(unread)} of {len(lines):,} answers (parser {parser}); they count as {counted}."
    ]


def group_lines(one: Evaluation) -> list[str]:
    """Return a table for each label of the benchmark, and one for the length of the true answer."""
    main, lines = one.metric.main, []
    tables = {
        (label, main): {value: numbers[main] for value, numbers in groups.items()}
        for label, groups in one.facts["groups"].items()
    }
    tables["length of the true answer", "mean score"] = _by_length(one.lines[MODEL])
    for (label, metric), groups in tables.items():
        # A single group is the whole.
        if len(groups) < 2:
            continue
        shown = sorted(groups.items(), key=lambda entry: -entry[1]["n"])[:_LARGEST]
        lines += [f"{one.name}, by {label}:", "", f"| {label} | {metric} | items |", "|---|---|---|"]
        for value, number in shown:
            few = " (few)" if number["n"] < _FEW else ""
            lines.append(f"| {cell(value)} | {number_text(number)} | {number['n']:,}{few} |")
        if rest := len(groups) - len(shown):
            lines.append(f"| {rest} smaller groups, see `evaluation.json` | | |")
        # Without it, the words before the next table would be a row of this one.
        lines.append("")
    return lines


def _by_length(lines: Sequence[Line]) -> dict[str, Number]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        length = min(len(target.split()) for target in _targets(line))
        name = next(name for most, name in LENGTHS if most is None or length <= most)
        found.setdefault(name, []).append(line)
    return {name: mean(own) for name, own in found.items()}


def not_measured(
    evaluations: Sequence[Evaluation], variants: Iterable[str], *, extra: Iterable[str]
) -> list[str]:
    """Return the checks without a measurement, as a list of Markdown."""
    variants = {*variants, *(variant for one in evaluations for variant in one.lines)}
    labels = {label for one in evaluations for label in one.facts["groups"]}
    done = {
        "media": NO_MEDIA in variants,
        "conflict": SHUFFLED_MEDIA in variants,
        "calibration": any(calibration_lines(one) for one in evaluations),
        "probes": any(pair_lines(one) for one in evaluations),
        "yes": any(yes_lines(one) for one in evaluations),
        "language": "language" in labels,
        "modality": "modality" in labels,
    }
    return [f"- {words}" for name, words in _CHECKS.items() if not done.get(name)] + [
        f"- {words}" for words in extra
    ]


def cell(text: Any) -> str:
    """Return a text as a cell of a Markdown table, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|")
