"""``bindllm evaluate``: zero-shot classification and retrieval across modalities, from embeddings only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import CacheOptions, EncoderOptions
from bindllm.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from bindllm.cache.visual_cache import VisualCache
    from bindllm.evaluation.layouts import Column, Dataset
    from bindllm.evaluation.zero_shot import Result


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

    def check_output(self) -> None:
        """Refuse an output that cannot be written: now, not after an hour of measuring."""
        if self.output is None:
            return
        if self.output.is_dir():
            raise UsageError(f"--output {self.output} is a folder; give a file in it, such as result.json")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--output {self.output}: its folder cannot be made ({error.strerror}); choose another path"
            ) from error

    def show(self, result: Result) -> None:
        """Print the result, and write it to the output file."""
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(result)
        if self.output:
            result.save(self.output)
            print(f"written to {self.output}")


def evaluate(
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
        encoders: the encoders
        data: part of the data set
        measuring: prompts, store and result
        cache: visual cache to blend every query with
        overrides: arguments of the encoder

    Example:
        bindllm evaluate esc50 data/ESC-50-master --encoder checkpoints/imagebind
    """
    if not (encoders.encoder or encoders.checkpoint):
        raise UsageError(
            "no encoder to evaluate: name one with --encoder, or a trained folder with --checkpoint"
        )
    measuring.check_output()

    from bindllm.evaluation.zero_shot import evaluate_zero_shot

    # Cheap checks come before the encoders are loaded.
    templates, device = measuring.templates(), encoders.find_device()
    result = evaluate_zero_shot(
        data.read(layout, folder),
        encoders.load(overrides),
        store=measuring.store,
        device=device,
        templates=templates,
        cache=_open_cache(cache),
        progress=sys.stderr.isatty(),
    )
    # The result file names its data, so that a number can be measured again.
    result.layout, result.folder = layout, str(folder)
    measuring.show(result)
    return 0


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


def _open_cache(options: CacheOptions) -> VisualCache | None:
    """Open the chosen visual cache."""
    # Settings without a cache would be ignored.
    if options.cache is None:
        if options.settings:
            raise UsageError(
                f"--cache_{next(iter(options.settings))} needs a visual cache: give --cache FOLDER"
            )
        return None

    from bindllm.cache.visual_cache import VisualCache, open_index

    return VisualCache(open_index(options.cache), **options.settings)
