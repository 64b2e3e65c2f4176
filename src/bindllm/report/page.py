"""The page of a report: plain data in, one self-contained HTML text out.

The page fetches and runs nothing: styles, figures and images are inside it, and it has no script. The template escapes
every text; only the figures, which are drawn here, are inserted as markup.
"""

from __future__ import annotations

import base64
import functools
import io
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bindllm.errors import BindLLMError, needs_extra
from bindllm.evaluation.task import MODEL
from bindllm.media import open_image
from bindllm.report.summary import (
    KEYS,
    METRICS,
    Variants,
    answer_lines,
    media_words,
    parts_of,
    summarize,
    variant_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Sequence[tuple[int, float]]
"""Points (step, value) in the order of steps."""

# Matplotlib does not support CSS variables: figures use stand-in colors, which are then replaced in the SVG.
_INK, _LINE, _FIRST, _SECOND = "#010101", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _LINE: "--line", _FIRST: "--first", _SECOND: "--second"}
_TEXT = 11
# A running mean of the training loss spans this share (1 / 40) of its points.
_SMOOTH_OVER = 40

SHEET_SIZE = 60
"""Rows on a sheet of cards."""

_SHEET_SEED = 0
# Markup of a cell; `format` escapes the text in it.
_BOLD = Markup("<b>{}</b>").format
# Characters shown of a text; one endless caption must not fill the page.
_LONGEST = 160
# Types of questions with a panel of bars; the table has all.
_PANELS = 8

# Rows and thumbnails of a folder may come from someone else: nothing but an inline image may become a source.
_THUMBNAIL = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/=]+")


@dataclass
class ReportData:
    """Content of a page.

    Args:
        rows: held-out rows by task: `bindllm.evaluation.captions.CaptionRow`,
            `bindllm.evaluation.answers.AnswerRow` and `bindllm.evaluation.episodes.EpisodeRow` as dictionaries.
        facts: the fields of `bindllm.report.report.RunFacts`.
        gates: effective gates, [L] or [L, H].
        thumbnails: data URIs by the path of their image, as in the rows.
    """

    metrics: dict[str, Any]
    rows: Mapping[str, Sequence[dict[str, Any]]]
    facts: dict[str, Any]
    gates: np.ndarray
    training: Series = field(default=())
    validation: Series = field(default=())
    recipe: str = ""
    thumbnails: Mapping[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> set[str]:
        """Modalities of the run's sources."""
        return {source["modality"] for source in self.facts["data"].get("sources", ())}


def render_page(data: ReportData) -> str:
    """Return the HTML of a report; no file that a row names is opened."""
    one, many = media_words(data.modalities)
    lead = summarize(
        data.metrics, num_captions=len(data.rows.get("captions", ())), modalities=data.modalities
    )
    # How to read this: everything below is plain data; the template only places and escapes it.
    logged = data.training or data.validation
    # A task without rows, such as conversations, has no cards.
    sheets = {task: _sheet(task, rows, data.thumbnails) for task, rows in data.rows.items() if rows}
    return (
        page_templates()
        .get_template("report.html.j2")
        .render(
            data.facts,
            metrics=data.metrics,
            lead=" ".join(lead),
            one=one,
            many=many,
            data_tables=_data_tables(data.facts["data"], one, many),
            groups=[
                (
                    row["group"],
                    f"{row['tensors']:,}",
                    f"{row['parameters']:,}",
                    "yes" if row["trainable"] else "frozen",
                )
                for row in data.facts["parameters"]
            ],
            parts=[(row["part"], row["name"], row["license"]) for row in data.facts["licenses"]],
            tasks={task: _task(task, variants, many) for task, variants in data.metrics["tasks"].items()},
            losses=Markup(loss_figure(data.training, data.validation)) if logged else "",
            gates=Markup(gate_figure(data.gates)),
            largest_gate=_largest(data.gates),
            sizes=np.abs(data.gates),
            sheets=sheets,
            blind={row["no_media"] for row in data.rows.get("captions", ())} - {None},
            recipe=data.recipe,
        )
    )


@functools.cache
def page_templates() -> Environment:
    """Return the templates of pages, compiled once; they escape every text."""
    # StrictUndefined: a renamed value raises instead of leaving a gap on the page.
    page = Environment(
        loader=PackageLoader("bindllm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"brief": brief, "duration": duration, "share": METRICS["accuracy"].show}
    return page


def _task(task: str, variants: Variants, many: str) -> dict[str, Any]:
    """Return panels of bars and a table with the metrics of a task."""
    # Columns in the order of the evaluation, the model first.
    titles = {
        "model": "this model",
        "no_media": f"no {many}",
        "shuffled_media": f"wrong {many}",
        "nearest_caption": "nearest caption",
        "blank_support": f"shots without {many}",
        "shuffled_support": f"shots with wrong {many}",
        "wrong_support": "names exchanged",
        "nearest_shot": "nearest shot",
        "copy_last": "last name",
        "majority_shot": "majority name",
        "majority_answer": "majority answer",
        "no_context": "no records",
        "random_context": "random records",
        "context_as_text": "records as text",
        "copied_context": "nearest record",
    }
    names = {name: titles[name] for name in variant_names(task, variants)}
    head = ["", *names.values()]
    # Answers are shares by type of question, all other tasks a list of metrics.
    if task in ("answers", "episodes"):
        # Without the subsets, which the table has.
        shown = min(_PANELS, len(variants["model"]["by_type"]))
        # Bars of shares fill the panel at 100 %, so that panels can be compared; bars of losses at the largest.
        lines = answer_lines(variants, list(names))
        head = ["type of question" if task == "answers" else "shots", "questions", *names.values()]
        panels = [_panel(title, row, names, "accuracy", full=1) for title, _, row in lines[: shown + 1]]
        panels[0] |= {"title": METRICS["accuracy"].title, "note": "higher is better"}
        rows = [
            (title, f"{count:,}", *(METRICS["accuracy"].show(share) for share in row.values()))
            for title, count, row in lines
        ]
        return {"panels": panels, "head": head, "rows": rows, "variants": variants}
    panels, rows = [], []
    # Bars for some metrics only; the table has all.
    for key in KEYS[task]:
        metric, row = METRICS[key], {name: variants[name][key] for name in names}
        better, arrow = ("lower", "↓") if metric.lower_is_better else ("higher", "↑")
        if task == "conversations" or key in ("loss", "cider", "rouge_l", "exact_match"):
            panels.append(_panel(metric.title, row, names, key) | {"note": f"{better} is better"})
        best = best_variants(row, lower=metric.lower_is_better)
        cells = [(_BOLD if name in best else str)(metric.show(value)) for name, value in row.items()]
        rows.append((f"{metric.title} {arrow}", *cells))
    for title, own in parts_of(variants, list(names)):
        # Reports of an earlier version have no counts.
        count = f" ({own[MODEL]['count']:,})" if "count" in own[MODEL] else ""
        for key in ("cider", "exact_match"):
            cells = [METRICS[key].show(each.get(key)) for each in own.values()]
            rows.append((f"{METRICS[key].title}: {title}{count}", *cells))
    return {"panels": panels, "head": head, "rows": rows, "variants": variants}


def _panel(
    title: str, row: Mapping[str, float | None], names: Mapping[str, str], key: str, *, full: float = 0
) -> dict[str, Any]:
    """Return bars for the values of several variants; ``full`` is the value of a full bar, 0 for the largest."""
    values = {name: value for name, value in row.items() if value is not None}
    # Never 0: all values may be 0.
    full = full or max(values.values(), default=0) or 1
    bars = [
        {"variant": name, "name": names[name], "width": 100 * value / full, "value": METRICS[key].show(value)}
        for name, value in values.items()
    ]
    return {"title": title, "note": "", "bars": bars}


def best_variants(row: Mapping[str, float | None], *, lower: bool = False) -> set[str]:
    """Return the variants that share the best value; empty if all are equal or undefined.

    Examples:
        >>> best_variants({"model": 3.5, "no_media": 8.2, "nearest_caption": None}, lower=True)
        {'model'}
    """
    known = {name: value for name, value in row.items() if value is not None}
    # Bold on equal values would claim a difference.
    if len(set(known.values())) < 2:
        return set()
    best = min(known.values()) if lower else max(known.values())
    return {name for name, value in known.items() if value == best}


def _data_tables(data: Mapping[str, Any], one: str, many: str) -> list[dict[str, Any]]:
    """Return tables of a `bindllm.data.report.DataReport`: sources, counts, and skipped rows; none without data."""
    # Facts of an older report may lack the data.
    if not data:
        return []
    rows = "rows" if any(source["format"] != "caption" for source in data["sources"]) else "captions"
    sources = [
        (
            source["path"],
            f"{source['num_media']:,}" + ("" if source["modality"] == "image" else f" {source['modality']}"),
            f"{source['num_rows']:,}",
        )
        for source in data["sources"]
    ]
    # Always shown: without them no metric of the page can be read.
    counts = [
        ("rows", ", ".join(f"{count:,} {split}" for split, count in data["rows"].items())),
        ("training tokens", f"{data['supervised_tokens']:,} in the answers, in one pass"),
        ("embeddings", data["embeddings"]),
    ]
    counts += [*data.get("languages", {}).items()]
    # Faults of the data: a line for each that there is.
    notes = {
        "answers cut to the longest length": data["truncated"],
        "rows without media": data["text_only"],
        f"held-out rows whose {one} is also in the training rows": data["shared_media"],
    }
    # The same remark of several sources is one line.
    remarks = sum((Counter(each["remarks"]["counts"]) for each in data["sources"]), Counter())
    notes |= {f"{rows} with {remark}": count for remark, count in remarks.items()}
    counts += [(name, f"{count:,}") for name, count in notes.items() if count]
    tables = [
        {"head": ["source", many, rows], "rows": sources, "kind": "numbers"},
        {"head": [], "rows": counts, "kind": "pairs"},
    ]
    if skipped := data["skipped"]["counts"]:
        examples = data["skipped"]["examples"]
        reasons = sorted(skipped, key=lambda reason: -skipped[reason])
        lines = [(brief(why), f"{skipped[why]:,}", brief(", ".join(examples[why]))) for why in reasons]
        tables.append({"head": ["reason for skipping", "rows", "for example"], "rows": lines})
    return tables


def shown_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows on a sheet, in their order: a fixed seed draws them, so that no one selects them."""
    drawn = sorted(random.Random(_SHEET_SEED).sample(range(len(rows)), min(SHEET_SIZE, len(rows))))
    return [rows[n] for n in drawn]


def draw_thumbnails(rows: Iterable[dict[str, Any]], resolve: Callable[[str], str]) -> dict[str, str]:
    """Return a data URI for each image on a sheet; one that cannot be opened has none.

    Args:
        rows: rows of a run of this process: their images are opened, whatever paths they have.
        resolve: turns a path of a row into one that can be opened from here.
    """
    found = {}
    for row in rows:
        # Also the image whose caption the baseline copies: it is shown small, next to it.
        for name in ("media", "nearest_media"):
            path = row.get(name)
            if path and row[name.replace("media", "modality")] == "image" and path not in found:
                with suppress(BindLLMError):
                    found[path] = thumbnail(resolve(path))
    return found


def _sheet(task: str, rows: Sequence[dict[str, Any]], thumbnails: Mapping[str, str]) -> dict[str, Any]:
    make = _caption_card if task == "captions" else _answer_card
    return {"total": len(rows), "cards": [make(row, thumbnails) for row in shown_rows(rows)]}


def _caption_card(row: dict[str, Any], thumbnails: Mapping[str, str]) -> dict[str, Any]:
    lines = [_line("true", " / ".join(row["references"]))]
    if row["model"] is not None:
        lines.append(_line("model", row["model"], kind="model", right=row["exact"]))
    if row["nearest_caption"] is not None:
        # With its image, so that a reader sees why it is the nearest.
        small = _tile(row["nearest_media"], row["nearest_modality"], thumbnails)
        said = row["nearest_caption"]
        lines.append(_line("nearest", said, kind="nearest", right=row["nearest_exact"], tile=small))
    return {"tile": _tile(row["media"], row["modality"], thumbnails), "lines": lines, "right": row["exact"]}


def _answer_card(row: dict[str, Any], thumbnails: Mapping[str, str]) -> dict[str, Any]:
    lines = [_line("asked", row["question"]), _line("true", " / ".join(row["references"]))]
    if row["model"] is not None:
        lines.append(_line("model", row["model"], kind="model", right=row["right"]))
    if row.get("majority_answer") is not None:
        lines.append(_line("majority", row["majority_answer"], kind="nearest"))
    tile = None if row["media"] is None else _tile(row["media"], row["modality"], thumbnails)
    return {"tile": tile, "lines": lines, "right": row["right"]}


def _line(
    name: str, text: str, *, kind: str = "", right: bool = False, tile: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return {"name": name, "text": text, "kind": kind, "right": right, "tile": tile}


def _tile(path: str, modality: str, thumbnails: Mapping[str, str]) -> dict[str, str]:
    """Return an image; for other media, and for an image without a thumbnail, a gray tile with its name."""
    # Rows of text media hold the text itself instead of a path.
    if modality == "text":
        return {"src": "", "name": path, "title": "text"}
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    if modality != "image":
        return {"src": "", "name": f"{modality}: {name}", "title": name}
    found = str(thumbnails.get(path, ""))
    return {"src": found if _THUMBNAIL.fullmatch(found) else "", "name": name, "title": name}


def _largest(gates: np.ndarray) -> str:
    """Return layer (and head) of the largest gate, as text."""
    # One index for a gate per layer, two for a gate per layer and head.
    index = np.unravel_index(int(np.abs(gates).argmax()), gates.shape)
    return ", ".join(f"{name} {number}" for name, number in zip(("layer", "head"), index, strict=False))


def brief(text: str) -> str:
    """Return a text on one line, control characters made visible, and no longer than a card can hold."""
    # Characters of category Cc would command a terminal or break a line.
    visible = "".join(
        letter if unicodedata.category(letter) != "Cc" else "\ufffd" for letter in " ".join(text.split())
    )
    return visible if len(visible) <= _LONGEST else visible[: _LONGEST - 1] + "…"


def duration(seconds: float) -> str:
    """Return seconds as text, in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def loss_figure(training: Series, validation: Series) -> str:
    """Draw training loss (faint: every logged step, strong: running mean) and validation loss.

    Args:
        training: loss per token, in nats, at each logged step; may be empty.
        validation: loss per token on the validation split; may be empty.

    Returns:
        one ``<svg>`` element.
    """
    axes = _empty_axes()
    if training:
        steps, values = zip(*training, strict=True)
        # Single steps are noisy: compare the running mean with the validation.
        axes.plot(steps, values, color=_FIRST, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(values), color=_FIRST, linewidth=2, label="training")
    if validation:
        steps, values = zip(*validation, strict=True)
        axes.plot(steps, values, color=_SECOND, linewidth=2, marker="o", markersize=5, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    # From zero: a cut axis would make small gains look large.
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=_TEXT)
    return _svg(axes, name="Loss by training step")


def gate_figure(gates: np.ndarray) -> str:
    """Draw the size of every gate: bars for one gate per layer, a map for one gate per layer and head.

    Args:
        gates: effective gates (after tanh where the injection applies it), [L] or [L, H].

    Returns:
        one ``<svg>`` element.
    """
    # The sign only flips the direction that the bind network learns; the size is how much a layer listens.
    sizes = np.abs(np.asarray(gates, dtype=np.float64))
    axes = _empty_axes()
    if sizes.ndim == 1:
        axes.bar(range(len(sizes)), sizes, color=_FIRST, width=0.8)
        axes.set_ylabel("size of the gate")
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
    else:
        # One column per layer: attention heads have no order, so bars would suggest one.
        drawing = axes.imshow(sizes.T, cmap="viridis", aspect="auto", interpolation="none", vmin=0)
        axes.set_ylabel("head")
        axes.yaxis.get_major_locator().set_params(integer=True)
        bar = axes.figure.colorbar(drawing, ax=axes, pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=_LINE, labelcolor=_INK, labelsize=_TEXT)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(axes, name="Size of the gates by layer")


def thumbnail(source: str, *, size: int = 160) -> str:
    """Return an image as a data URI, its longer side at most ``size`` pixels, transparent parts white.

    Raises:
        MediaError: the image cannot be read.
    """
    image = open_image(source, size=size)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _empty_axes() -> Axes:
    """Return axes in the report's style, made without pyplot, so that neither global state nor a display is used."""
    with needs_extra("matplotlib", extra="report", purpose="draw the report's figures"):
        from matplotlib.figure import Figure
    # No frame above and on the right: the figure sits in a page, among text.
    axes = Figure(figsize=(6.4, 3.3), layout="constrained").add_subplot()
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_LINE)
    axes.set_axisbelow(True)
    axes.tick_params(color=_LINE, labelcolor=_INK, labelsize=_TEXT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_INK, fontsize=_TEXT)
    return axes


def _svg(axes: Axes, *, name: str) -> str:
    """Return the figure as an ``<svg>`` element in the page's colors and font, without any URL in it."""
    import matplotlib

    content = io.StringIO()
    # Text stays text, and a fixed salt makes the ids deterministic.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        axes.figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Matplotlib's metadata names its website, and its ids would repeat when two figures share a page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg )[^>]*(viewBox="[^"]*")[^>]*>', rf'\1\2 role="img" aria-label="{name}">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r" ?font-family: [^;]*;", "", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """Return the centered running mean over a window that shrinks at both ends."""
    half = max(len(values) // _SMOOTH_OVER // 2, 1 if len(values) > 8 else 0)
    # By differences of the cumulative sum: one pass, whatever the window.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
