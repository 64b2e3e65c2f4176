"""Questions with short answers: VQAv2, OK-VQA, TextVQA, GQA, MUSIC-AVQA, and tables of questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bindllm.atomic import read_json
from bindllm.conversation.messages import FILE_MODALITIES, RowError
from bindllm.data.answers import same_answer
from bindllm.data.formats.columns import json_list, read_split
from bindllm.data.report import Skipped
from bindllm.data.source_config import language_named
from bindllm.data.tables import READERS, is_table, read_table
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import SHORT, Benchmark, Entry, Item, right_or_wrong
from bindllm.evaluation.benchmarks.metrics import ACCURACY
from bindllm.evaluation.captions import same_caption
from bindllm.evaluation.layouts.dataset import Files, read_entries, require

_ADVICE = "fetch the file again"

# Punctuation, number words, articles and contractions of the published evaluation code (arXiv 1505.00468).
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS)}
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
# The lookbehind is mistyped in the published code, "(?!<=\d)", so a period before another character than a digit goes.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(,)(\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
'ow's'at y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    text[:n] + text[n + 1 :]: text
    for text in _CONTRACTED.split()
    for n, char in enumerate(text)
    if char == "'"
}
# A slip of the published table, kept for equal numbers.
_CONTRACTIONS["somebody'd"] = "somebodyd"


def vqa_words(text: str) -> str:
    """Return an answer as the published evaluation of VQA compares it.

    Examples:
        >>> vqa_words("The two dogs."), vqa_words("dont"), vqa_words("2,000")
        ('2 dogs', "don't", '2000')
    """
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    found = text
    for mark in _PUNCTUATION:
        # Next to a space, or in a text with a number such as 1,000, a mark goes; else it becomes a space.
        spaced = mark + " " in text or " " + mark in text or _COMMA.search(text)
        found = found.replace(mark, "" if spaced else " ")
    return _PERIOD.sub("", found)


def _evalai_words(text: str) -> str:
    """Return an answer as the evaluation server of TextVQA and OK-VQA compares it: it also splits a possessive."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(text)


def _original_references(references: Sequence[str]) -> list[str]:
    """Return the answers of ten people, without punctuation if they differ, as the published code does."""
    return (
        [_without_punctuation(text) for text in references] if len(set(references)) > 1 else list(references)
    )


def soft_accuracy(
    item: Item,
    parsed: str,
    *,
    words: Callable[[str], str],
    references: Callable[[Sequence[str]], Sequence[str]],
) -> float:
    """Return the mean, over all people, of the share of agreement with the others: three equal answers are right."""
    answer, known = words(parsed), references(item.references)
    same = sum(text == answer for text in known)
    # Of a person who agrees, one agreement is their own.
    shares = [min(1.0, (same - (text == answer)) / 3) for text in known]
    return sum(shares) / len(shares)


VQA = right_or_wrong(partial(soft_accuracy, words=vqa_words, references=_original_references))
EVALAI = right_or_wrong(
    partial(soft_accuracy, words=_evalai_words, references=lambda texts: list(map(_evalai_words, texts)))
)


def read_vqa(folder: Path, *, questions: str, annotations: str) -> Iterator[Entry]:
    """Read a file of questions and a file of annotations, and the images of COCO val2014."""
    files = Files(folder, "image")
    (asked,) = read_entries(require(folder, _below(questions), purpose="the questions"), "questions")
    (known,) = read_entries(require(folder, _below(annotations), purpose="the answers"), "annotations")
    answers = {entry["question_id"]: entry for entry in known}
    for entry in asked:
        name = str(entry["question_id"])
        own = answers.get(entry["question_id"])
        image = files.find(f"COCO_val2014_{int(entry['image_id']):012d}.jpg", "val2014", "images/val2014")
        if own is None:
            yield Entry(name, {}, problem="a question without an entry in the annotations")
            continue
        record = {"image": image, "question": entry["question"], "answer": own["answers"]}
        groups = {label: str(own[label]) for label in ("answer_type", "question_type") if label in own}
        yield Entry(name, record, groups)


def read_textvqa(folder: Path) -> Iterator[Entry]:
    """Read ``TextVQA_0.5.1_val.json`` and the images, called by their ids."""
    files = Files(folder, "image")
    (rows,) = read_entries(require(folder, _below("TextVQA_0.5.1_val.json"), purpose="the questions"), "data")
    for row in rows:
        image = files.find(f"{row['image_id']}.jpg", "train_images", "train_val_images/train_images")
        yield Entry(
            str(row["question_id"]), {"image": image, "question": row["question"], "answer": row["answers"]}
        )


def read_gqa(folder: Path) -> Iterator[Entry]:
    """Read ``testdev_balanced_questions.json``, an object by question id, and ``images/<imageId>.jpg``."""
    files = Files(folder, "image")
    path = require(folder, _below("testdev_balanced_questions.json"), purpose="the questions")
    for name, row in _object(path).items():
        record = {
            "image": files.find(f"{row['imageId']}.jpg", "images"),
            "question": row["question"],
            "answer": row["answer"],
        }
        groups = {label: str(value) for label, value in (row.get("types") or {}).items() if value}
        yield Entry(name, record, groups)


def read_music_avqa(folder: Path) -> Iterator[Entry]:
    """Read ``avqa-test.json`` and ``<video_id>.mp4``; a model needs encoders of video and of audio.

    The key of the answer is spelled ``anser``, types and the words of the template are lists written as texts.
    """
    files = Files(folder, "video")
    path = require(folder, ("json/avqa-test.json", "avqa-test.json"), purpose="the questions")
    rows = read_json(path, InputError, _ADVICE)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of questions; {_ADVICE}")
    for row in rows:
        # Each <Object>, <LR> and so on stands for the next word.
        words = iter(_texts(row["templ_values"]))
        question = re.sub(r"<\w+>", lambda slot: next(words, slot[0]), row["question_content"])  # noqa: B023
        kinds = _texts(row["type"])
        video = files.find(f"{row['video_id']}.mp4")
        record = {"video": video, "audio": video, "question": question, "answer": row.get("anser")}
        groups = dict(zip(("modality", "type"), (kinds[0], " ".join(kinds)), strict=True))
        yield Entry(str(row["question_id"]), record, groups)


def read_questions(folder: Path, *, names: Sequence[str] = ("test", "questions")) -> Iterator[Entry]:
    """Read a table, or the table ``test.*`` or ``questions.*`` of a folder: its test rows if it has a column split.

    Columns are those of data sources. ``id`` is the id; ``type``, ``subset``, ``language``, and subset and language
    together are groups.
    """
    path = folder
    if not is_table(folder):
        wanted = [f"{name}{suffix}" for name in names for suffix in READERS]
        path = require(folder, wanted, purpose="a table of questions")
    skipped = Skipped()
    for name, row in read_table(path, (), skipped):
        try:
            if read_split(row, "split") not in (None, "test"):
                continue
        except RowError as error:
            yield Entry(name, {}, problem=str(error))
            continue
        record = {
            key: _whole_path(path, value) if key in MEDIA_COLUMNS else value for key, value in row.items()
        }
        groups = {label: str(row[label]) for label in ("type", "subset", "language") if row.get(label)}
        if "language" in groups:
            groups["language"] = language_named(groups["language"])
            if "subset" in groups:
                groups["subset, language"] = f"{groups['subset']}, {groups['language']}"
        # The id 0 is one, too.
        own = row.get("id")
        yield Entry(name if own is None or own == "" else str(own), record, groups)
    for reason, count in skipped.counts.items():
        yield from (Entry(f"{reason} {n}", {}, problem=reason) for n in range(count))


MEDIA_COLUMNS = tuple(f"{name}{end}" for name in FILE_MODALITIES for end in ("", "s"))
"""Columns of a table that hold media."""


def _whole_path(table: Path, value: Any) -> Any:
    value = json_list(value, (str,))
    if isinstance(value, list):
        return [_whole_path(table, one) for one in value]
    if isinstance(value, Mapping):
        # As in data sets of Hugging Face: bytes, a path, or both.
        return {**value, "path": _whole_path(table, value.get("path"))}
    is_path = isinstance(value, str) and value and not value.lower().startswith(("data:", "file:"))
    return str(table.parent / value) if is_path else value


def _below(name: str) -> tuple[str, ...]:
    return (name, f"annotations/{name}", f"questions/{name}")


def _object(path: Path) -> Mapping[str, Any]:
    content = read_json(path, InputError, _ADVICE)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object with a question for each id; {_ADVICE}")
    return content


def _texts(value: Any) -> list[str]:
    """Return a list, or a list that is written as a text."""
    return [str(one) for one in (json.loads(value) if isinstance(value, str) else value)]


_WHOLE = {"first_line": parsers.first_line}
_SAME_WORDS = right_or_wrong(lambda item, parsed: same_answer(parsed, item.references))
_COCO = "https://visualqa.org"

BENCHMARKS = (
    Benchmark(
        "vqav2",
        f"VQAv2, validation ({_COCO})",
        partial(
            read_vqa,
            questions="v2_OpenEnded_mscoco_val2014_questions.json",
            annotations="v2_mscoco_val2014_annotations.json",
        ),
        _WHOLE,
        ACCURACY,
        VQA,
        prompt=SHORT,
    ),
    Benchmark(
        "okvqa",
        "OK-VQA, validation (https://okvqa.allenai.org)",
        partial(
            read_vqa,
            questions="OpenEnded_mscoco_val2014_questions.json",
            annotations="mscoco_val2014_annotations.json",
        ),
        _WHOLE,
        ACCURACY,
        EVALAI,
        prompt=SHORT,
    ),
    Benchmark(
        "textvqa",
        "TextVQA, validation (https://textvqa.org)",
        read_textvqa,
        _WHOLE,
        ACCURACY,
        EVALAI,
        prompt=SHORT,
    ),
    Benchmark(
        "gqa",
        "GQA, testdev balanced (https://arxiv.org/abs/1902.09506)",
        read_gqa,
        _WHOLE,
        ACCURACY,
        right_or_wrong(lambda item, parsed: same_caption(parsed, item.references)),
        prompt=SHORT,
    ),
    Benchmark(
        "music_avqa",
        "MUSIC-AVQA, test (https://arxiv.org/abs/2203.14072)",
        read_music_avqa,
        _WHOLE,
        ACCURACY,
        _SAME_WORDS,
        modality="video",
        prompt=SHORT,
    ),
    Benchmark(
        "easyvqa",
        "easy-VQA (https://github.com/vzhou842/easy-VQA)",
        read_questions,
        _WHOLE,
        ACCURACY,
        _SAME_WORDS,
    ),
    Benchmark(
        "questions",
        "a table of questions",
        read_questions,
        {**_WHOLE, "stated": parsers.stated},
        ACCURACY,
        _SAME_WORDS,
        max_new_tokens=32,
    ),
)
