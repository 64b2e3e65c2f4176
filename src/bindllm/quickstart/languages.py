"""Names of things in several languages, half of them taught in English only: does a name cross to another language?

Views of the drawings of the scenes (`bindllm.quickstart.drawings`), with the names of the ``emoji`` package, which
come from Unicode CLDR. The table of ``openmoji`` is not changed.
"""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bindllm.quickstart import openmoji
from bindllm.quickstart.drawings import Sprite, make_sprites
from bindllm.quickstart.links import draw_view
from bindllm.quickstart.tables import position_of, write_captions, write_rows

PACKAGES = openmoji.PACKAGES

LANGUAGES = ("en", "es", "ja", "zh")
"""Languages of the names: English, Spanish, Japanese, and simplified Chinese."""

VIEWS: Mapping[str, int] = {"train": 6, "validation": 1, "test": 1}
"""Views of each thing in each split."""

ALL, ENGLISH = "taught in all languages", "taught in English"
"""Values of the column ``subset``."""

_NAMES = "emoji/unicode_codes/emoji{}.json"

_README = """# Things with their names in {languages}

All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 (see LICENSE). The
drawings were scaled, turned and put on a colored background by `bindllm fetch languages`; the images have the same
license. The names come from the Python package `emoji` (BSD-3-Clause), which takes them from Unicode CLDR.

`captions.jsonl` has a row for each image and language: `image`; `caption`, the name; `language`; `split`; `subset`.
`{all}`: all rows of the thing are in all languages. `{english}`: its training and validation rows are in English
only, and its test rows in all languages. No image is in two splits; every thing has images in all of them.

`names.jsonl` has a row for each thing: `name`, its names by language in `names`, and `subset`.

| subset | things | training rows | test rows |
|---|---|---|---|
{table}
"""


def build(
    wheels: Sequence[Path], folder: Path, *, views: Mapping[str, int] = VIEWS, threads: int | None = None
) -> dict[str, Any]:
    """Write the images and the table of their names; a `bindllm.quickstart.Builder`.

    Raises:
        MissingExtraError: resvg_py is not installed.
    """
    content = openmoji.read_wheels(wheels)
    names = read_names(wheels[1])
    sprites = make_sprites(content)
    things = taught({sprite.name: names[sprite.name] for sprite in sprites})
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        make = partial(_make, things=things, views=views, folder=folder)
        # In the order of the things, whichever thread makes them.
        rows = [row for made in pool.map(make, sprites) for row in made]
    write_rows(folder / "names.jsonl", things.values())
    counts = write_captions(folder / "captions.jsonl", rows)
    table = "\n".join(
        f"| {subset} | {sum(thing['subset'] == subset for thing in things.values())} | "
        f"{_count(rows, subset, 'train'):,} | {_count(rows, subset, 'test'):,} |"
        for subset in (ALL, ENGLISH)
    )
    text = _README.format(languages=", ".join(LANGUAGES), all=ALL, english=ENGLISH, table=table)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "LICENSE").write_bytes(content.license)
    return {
        "made": "drawings scaled, turned and put on a background",
        "things": len(things),
        "captions.jsonl": counts,
    }


def read_names(wheel: Path) -> dict[str, dict[str, str]]:
    """Return the names of each drawing by language, by its first English name, from the wheel of ``emoji``."""
    found: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as file:
        english = json.loads(file.read(_NAMES.format("")))
        others = {
            code: json.loads(file.read(_NAMES.format(f"_{code}"))) for code in LANGUAGES if code != "en"
        }
    for letters, entry in english.items():
        name, _ = openmoji.caption_of(entry["en"])
        own = {code: texts[letters].strip(":").replace("_", " ") for code, texts in others.items()}
        # The first of several spellings of an emoji: they differ in an invisible selector.
        found.setdefault(name, {"en": name, **own})
    return found


def taught(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Return the row of each thing: half of the things are taught in English only, chosen by the hash of their names.

    Things that have the English name in another language are taught in all languages: their name would not have to
    cross.
    """
    crossing = sorted(
        (name for name, own in names.items() if list(own.values()).count(name) == 1),
        key=lambda name: position_of(name.encode()),
    )
    english = set(crossing[: len(names) // 2])
    return {
        name: {"name": name, "names": dict(own), "subset": ENGLISH if name in english else ALL}
        for name, own in names.items()
    }


def _make(
    sprite: Sprite, *, things: Mapping[str, Mapping[str, Any]], views: Mapping[str, int], folder: Path
) -> list[dict[str, Any]]:
    """Write the views of a thing; return their rows."""
    thing, rows, numbers = things[sprite.name], [], itertools.count()
    place = folder / "images" / sprite.name.replace(" ", "-")
    place.mkdir(parents=True)
    for split, count in views.items():
        # Only the test asks for names that were not taught: validation rows choose the best weights.
        known = ("en",) if split != "test" and thing["subset"] == ENGLISH else LANGUAGES
        for number in itertools.islice(numbers, count):
            image = place / f"{number:02}.png"
            # The fastest level: backgrounds of one color are small at any level.
            draw_view(sprite, number).save(image, compress_level=1)
            rows += [
                {
                    "image": image.relative_to(folder).as_posix(),
                    "caption": [thing["names"][code]],
                    "language": code,
                    "split": split,
                    "subset": thing["subset"],
                }
                for code in known
            ]
    return rows


def _count(rows: Sequence[Mapping[str, Any]], subset: str, split: str) -> int:
    return sum(row["subset"] == subset and row["split"] == split for row in rows)
