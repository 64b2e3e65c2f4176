"""Plain sentences about the numbers of a run, the headline of its report; losses are stated as plainly as wins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bindllm.data.rows import spread
from bindllm.errors import printable
from bindllm.evaluation.context import CONTEXT_VARIANTS
from bindllm.evaluation.task import MODEL, VARIANTS

Variants = Mapping[str, Mapping[str, Any]]
"""The metrics of one task, by variant."""

FEW_ROWS = 100
"""Below this number of held-out rows the text warns that chance is large."""

_SHOWN_ROWS = 5
_SMALL_SHARE = 0.02
"""A loss that changes by less than this share has hardly changed."""


def variant_names(task: str, variants: Variants) -> list[str]:
    """Return the variants of a task that a report shows: those of every model, and those of retrieved context."""
    return [*VARIANTS[task], *(name for name in CONTEXT_VARIANTS if name in variants)]


@dataclass(frozen=True)
class Metric:
    """Name and format of a metric.

    Args:
        name: name inside a sentence.
        pattern: format of its values.
        lower_is_better: whether lower values are better.
    """

    name: str
    pattern: str
    lower_is_better: bool = False

    @property
    def title(self) -> str:
        """The name at the start of a line."""
        return self.name[0].upper() + self.name[1:]

    def show(self, value: float | None) -> str:
        """Return a value as text, or a dash if it is not defined."""
        return "-" if value is None else self.pattern.format(value)


METRICS = {
    "loss": Metric("loss per token", "{:.2f}", lower_is_better=True),
    "perplexity": Metric("perplexity", "{:,.4g}", lower_is_better=True),
    "cider": Metric("CIDEr", "{:.2f}"),
    "bleu4": Metric("BLEU-4", "{:.3f}"),
    "rouge_l": Metric("ROUGE-L", "{:.3f}"),
    "exact_match": Metric("exact match", "{:.1%}"),
    "accuracy": Metric("right answers", "{:.1%}"),
}
KEYS = {
    "captions": ("loss", "perplexity", "cider", "bleu4", "rouge_l", "exact_match"),
    "answers": ("accuracy", "by_type", "count", "count_by_type"),
    "episodes": ("accuracy", "by_type", "count", "count_by_type", "published", "named"),
    "conversations": ("loss", "perplexity"),
}
"""Keys that each variant of a task has in ``metrics.json``."""

_CAPTION_METRICS = KEYS["captions"][2:]
# Metrics of a variant that was not measured on a subset or a language.
_NOTHING: Mapping[str, Any] = {"accuracy": None, "by_type": {}}


def parts_of(
    variants: Variants,
    names: Sequence[str],
    labels: Sequence[str] = ("by_subset", "by_language"),
    prefix: str = "",
) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    """Yield name and metrics of each variant, for each subset with its languages, then for each language."""
    for n, label in enumerate(labels, start=1):
        for part in variants[MODEL].get(label, {}):
            # A variant without the part, such as one that was not measured, shows dashes.
            own = {name: variants[name].get(label, {}).get(part, _NOTHING) for name in names}
            yield f"{prefix}{part}", own
            yield from parts_of(own, names, labels[n:], f"{prefix}{part}, ")


def answer_lines(variants: Variants, names: Sequence[str]) -> list[tuple[str, int, dict[str, float | None]]]:
    """Return title, number of questions and share of right answers of each variant: of all, then of each type.

    The same follows for each subset and language, if the questions have them.
    """
    lines = _type_lines({name: variants[name] for name in names})
    for title, own in parts_of(variants, names):
        lines += _type_lines(own, prefix=title)
    return lines


def _type_lines(variants: Variants, prefix: str = "") -> list[tuple[str, int, dict[str, float | None]]]:
    # Types in the order of the data; a variant without a type shows a dash.
    model, start = variants["model"], f"{prefix}: " if prefix else ""
    lines = [(prefix or "all", model["count"], {name: each["accuracy"] for name, each in variants.items()})]
    for kind, count in model["count_by_type"].items():
        shares = {name: each["by_type"].get(kind) for name, each in variants.items()}
        lines.append((f"{start}{kind}", count, shares))
    return lines


def media_words(modalities: Iterable[str]) -> tuple[str, str]:
    """Return how texts name the media of a run, in singular and plural.

    Examples:
        >>> media_words(["image"]), media_words(["image", "radar"])
        (('image', 'images'), ('media', 'media'))
    """
    return ("image", "images") if set(modalities) <= {"image"} else ("media", "media")


def summarize(
    metrics: Mapping[str, Any], *, num_captions: int, modalities: Iterable[str] = ("image",)
) -> list[str]:
    """Return the headline: every task compared with its baselines, one sentence for each comparison.

    Args:
        num_captions: number of held-out images (or other media) with captions.
    """
    words, sentences = media_words(modalities), []
    for task, variants in metrics["tasks"].items():
        if task == "answers":
            sentences += _answers(variants, *words)
        elif task == "episodes":
            sentences += _episodes(variants, words[0])
        elif task == "captions":
            sentences += _captions(variants, num_captions, *words)
        else:
            sentences += _losses(variants, f"{variants['model']['count']:,} held-out conversations", *words)
    return sentences


def _captions(variants: Variants, count: int, one: str, many: str) -> list[str]:
    sentences = _losses(variants, f"{count:,} held-out {many}", one, many)
    # Nothing to compare: the sentence above says so already.
    if variants["model"]["loss"] is None:
        return sentences
    sentences += _against_nearest(variants["model"], variants["nearest_caption"], one)
    sentences += _context(variants, "rouge_l")
    return sentences + _languages(variants["model"], "exact_match") + _few(count, many)


def _languages(model: Mapping[str, Any], key: str) -> list[str]:
    """Return the metric of each language, of held-out rows in several."""
    show, parts = METRICS[key].show, model.get("by_language", {})
    listed = ", ".join(f"{show(part[key])} in {name}" for name, part in parts.items())
    return [f"By language, {METRICS[key].name}: {listed}."] if len(parts) > 1 else []


def _context(variants: Variants, key: str) -> list[str]:
    """Compare a model with retrieved context with the same model without records, and with other uses of them."""
    show = METRICS[key].show
    values = [
        f"{show(variants[name][key])} {words}"
        for name, words in (
            ("no_context", "without records"),
            ("random_context", "with random records"),
            ("context_as_text", "with their texts in the prompt"),
            ("copied_context", "by copying the nearest record"),
        )
        if variants.get(name, {}).get(key) is not None
    ]
    own = variants["model"].get(key)
    if not values or own is None:
        return []
    return [f"With retrieved records its {METRICS[key].title} is {show(own)}: {', '.join(values)}."]


def _few(count: int, rows: str) -> list[str]:
    return [f"{count:,} {rows} are few: small differences can be chance."] if count < FEW_ROWS else []


def _losses(variants: Variants, rows: str, one: str, many: str) -> list[str]:
    """Compare the loss with that of the same model without media and with wrong media."""
    model, blind, shuffled = (variants[name]["loss"] for name in ("model", "no_media", "shuffled_media"))
    if model is None:
        return [f"The loss on {rows} could not be measured."]
    # The same rows, weights and tokens: only the media change, so the difference shows how much the model uses them.
    perplexity = METRICS["perplexity"].show(variants["model"]["perplexity"])
    sentences = [f"On {rows} the loss is {model:.2f} per token (perplexity {perplexity})."]
    if blind is not None:
        useless = ": training has not helped it on this data" if model >= blind else ""
        sentences.append(f"Without {many} (gates at zero) the same model has {blind:.2f}{useless}.")
    if shuffled is not None:
        if shuffled <= model:
            verdict = f"not worse: nothing here shows that it uses the {one}"
        elif shuffled < model * (1 + _SMALL_SHARE):
            verdict = f"hardly worse: it makes little use of the {one}"
        else:
            verdict = f"so its output does depend on the {one}"
        sentences.append(f"With wrong {many} it has {shuffled:.2f}, {verdict}.")
    return sentences


def _against_nearest(model: Mapping[str, Any], nearest: Mapping[str, Any], one: str) -> list[str]:
    """Compare the captions with a baseline that copies a training caption."""
    pairs = {key: (model[key], nearest[key]) for key in _CAPTION_METRICS}
    # Metrics that could not be measured on either side are not compared.
    pairs = {key: pair for key, pair in pairs.items() if None not in pair}
    if not pairs:
        return []

    def listed(keys: Sequence[str]) -> str:
        return ", ".join(
            f"{METRICS[key].name} {' against '.join(map(METRICS[key].show, pairs[key]))}" for key in keys
        )

    # All caption metrics are better if larger; equal values are on neither side.
    better = [key for key, (own, other) in pairs.items() if own > other]
    worse = [key for key, (own, other) in pairs.items() if own < other]
    copying = f"copying the caption of the nearest training {one}"
    if not better and not worse:
        return [f"Its captions score the same as {copying}."]
    if not worse:
        return [f"Its captions beat {copying}: {listed(better)}."]
    if not better:
        return [f"Its captions are worse than {copying}: {listed(worse)}. Plain look-up wins here."]
    return [f"Its captions beat {copying} in {listed(better)}; copying is better in {listed(worse)}."]


def _answers(variants: Variants, one: str, many: str) -> list[str]:
    """Compare the share of right answers with the three baselines."""
    model, show = variants["model"], METRICS["accuracy"].show
    own, guess, blind, shuffled = (
        variants[name]["accuracy"] for name in ("model", "majority_answer", "no_media", "shuffled_media")
    )
    if own is None:
        return ["The answers to the held-out questions could not be measured."]
    # From the weakest baseline to the strongest test: guessing, no media, and the media of other rows.
    sentences = [f"Of {model['count']:,} held-out questions the model answers {show(own)} right."]
    if guess is not None:
        useless = ": the model knows no more than the questions reveal" if own <= guess else ""
        sentences.append(
            f"The most frequent training answer to each question is right for {show(guess)}{useless}."
        )
    if blind is not None:
        aside = _aside(variants["no_media"], model)
        sentences.append(f"Without the {one} the same model answers {show(blind)} right{aside}.")
    if shuffled is not None:
        variant = variants["shuffled_media"]
        # On the same questions: a sample may be easier than all of them.
        if shuffled >= variant.get("model_accuracy", own):
            verdict = f"not fewer: nothing here shows that it uses the {one}"
        else:
            verdict = f"so its answers do depend on the {one}"
        aside = _aside(variant, model)
        sentences.append(f"With wrong {many} it answers {show(shuffled)} right{aside}, {verdict}.")
    sentences += _context(variants, "accuracy") + _languages(model, "accuracy")
    return sentences + _few(model["count"], "questions")


def _episodes(variants: Variants, one: str) -> list[str]:
    """Compare the share of right names with copying a name, and with exchanged names."""
    model, show = variants["model"], METRICS["accuracy"].show
    own, near, last, most = (
        variants[name]["accuracy"] for name in ("model", "nearest_shot", "copy_last", "majority_shot")
    )
    if own is None:
        return ["The answers to the held-out episodes could not be measured."]
    by_shots = [f"{show(part['accuracy'])} at {name}" for name, part in model.get("by_subset", {}).items()]
    listed = f" ({', '.join(by_shots)})" if by_shots else ""
    sentences = [
        f"In {model['count']:,} held-out episodes the model names {show(own)} of the queries right{listed}."
    ]
    if last is not None and most is not None:
        useless = ": the model does no better than copying" if own <= max(last, most) else ""
        sentences.append(
            f"The name of the last shot is right for {show(last)}, the most frequent name for {show(most)}{useless}."
        )
    if near is not None:
        sentences.append(f"The name of the shot nearest to the query is right for {show(near)}.")
    variant = variants["wrong_support"]
    if (exchanged := variant["accuracy"]) is not None:
        # On the same episodes: those without shots have no names to exchange.
        same = variant.get("model_accuracy", own)
        if exchanged >= same:
            verdict = f"not fewer: nothing here shows that it learns names from the {one} of a shot"
        # Two standard errors, at most, of the difference of two shares.
        elif same - exchanged < 2 * math.sqrt(0.5 / variant["count"]):
            verdict = "hardly fewer: this can be chance"
        else:
            verdict = f"so it does learn names from the {one} of a shot"
        sentences.append(
            f"With the names exchanged between the classes it names {show(exchanged)} right instead of {show(same)}, "
            f"{verdict}."
        )
    return sentences + _few(model["count"], "episodes")


def _aside(variant: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return on which questions a variant was measured, if not on all, for a fair comparison with the model."""
    if "model_accuracy" not in variant or variant["count"] == model["count"]:
        return ""
    # The model on the same sample, which may be easier or harder than all questions.
    right = METRICS["accuracy"].show(variant["model_accuracy"])
    return f" (on {variant['count']:,} questions, of which it answers {right} right with the right one)"


def print_summary(
    console: Console, metrics: Mapping[str, Any], rows: Mapping[str, Any], page: Path, *, modalities: set[str]
) -> None:
    """Print the headline, a few captions and answers, and the path of the report."""
    console.print(f"report:        {page}\n", markup=False)
    for sentence in summarize(metrics, num_captions=len(rows.get("captions", ())), modalities=modalities):
        console.print(sentence, markup=False)
    for shown in filter(None, rows.values()):
        console.print(_shown(shown, modalities))


def _shown(rows: list[dict[str, Any]], modalities: set[str]) -> Table:
    """Return a table of a few held-out rows, evenly spread."""
    # Relative widths: a long caption in one column must not squeeze the others.
    table = Table(box=box.SIMPLE, expand=True)
    table.add_column(f"held-out {media_words(modalities)[0]}", ratio=1, overflow="fold")
    asked = "question" in rows[0]
    if asked:
        table.add_column("question", ratio=2)
    table.add_column("true", ratio=1)
    table.add_column("generated", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in spread(rows, _SHOWN_ROWS):
        question = (row["question"],) if asked else ()
        cells = (Path(row["media"] or "").name, *question, row["references"][0], row["model"] or "")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
