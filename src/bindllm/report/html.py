"""What the pages of reports are put together from: tables, bars, tiles and texts, as HTML."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape

from bindllm.errors import BindLLMError
from bindllm.report.figures import thumbnail

SHEET_SIZE = 60
"""Rows on a sheet of cards."""

RIGHT = '<span class="mark">✓ right</span>'

_SHEET_SEED = 0
_LONGEST = 160
"""Characters shown of a text; one endless caption must not fill the page."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table of ready HTML cells; the first cell of each row names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    opening = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    return f'<div class="wide"><table class="{kind}">\n{opening}<tbody>\n{body}</tbody></table></div>\n'


def panel(
    title: str,
    values: Mapping[str, float],
    *,
    names: Mapping[str, str],
    show: Callable[[float], str],
    full: float | None = None,
) -> str:
    """Bars for a number of several variants, the first of which is this model and is drawn strong.

    Args:
        title: HTML of the heading.
        values: the number of each variant that has one.
        names: HTML of their names.
        show: writes a number.
        full: number of a bar over the whole width; None: the largest.
    """
    own, full = next(iter(names)), full or max(values.values(), default=0) or 1
    bars = "".join(
        f'<li class="{"model" if name == own else name}"><span class="name">{names[name]}</span>'
        f'<span class="bar"><i style="width:{100 * value / full:.1f}%"></i></span>'
        f"<span>{show(value)}</span></li>"
        for name, value in values.items()
    )
    return f'<div class="panel"><h3>{title}</h3><ul>{bars}</ul></div>'


def sample(num_rows: int) -> list[int]:
    """Return which of the rows stand on a sheet: drawn by a fixed seed, in their order."""
    return sorted(random.Random(_SHEET_SEED).sample(range(num_rows), min(SHEET_SIZE, num_rows)))


def said(name: str, words: str, *, right: bool, below: str = "") -> str:
    """A line of a card: who said what, and whether that is right."""
    mark = f" {RIGHT}" if right else ""
    return f'<dt>{name}{below}</dt><dd class="{name}" dir="auto">{text(words) or "(nothing)"}{mark}</dd>'


def card(picture: str, lines: Sequence[str], *, right: bool) -> str:
    """A card of a sheet, of a tile and lines as `said` gives them."""
    kind = "card right" if right else "card"
    return f'<article class="{kind}">{picture}<dl>{"".join(lines)}</dl></article>\n'


def tile(path: str, modality: str, resolve: Callable[[str], str], *, size: int = 160) -> str:
    """The picture; a grey tile with the name of what is no picture, or cannot be opened any more."""
    if modality == "text":
        return f'<span class="missing" title="text">{text(path)}</span>'
    name = escape(path.replace("\\", "/").rsplit("/", 1)[-1])
    if modality != "image":
        return f'<span class="missing" title="{name}">{escape(modality)}: {name}</span>'
    try:
        return f'<img src="{thumbnail(resolve(path), size=size)}" alt="{name}" title="{name}">'
    except BindLLMError as error:
        return f'<span class="missing" title="{escape(str(error))}">{name}</span>'


def text(words: str) -> str:
    """A text of the data as HTML: escaped, control characters made visible, and no longer than a card can hold."""
    visible = "".join(
        letter if unicodedata.category(letter) != "Cc" else "\ufffd" for letter in " ".join(words.split())
    )
    return escape(visible if len(visible) <= _LONGEST else visible[: _LONGEST - 1] + "…")
