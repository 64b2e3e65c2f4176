"""Settings of the visual cache: how it mixes image embeddings in, and which one a recipe or a checkpoint names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from bindllm.errors import InputError, check_choice

FORMULAS = ("released", "paper")

MILVUS_SUFFIX = ".db"
"""Ending of the path of an embedded Milvus."""

MILVUS_TOKEN = "MILVUS_TOKEN"
"""Environment variable with the token of a Milvus server that asks for one."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How the nearest image embeddings are mixed into an embedding.

    Raises:
        InputError: A setting is out of its range.
    """

    top_k: int = 10
    """Neighbors that are mixed in, at least 1; fewer if the cache is smaller."""

    temperature: float = 100.0
    """Sharpness of the formula `released`, at least 0: 0 weighs all neighbors alike. The released code has 20; the
    default did better in every measurement (docs/results.md)."""

    weight: float = 0.5
    """Share of the neighbors, from 0 (as without a cache) to 1."""

    formula: Literal["released", "paper"] = "released"
    """Weights of the neighbors: softmax over ``temperature * similarity`` as in the `released` code of ImageBind-LLM,
    or the similarities themselves as in its `paper`."""

    skip: list[str] = field(default_factory=lambda: ["image"])
    """Modalities that stay unchanged. Images need no cache; the published demo uses it for them too, which is `[]`."""

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise InputError(f"top_k is {self.top_k!r}, expected a whole number of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}, expected a finite number of at least 0")
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight is {self.weight}, expected a number from 0 to 1")
        check_choice("formula", self.formula, FORMULAS)
        # A text is iterable too, and would count as a list of its characters.
        if isinstance(self.skip, str):
            raise InputError(f"skip takes a list of modalities: write [{self.skip!r}]")


@dataclass(frozen=True)
class CacheConfig(CacheSettings):
    """The visual cache of a model and how it is mixed in: the recipe key `model.cache`, the checkpoint's entry `cache`.

    Raises:
        InputError: The folder is not a local path, or a setting is out of its range.
    """

    folder: str
    """A folder that `bindllm index` wrote, or the path of an embedded Milvus (.db)."""

    def __post_init__(self) -> None:
        # jsonargparse hands over a mapping with a misspelled key as text.
        if not isinstance(self.folder, str) or not self.folder or self.folder.startswith("{"):
            raise InputError(
                f"cache.folder is {self.folder!r}, expected the path of a folder, or a mapping with the keys "
                f"{', '.join(sorted(one.name for one in fields(self)))}"
            )
        if is_address(self.folder):
            # Loading an untrusted checkpoint would send every query to that server.
            raise InputError(
                f"cache.folder {self.folder!r} is the address of a server, which a recipe or a checkpoint must not "
                "name: pass it when you use the model, as cache= or --cache"
            )
        super().__post_init__()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything except the folder: keywords of `CacheSettings`."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def is_address(place: str) -> bool:
    """Return whether a cache is on a server rather than in a local file or folder."""
    return "://" in place


def is_milvus(place: str) -> bool:
    """Return whether a cache is in Milvus: on a server, or in an embedded database."""
    return is_address(place) or place.endswith(MILVUS_SUFFIX)
