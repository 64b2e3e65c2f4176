"""``bindllm zero_shot``: zero-shot classification and retrieval across modalities, from embeddings only.

``bindllm few_shot``: held-out questions of a table, with worked examples before them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from bindllm import __version__
from bindllm.atomic import write_json
from bindllm.cli.arguments import refuse_together
from bindllm.cli.generate import ModelOptions, check_texts
from bindllm.cli.options import CacheOptions, EncoderOptions, print_whole
from bindllm.data.source_config import CAPTION_FORMATS, QUESTION, Format, SourceConfig
from bindllm.errors import UsageError, did_you_mean, printable_lines
from bindllm.shots import RETRIEVED, ShotsBy

if TYPE_CHECKING:
    from bindllm.data.report import Skipped
    from bindllm.data.rows import Row
    from bindllm.evaluation.layouts import Column, Dataset
    from bindllm.evaluation.task import Evaluation
    from bindllm.evaluation.zero_shot import Result

FEW_SHOT_FORMAT = 1
NUM_SHOTS = (0, 1, 2, 4)


@dataclass(frozen=True)
class DataOptions:
    """Data set."""

    split: str | None = None
    """the split (default: the one that is usually reported)"""
    fold: tuple[PositiveInt, ...] = ()
    """a fold of ESC-50; may be repeated"""
    limit: PositiveInt | None = None
    """only so many media, chosen by hash"""
    captions: PositiveInt | None = None
    """only so many captions of each media, the first ones"""
    classes: Path | None = None
    """file with the names of the classes: .json, .tsv or .txt"""
    modality: str | None = None
    """modality of the files, if their endings do not tell"""
    from_: str | None = None
    """MODALITY[:COLUMN], the column of a table that holds the media, as in audio:sound"""
    to: str | None = None
    """MODALITY[:COLUMN], the column that holds what belongs to them"""

    def read(self, layout: str, folder: Path) -> Dataset:
        """Return the chosen part of a data set."""
        from bindllm.evaluation.layouts import LAYOUTS, Choice, read_layout

        # A wrong word on the command line is an error of usage, unlike a folder in the wrong layout.
        if layout not in LAYOUTS:
            raise UsageError(f"unknown layout {layout!r}. {did_you_mean(layout, LAYOUTS)}")
        choice = Choice(
            split=self.split,
            folds=tuple(self.fold),
            modality=self.modality,
            classes=self.classes,
            source=_column("--from", self.from_),
            target=_column("--to", self.to),
            captions=self.captions,
        )
        # Files are listed, and none is opened yet.
        dataset = read_layout(layout, folder, choice)
        if self.limit is not None:
            dataset.limit(self.limit)
        return dataset


@dataclass(frozen=True)
class MeasuringOptions:
    """Measuring."""

    prompt: tuple[str, ...] = ()
    """template of a text, such as "a photo of a {}."; may be repeated"""
    prompts: Path | None = None
    """text file with one template a line"""
    store: str = "data/store"
    """folder of the embedding store"""
    output: Path | None = None
    """file to write the result to, as JSON"""

    def templates(self) -> Sequence[str] | None:
        """Return the templates, checked; None for the default of the layout."""
        from bindllm.evaluation.zero_shot import check_template, read_templates

        # Before anything is encoded.
        refuse_together(prompt=self.prompt, prompts=self.prompts)
        if self.prompts is not None:
            return read_templates(self.prompts)
        return [check_template(template, where="--prompt: ") for template in self.prompt] or None

    def show(self, result: Result) -> None:
        """Print the result, and write it to the output file."""
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(result)
        if self.output:
            result.save(self.output)
            print(f"written to {self.output}")


@dataclass(frozen=True)
class TableOptions:
    """Tables."""

    support: str | None = None
    """table of the worked examples. Then all rows of TABLE are questions; without it, the questions are its test rows
    (or its validation rows) and the shots its training rows"""
    format: Format = "vqa"
    """format of the rows, as of a data source (docs/data.md): vqa, choice or caption"""
    modality: str = "image"
    """modality of the files, as of a data source"""
    prompt: str = "Describe this image."
    """the question about media with captions; in vqa, a frame around {question}"""
    prompts: dict[str, str] | None = None
    """instead of it, one for each language, such as '{"en": "What is this?", "es": "¿Qué es esto?"}'"""
    inside_only: bool = False
    """skip rows that name files outside of the folder of the table: for tables that you do not trust"""
    limit: PositiveInt | None = None
    """only so many questions, evenly spread over the table"""

    def read(self, table: str, skipped: Skipped) -> tuple[list[Row], list[Row]]:
        """Return the questions and the rows of the support.

        Raises:
            UsageError: a prompt without effect.
        """
        from bindllm.data.rows import spread
        from bindllm.data.sources import read_source

        def rows(path: str, split: str | None) -> dict[str, list[Row]]:
            config = SourceConfig(
                path,
                format=self.format,
                modality=self.modality,
                split=split,
                prompt=self.prompt,
                prompts=self.prompts,
                allow_outside=not self.inside_only,
            )
            found, report = read_source(config)
            skipped.update(report.skipped)
            return found

        # A source refuses prompts by language that have no effect.
        framed = self.format == "vqa" and QUESTION in self.prompt
        if self.prompt != TableOptions().prompt and not (framed or self.format in CAPTION_FORMATS):
            raise UsageError(
                f"--prompt has no effect on rows of the format {self.format}, which have their own questions: leave it "
                f"out, or in vqa put {QUESTION} into it"
            )
        if self.support is not None:
            asked, support = rows(table, "test")["test"], rows(self.support, "train")["train"]
        else:
            splits = rows(table, None)
            asked, support = splits["test"] or splits["validation"], splits["train"]
        return (asked if self.limit is None else spread(asked, self.limit)), support


@dataclass(frozen=True)
class FewShotOptions:
    """Shots (docs/few-shot.md)."""

    num_shots: tuple[NonNegativeInt, ...] = ()
    """number of shots; may be repeated (default: 0, 1, 2 and 4)"""
    shots_by: ShotsBy = "random"
    """at random, in the order of the table, or nearest to the question: by media, by text, or by media and then text"""
    seed: int = 0
    """seed of random shots"""
    nearest_first: bool = False
    """put the nearest shot first (default: last, next to the question)"""
    store: str = "data/store"
    """folder of the embedding store"""
    batch_size: PositiveInt = 32
    """answers generated at the same time"""
    output: Path | None = None
    """file to write the result to, as JSON"""


def few_shot(
    checkpoint: str,
    table: str,
    *,
    tables: TableOptions = TableOptions(),
    shots: FewShotOptions = FewShotOptions(),
    model: ModelOptions = ModelOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Measure a checkpoint on held-out rows with worked examples in the prompt (docs/few-shot.md).

    Each number of shots is measured with controls: shots without media,
    with exchanged media and with wrong answers, and answers that are copied
    from the shots.

    Args:
        checkpoint: folder that bindllm fit wrote
        table: table with the held-out questions, as a data source of a recipe

    Example:
        bindllm few_shot checkpoints/easyvqa data/easyvqa/test.jsonl --support data/easyvqa/train.jsonl --limit 200
    """
    # How to read this: contradictions, the tables, the model, then one task for each number of shots.
    _check_few_shot(shots, model)

    from bindllm.data.report import Skipped
    from bindllm.evaluation.few_shot import FewShotData
    from bindllm.evaluation.support import Support
    from bindllm.evaluation.task import evaluate as measure
    from bindllm.parallel import RunContext

    skipped, progress = Skipped(), sys.stderr.isatty()
    rows, support_rows = tables.read(table, skipped)
    # Its records are not read, so it needs no datastore.
    loaded = replace(model, records=0).load(checkpoint, overrides, cache=False)
    check_texts(shots.shots_by, loaded)
    if loaded.context is not None:
        print("measured without the records of the model (docs/context.md)")
    data = FewShotData.prepare(
        rows,
        support_rows,
        Support((), shots.shots_by, seed=shots.seed, nearest_first=shots.nearest_first),
        model=loaded,
        store=shots.store,
        context=RunContext(device=loaded.device, progress=progress),
        skipped=skipped,
    )
    tasks = [data.task(count, loaded) for count in dict.fromkeys(shots.num_shots or NUM_SHOTS)]
    result = measure(loaded, tasks, lookup=data.embeddings, batch_size=shots.batch_size, progress=progress)
    _show_few_shot(result, skipped)
    if shots.output:
        # The result file names its data and its options, so that a number can be measured again.
        options = {**asdict(tables), **asdict(shots), **asdict(model), "overrides": list(overrides)}
        settings = {"checkpoint": checkpoint, "table": table, **options, "output": str(shots.output)}
        _save_few_shot(shots.output, result, skipped, settings)
    return 0


def _check_few_shot(shots: FewShotOptions, model: ModelOptions) -> None:
    """Refuse options without effect, and an output that cannot be written."""
    if shots.nearest_first and shots.shots_by not in RETRIEVED:
        raise UsageError("--nearest_first needs the nearest shots: give --shots_by media, text or media_text")
    if model.records or model.datastore is not None:
        raise UsageError(
            f"--{'records' if model.records else 'datastore'} has no effect: few_shot measures a model without its "
            "records (docs/context.md); leave it out"
        )
    _check_output(shots.output)


def _save_few_shot(output: Path, result: Evaluation, skipped: Skipped, settings: dict[str, Any]) -> None:
    content = {
        "format": FEW_SHOT_FORMAT,
        "bindllm": __version__,
        "settings": settings,
        "tasks": result.metrics,
        "skipped": skipped.counts,
        "problems": result.problems,
        "seconds": {"evaluate": round(result.seconds, 1)},
        "rows": result.rows,
    }
    write_json(output, content)
    print(f"written to {output}")


def _show_few_shot(result: Evaluation, skipped: Skipped) -> None:
    """Print a table for each metric: a line for each variant, and a column for each number of shots."""
    from rich.table import Table

    from bindllm.evaluation.task import MAIN_METRICS

    tasks = result.metrics
    variants = dict.fromkeys(name for metrics in tasks.values() for name in metrics)
    first = next(iter(tasks.values()))["model"]
    for metric in ("accuracy",) if "accuracy" in first else ("cider", "rouge_l"):
        table = Table(title=f"{metric} by number of shots", title_justify="left")
        table.add_column("variant")
        for name in tasks:
            # answers_4_shots
            table.add_column(name.split("_")[1], justify="right")
        for variant in variants:
            values = [metrics.get(variant, {}).get(metric) for metrics in tasks.values()]
            table.add_row(variant, *("-" if value is None else f"{value:.3f}" for value in values))
        print_whole(table)
    for name, metrics in tasks.items():
        facts = ", ".join(f"{metrics['model'][key]:,} {words}" for key, words in _COUNTS.items())
        print(f"{name}: {facts}")
        for variant, own in metrics.items():
            for metric in MAIN_METRICS:
                if (same := own.get(f"model_{metric}")) is not None:
                    print(
                        f"{name}: {variant} has only a part of the prompts, with a {metric} of model of {same:.3f}"
                    )
    for line in [
        *(f"skipped: {line}" for line in skipped.lines()),
        *(f"not measured: {name}: {reason}" for name, reason in result.problems.items()),
    ]:
        print(printable_lines(line))


_COUNTS = {
    "shots": "shots",
    "excluded": "excluded as the question itself",
    "not_fitting": "without room in the decoder",
    "not_found": "not found in the support",
}
"""The counts of a few-shot task, in words."""


def zero_shot(
    layout: str,
    folder: Path,
    *,
    encoders: EncoderOptions = EncoderOptions(),
    data: DataOptions = DataOptions(),
    measuring: MeasuringOptions = MeasuringOptions(),
    cache: CacheOptions = CacheOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Classify and retrieve across modalities, from embeddings only (docs/zero-shot.md).

    layouts:
      imagenet   images, 1000 classes: val/<wnid>/*.JPEG or Kaggle's
      esc50      audio, 50 classes: meta/esc50.csv, audio/*.wav
      audioset   audio, 527 labels, several each: eval_segments.csv, clips
      modelnet40 shapes, 40 classes: <class>/test/*.off or resampled
      folder     any modality: a folder for each class
      audiocaps  audio and captions: test.csv and clips
      clotho     audio and captions: clotho_captions_evaluation.csv
      coco       images and captions: captions_val2017.json or Karpathy's
      flickr30k  images and captions: dataset_flickr30k.json, results.csv
      table      any modality: captions.jsonl, or any table of pairs

    Args:
        layout: how the data set is stored: one of the list above
        folder: folder of the data set

    Example:
        bindllm zero_shot esc50 data/ESC-50-master --encoder checkpoints/imagebind
    """
    if not (encoders.encoder or encoders.checkpoint):
        raise UsageError(
            "no encoder to evaluate: name one with --encoder, or a trained folder with --checkpoint"
        )
    _check_output(measuring.output)

    from bindllm.evaluation.zero_shot import evaluate_zero_shot

    # Cheap checks come before the encoders are loaded.
    templates, device = measuring.templates(), encoders.find_device()
    result = evaluate_zero_shot(
        data.read(layout, folder),
        encoders.load(overrides),
        store=measuring.store,
        device=device,
        templates=templates,
        cache=cache.open(),
        progress=sys.stderr.isatty(),
    )
    # The result file names its data, so that a number can be measured again.
    result.layout, result.folder = layout, str(folder)
    measuring.show(result)
    return 0


def _check_output(output: Path | None) -> None:
    """Refuse an output that cannot be written: now, not after an hour of measuring."""
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder; give a file in it, such as result.json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {output}: its folder cannot be made ({error.strerror}); choose another path"
        ) from error


def _column(option: str, text: str | None) -> Column | None:
    """Return the modality and the column of an option; the default column has the name of the modality."""
    from bindllm.evaluation.layouts import Column
    from bindllm.media import is_modality

    if text is None:
        return None
    # MODALITY:COLUMN; a table of captions has its texts in the column caption.
    modality, _, name = text.partition(":")
    if not is_modality(modality):
        raise UsageError(f"{option} {text}: expected a modality and a column, such as audio:sound")
    return Column(modality, name or ("caption" if modality == "text" else modality))
