"""Figures of a report: loss curves and gates as inline SVG, and thumbnails as data URIs.

Colors in the SVG are the page's CSS variables, so that one figure serves a light and a dark page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bindllm.errors import MissingExtraError
from bindllm.media import open_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Sequence[tuple[int, float]]
"""Points (step, value) in the order of steps."""

# Matplotlib does not support CSS variables: figures use stand-in colors, which are then replaced in the SVG.
_INK, _LINE, _FIRST, _SECOND = "#010101", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _LINE: "--line", _FIRST: "--first", _SECOND: "--second"}
_TEXT = 11
_SMOOTH_OVER = 40
"""A running mean of the training loss spans this share (1 / 40) of its points."""


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra="report", purpose="draw the report's figures") from error
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
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
