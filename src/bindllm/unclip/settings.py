"""How an image is drawn, and where it may be written. Nothing heavy is imported here: the command line reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bindllm.errors import InputError

# The networks of the pipeline halve the sides of an image this often.
_SIDE = 8


@dataclass(frozen=True)
class DrawSettings:
    """Drawing.

    Raises:
        InputError: a setting is out of its range.
    """

    prompt: str = ""
    """text that guides the image, in addition to the media"""
    negative_prompt: str = ""
    """text that the image is guided away from"""
    seed: int = 0
    """seed of the first image; that of each further one is higher by 1"""
    steps: int = 20
    """denoising steps"""
    guidance: float = 10.0
    """scale of classifier-free guidance; up to 1: none"""
    noise_level: int = 0
    """noise added to the embedding, as a step of the pipeline's noise schedule; more noise gives more variation"""
    height: int | None = None
    """height in pixels, a multiple of 8 (default: that of the pipeline)"""
    width: int | None = None
    """width in pixels, a multiple of 8 (default: that of the pipeline)"""

    def __post_init__(self) -> None:
        # How to read this: name and smallest value, then the rules of sides and of guidance.
        for name, least in (("seed", 0), ("steps", 1), ("noise_level", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < _SIDE or side % _SIDE):
                raise InputError(f"{name} is {side}, expected a multiple of {_SIDE}")
        if not 0 <= self.guidance < math.inf:
            raise InputError(f"guidance is {self.guidance}, expected a finite number of at least 0")
        if self.negative_prompt and self.guidance <= 1:
            raise InputError(
                f"negative_prompt has no effect at guidance {self.guidance:g}: set guidance above 1, or leave it out"
            )


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a path at which no image can be written; its folder is made.

    Raises:
        InputError: the name does not end in .png, the file exists, or its folder cannot be made.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: images are written as PNG files; give a name that ends in .png")
    if path.exists() and not (overwrite and path.is_file()):
        raise InputError(f"{path} exists; nothing was written. Give another name, or overwrite it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: its folder cannot be made ({error.strerror}); choose another path"
        ) from error
