"""Learning from examples in the prompt: VL-ICL (arXiv 2403.13164) and ISEKAI (arXiv 2308.07891).

Each question is asked with several numbers of shots, which are groups. Images of one turn are fused into one embedding.
The controls of the shots are those of few-shot prompts, for every benchmark with shots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from bindllm.atomic import read_json
from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample, with_conversation
from bindllm.data.source_config import EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, right_or_wrong
from bindllm.evaluation.benchmarks.metrics import ACCURACY
from bindllm.evaluation.episodes import altered_media, exchange_names, is_published_right
from bindllm.evaluation.few_shot import wrong_answers
from bindllm.evaluation.layouts.dataset import Files
from bindllm.evaluation.task import WRONG_SUPPORT
from bindllm.shots import Shot, add_shots

_SHOTS = (0, 1, 2, 4)
_WITH_NUMBERS = ("operator_induction", "operator_induction_interleaved", "clevr")
_TASKS = (*_WITH_NUMBERS, "textocr", "open_mi", "matching_mi")
_OPERATORS = ("+", "-", "x")
_ISEKAI = ("ISEKAI-10", "ISEKAI-pair")


def read_vl_icl(folder: Path) -> Iterator[Entry]:
    """Read ``<task>/query.json`` and ``<task>/support.json`` of the tasks that are answered by text.

    Shots are drawn for each question with a fixed seed, so that an evaluation of a part asks the same.
    """
    tasks = [task for task in _TASKS if (folder / task / "query.json").is_file()]
    if not tasks:
        raise InputError(
            f"{folder} has no query.json of a task of VL-ICL, such as {folder / _TASKS[0] / 'query.json'}"
        )
    for task in tasks:
        # Of this task only, as tasks have images of the same name.
        files = Files(folder / task, "image")
        queries, support = (_rows(folder / task / f"{name}.json") for name in ("query", "support"))
        if not queries:
            raise InputError(f"{folder / task / 'query.json'} has no question; unpack the benchmark again")
        for number, query in enumerate(queries):
            for count in _SHOTS:
                name = f"{task}/{number}/{count} shots"
                rows = _shots(task, query, support, count, Random(f"0/{name}"))
                asked, *examples = [_record(row, files) for row in (query, *rows)]
                groups = {"task": task, "shots": str(count)}
                yield Entry(name, asked, groups, shots=examples)


def _shots(
    task: str, query: Mapping[str, Any], support: Sequence[Mapping[str, Any]], count: int, rng: Random
) -> list[Mapping[str, Any]]:
    """Return the worked examples of a question; in two tasks, ``count`` of each of two kinds."""
    if task == "open_mi":
        other = rng.choice([name for name in query["classes"] if name != query["answer"]])
        pair = rng.sample([query["answer"], other], 2)
        return [
            {"image": query["support"][name]["images"][n], "question": "This is a", "answer": name}
            for n in range(count)
            for name in pair
        ]
    drawn = rng.sample(list(support), count)
    if task == "matching_mi":
        return [row[kind] for row in drawn for kind in ("same", "diff")]
    if "operator" in query:
        # Of the results of all operators, the one of the question's operator.
        return [{**row, "answer": row["answer"][_OPERATORS.index(query["operator"])]} for row in drawn]
    return drawn


def _rows(path: Path) -> list[Any]:
    rows = read_json(path, InputError, "unpack the benchmark again")
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list, not {type(rows).__name__}; unpack the benchmark again")
    return rows


def _record(row: Mapping[str, Any], files: Files) -> dict[str, Any]:
    names = [row["image"]] if isinstance(row["image"], str) else list(row["image"])
    # Paths start at the folder of all tasks, or at that of the task.
    found = [files.find(name, "..", "") for name in names]
    image = None if None in found else found
    return {"image": image, "question": row.get("question") or "This is a", "answer": row["answer"]}


def parse_vl_icl(text: str, item: Item) -> str | None:
    """Return the text up to a line break or a period, its first integer, or its yes or no, by the task."""
    task = item.groups["task"]
    if task == "matching_mi":
        return parsers.yes_no(text, item)
    return (parsers.integer if task in _WITH_NUMBERS else parsers.up_to_period)(text, item)


def read_isekai(folder: Path) -> Iterator[Entry]:
    """Read ``ISEKAI-10.json`` and ``ISEKAI-pair.json``, with the images next to them or in folders called like them."""
    lists = [name for name in _ISEKAI if (folder / f"{name}.json").is_file()]
    if not lists:
        raise InputError(f"{folder} has no {_ISEKAI[0]}.json and no {_ISEKAI[1]}.json")
    for name in lists:
        media = folder / name
        config = SourceConfig(
            str(folder / f"{name}.json"),
            media=str(media if media.is_dir() else folder),
            prompt="What is in the image?",
            episodes=EpisodeConfig(layout="isekai", names="true", test_shots=[1, 2, 4, 8]),
        )
        rows, report = read_source(config)
        for row in rows["test"]:
            yield Entry(f"{name}/{row.name}", {}, {"list": name, "shots": row.subset}, row=row)
        for reason, count in report.skipped.counts.items():
            yield from (Entry(f"{name}/{reason} {n}", {}, problem=reason) for n in range(count))


def support_variants(
    samples: Sequence[Sample], lookup: Lookup, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, Callable[[Sample], Sample | None]]:
    """Return the variants that change the shots of a sample; None: it has none, or they do not fit.

    Args:
        limit: tokens that a prompt may have.

    Raises:
        InputError: by a variant, if all shots are equal.
    """
    change = cache(lambda: wrong_answers(shot for sample in samples for shot in _shots_of(sample)))

    def wrong(sample: Sample) -> Sample | None:
        if not (shots := _shots_of(sample)):
            return None
        # The names of an episode are exchanged within it.
        make = partial(exchange_names, sample)
        if sample.task != "episode":
            question = replace(sample.conversation, messages=sample.conversation.messages[-2:], examples=0)
            make = partial(with_conversation, sample, add_shots(question, [change()(shot) for shot in shots]))
        try:
            made = make(tokenizer=tokenizer)
        except InputError:
            # Longer than the decoder reads.
            return None
        return made if limit is None or made.prompt_length <= limit else None

    return {**altered_media(samples, lookup), WRONG_SUPPORT: wrong}


def _shots_of(sample: Sample) -> list[Shot]:
    messages = sample.conversation.messages[:-2]
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return [Shot(question.text, answer.text, question.media) for question, answer in pairs]


BENCHMARKS = (
    Benchmark(
        "vl_icl",
        "VL-ICL, tasks with text answers (https://arxiv.org/abs/2403.13164)",
        read_vl_icl,
        {"vl_icl": parse_vl_icl},
        ACCURACY,
        right_or_wrong(lambda item, parsed: parsed.lower() == item.references[0].lower()),
    ),
    Benchmark(
        "isekai",
        "ISEKAI, two classes (https://arxiv.org/abs/2308.07891)",
        read_isekai,
        {"whole": parsers.whole, "first_line": parsers.first_line},
        ACCURACY,
        right_or_wrong(lambda item, parsed: is_published_right(parsed, item.references[0], item.row.options)),
        notes=("an answer is right if it has the name in lower case, and no other name of the episode",),
    ),
)
