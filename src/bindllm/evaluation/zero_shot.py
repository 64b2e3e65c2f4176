"""Zero-shot classification and retrieval across modalities, from embeddings only, without a language model.

Each file and each text is encoded once and cached in the `EmbeddingStore`. The score of two embeddings is their cosine.
Classes are prompts: the mean of the unit embeddings of all sentences with the class name, normalized again (CLIP,
https://arxiv.org/abs/2103.00020, section 3.1.4).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bindllm import __version__
from bindllm.atomic import write_json
from bindllm.cache.visual_cache import VisualCache
from bindllm.data.collate import MediaGroup
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.report import Skipped
from bindllm.encoders import Encoder, alignment_warnings, encoder_for, skipped_encoders, space_of
from bindllm.errors import InputError, printable
from bindllm.evaluation.layouts import Dataset
from bindllm.evaluation.layouts.dataset import read_lines
from bindllm.evaluation.measures import MEASURES, Measure, Row, Scores
from bindllm.media import Media
from bindllm.parallel import RunContext

FORMAT = 1
"""Version of the JSON file."""

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


@dataclass
class Result:
    """The numbers of a zero-shot evaluation, and the conditions.

    Args:
        kind: classify, tag or retrieve.
        modality: modality of the media.
        target_modality: modality of the retrieved media, or of the prompts.
        skipped: media and rows that were not measured, and why.
        classes: name, number of items, and accuracy or average precision of each class; None if it has no item.
        templates: the sentences around each class name or caption.
        encoders: class, modalities, space and fingerprint of the encoders.
        cache: folder and settings of the visual cache, if one was used.
        warnings: reasons why the numbers may be meaningless.
        num_encoded: number of media and texts encoded by this run; the others were in the store.
        seconds: wall time.
        layout: name of the layout, set by the caller.
        folder: folder of the data set, set by the caller.
    """

    kind: str
    modality: str
    target_modality: str
    measures: list[Measure]
    num_listed: int
    num_measured: int
    skipped: Skipped = field(default_factory=Skipped)
    classes: list[dict[str, Any]] = field(default_factory=list)
    templates: Sequence[str] = ()
    encoders: list[dict[str, Any]] = field(default_factory=list)
    cache: Mapping[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_encoded: int = 0
    seconds: float = 0.0
    layout: str = ""
    folder: str = ""

    def __getitem__(self, name: str) -> float:
        """Return the value of a measure."""
        return next(measure.value for measure in self.measures if measure.name == name)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(path, {"format": FORMAT, "bindllm": __version__, **asdict(self)})

    def __rich__(self) -> RenderableType:
        """Return a table with a chance column, followed by the skipped media and all remarks."""
        table = Table(title=Text(printable(f"{self.layout} {self.folder}".strip())), title_justify="left")
        table.add_column("metric")
        for column in ("result", "chance", "queries", "candidates"):
            table.add_column(column, justify="right")
        for one in self.measures:
            numbers = (
                f"{one.value:.4f}",
                f"{one.chance:.4f}",
                f"{one.num_queries:,}",
                f"{one.num_candidates:,}",
            )
            table.add_row(one.name, *numbers)
        lines = [f"{self.num_measured:,} of {self.num_listed:,} {self.modality} media measured"]
        lines += [f"  skipped: {line}" for line in self.skipped.lines()]
        # The plain name is not worth a line.
        if self.templates != ("{}",):
            lines.append(f"prompts: {'; '.join(self.templates)}")
        if self.cache is not None:
            lines.append("cache: " + ", ".join(f"{name} {value}" for name, value in self.cache.items()))
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"{self.num_encoded:,} encoded now, {self.seconds:.1f} s")
        return Group(table, *(Text(printable(line)) for line in lines))


def evaluate_zero_shot(
    dataset: Dataset,
    encoders: Sequence[Encoder],
    *,
    store: str | Path,
    device: torch.device | str = "cpu",
    templates: Sequence[str] | None = None,
    cache: VisualCache | None = None,
    progress: bool = False,
) -> Result:
    """Measure how well encoders classify or retrieve.

    Media whose file cannot be read are skipped, counted and reported. In retrieval, media with the same content count
    once, and so do equal texts: each is right for everything that it belongs to.

    Args:
        dataset: media with their labels or counterparts, as of `read_layout`.
        encoders: the first encoder that supports a modality embeds it.
        store: folder of the embedding stores.
        device: device of the encoders.
        templates: sentences with {} for the class name or the caption; None: the defaults of the modality, and plain
            captions.
        cache: every query is blended with this visual cache, unless the cache skips its modality: the media in
            classification, both directions in retrieval. Candidates are not blended.
        progress: show a bar.

    Raises:
        InputError: no encoder supports a modality, their widths differ, or no media can be read.
        StoreError: the cache was not built with one of the encoders, or the store cannot be used.
    """
    started = time.perf_counter()
    needed = _needed(dataset, encoders)
    templates = _templates(dataset, templates)
    embeddings = MediaEmbeddings(needed, store)
    # Before anything is encoded, as it fails if the cache belongs to another encoder.
    scores = Scores(embeddings, encoders, cache)
    prompts = [fill_templates(names, templates) for names in dataset.classes]
    # A copy, so that a data set can be measured again.
    skipped = Skipped()
    skipped.update(dataset.skipped)
    wanted = [Row(item.media, item.labels, _targets(item.targets, templates)) for item in dataset.items]
    num_encoded, rows = _fill(embeddings, wanted, prompts, skipped, device=device, progress=progress)
    measured = MEASURES[dataset.kind](dataset, rows, prompts, scores)
    return Result(
        kind=dataset.kind,
        modality=dataset.modality,
        target_modality=dataset.target_modality,
        measures=measured.measures,
        num_listed=dataset.num_listed,
        num_measured=len(rows),
        skipped=skipped,
        classes=measured.classes,
        templates=templates,
        encoders=[_describe(encoder) for encoder in needed],
        cache=None if cache is None else _settings(cache),
        warnings=[*alignment_warnings(needed), *skipped_encoders(encoders)],
        notes=[*dataset.notes, *_notes_on_cache(dataset, cache), *measured.notes],
        num_encoded=num_encoded,
        seconds=time.perf_counter() - started,
    )


def _needed(dataset: Dataset, encoders: Sequence[Encoder]) -> list[Encoder]:
    """Return the encoders that the data set needs, the encoder of its media first."""
    # Only these are loaded and embed; a checkpoint may have encoders that this data set does not need.
    needed: list[Encoder] = []
    for modality, purpose in (
        (dataset.modality, "its media"),
        (dataset.target_modality, "the texts or media to compare"),
    ):
        if not any(modality in encoder.modalities for encoder in encoders):
            supported = sorted({name for encoder in encoders for name in encoder.modalities})
            raise InputError(
                f"the data set needs an encoder of {modality} for {purpose}; the given encoders support "
                f"{', '.join(supported) or 'nothing'}. Add one of the same joint space"
            )
        encoder = encoder_for(modality, encoders)
        # One encoder may serve both modalities.
        if not any(encoder is other for other in needed):
            needed.append(encoder)
    return needed


def _templates(dataset: Dataset, templates: Sequence[str] | None) -> tuple[str, ...]:
    """Return the given templates, else those of the modality."""
    if dataset.kind != "retrieve":
        # Without templates of its own, a modality gets the plain class name.
        return tuple(templates or TEMPLATES.get(dataset.modality, (NAME,)))
    templates = tuple(templates or (NAME,))
    if dataset.target_modality != "text" and templates != (NAME,):
        raise InputError(f"prompts need texts, but {dataset.target_modality} is retrieved; remove them")
    return templates


def _fill(
    embeddings: MediaEmbeddings,
    rows: list[Row],
    prompts: list[MediaGroup],
    skipped: Skipped,
    *,
    device: torch.device | str,
    progress: bool,
) -> tuple[int, list[Row]]:
    """Embed media that are not in the store; return their number, and the rows that can be measured."""
    # A dictionary keeps the order and drops repeated media.
    wanted = dict.fromkeys(row.media for row in rows)
    for groups in (*(row.targets for row in rows), prompts):
        wanted |= dict.fromkeys(media for group in groups for media in group)
    totals = embeddings.precompute(wanted, RunContext(device=device, progress=progress))
    failed = totals.failed
    # A missing prompt would change the task, while a missing file only makes it smaller.
    if broken := [media for prompt in prompts for media in prompt if media in failed]:
        raise InputError(f"the prompt {broken[0].name} cannot be embedded: {failed[broken[0]]}")
    kept = []
    for row in rows:
        # Media stay as long as one of their targets can be read.
        targets = tuple(group for group in row.targets if not any(media in failed for media in group))
        if row.media in failed:
            skipped.add("the file cannot be read", failed[row.media])
        elif row.targets and not targets:
            skipped.add("none of its targets can be read", row.media.name)
        else:
            kept.append(row._replace(targets=targets))
    if not kept:
        raise InputError(f"none of {len(rows):,} media can be measured: {'; '.join(skipped.lines())}")
    return totals.encoded, kept


def _targets(targets: Sequence[Media], templates: Sequence[str]) -> tuple[MediaGroup, ...]:
    # Without a sentence around them, targets may be of any modality.
    if tuple(templates) == (NAME,):
        return tuple((target,) for target in targets)
    return tuple(fill_templates([str(target.source)], templates) for target in targets)


def _describe(encoder: Encoder) -> dict[str, object]:
    # Enough to find out later which embeddings gave these numbers.
    kind = type(encoder)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "modalities": list(encoder.modalities),
        "space": space_of(encoder),
        "fingerprint": encoder.fingerprint(),
    }


def _settings(cache: VisualCache) -> dict[str, object]:
    return {
        "folder": str(cache.index.source),
        "images": len(cache),
        # The folder is given above; a note names the skipped modalities.
        **{name: value for name, value in asdict(cache.settings).items() if name not in ("folder", "skip")},
    }


def _notes_on_cache(dataset: Dataset, cache: VisualCache | None) -> list[str]:
    """Return remarks on the cache."""
    if cache is None:
        return []
    # In retrieval both sides are queries, once in each direction.
    queries = (
        {dataset.modality, dataset.target_modality} if dataset.kind == "retrieve" else {dataset.modality}
    )
    skipped = sorted(queries & set(cache.settings.skip))
    return [f"the cache skips {' and '.join(skipped)} queries"] if skipped else []


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


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> MediaGroup:
    """Return the sentences for one class or caption, each once; their embeddings are averaged.

    Examples:
        >>> [text.source for text in fill_templates(["dog"], ["a photo of a {}.", "{}"])]
        ['a photo of a dog.', 'dog']
    """
    # Several names of a class are synonyms: each goes into every template.
    texts = dict.fromkeys(template.replace(NAME, name) for name in names for template in templates)
    return tuple(map(Media.text, texts))
