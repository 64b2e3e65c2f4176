"""Tux Paint's stamps: photographs and drawings with sentences, some with audio, from a Debian package.

The package is read without dpkg, so a ``.deb`` that was downloaded by hand works on any system.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from bindllm.errors import AssetError
from bindllm.quickstart.packages import Package
from bindllm.quickstart.tables import split_of, write_captions

STAMPS = Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    license="GPL-2.0-or-later",
    megabytes=161,
)

_STAMPS = "./usr/share/tuxpaint/stamps/"
_COPYRIGHT = "./usr/share/doc/tuxpaint-stamps-default/copyright"
_IMAGES = (".svg", ".png")  # in order of preference: an SVG is sharp at any size
_SOUNDS = (".ogg", ".wav")
_TRANSLATION = re.compile(r"_desc_[a-z]{2,3}(_[A-Z]{2})?\.(ogg|wav)$")

_README = """# Tux Paint stamps with English sentences

From the Debian package tuxpaint-stamps-default. License: GPL-2.0-or-later (see copyright). The files are unchanged.

`captions.jsonl`, one row per image: `image`; `caption`, the English sentence (a list if an image has several);
`split` (train, validation or test, about 84/8/8, by the hash of the image's bytes); `group`, its folder; and if they
exist, `sound`, its audio, and `spoken`, the sentence read aloud in English.
"""


def build(packages: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write images, audio files and the caption table; a `bindllm.quickstart.Builder`."""
    files = _read_deb(packages[0])
    (folder / "copyright").write_bytes(files.pop(_COPYRIGHT))
    captioned = sorted(name.removesuffix(".txt") for name in files if name.endswith(".txt"))
    rows: dict[bytes, dict[str, Any]] = {}
    without_image = 0
    for stem in captioned:
        image = _first(files, stem, _IMAGES)
        if image is None:
            without_image += 1
            continue
        # The first line is English; the translations come after it, with the name of their language.
        caption = " ".join(files[f"{stem}.txt"].decode("utf-8").splitlines()[0].split())
        # Equal images become one row with all their sentences, else they could be on both sides of a split.
        if known := rows.get(files[image]):
            known["caption"] = list(dict.fromkeys([*known["caption"], caption]))
            continue
        # The split follows from the image's bytes; sounds and sentences follow their image.
        row = {"image": _keep(files, image, folder / "images"), "caption": [caption]}
        row |= {"split": split_of(files[image]), "group": PurePosixPath(stem).parts[0]}
        for column, ending in (("sound", ""), ("spoken", "_desc")):
            if sound := _first(files, stem + ending, _SOUNDS):
                row[column] = _keep(files, sound, folder / "sounds")
        rows[files[image]] = row
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return {
        "made": "files unchanged; the first, English, line of each text; split by the hash of the image",
        "captions.jsonl": write_captions(folder / "captions.jsonl", rows.values()),
        "skipped": {
            "captions without an image": without_image,
            "images equal to another one": len(captioned) - without_image - len(rows),
        },
        "with": {column: sum(column in row for row in rows.values()) for column in ("sound", "spoken")},
    }


def _read_deb(path: Path) -> dict[str, bytes]:
    """Return the stamps in a ``.deb``, by their path below the stamps' folder, except translated speech."""
    files = {}
    with path.open("rb") as deb:
        # A .deb is an ar archive: 8 bytes, then members of 60 bytes of header and content of even length.
        deb.seek(8)
        while (header := deb.read(60)) and not header.startswith(b"data.tar"):
            size = int(header[48:58])
            deb.seek(size + size % 2, 1)
        if not header:
            raise AssetError(f"{path.name}: it has no data.tar, so it is not a Debian package")
        with tarfile.open(fileobj=deb, mode="r|*") as members:
            # In one pass: the compressed tar inside cannot be read backwards.
            for member in members:
                wanted = member.name.startswith(_STAMPS) or member.name == _COPYRIGHT
                if member.isfile() and wanted and not _TRANSLATION.search(member.name):
                    files[member.name.removeprefix(_STAMPS)] = members.extractfile(member).read()
    return files


def _first(files: dict[str, bytes], stem: str, endings: Sequence[str]) -> str | None:
    """Return the first of ``stem`` + ending that exists."""
    return next((stem + ending for ending in endings if stem + ending in files), None)


def _keep(files: dict[str, bytes], name: str, folder: Path) -> str:
    """Write one file below ``folder``, and return its path relative to the caption table."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(files[name])
    # Relative, so that the whole folder can be moved.
    return f"{folder.name}/{name}"
