"""Tables and plot of `benchmarks.ablation`: means over the seeds, and the spread from the smallest to the largest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NUMBERS = ("loss", "cider", "exact_match", "cosine")
CASE = ("recipe", "images", "modality")
SETTINGS = ("size", "top_k", "temperature", "weight", "formula")
SWEPT = ("size", "top_k", "temperature", "weight")
BOUNDS = {
    "image": "the image itself",
    "none": "no cache",
    "mean": "the mean image",
    "shuffled": "a shuffled cache",
}
INK, FAINT = "#1b1d21", "#656b76"
COLORS = {"image": "#0b7a43", "none": "#c2410c", "mean": "#b88a00", "shuffled": "#9a9fa8"}


def tables(rows: list[Row]) -> str:
    """Return a Markdown table for each case and split."""
    parts = []
    for case, split in dict.fromkeys((tuple(row[name] for name in CASE), row["split"]) for row in rows):
        own = _of(rows, case, split)
        recipe, images, modality = case
        parts += [
            f"**{recipe}, asked by {modality} about {images}** ({split}, {own[0]['questions']} questions)",
            f"| | {' | '.join(NUMBERS)} |\n|---|{'---|' * len(NUMBERS)}",
        ]
        lines = [f"| {name} | {_cells(same)} |" for name, same in _grouped(own)]
        parts[-1] += "\n" + "\n".join(lines)
    return "\n\n".join(parts)


def _of(rows: list[Row], case: tuple[str, ...], split: str) -> list[Row]:
    return [row for row in rows if tuple(row[name] for name in CASE) == case and row["split"] == split]


def _grouped(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_name(row), []).append(row)
    return list(groups.items())


def _name(row: Row) -> str:
    if row["kind"] in BOUNDS:
        return BOUNDS[row["kind"]]
    said = f"K {row['top_k']}, temperature {row['temperature']:g}, weight {row['weight']:g}"
    return f"{said}, {row['size'] or 'all'} images{', paper' if row['formula'] == 'paper' else ''}"


def _cells(rows: Sequence[Row]) -> str:
    cells = []
    for name in NUMBERS:
        values = [row[name] for row in rows]
        spread = f" ({max(values) - min(values):.3f})" if len(values) > 1 and name != "cosine" else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    return " | ".join(cells)


def draw(rows: list[Row], file: Path) -> None:
    """Draw CIDEr over each swept setting, one row of panels per case; error bars span the seeds."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["split"] != "test"]
    cases = list(dict.fromkeys(tuple(row[name] for name in CASE) for row in rows))
    figure = Figure(figsize=(9.5, 2.2 * len(cases)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1)
    heading = "The visual cache, one setting changed at a time; bars reach over three seeds\n"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10.5, color=INK)
    panels = figure.subplots(len(cases), len(SWEPT), squeeze=False)
    for case, line in zip(cases, panels, strict=True):
        own = [row for row in rows if tuple(row[name] for name in CASE) == case]
        limit = 1.15 * max(row["cider"] for row in own)
        for swept, axes in zip(SWEPT, line, strict=True):
            _draw_panel(axes, own, swept)
            axes.set_ylim(0, limit)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, colors=FAINT)
        recipe, images, modality = case
        count = own[0]["questions"]
        title = f"{recipe} model, asked by {modality} about {count} held-out images of {Path(images).name}"
        note = line[0].annotate(title, (0, 1.06), xycoords="axes fraction", fontsize=9, color=INK)
        # The title spans all panels and must not widen the first.
        note.set_in_layout(False)
        line[0].set_ylabel("CIDEr", fontsize=8, color=FAINT)
    for swept, axes in zip(SWEPT, panels[-1], strict=True):
        axes.set_xlabel(swept, fontsize=9, color=INK)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def _draw_panel(axes: Any, rows: list[Row], swept: str) -> None:
    """Draw the sweep of one setting with the others as released, and the bounds as lines."""
    released = {"size": 0, "top_k": 10, "temperature": 20.0, "weight": 0.5, "formula": "released"}
    others = {name: value for name, value in released.items() if name != swept}
    caches = [row for row in rows if row["kind"] == "cache" and others.items() <= row.items()]
    points = sorted({row[swept] for row in caches}, key=lambda value: (swept == "size" and value == 0, value))
    values = [[row["cider"] for row in caches if row[swept] == point] for point in points]
    means = [statistics.mean(column) for column in values]
    reach = [
        [mean - min(column) for mean, column in zip(means, values, strict=True)],
        [max(column) - mean for mean, column in zip(means, values, strict=True)],
    ]
    for kind, color in COLORS.items():
        if bound := [row["cider"] for row in rows if row["kind"] == kind]:
            axes.axhline(statistics.mean(bound), color=color, linewidth=1.2, label=BOUNDS[kind])
    axes.errorbar(
        range(len(points)), means, reach, color="#2457d6", marker="o", markersize=4, capsize=2, label="cache"
    )
    axes.set_xticks(range(len(points)), [_label(swept, point) for point in points])
    axes.margins(x=0.15)


def _label(swept: str, point: float) -> str:
    return "all" if swept == "size" and point == 0 else f"{point:g}"
