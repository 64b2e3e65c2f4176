"""What a recipe says about one source of data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from bindllm.errors import InputError, did_you_mean
from bindllm.media import MODALITIES, is_modality

Format = Literal[
    "caption",
    "messages",
    "llava",
    "sharegpt",
    "alpaca",
    "instruction",
    "minigpt4",
    "vqa",
    "choice",
    "preference",
]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_OTHER_NAMES: dict[object, Split] = {"val": "validation", "valid": "validation", "dev": "validation"}


def split_named(name: object) -> Split | None:
    """Return the split that a table, a row or a library calls by this name, or None where it means none.

    Example:
        >>> split_named("test"), split_named("val"), split_named("extra")
        ('test', 'validation', None)
    """
    return name if name in SPLITS else _OTHER_NAMES.get(name) if isinstance(name, str) else None


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table, or of the keys of a JSON object; a format looks at its own alone.

    Where a column keeps its name of here and a row lacks it, the names in brackets are tried.

    Args:
        image: path of the picture, relative to the folder of the table. In a source of another modality the column
            is called like the modality, unless this says otherwise; for ``text`` it holds the text itself.
        caption: a text or a list of texts.
        split: train, validation (or val, valid, dev) or test; a table may lack this column. None: it is not looked at.
        messages: OpenAI messages.
        conversations: the turns of LLaVA and ShareGPT (conversation).
        instruction: what is to be done.
        input: what it is to be done with (context); may be empty or missing.
        output: the answer to an instruction (response).
        system: a system prompt; may be missing.
        question: of vqa and choice.
        answer: a text or a list of texts; of choice: the number of an option from 0, its letter or its text (answers).
        type: kind of question, for accuracy by type; may be missing.
        choices: the options, a list of texts (options, or a column for each letter: A, B, ...).
        hint: what helps to answer (context); may be empty or missing.
        lecture: what is to be known, ahead of the explanation; may be empty or missing.
        solution: the explanation (explanation, rationale); may be empty or missing.
        prompt: of preference (question, instruction); a text or messages.
        chosen: the better answer; a text or messages.
        rejected: the worse answer; a text or messages.
        completion: the only answer of a row without a pair; a text or messages.
        label: whether that answer is a wanted one.
    """

    image: str = "image"
    caption: str = "caption"
    split: str | None = "split"
    messages: str = "messages"
    conversations: str = "conversations"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = "system"
    question: str = "question"
    answer: str = "answer"
    type: str = "type"
    choices: str = "choices"
    hint: str = "hint"
    lecture: str = "lecture"
    solution: str = "solution"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"


@dataclass
class SourceConfig:
    """One source of training data.

    Args:
        path: a table (.json, .jsonl, .csv, .tsv, .parquet), a folder with such tables, a folder that
            ``save_to_disk`` of Hugging Face ``datasets`` wrote, ``hf://NAME``, or tar shards, which are streamed. Of
            the format caption: also a folder with a table named captions.*, or a folder of pictures, each with a .txt
            file of the same name that has one caption a line.
        format: how the rows are to be read; docs/data.md shows each.
        modality: what the files are: image, another modality of `bindllm.media.MODALITIES`, or any lower-case word
            that an encoder of the recipe serves. In a table their column is then called like the modality.
        prompt: what the user asks about each picture (or other media) of captions. In vqa, a prompt that holds
            ``{question}`` is what the question is put into.
        weight: how often each row is drawn in an epoch: 2 is twice, 0.5 every second epoch.
        split: put the whole source into one split. Otherwise the column split of the table decides, and where
            there is none, the hash of the media's path (or of the question); rows that share media share a split.
        held_out: share of media, 0 to 1, that the hash holds out: half of them for validation, half for test.
        limit: use only this many pictures of captions, or this many rows of another format, chosen by hash.
        columns: what the columns of the table are called.
        media: folder that paths of media are relative to; the folder of their table where this is not given.
        rationale: of multiple choice: learn the lecture and the explanation, then the answer (QCM-LE-A), not the
            answer alone (QCM-A).
    """

    path: str
    format: Format = "caption"
    modality: str = "image"
    prompt: str = "Describe this image."
    weight: float = 1.0
    split: Split | None = None
    held_out: float = 0.1
    limit: int | None = None
    columns: Columns = field(default_factory=Columns)
    media: str | None = None
    rationale: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise InputError(
                f"{self.path}: unknown format {self.format!r}. {did_you_mean(self.format, get_args(Format))}"
            )
        if not is_modality(self.modality):
            raise InputError(
                f"{self.path}: a modality is a lower-case word, not {self.modality!r}. "
                f"{did_you_mean(str(self.modality).lower(), MODALITIES)}"
            )
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"{self.path}: unknown split {self.split!r}. {did_you_mean(self.split, SPLITS)}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{self.path}: weight must be finite and above 0, not {self.weight}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{self.path}: held_out must be from 0 to below 1, not {self.held_out}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"{self.path}: limit must be at least 1, not {self.limit}")
        if self.rationale and self.format != "choice":
            raise InputError(f"{self.path}: rationale belongs to format: choice, not to {self.format}")
