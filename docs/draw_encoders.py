"""Draw the images of `docs/encoders.md`: encoder inputs, made from files by the encoders' own functions.

    python docs/draw_encoders.py [--output docs/encoders]

`synthetic_media.py` writes the files to a temporary folder first. No weights and no downloads are needed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import synthetic_media
import torch
from drawing import (
    COLORS,
    FIRST,
    HEADING,
    INK,
    LINE,
    SECOND,
    TITLE,
    add_bar,
    draw_clips,
    draw_groups,
    draw_mesh,
    new_figure,
    outline_middle,
    project,
    save,
    show,
    strip,
)  # fmt: skip
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from bindllm.encoders.imagebind import clips, inputs
from bindllm.encoders.pointbind.cloud import fit_cloud
from bindllm.encoders.pointbind.networks import build_network
from bindllm.media import open_image
from bindllm.media.audio import cut_audio
from bindllm.media.maps import open_depth, open_thermal
from bindllm.media.motion import AXES
from bindllm.media.points import open_points
from bindllm.media.source import Source

FOLDER = Path(__file__).parent / "encoders"
_CAMERA = {"baseline": 0.075, "focal": 518.86}
# Mean and deviation of the vision trunk's normalization, undone here to show its input as an image.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def draw_image(folder: Path) -> Figure:
    """Draw a photograph as stored, upright with the cropped square, and as input of the trunk."""
    file = synthetic_media.write_photograph(folder / "photo.jpg")
    figure = new_figure(2.9)
    stored, whole, seen = figure.subplots(1, 3, width_ratios=(0.625, 1.6, 1))
    with Image.open(file) as photo:
        show(
            stored,
            np.asarray(photo),
            f"photo.jpg as stored\n{photo.width} x {photo.height}, EXIF: rotate it",
        )
    upright = open_image(file, size=None)
    show(
        whole, np.asarray(upright), f"upright: {upright.width} x {upright.height}\nthe middle square is used"
    )
    outline_middle(whole, upright.height, upright.width)
    show(seen, inputs.image_input(file).permute(1, 2, 0).numpy(), "input of the trunk\nuint8 [3, 224, 224]")
    return figure


def draw_video(folder: Path) -> Figure:
    """Draw the sampled frames of a video and the three crops of one clip."""
    file = synthetic_media.write_video(folder / "ball.mp4")
    frames: dict[int, np.ndarray] = {}
    length: list[Fraction] = []

    def read_and_record(source: Source, *, pick: Callable) -> Iterator[tuple[int, np.ndarray]]:
        def recording(count: int, rate: Fraction) -> Sequence[int]:
            length[:] = [count / rate]
            return pick(count, rate)

        for number, frame in read_frames(source, pick=recording):
            frames[number] = frame
            yield number, frame

    read_frames = clips.read_frames
    with mock.patch.object(clips, "read_frames", read_and_record):
        views = clips.video_input(file, coverage="published", max_clips=64)
    numbers = sorted(frames)
    starts = clips.clip_starts(length[0], published=5, coverage="published", max_clips=64, name="")

    figure = new_figure(6.2)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.2, 1.2, 2.0))
    line = top.subplots()
    draw_clips(line, length[0], published=5)
    for number in numbers:
        at = number / synthetic_media.FRAME_RATE
        line.plot(at, 0.12, marker="v", color=SECOND, markersize=7, clip_on=False)
        line.annotate(str(number), (at, 0.38), ha="center", color=SECOND, fontsize=9, annotation_clip=False)
    line.set_yticks([0.5, *line.get_yticks()], ["sampled\nframes", *line.get_yticklabels()])
    line.set_title("ball.mp4: 8 seconds, 10 frames per second, 384 x 216", **TITLE)
    for axes, start in zip(middle.subplots(1, 5), starts, strict=True):
        shown = [
            n
            for n in numbers
            if start <= Fraction(n, synthetic_media.FRAME_RATE) < start + clips.CLIP_SECONDS
        ]
        show(axes, frames[shown[0]], f"clip {starts.index(start) + 1}: frames {shown[0]}, {shown[-1]}")
    crops = views.view(5, 3, 3, 2, 224, 224)[2] * _column(_DEVIATION) + _column(_MEAN)
    bottom.suptitle("clip 3 as input of the trunk: first and last frame of three crops", **HEADING)
    positions = ("left", "middle", "right")
    for number, axes in enumerate(bottom.subplots(1, 6)):
        crop, position = divmod(number, 2)
        pixels = crops[crop, :, position].permute(1, 2, 0).clip(0, 1).numpy()
        show(axes, pixels, f"{positions[crop]}, {('first', 'last')[position]}")
    return figure


def draw_audio(folder: Path) -> Figure:
    """Draw a melody, its three clips, and their spectrograms."""
    file = synthetic_media.write_melody(folder / "melody.wav")
    spectra = clips.audio_input(file, coverage="published", max_clips=64)[:, 0].numpy()
    (wave,) = cut_audio(file, rate=clips.RATE, cut=lambda length: [(0, length)])
    short = clips.audio_input(wave[:, : int(0.7 * clips.RATE)], coverage="published", max_clips=64)[
        0, 0
    ].numpy()
    seconds = Fraction(wave.shape[1], clips.RATE)
    starts = clips.clip_starts(seconds, published=3, coverage="published", max_clips=64, name="")

    figure = new_figure(5.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.7, 2.9))
    line, bars = top.subplots(2, 1, sharex=True)
    line.plot(np.arange(wave.shape[1]) / clips.RATE, wave[0], color=INK, linewidth=0.4)
    line.set_ylabel("amplitude")
    line.tick_params(axis="x", length=0)
    strip(line)
    line.spines["bottom"].set_visible(False)
    line.set_title("melody.wav: nine notes, one a second; stereo, 44,100 Hz", **TITLE)
    draw_clips(bars, seconds, published=3)
    bottom.suptitle("input of the trunk: [clips, 1, 128, 204], logarithm of the energy, scaled", **HEADING)
    panels = bottom.subplots(1, 4, sharey=True)
    titles = [f"clip {n}: from {float(start):g} s" for n, start in enumerate(starts, start=1)]
    for axes, spectrum, title in zip(
        panels, [*spectra, short], [*titles, "a sound of 0.7 s, padded"], strict=True
    ):
        drawn = axes.imshow(
            spectrum,
            origin="lower",
            aspect="auto",
            extent=(0, 2.04, 0, 128),
            cmap="magma",
            vmin=-1.3,
            vmax=1.2,
        )
        axes.set_title(title, **TITLE)
        axes.set_xlabel("seconds")
        axes.set_xticks([0, 1, 2])
    panels[0].set_ylabel("hertz, 128 mel bands")
    panels[0].set_yticks(*_mel_ticks())
    bar = bottom.colorbar(drawn, ax=panels, pad=0.01, fraction=0.02)
    bar.outline.set_visible(False)
    return figure


def draw_depth(folder: Path) -> Figure:
    """Draw the depth in meters, the curve from meters to input, and the input."""
    file = synthetic_media.write_depth(folder / "room.png")
    meters = open_depth(file)
    figure = new_figure(3.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.1))
    drawn = show(
        left, np.where(meters > 0, meters, np.nan), "room.png: meters\ngray: not measured", cmap="viridis_r"
    )
    left.set_facecolor("#b9bec7")
    outline_middle(left, *meters.shape)
    add_bar(figure, drawn, left)
    distances = np.geomspace(0.3, 60, 80)
    flat = (np.full((8, 8), meter, np.float32) for meter in distances)
    middle.semilogx(
        distances, [inputs.depth_input(map, **_CAMERA)[0, 0, 0] for map in flat], color=FIRST, linewidth=2
    )
    middle.set_xticks([0.5, 1, 2, 5, 10, 50], ["0.5", "1", "2", "5", "10", "50"])
    middle.minorticks_off()
    seen = inputs.depth_input(file, **_CAMERA)[0].numpy()
    middle.axhline(seen.min(), color=SECOND, linestyle=(0, (1, 2)), linewidth=1.5)
    middle.set_xlabel("meters")
    middle.set_title("input value by distance\ndotted: not measured", **TITLE)
    middle.grid(color=LINE)
    strip(middle)
    drawn = show(right, seen, "input: near is large\nfloat32 [1, 224, 224]", cmap="viridis")
    add_bar(figure, drawn, right)
    return figure


def draw_thermal(folder: Path) -> Figure:
    """Draw the stored values, their clipping limits, and the input."""
    file = synthetic_media.write_heat(folder / "heat.png")
    with Image.open(file) as photo:
        stored = np.asarray(photo).astype(np.float64)
    brightness = open_thermal(file)
    inside = stored[(brightness > 0) & (brightness < 1)]
    low, high = inside.min(), inside.max()
    figure = new_figure(3.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.15))
    drawn = show(left, stored, "heat.png: 16 bits, 0.01 K;\none hot pixel sets the range", cmap="inferno")
    outline_middle(left, *stored.shape)
    add_bar(figure, drawn, left)
    middle.hist(stored[stored < 40_000].ravel(), bins=80, color="#9aa3b2", log=True)
    for value, label, side in ((low, "  0", "left"), (high, "1  ", "right")):
        middle.axvline(value, color=SECOND, linewidth=1.5)
        middle.annotate(
            label, (value, 0.95), xycoords=("data", "axes fraction"), color=SECOND, ha=side, va="top"
        )
    middle.set_title("histogram of values;\nlimits mapped to 0 and 1", **TITLE)
    middle.set_xlabel("stored value")
    strip(middle)
    seen = inputs.thermal_input(file)[0].numpy()
    drawn = show(
        right, seen, "input of the trunk\nfloat32 [1, 224, 224], 0..1", cmap="inferno", vmin=0, vmax=1
    )
    add_bar(figure, drawn, right)
    return figure


def draw_imu(folder: Path) -> Figure:
    """Draw the readings of a file and the evenly resampled input."""
    file = synthetic_media.write_walk(folder / "walk.csv")
    table = np.loadtxt(file, delimiter=",", skiprows=1)
    signal = inputs.imu_input(file).numpy()
    figure = new_figure(4.6)
    panels = figure.subplots(2, 2, sharey="row")
    kinds = ((0, "acceleration, m/s²"), (3, "rotation, rad/s"))
    for row, (first, unit) in zip(panels, kinds, strict=True):
        for axis in range(first, first + 3):
            style = {"color": COLORS[axis - first], "label": AXES[axis][-1]}
            row[0].plot(table[:, 0], table[:, 1 + axis], linestyle="", marker=".", markersize=3, **style)
            row[1].plot(signal[axis], linewidth=1.2, **style)
        row[0].set_ylabel(unit)
        strip(*row)
        row[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0, 0].set_title(f"walk.csv: {len(table)} readings in 6 seconds, uneven, with a gap", **TITLE)
    panels[0, 1].set_title("input of the trunk: float32 [6, 2000], evenly sampled", **TITLE)
    panels[1, 0].set_xlabel("seconds")
    panels[1, 1].set_xlabel("step")
    return figure


def draw_point(folder: Path) -> Figure:
    """Draw a mesh, its point cloud, and the groups of both networks."""
    import trimesh

    file = synthetic_media.write_chair(folder / "chair.ply")
    cloud = fit_cloud(open_points(file), 8192)
    figure = new_figure(6.6)
    panels = figure.subplots(2, 3).ravel()
    draw_mesh(panels[0], trimesh.load_mesh(file).subdivide().subdivide().subdivide().triangles)
    panels[0].set_title("chair.ply: a mesh, in centimeters", **TITLE)
    across, up, _ = project(cloud.numpy()).T
    panels[1].scatter(across, up, s=0.6, color=INK, linewidths=0)
    panels[1].set_title("8192 points, farthest distance 1", **TITLE)
    rest = iter(panels[2:])
    for variant, name in (("point-bert", "Point-BERT"), ("i2p-mae", "I2P-MAE")):
        levels = build_network({"variant": variant}, source=variant).group(cloud[None])
        below = cloud[None]
        for number, level in enumerate(levels, start=1):
            axes = next(rest)
            draw_groups(axes, below, level)
            groups, neighbors = level.neighbors.shape[1:]
            label = f"{name} {number}" if len(levels) > 1 else name
            axes.set_title(f"{label}: {groups} groups of {neighbors}", **TITLE)
            below = level.centers
    for axes in panels:
        axes.set_aspect("equal")
        axes.set_axis_off()
    return figure


DRAWINGS: dict[str, Callable[[Path], Figure]] = {
    "image": draw_image,
    "video": draw_video,
    "audio": draw_audio,
    "depth": draw_depth,
    "thermal": draw_thermal,
    "imu": draw_imu,
    "point": draw_point,
}


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1, 1)


def _mel_ticks() -> tuple[list[float], list[str]]:
    """Return the bands at some frequencies and their labels (the mel scale of O'Shaughnessy, 1987)."""
    low, *inside, high = (1127 * np.log1p(hertz / 700) for hertz in (20, 250, 500, 1000, 2000, 4000, 8000))
    return [128 * (mel - low) / (high - low) for mel in inside], ["250", "500", "1000", "2000", "4000"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all images, or only the named ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*DRAWINGS, []], metavar="NAME", help=", ".join(DRAWINGS))
    parser.add_argument("--output", type=Path, default=FOLDER, help="output folder")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name in chosen.names or DRAWINGS:
        with tempfile.TemporaryDirectory() as folder, style.context("default"):
            save(DRAWINGS[name](Path(folder)), chosen.output / f"{name}.png")
        print(chosen.output / f"{name}.png")


if __name__ == "__main__":
    main()
