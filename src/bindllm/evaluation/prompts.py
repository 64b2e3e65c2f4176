"""Prompt templates for class names: CLIP (https://arxiv.org/abs/2103.00020), section 3.1.4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bindllm.errors import InputError
from bindllm.evaluation.layouts.files import read_lines

NAME = "{}"
"""Placeholder of the class name in a template."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    # The template of the paper, and the seven that its authors selected for ImageNet.
    "image": (
        "a photo of a {}.",
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    # CLAP, https://arxiv.org/abs/2206.04769
    "audio": ("this is a sound of {}.",),
    "video": ("a video of {}.", "a photo of a person doing {}."),
    # after ULIP, https://arxiv.org/abs/2212.05171
    "point": ("a point cloud model of {}.", "a point cloud of a {}.", "a 3D model of a {}."),
    "depth": ("a depth map of a {}.", "a photo of a {}."),
    "thermal": ("a thermal image of a {}.", "a photo of a {}."),
}
"""Templates by modality of the classified media; for all others only the class name."""


def templates_for(modality: str) -> tuple[str, ...]:
    """Return the default templates of a modality.

    Examples:
        >>> templates_for("audio"), templates_for("radar")
        (('this is a sound of {}.',), ('{}',))
    """
    return TEMPLATES.get(modality, (NAME,))


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates of a text file: one per line, each with {} for the class name; # starts a comment.

    Raises:
        InputError: it cannot be read or has no template, or a line is not a template; names file and line.
    """
    templates = []
    for row, line in read_lines(path):
        if not line.lstrip().startswith("#"):
            check_template(line, where=f"{row}: ")
            templates.append(line.strip())
    if not templates:
        raise InputError(f"{path}: contains no template; write one per line, such as: a photo of a {NAME}.")
    return tuple(templates)


def check_template(template: str, *, where: str = "") -> str:
    """Return a template.

    Raises:
        InputError: it has no placeholder of the class name.
    """
    if NAME not in template:
        raise InputError(
            f"{where}{template!r} has no {NAME} for the class name; such as: a photo of a {NAME}."
        )
    return template


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Return every template with every name of one class, each text once.

    Examples:
        >>> fill_templates(["dog"], ["a photo of a {}.", "{}"])
        ('a photo of a dog.', 'dog')
    """
    # Several names of a class are synonyms: each goes into every template.
    return tuple(dict.fromkeys(template.replace(NAME, name) for name in names for template in templates))
