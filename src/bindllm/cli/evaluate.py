"""``bindllm evaluate``: measure a checkpoint on published benchmarks. ``bindllm compare``: compare two evaluations."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from bindllm.atomic import write_json
from bindllm.cli.generate import ModelOptions
from bindllm.cli.options import PositiveNumber, print_whole
from bindllm.errors import BindLLMError, UsageError, printable_lines
from bindllm.imports import name_module

if TYPE_CHECKING:
    from bindllm.evaluation.benchmarks import Benchmark
    from bindllm.evaluation.benchmarks.folder import Evaluation
    from bindllm.model.bindllm import BindLLM
    from bindllm.parallel import RunContext


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measuring (docs/benchmarks.md)."""

    limit: PositiveInt | None = None
    """only about so many questions, chosen by hash"""
    parser: str | None = None
    """parser of the answers (default: the first one of the benchmark)"""
    unparsed: Literal["wrong", "random"] = "wrong"
    """an answer that the parser cannot read is wrong, or a random option, as in the scripts of ScienceQA"""
    seed: int = 0
    """seed of random options and samples"""
    prompt: str | None = None
    """frame of a question, such as "{question} Answer briefly.", or the question about media with captions"""
    prompts: dict[str, str] | None = None
    """instead of it, one for each language, such as '{"en": "What is this?", "es": "¿Qué es esto?"}'"""
    choose: Literal["text", "likelihood"] = "text"
    """answer a multiple choice by text, or by the option with the highest log-likelihood"""
    tokenizer: Literal["python", "ptb"] = "python"
    """words of captions: split in Python, or as in published scores and with METEOR (needs Java and pycocoevalcap)"""
    spice: str | None = None
    """folder with the jars of Stanford CoreNLP 3.6.0: with --tokenizer ptb, captions have SPICE and SPIDEr too"""
    no_controls: bool = False
    """do not measure the controls: no media, shuffled media, and an answer without a model"""
    batch_size: PositiveInt | None = None
    """answers generated at the same time (default: 32, or more if the prompts are short)"""
    max_new_tokens: PositiveInt | None = None
    """length of the longest answer (default: that of the benchmark)"""
    samples: PositiveInt | None = None
    """sample so many answers to each question; the most frequent one counts (default: one greedy answer)"""
    temperature: PositiveNumber | None = None
    """temperature of the samples (default: 0.7)"""
    rationales: str | None = None
    """file with generated rationales, which are added to the questions of the same ids (docs/rationales.md)"""
    store: str = "data/store"
    """folder of the embedding store"""
    output: Path | None = None
    """folder with a subfolder for each benchmark (default: runs/eval/CHECKPOINT)"""
    devices: PositiveInt = 1
    """devices that share the questions, with a process on each; under torchrun, its processes do"""

    def settings(self) -> dict[str, Any]:
        """Return the keywords of `bindllm.evaluation.evaluate`, without the output."""
        own = ("no_controls", "output", "devices")
        return {**{k: v for k, v in vars(self).items() if k not in own}, "controls": not self.no_controls}


def evaluate(
    names: tuple[str, ...],
    *,
    checkpoint: str,
    root: Path | None = None,
    measuring: BenchmarkOptions = BenchmarkOptions(),
    model: ModelOptions = ModelOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Measure a checkpoint on published benchmarks, with controls and intervals (docs/benchmarks.md).

    Answers are written as they come. The same command resumes an interrupted
    evaluation. Embeddings without a language model: bindllm zero_shot.

    benchmarks:
      yes or no        pope mme
      short answers    vqav2 okvqa textvqa gqa music_avqa easyvqa questions
      multiple choice  scienceqa mmbench seed choices
      captions         coco flickr30k nocaps clotho audiocaps pointllm captions
      classes          modelnet40 esc50
      shots            vl_icl isekai
      bias             pairs

    Args:
        names: names of benchmarks, or import paths of your own (my_lab.BENCHMARK), followed by the folder of their
            files. With several benchmarks it has a subfolder for each
        checkpoint: folder that bindllm fit wrote
        root: the folder of the files, if it is not the last word

    Example:
        bindllm evaluate pope mme benchmarks --checkpoint checkpoints/7b --limit 500
    """
    benchmarks, data = _read_names(names, root)
    # In a process that torchrun has started, it says how many there are.
    counts = {"devices": int(os.environ.get("LOCAL_WORLD_SIZE", measuring.devices))}
    counts["num_nodes"] = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    failed: list[str] = []

    from bindllm.cli.recipes.fit import launch
    from bindllm.cli.recipes.recipe import quiet

    def work(context: RunContext) -> None:
        loaded = model.load(checkpoint, overrides, cache=False, device=str(context.device))
        failed.extend(_measure(loaded, benchmarks, data, checkpoint, measuring, context))
        context.processes.barrier()

    given = {"checkpoint": checkpoint, "root": root, "measuring": measuring, "model": model}
    with quiet():
        # The other processes run this command again, from its start.
        launch(counts, work, again=partial(evaluate, names, **given, overrides=overrides))
    return 1 if failed else 0


def _measure(
    model: BindLLM,
    benchmarks: Sequence[Benchmark],
    data: Path,
    checkpoint: str,
    measuring: BenchmarkOptions,
    context: RunContext,
) -> Iterator[str]:
    """Measure a model on benchmarks, print and write the results, and yield the names of benchmarks that failed."""
    from bindllm.evaluation.benchmarks.run import evaluate as measure
    from bindllm.report.benchmark import write_page

    output = measuring.output or Path("runs/eval", Path(checkpoint).resolve().name)
    given = {"root": data, "checkpoint": checkpoint, "progress": context.progress, **measuring.settings()}
    for benchmark in benchmarks:
        try:
            done = measure(
                model, benchmark, output=output / benchmark.name, processes=context.processes, **given
            )
        except BindLLMError as error:
            # One benchmark that cannot be measured must not cost the others.
            if len(benchmarks) == 1:
                raise
            yield benchmark.name
            if context.processes.is_first:
                print(printable_lines(f"error: {benchmark.name}: {error}"), file=sys.stderr)
            continue
        if context.processes.is_first:
            _show(done)
            print(f"page: {write_page(done)}")


def _read_names(names: Sequence[str], root: Path | None) -> tuple[list[Benchmark], Path]:
    """Return the benchmarks and the folder of their files, before a model is loaded."""
    if root is None:
        *names, last = names
        if not names:
            raise UsageError(f"no folder for {last}: bindllm evaluate {last} FOLDER --checkpoint CHECKPOINT")
        root = Path(last)
    return [_find(name) for name in dict.fromkeys(names)], root


def _find(name: str) -> Benchmark:
    """Return a benchmark by its name, or by the import path of one that a user wrote."""
    from bindllm.evaluation.benchmarks import Benchmark, find_benchmark

    if "." not in name:
        try:
            return find_benchmark(name)
        except BindLLMError as error:
            raise UsageError(str(error)) from error
    name_module(name)
    try:
        found = resolve_name(name)
    # A module of a user may raise anything when it is imported.
    except Exception as error:
        raise UsageError(f"{name} cannot be imported ({error}); expected the path of a Benchmark") from error
    if not isinstance(found, Benchmark):
        raise UsageError(f"{name} is not a Benchmark, but {type(found).__name__} (docs/benchmarks.md)")
    return found


def compare(a: Path, b: Path, *, show: NonNegativeInt = 5, output: Path | None = None) -> int:
    """Compare two evaluations: a paired test of every number, and the questions that were won and lost.

    Args:
        a: folder that bindllm evaluate wrote: of one benchmark, or with a subfolder for each
        b: the same of the other checkpoint
        show: number of won and of lost questions to print
        output: file to write all won and lost questions to, as JSON

    Example:
        bindllm compare runs/eval/a runs/eval/b
    """
    from rich.table import Table

    from bindllm.evaluation.benchmarks.bootstrap import compare_folders, interval_text

    found = compare_folders(a, b)
    for one in found:
        table = Table(title=f"{one.benchmark}, {one.count:,} questions of both", title_justify="left")
        for column in ("metric", "A", "B", "B - A, 95 %", "p"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for name, number in one.difference.items():
            p = "-" if number["value"] is None else f"{number['p']:.3f}"
            table.add_row(name, *(interval_text(part[name]) for part in (one.a, one.b, one.difference)), p)
        print_whole(table)
        print(f"B won {len(one.won):,} questions and lost {len(one.lost):,}")
        for word, pairs in (("won", one.won), ("lost", one.lost)):
            for x, y in pairs[:show]:
                asked = f"{word}: {x['id']}: {x['question']!r}, true {x['target']!r}"
                print(printable_lines(f"{asked}: A {x['answer']!r}, B {y['answer']!r}"))
        print(printable_lines("\n".join(f"note: {note}" for note in one.notes)), end="\n" * bool(one.notes))
    if output:
        write_json(output, {one.benchmark: one.facts() for one in found})
        print(f"written to {output}")
    return 0


def _show(done: Evaluation) -> None:
    """Print the numbers of each variant, and the counts."""
    from rich.table import Table

    from bindllm.evaluation.benchmarks.bootstrap import interval_text

    facts, scores = done.facts, done.facts["scores"]
    table = Table(title=f"{done.name}, 95 % intervals", title_justify="left")
    table.add_column("metric")
    for variant in scores:
        table.add_column(variant, justify="right")
    for metric in scores["model"]:
        table.add_row(metric, *(interval_text(own.get(metric)) for own in scores.values()))
    print_whole(table)
    counts = facts["counts"]
    chosen = f", chosen by hash from {counts['total']:,}" if counts["listed"] < counts["total"] else ""
    lines = [
        facts["media"],
        f"{counts['items']:,} of {counts['listed']:,} questions{chosen}; {counts['unparsed']:,} answers could not be "
        f"read by the parser {facts['settings']['parser']} and are {facts['settings']['unparsed']}",
        *(f"skipped: {count:,} x {reason}" for reason, count in facts["skipped"].items()),
        *(f"note: {note}" for note in facts["notes"]),
    ]
    if counts["duplicate_ids"]:
        lines.append(f"note: {counts['duplicate_ids']:,} ids occur twice; #2 was appended to the second")
    lines.append(f"written to {done.folder}, {facts['seconds']:.1f} s")
    print(printable_lines("\n".join(lines)))
