"""The configuration of one data source in a recipe."""

from __future__ import annotations

import math
import re
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
CAPTION_FORMATS: tuple[Format, ...] = ("caption", "minigpt4")
"""Formats whose question is the prompt of the source."""
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Hugging Face calls it validation, COCO val, older sets valid or dev.
_OTHER_NAMES: dict[object, Split] = {"val": "validation", "valid": "validation", "dev": "validation"}
Strategy = Literal["2-way", "2-way-random", "2-way-weight", "mix"]
Names = Literal["made-up", "true"]
Negatives = Literal["random", "hard"]
Layout = Literal["table", "isekai", "imagenet"]
Rationale = bool | Literal["only", "given"]
QUESTION = "{question}"
"""In the prompt of a source, stands for the question of each row."""

# The first part of a language tag, and the others.
_LANGUAGE, _SUBTAG = re.compile("[A-Za-z]{2,3}"), re.compile("[A-Za-z0-9]{2,8}")


def split_named(name: object) -> Split | None:
    """Return the split that a table, a row or a library calls by this name, or None if it is not a split.

    Examples:
        >>> split_named("test"), split_named("val"), split_named("extra")
        ('test', 'validation', None)
    """
    return name if name in SPLITS else _OTHER_NAMES.get(name) if isinstance(name, str) else None


def language_named(name: str) -> str:
    """Return a language in one spelling: a tag such as ``zh-Hans-CN`` in the case of BCP 47; other names as they are.

    Examples:
        >>> language_named("zh_hans"), language_named("PT-br"), language_named("Quechua")
        ('zh-Hans', 'pt-BR', 'Quechua')
    """
    parts = name.replace("_", "-").split("-")
    if not (_LANGUAGE.fullmatch(parts[0]) and all(map(_SUBTAG.fullmatch, parts[1:]))):
        return name
    # Scripts have four letters, regions two letters or three digits.
    cases = {4: str.title, 2: str.upper}
    return "-".join([parts[0].lower(), *(cases.get(len(part), str.lower)(part) for part in parts[1:])])


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table, or of the keys of a JSON object; each format uses only its own.

    If a column keeps its default name and a row lacks it, the names in parentheses are tried.

    Args:
        image: path of the image, relative to the folder of the table. In a source of another modality the column is
            called like the modality by default; for ``text`` it holds the text itself.
        caption: a text or a list of texts.
        split: train, validation (or val, valid, dev) or test; a table may lack this column. None: it is ignored.
        messages: OpenAI messages.
        conversations: the turns of LLaVA and ShareGPT (conversation).
        instruction: the task.
        input: its input (context); may be empty or missing.
        output: the answer to an instruction (response, completion).
        system: a system prompt; may be missing.
        question: in vqa and choice.
        answer: a text or a list of texts; in choice, the index of an option from 0, its letter or its text (answers).
        type: kind of question, for accuracy by type; may be missing.
        subset: part of the held-out rows, for metrics by subset; may be missing.
        language: language of the row, for metrics by language; may be missing, unless there is a prompt for each.
        choices: the options, a list of texts (options, or a column for each letter: A, B, ...).
        hint: context of the question (context); may be empty or missing.
        lecture: background knowledge, before the explanation; may be empty or missing.
        solution: the explanation (explanation, rationale); may be empty or missing.
        prompt: in preference (question, instruction); a text or messages.
        chosen: the better answer; a text or messages.
        rejected: the worse answer; a text or messages.
        completion: the only answer of a row without a pair; a text or messages.
        label: whether that answer is a wanted one. In a source with episodes, the name of the class of an image
            (caption).
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
    subset: str = "subset"
    language: str = "language"
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
class EpisodeConfig:
    """Episodes of link-context learning (arXiv 2308.07891, section 3.2), drawn from labeled images.

    An episode is a conversation about ``ways`` classes. Each shot is an image, the question, and the name of its class
    as the answer; the last question is about another image of one of these classes. Shots are counted per class: the
    published "16 shots" of two classes are ``shots: 8``.

    The strategies have the names of the paper. The released code calls the first ``2way_weight`` (its weights are those
    of the neighbors) and the third ``2way_random_shot``.

    - ``2-way``: a fixed number of shots.
    - ``2-way-random``: a number from the range ``shots``, all equally likely.
    - ``2-way-weight``: a number from the range ``shots``, with a probability proportional to e^j for j shots in all.
    - ``mix``: episodes next to ordinary sources; the ``weight`` of each source decides how often it is drawn.

    They are independent of the number of ways.

    Args:
        ways: classes of an episode, at least 2.
        shots: images of each class in front of the query; a number, or the smallest and the largest of a range.
        strategy: how the number of shots is drawn; None: ``2-way`` for a number, ``2-way-random`` for a range.
        names: made-up, drawn for each episode, or the true names of the classes.
        negatives: hard: the other classes are near the first one in the space of the encoder. Its j-th neighbor is
            drawn with a probability proportional to 101 - j.
        label_noise: probability, 0 to 1, that a shot of a training episode has the name of another class of it.
        loss: learn the answer about the query, or all answers.
        count: number of training episodes.
        held_out_count: number of validation episodes, and of test episodes for each of ``test_shots``.
        test_shots: numbers of shots of the test episodes. Episodes of one number have the same classes, names and
            query whatever their shots.
        seed: an episode is a function of the table, the seed and its number.
        layout: table: images and labels. isekai, imagenet: a list of the paper, with one JSON object per line. Its test
            episodes are fixed; of ImageNet each class has ``held_out_count`` queries.

    Raises:
        InputError: a value out of its range, or a strategy that does not fit the shots.
    """

    ways: int = 2
    shots: int | tuple[int, int] = 4
    strategy: Strategy | None = None
    names: Names = "made-up"
    negatives: Negatives = "random"
    label_noise: float = 0.0
    loss: Literal["query", "all"] = "query"
    count: int = 1000
    held_out_count: int = 100
    test_shots: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])
    seed: int = 0
    layout: Layout = "table"

    def __post_init__(self) -> None:
        closed = {"strategy": Strategy, "names": Names, "negatives": Negatives, "layout": Layout}
        for name, known in closed.items():
            if (value := getattr(self, name)) not in get_args(known) and value is not None:
                raise InputError(
                    f"episodes.{name} {value!r} is unknown. {did_you_mean(value, get_args(known))}"
                )
        if self.loss not in ("query", "all"):
            raise InputError(f"episodes.loss must be query or all, not {self.loss!r}")
        if not self.test_shots:
            raise InputError(
                "episodes.test_shots is empty: give at least one number of shots, such as [0, 1, 4]"
            )
        for name, value, least in (
            ("ways", self.ways, 2),
            ("count", self.count, 1),
            ("held_out_count", self.held_out_count, 1),
            ("shots", min(self.shot_range), 0),
            ("test_shots", min(self.test_shots), 0),
        ):
            if value < least:
                raise InputError(f"episodes.{name} must be at least {least}, not {value}")
        if self.layout != "table" and self.ways != 2:
            raise InputError(
                f"episodes.layout {self.layout} has two classes in an episode, not {self.ways} ways"
            )
        if not 0 <= self.label_noise <= 1:
            raise InputError(f"episodes.label_noise must be from 0 to 1, not {self.label_noise}")
        low, high = self.shot_range
        if low > high:
            raise InputError(f"episodes.shots {[low, high]}: the smallest number comes first")
        if (self.strategy == "2-way" and low < high) or (
            self.strategy in ("2-way-random", "2-way-weight") and low == high
        ):
            expected = "one number" if low < high else "a range, such as [1, 8]"
            raise InputError(f"episodes.shots is {self.shots}, and strategy {self.strategy} needs {expected}")

    @property
    def shot_range(self) -> tuple[int, int]:
        """The smallest and the largest number of shots of each class in training."""
        return (self.shots, self.shots) if isinstance(self.shots, int) else (self.shots[0], self.shots[1])


@dataclass
class SourceConfig:
    """One source of training data.

    Args:
        path: a table (.json, .jsonl, .csv, .tsv, .parquet), a folder with such tables, a folder that
            ``save_to_disk`` of Hugging Face ``datasets`` wrote, ``hf://NAME``, or tar shards, which are streamed. For
            the format caption, also a folder with a table named captions.*, a folder of images, each with a .txt file
            of the same name that has one caption per line, or a folder with a folder for each class.
        format: format of the rows; docs/data.md shows each.
        modality: modality of the files: image, another modality of `bindllm.media.MODALITIES`, or any lower-case word
            that an encoder of the recipe serves. In a table, their column is then called like the modality.
        prompt: the question about each image (or other media) with captions. In vqa, ``{question}`` in the prompt is
            replaced by the question.
        prompts: instead of it, a prompt for each language, such as ``{en: "What is this?", es: "¿Qué es esto?"}``. The
            column language of a row chooses its prompt; a row of another language is skipped and counted.
        weight: how often each row is drawn in an epoch: 2 is twice, 0.5 every second epoch.
        split: put the whole source into one split. Otherwise the column split of the table decides, and without it,
            the hash of the media's path (or of the question); rows that share media share a split.
        held_out: share of media, 0 to 1, that the hash holds out: half for validation, half for test.
        split_by: media, or row: each row has a hash of its own, and the same image may be trained on and held out.
        limit: use only this many images with captions, or this many rows of another format, chosen by hash. With
            episodes, this many classes.
        columns: names of the columns of the table.
        media: folder that paths of media are relative to; by default, the folder of their table.
        allow_outside: whether rows may name files outside that folder; false for tables that you do not trust.
        rationale: in vqa and choice, the use of lecture and explanation. false: none (QCM-A). true: learn them before
            the answer (QCM-LE-A). only: learn only them (QCM-LE). given: they belong to the question (QCMG-A).
        rationales: a file with generated rationales, which ``bindllm generate --input`` wrote. They replace those of
            the rows with the same column ``id``. A row without one is skipped.
        reasoning: learn the thoughts before an answer, keep them in the text without learning them (mask), or drop
            them.
        episodes: draw episodes of link-context learning from the images and their labels. Each class is in one split.
    """

    path: str
    format: Format = "caption"
    modality: str = "image"
    prompt: str = "Describe this image."
    prompts: dict[str, str] | None = None
    weight: float = 1.0
    split: Split | None = None
    held_out: float = 0.1
    split_by: Literal["media", "row"] = "media"
    limit: int | None = None
    columns: Columns = field(default_factory=Columns)
    media: str | None = None
    allow_outside: bool = True
    rationale: Rationale = False
    rationales: str | None = None
    reasoning: Literal["learn", "mask", "drop"] = "learn"
    episodes: EpisodeConfig | None = None

    def __post_init__(self) -> None:
        # jsonargparse checks a recipe already; these are for Python callers, and for values that no type excludes.
        if self.format not in get_args(Format):
            raise InputError(
                f"{self.path}: unknown format {self.format!r}. {did_you_mean(self.format, get_args(Format))}"
            )
        if not is_modality(self.modality):
            raise InputError(
                f"{self.path}: a modality is a lower-case word, not {self.modality!r}. "
                f"{did_you_mean(str(self.modality).lower(), MODALITIES)}"
            )
        if self.prompts is not None:
            self._check_prompts(self.prompts)
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"{self.path}: unknown split {self.split!r}. {did_you_mean(self.split, SPLITS)}")
        if self.split_by not in ("media", "row"):
            raise InputError(f"{self.path}: split_by must be media or row, not {self.split_by!r}")
        # A weight of NaN passes every comparison that is written the other way round.
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{self.path}: weight must be finite and above 0, not {self.weight}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{self.path}: held_out must be from 0 to below 1, not {self.held_out}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"{self.path}: limit must be at least 1, not {self.limit}")
        if self.rationale not in (False, True, "only", "given"):
            raise InputError(
                f"{self.path}: rationale must be true, false, only or given, not {self.rationale!r}"
            )
        if self.rationale and self.format not in ("choice", "vqa"):
            raise InputError(f"{self.path}: rationale belongs to format: choice or vqa, not to {self.format}")
        if self.rationales is not None and not self.rationale:
            raise InputError(f"{self.path}: rationales are not used with rationale: false; choose given")
        if self.reasoning not in ("learn", "mask", "drop"):
            raise InputError(f"{self.path}: reasoning must be learn, mask or drop, not {self.reasoning!r}")
        if self.episodes is not None and self.format != "caption":
            raise InputError(f"{self.path}: episodes belong to format: caption, not to {self.format}")

    def _check_prompts(self, prompts: dict[str, str]) -> None:
        """Raise if the prompts are not used, or one of them cannot be."""
        if self.prompt != SourceConfig.prompt:
            raise InputError(f"{self.path}: give prompt or prompts, not both")
        if self.format not in (*CAPTION_FORMATS, "vqa") or self.episodes is not None:
            raise InputError(
                f"{self.path}: prompts belong to format: {', '.join(CAPTION_FORMATS)} or vqa, without episodes"
            )
        texts = [*prompts, *prompts.values()]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(
                f"{self.path}: prompts must name a text for each language, such as "
                f'{{en: "What is this?", "no": "Hva er dette?"}} (YAML reads no without quotes as false), not {prompts}'
            )
        if self.format == "vqa" and not all(QUESTION in text for text in prompts.values()):
            raise InputError(
                f"{self.path}: prompts of vqa are frames around {QUESTION}, which each of them must contain, not "
                f"{prompts}"
            )
        # zh-CN and zh_cn are one language, which cannot have two prompts.
        if len({language_named(name) for name in prompts}) < len(prompts):
            raise InputError(f"{self.path}: prompts name one language twice: {', '.join(prompts)}")
