"""The drawings of the scenes: a choice of OpenMoji, rendered once, then scaled and turned."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bindllm.errors import AssetError, MissingExtraError
from bindllm.quickstart import openmoji

# The training split of OpenMoji decides which of them are known. All are compact, countable, without a color in their
# name, and no two look alike.
_THINGS = """
tomato, strawberry, hamburger, avocado, watermelon, mushroom, pear, pretzel, cupcake, pizza, birthday cake,
onion, cheese wedge, doughnut, eggplant, pineapple, coconut, sandwich, cat, rabbit, snail, elephant, whale,
lady beetle, turtle, koala, frog, lion, duck, butterfly, crab, peacock, cow, tropical fish, gorilla, panda,
tiger, horse, octopus, penguin, zebra, hedgehog, teapot, honeybee, skunk, cactus, potted plant, evergreen
tree, tractor, rocket, sailboat, locomotive, fire engine, bicycle, helicopter, airplane, balloon, crown,
drum, telephone, television, radio, bell, top hat, t-shirt, dress, handbag, bomb, game die, basketball,
fountain, beer mug, bucket, mirror, door, bed, castle, house, tent, ghost, robot, skull, sun, cloud,
rainbow, money bag, envelope, treasure chest, roller skate, brain, puzzle piece, watch, wheel, megaphone,
trophy, factory, lemon, taco, fox, swan, gear, raccoon, laptop, backpack, camera, soccer ball, alarm clock,
printer, parachute, teddy bear, ferry, package, newspaper, owl, light bulb, star, maple leaf, croissant,
camel, llama
"""

THINGS = tuple(" ".join(name.split()) for name in _THINGS.split(","))
"""Names of the things, as OpenMoji has them."""

GROUPS = 8
"""Groups of known things: scenes of known things have at most one of each, new combinations only things of one."""

# Longer side of a rendered drawing, in pixels: more than the largest in a scene.
_RENDERED = 192
# Transparent pixels around a drawing, so that its outline is smooth after a turn.
_BORDER = 4


@dataclass(frozen=True)
class Sprite:
    """The drawing of a thing. The size of a thing is the square root of its width times its height.

    Args:
        is_known: whether training scenes may have it.
        drawing: premultiplied RGBA, cropped to its visible pixels, with a transparent border.
        sides: width and height of the visible pixels, divided by the size.
        middle: mean position of the opaque pixels, from the center of the drawing, divided by the size.
    """

    name: str
    is_known: bool
    group: int
    drawing: Image.Image
    sides: tuple[float, float]
    middle: tuple[float, float]

    def extent(self, size: int, turn: int) -> tuple[int, int]:
        """Return width and height of the turned drawing in pixels, rounded up."""
        cos, sin = cos_sin(turn)
        width, height = (size * side for side in self.sides)
        # One pixel at each side for smooth edges.
        return math.ceil(width * cos + height * abs(sin)) + 2, math.ceil(width * abs(sin) + height * cos) + 2

    def center(self, size: int, turn: int) -> tuple[float, float]:
        """Return the mean position of the opaque pixels of the turned drawing, from its upper left corner."""
        (width, height), (cos, sin) = self.extent(size, turn), cos_sin(turn)
        x, y = (size * distance for distance in self.middle)
        return width / 2 + cos * x - sin * y, height / 2 + sin * x + cos * y

    def draw(self, size: int, turn: int) -> Image.Image:
        """Return the drawing as RGBA, scaled and turned clockwise by degrees, as large as its `extent`."""
        scale = size * self.sides[0] / (self.drawing.width - 2 * _BORDER)
        inner, outer = tuple(round(scale * side) for side in self.drawing.size), self.extent(size, turn)
        cos, sin = cos_sin(turn)
        # From a pixel of the result to one of the drawing: turned back around both centers.
        x, y = outer[0] / 2, outer[1] / 2
        matrix = (cos, sin, inner[0] / 2 - cos * x - sin * y, -sin, cos, inner[1] / 2 + sin * x - cos * y)
        # Scaled first: only resize averages over pixels. Neither filter rings, which would leave faint pixels around.
        small = self.drawing.resize(inner, Image.Resampling.HAMMING)
        return small.transform(outer, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).convert(
            "RGBA"
        )


def cos_sin(turn: int) -> tuple[float, float]:
    """Return cosine and sine of degrees."""
    return math.cos(math.radians(turn)), math.sin(math.radians(turn))


def make_sprites(content: openmoji.Wheels) -> list[Sprite]:
    """Return the sprites of `THINGS`.

    Raises:
        AssetError: OpenMoji lacks one of them.
        MissingExtraError: resvg_py is not installed.
    """
    rows = {row["caption"][0]: row for row in openmoji.rows_of(content)}
    if missing := [name for name in THINGS if name not in rows]:
        raise AssetError(
            f"OpenMoji has no drawing called {', '.join(missing)}; expected {openmoji.PACKAGES[0]}"
        )
    known = [name for name in THINGS if rows[name]["split"] == "train"]
    # Dealt out, so that the groups are equally large.
    groups = {name: number % GROUPS for number, name in enumerate(known)}
    return [
        make_sprite(rows[name], content, is_known=name in groups, group=groups.get(name, 0))
        for name in THINGS
    ]


def make_sprite(
    row: Mapping[str, Any], content: openmoji.Wheels, *, is_known: bool = True, group: int = 0
) -> Sprite:
    """Return the sprite of a row of OpenMoji, called by its first name.

    Raises:
        MissingExtraError: resvg_py is not installed.
    """
    return Sprite(row["caption"][0], is_known, group, *_render(content.drawings[Path(row["image"]).stem]))


def _render(svg: bytes) -> tuple[Image.Image, tuple[float, float], tuple[float, float]]:
    """Return a drawing, its sides and its middle, as in `Sprite`."""
    try:
        # In this process: the package was verified, and the renderer for untrusted files draws on white.
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg-py", extra="svg", purpose="render SVG images") from error
    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=_RENDERED, height=_RENDERED)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    left, top, right, bottom = drawing.getchannel("A").getbbox()
    size = math.sqrt((right - left) * (bottom - top))
    drawing = drawing.crop((left - _BORDER, top - _BORDER, right + _BORDER, bottom + _BORDER))
    opaque = np.asarray(drawing.getchannel("A"), dtype=np.float64)
    # Sums over columns give the position across, sums over rows the one down.
    x, y = (
        float((np.arange(side) + 0.5 - side / 2) @ opaque.sum(axis)) / opaque.sum() / size
        for axis, side in enumerate(drawing.size)
    )
    sides = (right - left) / size, (bottom - top) / size
    return drawing.convert("RGBa"), sides, (float(x), float(y))
