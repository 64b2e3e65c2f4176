"""The page of a report: plain data in, one self-contained HTML text out.

Nothing on the page is fetched or run: styles, figures and pictures are inside it, and there is no script. Every
text that comes from data goes through `html.escape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from bindllm.report import answers, html
from bindllm.report.figures import Series, gate_figure, loss_figure
from bindllm.report.summary import (
    CHAT_MEASURES,
    CHAT_VARIANTS,
    METRICS,
    VARIANTS,
    Metrics,
    best_variants,
    in_words_of,
    summarise,
)


@dataclass
class ReportData:
    """What a page shows.

    Args:
        metrics: content of ``metrics.json``.
        captions: one row per held-out picture: fields of `bindllm.evaluation.captions.CaptionRow`.
        answers: one row per held-out question: fields of `bindllm.evaluation.answers.AnswerRow`.
        facts: the fields of `bindllm.report.report.RunFacts`.
        training: training loss by step.
        validation: validation loss by step.
        gates: effective gates, [L] or [L, H].
        recipe: text of ``recipe.yaml``, or empty.
    """

    metrics: dict[str, Any]
    captions: list[dict[str, Any]]
    facts: dict[str, Any]
    gates: np.ndarray
    answers: Sequence[dict[str, Any]] = ()
    training: Series = ()
    validation: Series = ()
    recipe: str = ""

    @property
    def modalities(self) -> set[str]:
        """What the sources of the run are of."""
        return {source.get("modality", "image") for source in self.facts["data"].get("sources", ())}

    def say(self, text: str) -> str:
        """Return a text of the page about pictures in words that fit what the run is about."""
        return in_words_of(text, self.modalities)


def render_page(data: ReportData, *, resolve: Callable[[str], str] = str) -> str:
    """Return the HTML of a report.

    Args:
        data: what to show.
        resolve: turns a picture's path in the rows into one that can be opened from here.
    """
    title = escape(data.facts["title"])
    style = files("bindllm.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        _header(data, title),
        _problems(data.facts["problems"]),
        _section("How good it is", _figures(data)),
        _section("How it learnt", _learning(data)),
        _section("What it says", _sheets(data, resolve)),
        _section("What it learnt from", _data(data)),
        _section("The run", _run_facts(data)),
        _section("Licences", _licences(data.facts["licences"])),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{body}\n</section>\n"


def _header(data: ReportData, title: str) -> str:
    seconds = data.metrics["seconds"]
    facts = [
        f"trained in {_duration(seconds['train'])}",
        f"{data.say('pictures')} embedded in {_duration(seconds['embed'])}",
        f"evaluated in {_duration(seconds['evaluate'])}",
        f"{data.metrics['trainable_parameters']:,} trainable parameters",
        data.facts["device"],
        f"finished {data.facts['finished']}",
    ]
    text = " ".join(summarise(data.metrics, num_pictures=len(data.captions), modalities=data.modalities))
    line = "".join(f"<li>{escape(fact)}</li>" for fact in facts if fact)
    return f'<header>\n<h1>{title}</h1>\n<ul class="meta">{line}</ul>\n<p class="lead">{escape(text)}</p>\n</header>\n'


def _problems(problems: dict[str, str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in problems.items())
    return f'<section class="problems"><h2>What did not work</h2><ul>{items}</ul></section>\n'


_HEADINGS = {"captions": "Captions", "answers": "Questions and answers", "conversations": "Conversations"}


def _figures(data: ReportData) -> str:
    """The numbers of each kind of held-out rows; a heading tells several kinds apart."""
    drawn = {}
    for kind, metrics in data.metrics["tasks"].items():
        if kind == "answers":
            drawn[kind] = answers.figures(metrics, data.say)
        elif kind == "conversations":
            drawn[kind] = _panels(data, metrics, CHAT_MEASURES, CHAT_VARIANTS) + _chat_table(data, metrics)
        else:
            shown = ("loss", "cider", "rouge_l", "exact_match")
            drawn[kind] = _panels(data, metrics, shown, VARIANTS) + _captions_table(data, metrics)
    return _headed(drawn)


def _headed(parts: dict[str, str]) -> str:
    if len(parts) == 1:
        return next(iter(parts.values()))
    return "".join(f"<h3>{_HEADINGS[kind]}</h3>\n{part}" for kind, part in parts.items())


def _panels(data: ReportData, metrics: Metrics, keys: Sequence[str], variants: Sequence[str]) -> str:
    """Bars for the headline metrics: this model beside its baselines."""
    panels = []
    names = {name: data.say(VARIANTS[name]) for name in variants}
    for key in keys:
        metric = METRICS[key]
        known = {name: metrics[name][key] for name in variants if metrics[name][key] is not None}
        better = "lower is better" if metric.lower_is_better else "higher is better"
        title = f"{metric.title} <small>{better}</small>"
        panels.append(html.panel(title, known, names=names, show=metric.show))
    return f'<div class="panels">{"".join(panels)}</div>\n'


def _numbers_table(data: ReportData, metrics: Metrics, keys: Sequence[str], variants: Sequence[str]) -> str:
    rows = []
    for key in keys:
        metric, best = METRICS[key], best_variants(metrics, key, variants)
        cells = {name: metric.show(metrics[name][key]) for name in variants}
        arrow = "↓" if metric.lower_is_better else "↑"
        bold = [f"<b>{cell}</b>" if name in best else cell for name, cell in cells.items()]
        rows.append([f"{metric.title} {arrow}", *bold])
    return html.table(["", *(data.say(VARIANTS[name]) for name in variants)], rows, kind="numbers")


_NOTES = (
    "↓ lower is better, ↑ higher is better; the best of each row is bold. "
    "<b>This model</b> sees the right picture. <b>Gates at zero</b>: the same model, blind. "
    "<b>Wrong pictures</b>: the same model, every picture exchanged for another one. "
)


def _captions_table(data: ReportData, metrics: Metrics) -> str:
    notes = (
        f"{_NOTES}<b>Nearest picture</b>: no model at all, the caption of the training picture that is most alike "
        "(a look-up has no loss). CIDEr goes from 0 to 10, and a right caption of two words reaches 5; papers print "
        "it times 100. BLEU-4 counts phrases of four words, so it stays near 0 where captions are shorter."
    )
    table = _numbers_table(data, metrics, list(METRICS), list(VARIANTS))
    return f'{table}<p class="note">{data.say(notes)}</p>'


def _chat_table(data: ReportData, metrics: Metrics) -> str:
    notes = f"{_NOTES}Conversations without pictures are the same in all three."
    return (
        f'{_numbers_table(data, metrics, CHAT_MEASURES, CHAT_VARIANTS)}<p class="note">{data.say(notes)}</p>'
    )


def _learning(data: ReportData) -> str:
    figures = []
    if data.training or data.validation:
        drawing = loss_figure(data.training, data.validation)
        text = "Loss per token by optimiser step. Faint: every logged step; strong: running mean."
        figures.append(f"<figure>{drawing}<figcaption>{text}</figcaption></figure>")
    sizes = np.abs(data.gates)
    place = np.unravel_index(int(sizes.argmax()), sizes.shape)
    names = ", ".join(f"{name} {index}" for name, index in zip(("layer", "head"), place, strict=False))
    text = (
        "Size of the gates; layer 0 is next to the words, and every gate started at zero. "
        f"Mean {sizes.mean():.3f}, largest {sizes.max():.3f} ({names})."
    )
    figures.append(f"<figure>{gate_figure(data.gates)}<figcaption>{text}</figcaption></figure>")
    return f'<div class="figures">{"".join(figures)}</div>'


def _sheets(data: ReportData, resolve: Callable[[str], str]) -> str:
    parts = {}
    if data.captions:
        parts["captions"] = _captions_sheet(data, resolve)
    if data.answers:
        parts["answers"] = answers.sheet(data.answers, resolve, data.say)
    if not parts:
        return "<p>Of held-out conversations the loss alone is measured.</p>"
    return _headed(parts)


def _captions_sheet(data: ReportData, resolve: Callable[[str], str]) -> str:
    captions = data.captions
    places = html.sample(len(captions))
    cards = "".join(_card(captions[n], resolve) for n in places)
    blind = {row["no_media"] for row in captions if row["no_media"] is not None}
    text = data.say(
        f"{len(places)} of {len(captions)} held-out pictures, drawn by a fixed seed and not chosen by anyone; all rows "
        f"are in <code>report/captions.jsonl</code>. {html.RIGHT} marks a caption that has exactly the true words."
    )
    if len(blind) == 1:
        words = html.text(blind.pop())
        text += f" With its gates at zero the model says of every {data.say('picture')}: <q>{words}</q>"
    return f'<p>{text}</p>\n<div class="sheet">{cards}</div>'


def _card(row: dict[str, Any], resolve: Callable[[str], str]) -> str:
    lines = [f'<dt>true</dt><dd dir="auto">{html.text(" / ".join(row["references"]))}</dd>']
    if row["model"] is not None:
        lines.append(html.said("model", row["model"], right=row["exact"]))
    if row["nearest_caption"] is not None:
        small = html.tile(row["nearest_media"], row["nearest_modality"], resolve, size=64)
        lines.append(html.said("nearest", row["nearest_caption"], right=row["nearest_exact"], below=small))
    picture = html.tile(row["media"], row["modality"], resolve)
    return html.card(picture, lines, right=row["exact"])


def _data(page: ReportData) -> str:
    """What a `bindllm.data.report.DataReport` says: sources, rows, and what was left out and why."""
    data = page.facts["data"]
    if not data:
        return "<p>Not recorded.</p>"
    sources = [[escape(s["path"]), _counted(s), f"{s['num_rows']:,}"] for s in data["sources"]]
    cleaned = sum(source["control_characters"] for source in data["sources"])
    notes = {
        "answers cut to the longest length": data["truncated"],
        "rows without media": data["text_only"],
        f"{_rows_of(data)} with control characters removed": cleaned,
        page.say("held-out rows whose picture is in the training rows too"): data["shared_media"],
    }
    counts = {
        "rows": ", ".join(f"{count:,} {split}" for split, count in data["rows"].items()),
        "training tokens": f"{data['supervised_tokens']:,} in the answers, in one pass",
        "embeddings": f"{data['encoded']:,} made for this run, {data['reused']:,} from the store",
        **{name: f"{count:,}" for name, count in notes.items() if count},
    }
    pairs = [[escape(name), escape(value)] for name, value in counts.items()]
    parts = [
        html.table(["source", page.say("pictures"), _rows_of(data)], sources, kind="numbers"),
        html.table([], pairs, kind="pairs"),
    ]
    skipped = sorted(data["skipped"]["counts"].items(), key=lambda item: -item[1])
    if skipped:
        examples = data["skipped"]["examples"]
        rows = [[html.text(why), f"{count:,}", html.text(", ".join(examples[why]))] for why, count in skipped]
        parts.append(html.table(["left out because", "rows", "such as"], rows))
    else:
        parts.append("<p>No row was left out.</p>")
    return "".join(parts)


def _rows_of(data: dict[str, Any]) -> str:
    """What the rows of the sources are called: captions, where all are."""
    formats = {source.get("format", "caption") for source in data["sources"]}
    return "captions" if formats <= {"caption"} else "rows"


def _counted(source: dict[str, Any]) -> str:
    modality = source.get("modality", "image")
    return f"{source['num_media']:,}" + ("" if modality == "image" else f" {escape(modality)}")


def _run_facts(data: ReportData) -> str:
    groups = [
        [
            escape(row["group"]),
            f"{row['tensors']:,}",
            f"{row['parameters']:,}",
            "yes" if row["trainable"] else "frozen",
        ]
        for row in data.facts["parameters"]
    ]
    parts = (
        [html.table(["group", "tensors", "parameters", "trained"], groups, kind="numbers")] if groups else []
    )
    software = ", ".join(f"{name} {number}" for name, number in data.facts["software"].items())
    revision = data.facts["revision"] or "unknown"
    parts.append(f"<p>{escape(software)}; git revision: {escape(revision)}</p>")
    if data.recipe:
        parts.append(f"<details><summary>Recipe</summary><pre>{escape(data.recipe)}</pre></details>")
    return "".join(parts)


def _licences(licences: Sequence[dict[str, str]]) -> str:
    if not licences:
        return "<p>See the model card, <code>README.md</code>.</p>"
    rows = [[escape(row["part"]), escape(row["name"]), escape(row["licence"])] for row in licences]
    return html.table(["part", "is", "licence"], rows)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
