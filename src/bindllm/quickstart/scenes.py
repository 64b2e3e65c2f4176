"""Scenes with known answers: OpenMoji drawings on a colored background, with captions and questions about them.

A scene is a function of its part and number, so it is the same on every run and with any number of threads. Its
description (`Scene`) determines the image, the caption and every answer. Nothing in a scene is ambiguous: names are
unique, drawings do not overlap, and only pairs with a clear margin are compared.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from bindllm.quickstart import openmoji
from bindllm.quickstart.drawings import Sprite, make_sprites
from bindllm.quickstart.tables import write_rows

PACKAGES = openmoji.PACKAGES

COUNTS = ("one", "two", "three", "four", "five")
"""Answers to how many things a scene has."""

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (165, 165, 165),
    "red": (232, 96, 92),
    "orange": (248, 165, 70),
    "yellow": (248, 228, 90),
    "green": (118, 195, 110),
    "blue": (105, 160, 235),
    "purple": (172, 122, 215),
}
"""Colors of the backgrounds, RGB: bright enough for the black outlines of the drawings."""

OTHER_BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "pink": (248, 175, 205),
    "brown": (165, 115, 80),
    "turquoise": (85, 205, 198),
}
"""Colors that only the part `NAMING` has."""

SIDE = 224
"""Width and height of an image in pixels."""

SIZES = (38, 80)
"""Smallest and largest size of a thing: square root of width times height, in pixels, before it is turned."""

TURN = 20
"""Largest turn to either side, in degrees."""

NAMING_SIZES, NAMING_TURNS = (38, 64), (25, 45)
"""Sizes and turns of the part `NAMING`."""

LARGER = 1.5
"""Least ratio of two sizes that are compared."""

ASIDE = 2.0
"""Least ratio of the distances along and across a direction."""

SHADE = 6
"""Largest difference of a background from its color, the same for each channel."""

NEW_SCENES, NEW_COMBINATIONS = "new scenes", "new combinations"
NEW_THINGS, NAMING = "new things", "naming"


class Part(NamedTuple):
    """Scenes of one kind: their split, their number, and the value of the column ``subset``."""

    name: str
    split: str
    count: int


PARTS = (
    Part("train", "train", 17_920),
    Part("validation", "validation", 400),
    Part(NEW_SCENES, "test", 400),
    Part(NEW_COMBINATIONS, "test", 400),
    Part(NEW_THINGS, "test", 400),
    Part(NAMING, "test", 480),
)
"""20,000 scenes."""

# Pixels: around the image, between drawings, and between the middles of two drawings in the order of a caption.
_EDGE, _GAP, _ORDER = 2, 4, 10
# Few: after these, the sizes most likely do not fit together.
_TRIES = 24
_DIRECTIONS = (("left", "right"), ("above", "below"))
# Kind of the question in `seen.jsonl`, drawn for each scene. Not by what a scene has: counts keep their shares.
_SEEN = ("count", "color", "what", "what")

_README = """# Scenes of OpenMoji drawings, with captions and questions

All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 (see LICENSE). The
drawings were scaled, turned and put on a colored background by `bindllm fetch scenes`; the scenes, captions and
questions have the same license.

{count:,} images of 224 x 224 pixels, each with 1 to 5 of {known} known things (the training split of `openmoji`) or of
{new} new things (its validation and test splits).

- `train.jsonl`: questions about the training and validation scenes. `test.jsonl`: questions about the test scenes.
- `seen.jsonl`: of these questions at most one for each scene, of the types what, count and color.
- `captions.jsonl`: one row for each scene with its caption and its description: background, and for each thing from
  left to right its name, size in pixels, clockwise turn in degrees, box (left, top, right, bottom), and the middle of
  its opaque pixels.

Columns of the questions: `image`; `question`; `answer`; `type` ({types}); `split`; in the test split `subset`:

- new scenes: known things in scenes that training does not have;
- new combinations: known things that are never together in a training scene;
- new things: only things that training does not have;
- naming: one known thing, turned by 25 to 45 degrees (training: at most 20), on a color that training does not have.

Chance: share of right answers of the best constant answer to all questions of a type.

{table}
"""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene.

    Args:
        size: square root of width times height before the turn, in pixels.
        turn: clockwise turn in degrees.
        box: left, top, right and bottom, in pixels.
        middle: mean position of its opaque pixels, x and y.
    """

    name: str
    size: int
    turn: int
    box: tuple[int, int, int, int]
    middle: tuple[float, float]

    def moved(self, right: int, down: int) -> Thing:
        """Return the thing at another position, in pixels from this one."""
        (a, b, c, d), (x, y) = self.box, self.middle
        # As in the table, so that every answer follows from the rounded numbers.
        middle = round(x + right, 1), round(y + down, 1)
        return Thing(self.name, self.size, self.turn, (a + right, b + down, c + right, d + down), middle)


@dataclass(frozen=True)
class Scene:
    """Everything about a scene.

    Args:
        things: from left to right.
    """

    part: str
    number: int
    background: str
    color: tuple[int, int, int]
    things: tuple[Thing, ...]

    @property
    def image(self) -> str:
        """Path of the image, relative to the tables."""
        # Without spaces, for commands.
        return f"images/{self.part.replace(' ', '-')}/{self.number:05}.png"


def build(
    wheels: Sequence[Path], folder: Path, *, parts: Sequence[Part] = PARTS, threads: int | None = None
) -> dict[str, Any]:
    """Write the images, the questions and the descriptions; a `bindllm.quickstart.Builder`.

    Raises:
        AssetError: OpenMoji lacks a thing.
        MissingExtraError: resvg_py is not installed.
    """
    content = openmoji.read_wheels(wheels)
    sprites = {sprite.name: sprite for sprite in make_sprites(content)}
    scenes: list[Scene] = []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for part in parts:
            make = partial(_make, part.name, sprites=sprites, folder=folder)
            # The parts have a folder each.
            (folder / Scene(part.name, 0, "", (0, 0, 0), ()).image).parent.mkdir(parents=True)
            # In the order of the numbers, whichever thread makes a scene; only descriptions stay in memory.
            scenes += pool.map(make, range(part.count))
    # From the descriptions only: no image is opened again.
    split = {part.name: part.split for part in parts}
    rows = [row | _labels(scene, split) for scene in scenes for row in questions(scene, sprites)]
    write_rows(folder / "train.jsonl", [row for row in rows if row["split"] != "test"])
    write_rows(folder / "test.jsonl", [row for row in rows if row["split"] == "test"])
    write_rows(folder / "seen.jsonl", seen(scenes, rows))
    write_rows(folder / "captions.jsonl", (describe(scene) | _labels(scene, split) for scene in scenes))
    # The card is computed too, so that it cannot differ from the rows.
    chances = chance(rows)
    known = sum(sprite.is_known for sprite in sprites.values())
    text = _README.format(
        count=len(scenes),
        known=known,
        new=len(sprites) - known,
        types=", ".join(dict.fromkeys(row["type"] for row in rows)),
        table=_table(chances),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "LICENSE").write_bytes(content.license)
    return {
        "made": "drawings scaled, turned and put on a background; everything else follows from the descriptions",
        "scenes": {part.name: part.count for part in parts},
        "questions": dict(Counter(row["type"] for row in rows)),
        "chance": chances,
    }


def _make(part: str, number: int, *, sprites: Mapping[str, Sprite], folder: Path) -> Scene:
    scene = plan(part, number, sprites)
    # The fastest level: backgrounds of one color are small at any level.
    draw(scene, sprites).save(folder / scene.image, compress_level=1)
    return scene


def plan(part: str, number: int, sprites: Mapping[str, Sprite]) -> Scene:
    """Return the description of a scene."""
    # Only `random()` of a generator is the same in every version of Python.
    rng = Random(f"{part}/{number}")
    colors = OTHER_BACKGROUNDS if part == NAMING else BACKGROUNDS
    pool = [each for each in sprites.values() if each.is_known == (part != NEW_THINGS)]
    chosen = _choose(part, number, pool, rng)
    # In turn, not drawn: all counts and colors are equally frequent, each color with each count.
    background = list(colors)[number // len(COUNTS) % len(colors)]
    shade = between((-SHADE, SHADE), rng)
    color = tuple(value + shade for value in colors[background])
    things = None
    # Sizes are drawn again too: some do not fit together.
    while things is None:
        things = _arrange(part, chosen, rng)
    return Scene(part, number, background, color, things)


def _choose(part: str, number: int, pool: Sequence[Sprite], rng: Random) -> list[Sprite]:
    """Return the drawings of a scene."""
    # In turn, so that each name is asked for equally often.
    if part == NAMING:
        return [pool[number % len(pool)]]
    groups: dict[int, list[Sprite]] = defaultdict(list)
    for sprite in pool:
        groups[sprite.group].append(sprite)
    if part == NEW_COMBINATIONS:
        # A combination has at least two.
        return _shuffled(_shuffled(groups.values(), rng)[0], rng)[: 2 + number % (len(COUNTS) - 1)]
    count = 1 + number % len(COUNTS)
    if part == NEW_THINGS:
        return _shuffled(pool, rng)[:count]
    # Pairs inside a group are left for new combinations.
    return [_shuffled(group, rng)[0] for group in _shuffled(groups.values(), rng)[:count]]


def _arrange(part: str, chosen: Iterable[Sprite], rng: Random) -> tuple[Thing, ...] | None:
    """Return the things of a scene from left to right, or None if no room was found."""
    # Sizes first, independent of the place: no name is more often large, or on one side.
    drawn = []
    for sprite in chosen:
        size, turn = between(SIZES, rng), between((-TURN, TURN), rng)
        if part == NAMING:
            size, turn = between(NAMING_SIZES, rng), between(NAMING_TURNS, rng) * (-1 if turn < 0 else 1)
        box = (0, 0, *sprite.extent(size, turn))
        drawn.append(Thing(sprite.name, size, turn, box, sprite.center(size, turn)))
    things: list[Thing] = []
    # How to read this: each thing, its box at the corner of the image, is moved until it is apart from all before it.
    # The largest first: room for it is the hardest to find.
    for corner in sorted(drawn, key=lambda thing: -thing.size):
        for _ in range(_TRIES):
            thing = corner.moved(*(between((_EDGE, SIDE - _EDGE - side), rng) for side in corner.box[2:]))
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return tuple(sorted(things, key=lambda thing: thing.middle))


def _apart(one: Thing, other: Thing) -> bool:
    """Return whether two things do not touch, and one of them is further to the left."""
    return max(_gaps(one, other)) >= _GAP and abs(one.middle[0] - other.middle[0]) >= _ORDER


def _gaps(one: Thing, other: Thing) -> tuple[int, int]:
    """Return the room between two boxes, across and down; negative if they overlap in that direction."""
    (a, b), (c, d) = (one.box[:2], one.box[2:]), (other.box[:2], other.box[2:])
    return max(c[0] - b[0], a[0] - d[0]), max(c[1] - b[1], a[1] - d[1])


def between(limits: tuple[int, int], rng: Random) -> int:
    """Return a random whole number, both limits included."""
    low, high = limits
    return low + int(rng.random() * (high - low + 1))


def _shuffled(items: Iterable[Item], rng: Random) -> list[Item]:
    return sorted(items, key=lambda _: rng.random())


def draw(scene: Scene, sprites: Mapping[str, Sprite]) -> Image.Image:
    """Return the image of a scene."""
    # In any order, as no two overlap.
    image = Image.new("RGB", (SIDE, SIDE), scene.color)
    for thing in scene.things:
        drawing = sprites[thing.name].draw(thing.size, thing.turn)
        image.paste(drawing, thing.box[:2], drawing)
    return image


def caption(scene: Scene) -> str:
    """Return the caption: all things from left to right, and the background."""
    *names, last = (with_article(thing.name) for thing in scene.things)
    listed = f"{', '.join(names)} and {last}" if names else last
    return f"{listed} on {with_article(scene.background)} background"


def with_article(name: str) -> str:
    """Return a name after a or an.

    Examples:
        >>> with_article("owl"), with_article("unicorn")
        ('an owl', 'a unicorn')
    """
    return f"{'an' if name[0] in 'aeiou' and not name.startswith('uni') else 'a'} {name}"


def questions(scene: Scene, sprites: Mapping[str, Sprite]) -> list[dict[str, str]]:
    """Return the questions about a scene, as rows ``image``, ``question``, ``answer`` and ``type``."""
    rng = Random(f"{scene.part}/{scene.number}/questions")
    # How to read this: type, question and answer of each. Pairs are asked in both orders, so that answers balance.
    # Not by the number: it decides count and color, and the side that is asked for must not depend on them.
    first, names = between((0, 1), rng), [thing.name for thing in scene.things]
    found = [("what", "What is in the image?", with_article(names[0]))] if len(names) == 1 else []
    # The colors of NAMING are not among the answers that training has.
    if scene.part != NAMING:
        # With more things the answer would not be one name.
        if len(names) == 2:
            other = with_article(names[1 - first])
            found.append(("what", f"What is in the image, apart from the {names[first]}?", other))
        # Of the same pool: a name that training does not have must not mean yes.
        absent = [
            each.name
            for each in sprites.values()
            if each.is_known == (scene.part != NEW_THINGS) and each.name not in names
        ]
        for pool, answer in ((names, "yes"), (absent, "no")):
            name = with_article(_shuffled(pool, rng)[0])
            found.append(("presence", f"Is there {name} in the image?", answer))
        found.append(("count", "How many things are in the image?", COUNTS[len(names) - 1]))
        pairs = _shuffled(((a, b) for a in scene.things for b in scene.things if a is not b), rng)
        found += _position(pairs, first) + _comparison(pairs)
        found.append(("color", "What color is the background?", scene.background))
        found.append(("caption", "Describe this image.", caption(scene)))
    return [
        {"image": scene.image, "question": question, "answer": answer, "type": kind}
        for kind, question, answer in found
    ]


def _position(pairs: Sequence[tuple[Thing, Thing]], axis: int) -> list[tuple[str, str, str]]:
    # The wanted axis first, so that both are about equally frequent.
    for wanted in (_DIRECTIONS[axis], _DIRECTIONS[1 - axis]):
        for pair in pairs:
            if direction(*pair) in wanted:
                return [
                    (
                        "position",
                        f"Where is the {one.name}, seen from the {other.name}?",
                        str(direction(one, other)),
                    )
                    for one, other in (pair, pair[::-1])
                ]
    return []


def direction(one: Thing, other: Thing) -> str | None:
    """Return where one thing is, seen from another: left, right, above or below; None if that is not clear.

    It is clear if the boxes are apart in that direction, and the middles are `ASIDE` times as far apart in it as in
    the other one.
    """
    gaps = _gaps(one, other)
    distances = [a - b for a, b in zip(one.middle, other.middle, strict=True)]
    # At most one axis can be clear.
    for axis, names in enumerate(_DIRECTIONS):
        if gaps[axis] >= _GAP and abs(distances[axis]) >= ASIDE * abs(distances[1 - axis]):
            return names[distances[axis] > 0]
    return None


def _comparison(pairs: Sequence[tuple[Thing, Thing]]) -> list[tuple[str, str, str]]:
    for large, small in pairs:
        if large.size >= LARGER * small.size:
            question = "Is the {} larger or smaller than the {}?".format
            return [
                ("comparison", question(large.name, small.name), "larger"),
                ("comparison", question(small.name, large.name), "smaller"),
            ]
    return []


def seen(scenes: Iterable[Scene], rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return at most one row of each scene: its first question of a type that is drawn."""
    # Not by the number: it decides count and color.
    draw = {scene.image: Random(f"{scene.part}/{scene.number}/seen") for scene in scenes}
    wanted = {image: _SEEN[between((0, len(_SEEN) - 1), rng)] for image, rng in draw.items()}
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["type"] == wanted[row["image"]]:
            chosen.setdefault(row["image"], row)
    return [*chosen.values()]


def describe(scene: Scene) -> dict[str, Any]:
    """Return the row of a scene in ``captions.jsonl``."""
    return {
        "image": scene.image,
        "caption": caption(scene),
        "background": scene.background,
        "color": scene.color,
        "things": [vars(thing) for thing in scene.things],
    }


def _labels(scene: Scene, split: Mapping[str, str]) -> dict[str, str]:
    # Subsets are parts of the test split.
    labels = {"split": split[scene.part]}
    return labels | ({"subset": scene.part} if labels["split"] == "test" else {})


def chance(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Return the share of the most frequent answer to each type of question, by subset (or split) and type.

    Examples:
        >>> chance([{"type": "count", "answer": answer, "split": "train"} for answer in ("one", "two")])
        {'train': {'count': 0.5}}
    """
    # The answer does not depend on the names in a question, so no model without the image does better in the long run.
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        answers[row.get("subset", row["split"])][row["type"]][row["answer"]] += 1
    return {
        part: {kind: round(max(found.values()) / found.total(), 4) for kind, found in kinds.items()}
        for part, kinds in answers.items()
    }


def _table(chances: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table of the chance levels, a row for each type of question."""
    kinds = dict.fromkeys(kind for shares in chances.values() for kind in shares)
    rows = [["type", *chances], ["---"] * (len(chances) + 1)]
    rows += [
        [kind, *(f"{shares[kind]:.1%}" if kind in shares else "-" for shares in chances.values())]
        for kind in kinds
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
