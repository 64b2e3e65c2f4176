"""Style and shared parts of the images of the docs."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from bindllm.encoders.imagebind import clips
from bindllm.encoders.pointbind.cloud import Level, gather

INK, FAINT, LINE, FIRST, SECOND = "#1b1d21", "#656b76", "#dfe2e7", "#2457d6", "#c2410c"
COLORS = ("#2457d6", "#c2410c", "#0b7a43", "#9333a8", "#b88a00", "#0e7f8c")
MAX_BYTES = 150_000
"""Maximum size of an image file."""

_DOTS_PER_INCH = 120
_WIDTH = 9.0

TITLE = {"loc": "left", "color": INK, "fontsize": 10}
HEADING = {"x": 0.01, "ha": "left", "color": INK, "fontsize": 10.5}


def new_figure(height: float) -> Figure:
    """Return an empty figure, made without pyplot, so that no display is needed."""
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def show(axes: Axes, pixels: np.ndarray, title: str, **options: Any) -> AxesImage:
    """Draw an image without ticks."""
    axes.set_title(title, **TITLE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes.imshow(pixels, **options)


def add_bar(figure: Figure, drawn: AxesImage, axes: Axes) -> None:
    """Add a color bar."""
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)


def outline_middle(axes: Axes, height: int, width: int) -> None:
    """Outline the middle square, which is cropped for image, depth and thermal inputs."""
    side = min(height, width)
    corner = ((width - side) / 2 - 0.5, (height - side) / 2 - 0.5)
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=SECOND, linewidth=2, clip_on=False))


def draw_clips(axes: Axes, seconds: Fraction, *, published: int) -> None:
    """Draw the clips of both coverages as bars on a time line."""
    for height, coverage, color in ((1.0, "published", FIRST), (2.6, "full", FAINT)):
        starts = clips.clip_starts(seconds, published=published, coverage=coverage, max_clips=64, name="")
        for number, start in enumerate(starts):
            # Every other bar is a little higher, so that overlapping bars can be told apart.
            base = height + 0.55 * (number % 2)
            axes.broken_barh([(float(start), clips.CLIP_SECONDS)], (base, 0.5), color=color, alpha=0.85)
            middle = (float(start) + clips.CLIP_SECONDS / 2, base + 0.23)
            axes.annotate(str(number + 1), middle, color="white", ha="center", va="center", fontsize=8)
    axes.set_yticks([1.5, 3.1], ["coverage:\npublished", "coverage:\nfull"])
    axes.tick_params(axis="y", length=0, pad=10)
    axes.set_ylim(0, 3.8)
    axes.set_xlim(0, float(seconds))
    axes.set_xlabel("seconds")
    strip(axes)
    axes.spines["left"].set_visible(False)


def strip(*panels: Axes) -> None:
    """Remove the frame except for both axes."""
    for axes in panels:
        axes.spines[["right", "top"]].set_visible(False)


def project(points: np.ndarray) -> np.ndarray:
    """Return points [..., 3] as (right, up, towards the viewer), viewed from the front, right and above."""
    turn, tilt = np.radians(32), np.radians(18)
    x, y, z = np.moveaxis(points, -1, 0)
    across, deep = x * np.cos(turn) - z * np.sin(turn), x * np.sin(turn) + z * np.cos(turn)
    return np.stack(
        [across, y * np.cos(tilt) - deep * np.sin(tilt), y * np.sin(tilt) + deep * np.cos(tilt)], -1
    )


def draw_mesh(axes: Axes, triangles: np.ndarray) -> None:
    """Draw triangles [N, 3, 3] from far to near, brighter if they face the light."""
    seen = project(triangles)
    normals = np.cross(seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    order = np.argsort(seen[:, :, 2].mean(1))
    order = order[normals[order, 2] > 0]
    bright = 0.45 + 0.5 * np.clip(normals[order] @ (-0.35, 0.8, 0.49), 0, 1)
    colors = bright[:, None] * (0.95, 0.87, 0.72)
    axes.add_collection(PolyCollection(seen[order, :, :2], facecolors=colors, edgecolors="face"))
    axes.autoscale_view()


def draw_groups(axes: Axes, below: torch.Tensor, level: Level) -> None:
    """Draw the points of the level below, some of its groups in color, and all centers."""
    members = gather(below, level.neighbors)[0].numpy()
    across, up, _ = project(below[0].numpy()).T
    axes.scatter(across, up, s=1 if len(across) > 1000 else 4, color="#c9ced6", linewidths=0)
    centers = project(level.centers[0].numpy())
    axes.scatter(centers[:, 0], centers[:, 1], s=5, color=INK, linewidths=0)
    # The first centers of farthest-point sampling are far apart.
    for number, color in enumerate(COLORS):
        group = project(members[number])
        axes.scatter(group[:, 0], group[:, 1], s=5 if len(across) > 1000 else 14, color=color, linewidths=0)
        axes.scatter(*centers[number, :2], s=60, marker="x", color=color, linewidths=2)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG of at most `MAX_BYTES`, with 256 colors if necessary."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DOTS_PER_INCH)
    with Image.open(content) as image:
        image.convert("RGB").save(file, optimize=True)
        if file.stat().st_size > MAX_BYTES:
            image.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE).save(file, optimize=True)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{file}: {size:,} bytes; expected at most {MAX_BYTES:,}")
