"""The limits and bias report of a card: each sentence is computed from the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bindllm.card.evidence import Evidence, Figure, mean_of
from bindllm.evaluation.task import MODEL, NO_MEDIA, SHUFFLED_MEDIA

Item = Mapping[str, Any]

CONTROLS = {
    NO_MEDIA: "without media",
    "gates_shut": "with the gates shut",
    SHUFFLED_MEDIA: "with the media of other items, which conflict with the question",
}
"""Variants of the model that take its media away, in words."""

LENGTHS = ((1, "1 word"), (3, "2 to 3 words"), (8, "4 to 8 words"), (None, "9 words or more"))
"""Groups of items by the words of the true answer: the largest number of words, and the name."""

_FEW = 30
"""A group of fewer items is marked."""
_LARGEST = 20
"""Groups of a label that the table shows, the largest ones."""


def limits(evidence: Sequence[Evidence]) -> list[str]:
    """Return the report as lines of Markdown."""
    sections: tuple[tuple[str, Callable[[Evidence], list[str]]], ...] = (
        ("Dependence on the media", media_lines),
        ("Baselines", baseline_lines),
        ("Bias towards yes", yes_lines),
        ("Answers that could not be read", unparsed_lines),
        ("Scores by group", group_lines),
    )
    lines = []
    for title, make in sections:
        found = [line for one in evidence for line in make(one)]
        if found:
            lines += [f"### {title}", "", *found, ""]
    return lines


def media_lines(evidence: Evidence) -> list[str]:
    """Compare the model with itself without its media, and with wrong ones, on the same items."""
    lines, own = [], evidence.of(MODEL)
    for variant, words in CONTROLS.items():
        if variant not in evidence.scores:
            continue
        other = evidence.of(variant)
        pairs = [(own[key], other[key]) for key in other if key in own]
        lines.append(
            f"- {evidence.name}: {_loss_of_media(evidence, variant, words, pairs)}{_same_answers(pairs)}"
        )
    return lines


def _loss_of_media(evidence: Evidence, variant: str, words: str, pairs: list[tuple[Item, Item]]) -> str:
    scored = [(a["score"], b["score"]) for a, b in pairs if None not in (a["score"], b["score"])]
    metric = evidence.main
    if not scored:
        values = (evidence.scores[name].get(metric) for name in (MODEL, variant))
        return f"{metric} {' against '.join(str(value or '-') for value in values)} {words}."
    own, other = (sum(side) / len(scored) for side in zip(*scored, strict=True))
    change = mean_of(a - b for a, b in scored)
    verdict = (
        "the score needs the media" if change.low > 0 else "nothing here shows that the score needs the media"
    )
    return (
        f"the mean score of {len(scored):,} items is {own:.3f}, and {other:.3f} {words} (difference {change}): "
        f"{verdict}."
    )


def _same_answers(pairs: list[tuple[Item, Item]]) -> str:
    """Return how often the answer stays the same."""
    if not pairs:
        return ""
    same = mean_of(_answer(a) == _answer(b) for a, b in pairs)
    return f" {_percent(same)} of the answers stay the same."


def _answer(item: Item) -> str:
    """Return an answer for comparison; one that could not be parsed counts as it is."""
    parsed = item["parsed"]
    return str(item["answer"] if parsed is None else parsed).strip().lower()


def baseline_lines(evidence: Evidence) -> list[str]:
    """Compare the model with the variants that need no model, such as the most frequent answer."""
    metric, lines = evidence.main, []
    own = evidence.scores[MODEL][metric]
    for variant, found in evidence.scores.items():
        figure = found.get(metric)
        if variant == MODEL or variant in CONTROLS or figure is None or None in (figure.value, own.value):
            continue
        verdict = "better than the model" if figure.value > own.value else "not better than the model"
        lines.append(
            f"- {evidence.name}: {metric} of `{variant}` is {figure}, of the model {own}: it is {verdict}."
        )
    return lines


def yes_lines(evidence: Evidence) -> list[str]:
    """Compare the share of yes among the answers with that among the true answers."""
    asked = [
        item
        for item in evidence.of(MODEL).values()
        if set(_targets(item)) <= {"yes", "no"} and _targets(item)
    ]
    if not asked:
        return []
    given = mean_of(_answer(item) == "yes" for item in asked)
    true = sum(_targets(item) == ["yes"] for item in asked) / len(asked)
    if given.low <= true <= given.high:
        verdict = "no bias is shown"
    else:
        verdict = f"the model says yes too {'often' if given.value > true else 'rarely'}"
    return [
        f"- {evidence.name}: the model answers yes to {_percent(given)} of {len(asked):,} questions; yes is true for "
        f"{true:.1%}: {verdict}."
    ]


def _targets(item: Item) -> list[str]:
    target = item["target"]
    return [str(one).strip().lower() for one in (target if isinstance(target, list) else [target])]


def unparsed_lines(evidence: Evidence) -> list[str]:
    """Return the share of answers that the parser could not read, if the evaluation has a parser."""
    items = [item for item in evidence.of(MODEL).values() if item.get("parser")]
    if not items:
        return []
    names = sorted({str(item["parser"]) for item in items})
    return [
        f"- {evidence.name}: {_percent(mean_of(item['parsed'] is None for item in items))} of {len(items):,} answers "
        f"(parser {', '.join(names)}); they count as wrong."
    ]


def group_lines(evidence: Evidence) -> list[str]:
    """Return a table for each label: those of the evaluation, and the length of the true answer."""
    main, lines = evidence.main, []
    tables = {
        (label, main): {value: found[main] for value, found in groups.items() if main in found}
        for label, groups in evidence.groups.items()
    }
    others = scored_groups(evidence)
    tables |= {
        (label, "mean score"): found for label, found in others.items() if label not in evidence.groups
    }
    for (label, metric), groups in tables.items():
        # A single group is the whole.
        if len(groups) < 2:
            continue
        shown = sorted(groups.items(), key=lambda entry: -(entry[1].n or 0))[:_LARGEST]
        lines += [
            f"{evidence.name}, by {label}:",
            "",
            f"| {label} | {metric} (95 % interval) | items |",
            "|---|---|---|",
        ]
        lines += [f"| {cell(value)} | {figure} | {_count(figure)} |" for value, figure in shown]
        if rest := len(groups) - len(shown):
            lines.append(f"| {rest} smaller groups, see `{evidence.file}` | | |")
        lines.append("")
    # The caller separates sections.
    return lines[:-1]


def scored_groups(evidence: Evidence) -> dict[str, dict[str, Figure]]:
    """Return the mean score of items by the length of the true answer, and by labels that have no figures yet."""
    found: dict[str, dict[str, list[float]]] = {}
    for item in evidence.of(MODEL).values():
        if item["score"] is None:
            continue
        length = min(len(target.split()) for target in _targets(item) or [""])
        name = next(name for most, name in LENGTHS if most is None or length <= most)
        for label, value in {**item.get("groups", {}), "length of the true answer": name}.items():
            found.setdefault(label, {}).setdefault(str(value), []).append(item["score"])
    return {label: {value: mean_of(own) for value, own in groups.items()} for label, groups in found.items()}


def not_measured(evidence: Sequence[Evidence], *, extra: Iterable[str], measured: Iterable[str]) -> list[str]:
    """Return the checks without a measurement, as a list of Markdown.

    Args:
        evidence: all evaluations.
        extra: further sentences.
        measured: names of `_CHECKS` that something else has measured.
    """
    items = [item for one in evidence for item in one.of(MODEL).values()]
    variants = {variant for one in evidence for variant in one.scores}
    labels = {label for one in evidence for label in one.groups} | {
        k for i in items for k in i.get("groups", {})
    }
    done = set(measured) | {
        name
        for name, is_done in {
            "media": bool(variants & {NO_MEDIA, "gates_shut"}),
            "conflict": SHUFFLED_MEDIA in variants,
            "yes": any(yes_lines(one) for one in evidence),
            "language": "language" in labels,
            "modality": "modality" in labels,
        }.items()
        if is_done
    }
    return [f"- {words}" for name, words in _CHECKS.items() if name not in done] + [
        f"- {words}" for words in extra
    ]


_CHECKS = {
    "media": "Answers without media.",
    "conflict": "Answers to media that conflict with the question.",
    "yes": "Bias towards yes, and objects that are named and not there (POPE measures both).",
    "modality": "Scores by modality.",
    "language": "Scores by language.",
    "probes": "Counterfactual pairs: the same question with one attribute swapped (`--probes`).",
    "people": "Differences between groups of people, beyond the groups above.",
    "calibration": "Calibration: whether the probability of an answer is the share of right ones.",
    "harm": "Harmful, stereotyped or toxic answers, refusals, and attacks by text or media.",
    "energy": "Energy and emissions of the training.",
}


def _percent(figure: Figure) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"


def _count(figure: Figure) -> str:
    if figure.n is None:
        return "-"
    return f"{figure.n:,}" + (" (few)" if figure.n < _FEW else "")


def cell(text: Any) -> str:
    """Return a text as a cell of a Markdown table, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|")
