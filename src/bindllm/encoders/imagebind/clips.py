"""Start times of the clips of an audio or video file: a few spread over it as published, or enough to cover it."""

from __future__ import annotations

import logging
from fractions import Fraction
from math import ceil
from typing import Literal, get_args

from bindllm.errors import InputError, did_you_mean

Coverage = Literal["published", "full"]

CLIP_SECONDS = 2
"""Length of a clip of either kind, in seconds (ImageBind, arXiv 2305.05665, section 4)."""

_log = logging.getLogger("bindllm")


def clip_starts(
    duration: Fraction, *, published: int, coverage: str, max_clips: int, name: str
) -> list[Fraction]:
    """Return the starts of the clips of a file, in seconds, as exact fractions.

    "published" spreads a fixed number of clips evenly from the start to the end; if the file is shorter than a clip,
    all of them are the same. The published code subtracts in double precision, so these starts may be a tiny fraction
    below the exact ones, and a clip then starts one sample or frame earlier. "full" puts clips one after the other, the
    last one ending with the file; a file that needs more than ``max_clips`` gets that many, evenly spread, with a
    warning.

    Args:
        duration: length of the file, in seconds.
        published: number of clips that the published preprocessing takes.
        coverage: "published" or "full".
        max_clips: most clips under "full".
        name: name of the file, for the warning.

    Raises:
        InputError: unknown coverage, or ``max_clips`` below 1.

    Examples:
        >>> [float(start) for start in clip_starts(
        ...     Fraction(5), published=3, coverage="published", max_clips=64, name="bark.wav")]
        [0.0, 1.5, 3.0]
        >>> [float(start) for start in clip_starts(
        ...     Fraction(5), published=3, coverage="full", max_clips=64, name="bark.wav")]
        [0.0, 2.0, 3.0]
    """
    if coverage not in get_args(Coverage):
        raise InputError(
            f"coverage={coverage!r} is unknown. {did_you_mean(str(coverage), get_args(Coverage))}"
        )
    if max_clips < 1:
        raise InputError(f"max_clips={max_clips}: expected at least 1")
    if coverage == "published":
        # As published: one subtraction in double precision, and only then exact fractions. 2.3 - 2 is a little less
        # than 0.3, so the last clip of 2.3 seconds starts at sample 4799, not 4800.
        return _spread(Fraction(max(float(duration) - CLIP_SECONDS, 0.0)), published)
    # Fractions, since frame times are rational: floats would pick another frame at exact borders.
    last = max(duration - CLIP_SECONDS, Fraction(0))
    # Full coverage: the last clip ends with the file and may overlap the one before.
    count = max(1, ceil(duration / CLIP_SECONDS))
    if count <= max_clips:
        return [min(Fraction(number * CLIP_SECONDS), last) for number in range(count)]
    _log.warning(
        "%s: %.0f seconds need %d clips of %d seconds; only %d, evenly spread, are read (max_clips)",
        name, duration, count, CLIP_SECONDS, max_clips,
    )  # fmt: skip
    return _spread(last, max_clips)


def _spread(last: Fraction, count: int) -> list[Fraction]:
    """Return ``count`` starts from 0 to ``last``; a single one is in the middle."""
    if count == 1:
        return [last / 2]
    return [last * number / (count - 1) for number in range(count)]
