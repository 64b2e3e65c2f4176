"""The page of a report: plain data in, one self-contained HTML text out.

Nothing on the page is fetched or run: styles, figures and pictures are inside it, and there is no script. Every
text that comes from data goes through `html.escape`.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from bindllm.errors import BindLLMError
from bindllm.training.figures import Series, gate_figure, loss_figure, thumbnail
from bindllm.training.summary import METRICS, VARIANTS, Metrics, best_variants, in_words_of, summarise

SHEET_SIZE = 60
"""Pictures on the contact sheet."""

_SHEET_SEED = 0
_LONGEST = 160
"""Characters shown of a text; one endless caption must not fill the page."""
_RIGHT = '<span class="mark">✓ right</span>'


@dataclass
class ReportData:
    """What a page shows.

    Args:
        metrics: content of ``metrics.json``.
        captions: one row per held-out picture: ``picture``, ``references``, ``generated``, ``zero_gates``,
            ``exact``, ``nearest``, ``nearest_picture``, ``nearest_exact``, ``modality``, ``nearest_modality``.
        facts: the fields of `bindllm.training.report.RunFacts`.
        training: training loss by step.
        validation: validation loss by step.
        gates: effective gates, [L] or [L, H].
        recipe: text of ``recipe.yaml``, or empty.
    """

    metrics: dict[str, Any]
    captions: list[dict[str, Any]]
    facts: dict[str, Any]
    gates: np.ndarray
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
    style = files("bindllm.training").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        _header(data, title),
        _problems(data.facts["problems"]),
        _section("How good it is", _panels(data) + _metrics_table(data)),
        _section("How it learnt", _learning(data)),
        _section("What it says", _contact_sheet(data, resolve)),
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table of ready HTML cells; the first cell of each row names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    opening = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    return f'<div class="wide"><table class="{kind}">\n{opening}<tbody>\n{body}</tbody></table></div>\n'


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


def _panels(data: ReportData) -> str:
    """Bars for the headline metrics: this model beside its baselines."""
    metrics: Metrics = data.metrics
    panels = []
    for key in ("loss", "cider", "rouge_l", "exact_match"):
        metric = METRICS[key]
        known = {name: metrics[name][key] for name in VARIANTS if metrics[name][key] is not None}
        top = max(known.values(), default=0) or 1
        bars = "".join(
            f'<li class="{name}"><span class="name">{data.say(VARIANTS[name])}</span>'
            f'<span class="bar"><i style="width:{100 * known[name] / top:.1f}%"></i></span>'
            f"<span>{metric.show(known[name])}</span></li>"
            for name in VARIANTS
            if name in known
        )
        better = "lower is better" if metric.lower_is_better else "higher is better"
        panels.append(
            f'<div class="panel"><h3>{metric.title} <small>{better}</small></h3><ul>{bars}</ul></div>'
        )
    return f'<div class="panels">{"".join(panels)}</div>\n'


def _metrics_table(data: ReportData) -> str:
    metrics: Metrics = data.metrics
    rows = []
    for key, metric in METRICS.items():
        best = best_variants(metrics, key)
        cells = [metric.show(metrics[name][key]) for name in VARIANTS]
        cells = [
            f"<b>{cell}</b>" if name in best else cell for name, cell in zip(VARIANTS, cells, strict=True)
        ]
        arrow = "↓" if metric.lower_is_better else "↑"
        rows.append([f"{metric.title} {arrow}", *cells])
    notes = (
        "↓ lower is better, ↑ higher is better; the best of each row is bold. "
        "<b>This model</b> sees the right picture. <b>Gates at zero</b>: the same model, blind. "
        "<b>Wrong pictures</b>: the same model, every picture exchanged for another one. "
        "<b>Nearest picture</b>: no model at all, the caption of the training picture that is most alike "
        "(a look-up has no loss). CIDEr goes from 0 to 10, and a right caption of two words reaches 5; papers print "
        "it times 100. BLEU-4 counts phrases of four words, so it stays near 0 where captions are shorter."
    )
    head = ["", *map(data.say, VARIANTS.values())]
    return _table(head, rows, kind="numbers") + f'<p class="note">{data.say(notes)}</p>'


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


def _contact_sheet(data: ReportData, resolve: Callable[[str], str]) -> str:
    captions = data.captions
    count = min(SHEET_SIZE, len(captions))
    shown = sorted(random.Random(_SHEET_SEED).sample(range(len(captions)), count))
    cards = "".join(_card(captions[n], resolve) for n in shown)
    blind = {row["zero_gates"] for row in captions if row["zero_gates"] is not None}
    text = data.say(
        f"{count} of {len(captions)} held-out pictures, drawn by a fixed seed and not chosen by anyone; all rows are "
        f"in <code>report/captions.jsonl</code>. {_RIGHT} marks a caption that has exactly the true words."
    )
    if len(blind) == 1:
        text += f" With its gates at zero the model says of every {data.say('picture')}: <q>{_text(blind.pop())}</q>"
    return f'<p>{text}</p>\n<div class="sheet">{cards}</div>'


def _card(row: dict[str, Any], resolve: Callable[[str], str]) -> str:
    lines = [f'<dt>true</dt><dd dir="auto">{_text(" / ".join(row["references"]))}</dd>']
    if row["generated"] is not None:
        lines.append(_said("model", row["generated"], right=row["exact"]))
    if row["nearest"] is not None:
        small = _tile(row["nearest_picture"], row.get("nearest_modality", "image"), resolve, size=64)
        lines.append(_said("nearest", row["nearest"], right=row["nearest_exact"], below=small))
    tile = _tile(row["picture"], row.get("modality", "image"), resolve)
    kind = "card right" if row["exact"] else "card"
    return f'<article class="{kind}">{tile}<dl>{"".join(lines)}</dl></article>\n'


def _said(name: str, text: str, *, right: bool, below: str = "") -> str:
    said = _text(text) or "(nothing)"
    mark = f" {_RIGHT}" if right else ""
    return f'<dt>{name}{below}</dt><dd class="{name}" dir="auto">{said}{mark}</dd>'


def _tile(path: str, modality: str, resolve: Callable[[str], str], *, size: int = 160) -> str:
    """The picture; a grey tile with the name of what is no picture, or cannot be opened any more."""
    if modality == "text":
        return f'<span class="missing" title="text">{_text(path)}</span>'
    name = escape(path.replace("\\", "/").rsplit("/", 1)[-1])
    if modality != "image":
        return f'<span class="missing" title="{name}">{escape(modality)}: {name}</span>'
    try:
        return f'<img src="{thumbnail(resolve(path), size=size)}" alt="{name}" title="{name}">'
    except BindLLMError as error:
        return f'<span class="missing" title="{escape(str(error))}">{name}</span>'


def _data(page: ReportData) -> str:
    """What a `bindllm.data.report.DataReport` says: sources, rows, and what was left out and why."""
    data = page.facts["data"]
    if not data:
        return "<p>Not recorded.</p>"
    sources = [[escape(s["path"]), _counted(s), f"{s['captions']:,}"] for s in data["sources"]]
    cleaned = sum(source["control_characters"] for source in data["sources"])
    notes = {
        "answers cut to the longest length": data["truncated"],
        "rows without media": data["text_only"],
        "captions with control characters removed": cleaned,
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
        _table(["source", page.say("pictures"), "captions"], sources, kind="numbers"),
        _table([], pairs, kind="pairs"),
    ]
    skipped = sorted(data["skipped"]["counts"].items(), key=lambda item: -item[1])
    if skipped:
        examples = data["skipped"]["examples"]
        rows = [[_text(why), f"{count:,}", _text(", ".join(examples[why]))] for why, count in skipped]
        parts.append(_table(["left out because", "rows", "such as"], rows))
    else:
        parts.append("<p>No row was left out.</p>")
    return "".join(parts)


def _counted(source: dict[str, Any]) -> str:
    modality = source.get("modality", "image")
    return f"{source['pictures']:,}" + ("" if modality == "image" else f" {escape(modality)}")


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
    parts = [_table(["group", "tensors", "parameters", "trained"], groups, kind="numbers")] if groups else []
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
    return _table(["part", "is", "licence"], rows)


def _text(text: str) -> str:
    """A text of the data as HTML: escaped, control characters made visible, and no longer than a card can hold."""
    visible = "".join(
        letter if unicodedata.category(letter) != "Cc" else "\ufffd" for letter in " ".join(text.split())
    )
    return escape(visible if len(visible) <= _LONGEST else visible[: _LONGEST - 1] + "…")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
