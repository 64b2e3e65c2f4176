"""What a report says and shows of held-out questions: the share of right answers, beside what needs no looking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bindllm.report import html

VARIANTS = {
    "model": "this model",
    "no_media": "no picture",
    "shuffled_media": "wrong pictures",
    "majority_answer": "question alone",
}
MEASURES = ("accuracy", "by_type", "count", "count_by_type")
FEW_QUESTIONS = 100
"""Below this number of held-out questions the text warns that chance is large."""

_PANELS = 8
"""Types of question that have a panel of bars; the table has all."""

Say = Callable[[str], str]
"""Puts a text about pictures into words that fit what the run is about."""


def show(share: float | None) -> str:
    """Return a share of right answers as text, or a dash where it was not measured.

    Example:
        >>> show(0.5), show(None)
        ('50.0%', '-')
    """
    return "-" if share is None else f"{share:.1%}"


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """Return the headline: the share of right answers against the three baselines, one sentence each."""
    own = metrics["model"]
    if own["accuracy"] is None:
        return ["The answers to the held-out questions could not be measured."]
    told = [f"Of {own['count']:,} held-out questions the model answers {show(own['accuracy'])} right."]
    told += _against_question(own["accuracy"], metrics["majority_answer"]["accuracy"])
    told += _against_blind(metrics["no_media"], own)
    told += _against_shuffled(metrics["shuffled_media"], own)
    if own["count"] < FEW_QUESTIONS:
        told.append(f"{own['count']:,} questions are few: small differences here can be chance.")
    return told


def _against_question(own: float, guess: float | None) -> list[str]:
    if guess is None:
        return []
    if own <= guess:
        return [
            f"The most frequent training answer to each question is right for {show(guess)}: "
            "the model knows no more than the questions give away."
        ]
    return [
        f"The most frequent training answer to each question, without looking, is right for {show(guess)}."
    ]


def _against_blind(blind: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Compare with the same model without the picture, on the questions about pictures."""
    if blind["accuracy"] is None:
        return []
    return [
        f"Asked without the picture the same model answers {show(blind['accuracy'])} right{_aside(blind, own)}."
    ]


def _against_shuffled(wrong: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    if wrong["accuracy"] is None:
        return []
    right = wrong.get("model_accuracy", own["accuracy"])
    told = f"Shown wrong pictures it answers {show(wrong['accuracy'])} right{_aside(wrong, own)}"
    if wrong["accuracy"] >= right:
        return [f"{told}, no fewer: nothing here shows that it uses the picture."]
    return [f"{told}, so what it answers does depend on what it sees."]


def _aside(variant: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say on which questions a variant was measured, where not on all."""
    if "model_accuracy" not in variant or variant["count"] == own["count"]:
        return ""
    right = show(variant["model_accuracy"])
    return f" (of {variant['count']:,} questions, of which it answers {right} with the right one)"


def figures(metrics: Mapping[str, Any], say: Say) -> str:
    """Return the HTML of the numbers: bars for all questions and for each type, and a table."""
    own, names = metrics["model"], {name: say(title) for name, title in VARIANTS.items()}
    types = list(own["by_type"])

    def bars(title: str, pick: Callable[[Mapping[str, Any]], float | None]) -> str:
        values = {name: share for name in VARIANTS if (share := pick(metrics[name])) is not None}
        return html.panel(title, values, names=names, show=show, full=1)

    panels = [bars("Right answers <small>higher is better</small>", lambda variant: variant["accuracy"])]
    for name in types[:_PANELS]:
        panels.append(bars(html.text(name), lambda variant, name=name: variant["by_type"].get(name)))
    rows = [["all", f"{own['count']:,}", *(show(metrics[name]["accuracy"]) for name in VARIANTS)]]
    for name in types:
        shares = (show(metrics[variant]["by_type"].get(name)) for variant in VARIANTS)
        rows.append([html.text(name), f"{own['count_by_type'][name]:,}", *shares])
    notes = (
        "Shares of right answers: the words of a true answer (upper and lower case, punctuation and articles aside), "
        "or the letter of the right option. <b>This model</b> sees the right picture. <b>Question alone</b>: no model, "
        "the most frequent training answer to the same question, else to questions of its type. <b>Wrong pictures</b>: "
        "the same model, every picture exchanged for another one"
        f"{_measured_on(metrics['shuffled_media'], own)}. <b>No picture</b>: the same model, asked without it"
        f"{_measured_on(metrics['no_media'], own)}."
    )
    head = ["type of question", "questions", *names.values()]
    return (
        f'<div class="panels">{"".join(panels)}</div>\n'
        f'{html.table(head, rows, kind="numbers")}<p class="note">{say(notes)}</p>'
    )


def _measured_on(variant: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    if not variant["count"] or variant["count"] == own["count"]:
        return ""
    return f" ({variant['count']:,} of the questions)"


def sheet(answers: Sequence[Mapping[str, Any]], resolve: Callable[[str], str], say: Say) -> str:
    """Return the HTML of the sheet of cards: picture, question, true answer and what was answered."""
    places = html.sample(len(answers))
    cards = "".join(_card(answers[n], resolve) for n in places)
    told = say(
        f"{len(places):,} of {len(answers):,} held-out questions, drawn by a fixed seed and not chosen by anyone; all "
        f"are in <code>report/answers.jsonl</code>. {html.RIGHT} marks a right answer; <q>guess</q> is the most common "
        "training answer to the question."
    )
    return f'<p>{told}</p>\n<div class="sheet">{cards}</div>'


def _card(row: Mapping[str, Any], resolve: Callable[[str], str]) -> str:
    lines = [
        f'<dt>asked</dt><dd dir="auto">{html.text(row["question"])}</dd>',
        f'<dt>true</dt><dd dir="auto">{html.text(" / ".join(row["references"]))}</dd>',
    ]
    if row["model"] is not None:
        lines.append(html.said("model", row["model"], right=row["right"]))
    if row["majority_answer"] is not None:
        lines.append(f'<dt>guess</dt><dd class="nearest" dir="auto">{html.text(row["majority_answer"])}</dd>')
    picture = "" if row["media"] is None else html.tile(row["media"], row["modality"], resolve)
    return html.card(picture, lines, right=row["right"])
