"""Finding a data set's files, and reading its tables and lists with errors that name file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bindllm.data.captions import PICTURE_SUFFIXES
from bindllm.errors import InputError, did_you_mean

ENDINGS: dict[str, frozenset[str]] = {
    "image": PICTURE_SUFFIXES,
    "audio": frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac")),
    "video": frozenset((".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")),
    "point": frozenset((".off", ".ply", ".obj", ".stl", ".glb", ".xyz", ".pts", ".pcd")),
}
"""By which endings files are found. A sound may lie in a video file too, so those count for audio as well."""


def endings_of(modality: str) -> frozenset[str]:
    """Return the endings of a modality's files; none for one whose files may be called anything."""
    extra = ENDINGS["video"] if modality == "audio" else frozenset()
    return ENDINGS.get(modality, frozenset()) | extra


class Files:
    """The files below a folder, by name: archives are unpacked in many ways, and names say enough.

    Files whose name starts with a dot are not seen (macOS leaves one beside each file of an archive). Of several
    files of one name the first in alphabetical order counts.

    Args:
        folder: where to look; read once, when the first name is asked for.
        modality: only files with its endings are found.
    """

    def __init__(self, folder: Path, modality: str) -> None:
        self._folder, self._endings = folder, endings_of(modality)
        self._names: dict[str, str] | None = None
        self._stems: dict[str, str] = {}

    def find(self, name: str, *places: str) -> str | None:
        """Return the path of a file.

        Args:
            name: its name, with its ending.
            places: folders to look into first, below the folder.
        """
        for place in places:
            if os.path.isfile(file := os.path.join(self._folder, place, name)):
                return file
        return self._index().get(os.path.basename(name))

    def find_stem(self, stems: Iterable[str]) -> str | None:
        """Return the path of the first file that is called like one of these, without its ending."""
        self._index()
        return next((self._stems[stem] for stem in stems if stem in self._stems), None)

    def _index(self) -> dict[str, str]:
        if self._names is None:
            self._names = {}
            for file in sorted(walk(self._folder)):
                stem, ending = os.path.splitext(os.path.basename(file))
                if not self._endings or ending.lower() in self._endings:
                    self._names.setdefault(stem + ending, file)
                    self._stems.setdefault(stem, file)
        return self._names


def walk(folder: str | Path) -> Iterator[str]:
    """Yield the paths of all files below a folder but hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def list_files(folder: Path, modality: str) -> list[str]:
    """Return the files of a modality directly in a folder, sorted."""
    endings = endings_of(modality)
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
        and (not endings or os.path.splitext(entry.name)[1].lower() in endings)
        and entry.is_file()
    )


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted by name."""
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def require_file(folder: Path, names: Sequence[str], *, purpose: str) -> Path:
    """Return the first of these files that exists.

    Args:
        folder: where they are looked for.
        names: paths below it, best first.
        purpose: what the file is, for the error.

    Raises:
        InputError: there is none of them, or no such folder; the closest existing name is given.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of the data set")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    present = [entry.name for entry in os.scandir(folder)]
    raise InputError(
        f"{folder} has no {' and no '.join(names)} ({purpose}). "
        f"{did_you_mean(Path(names[0]).name, present[:50]).replace('Known:', 'It holds:')}"
    )


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text that are not blank, each with its name for messages.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path} line {number}", line.strip("\r\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); check the file") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: it cannot be read; names the line where the JSON breaks off.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not valid JSON ({error.msg})") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_entries(path: Path, *keys: str) -> list[list[Any]]:
    """Return lists that a JSON file holds under these keys.

    Raises:
        InputError: it holds no such lists.
    """
    content = read_json(path)
    lists = [content.get(key) if isinstance(content, dict) else None for key in keys]
    if any(not isinstance(entries, list) for entries in lists):
        wanted = " and ".join(repr(key) for key in keys)
        has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: expected an object with lists under {wanted}; it holds {has[:100] or 'nothing'}"
        )
    return lists
