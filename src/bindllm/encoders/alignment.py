"""Whether the encoders of a model were trained together: do their embeddings of one thing point the same way?

Several encoders may serve one model, each its own modalities, and equal widths alone say nothing. What a bind
network has learnt from pictures of one space holds for sounds of the same space, and for no other. An encoder
names its space by the optional attribute ``space``; one without it stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from bindllm.encoders import Encoder, HasSpace


def space_of(encoder: Encoder) -> str | None:
    """Return the name of an encoder's joint space, or None when it does not name one."""
    return encoder.space if isinstance(encoder, HasSpace) else None


def alignment_warnings(encoders: Sequence[Encoder]) -> list[str]:
    """Return one sentence for each space that was never trained together with that of the first encoder.

    Encoders of one ``space`` belong together; an encoder without one belongs to nobody. Every group after the first
    is warned of, compared with the first, since the first encoder is the one that most recipes train on.

    Example:
        >>> class Ears:
        ...     modalities = ("audio",)
        >>> class Eyes:
        ...     modalities, space = ("image",), "clip"
        >>> print(alignment_warnings([Eyes(), Ears()])[0])
        Ears (audio; no space named) was never trained together with Eyes (image; space 'clip'): what a model learns \
from one means nothing to it from the other. Train on each of these modalities, or take encoders of one space; if \
they do share one, give both the same attribute `space`.
    """
    groups: list[list[Encoder]] = []
    for encoder in encoders:
        space = space_of(encoder)
        same = [group for group in groups if space is not None and space_of(group[0]) == space]
        if same:
            same[0].append(encoder)
        else:
            groups.append([encoder])
    return [
        f"{_names(group)} {'was' if len(group) == 1 else 'were'} never trained together with {_names(groups[0])}: "
        "what a model learns from one means nothing to it from the other. Train on each of these modalities, or take "
        "encoders of one space; if they do share one, give both the same attribute `space`."
        for group in groups[1:]
    ]


def _names(group: Sequence[Encoder]) -> str:
    space = space_of(group[0])
    told = "no space named" if space is None else f"space {space!r}"
    return " and ".join(
        f"{type(encoder).__name__} ({', '.join(encoder.modalities)}; {told})" for encoder in group
    )
