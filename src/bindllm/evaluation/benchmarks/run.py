"""Runs a benchmark: asks every question, and a part of them in each control, writes answers as they come, and scores.

Controls of the model are measured on a quarter of the questions each, so two of them cost at most half of the main run:
``no_media``, the same as gates of zero, and ``shuffled_media``. ``majority_answer`` and ``nearest_caption`` cost
nothing and have all questions. Questions with shots also have the controls of few-shot prompts (docs/few-shot.md).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bindllm import __version__
from bindllm.data.answers import vote
from bindllm.data.collate import Lookup
from bindllm.data.embeddings import MediaEmbeddings, RetrievedRecords
from bindllm.data.formats import answer_of
from bindllm.data.rows import Sample, make_sample
from bindllm.encoders import encoder_for
from bindllm.errors import InputError, check_choice
from bindllm.evaluation.answering import (
    Answers,
    Choice,
    Choices,
    Sampling,
    answer_batches,
    choice_batches,
    loaded_settings,
)
from bindllm.evaluation.answering.log import changed_question, media_sha256, prompt_sha256
from bindllm.evaluation.benchmarks import Benchmark, find_benchmark
from bindllm.evaluation.benchmarks.benchmark import (
    UNREADABLE,
    Item,
    Items,
    embed_items,
    line_of,
    majority_answers,
    read_items,
)
from bindllm.evaluation.benchmarks.bootstrap import by_group, intervals, media_sentence
from bindllm.evaluation.benchmarks.captions import (
    caption_note,
    check_english,
    check_java,
    nearest_captions,
    score_as_published,
)
from bindllm.evaluation.benchmarks.folder import FORMAT, Evaluation, EvaluationFolder, home_of
from bindllm.evaluation.benchmarks.metrics import Line
from bindllm.evaluation.benchmarks.parsers import letter
from bindllm.evaluation.benchmarks.shots import support_variants
from bindllm.evaluation.episodes import copied_answers
from bindllm.evaluation.layouts.dataset import NO_FILE
from bindllm.evaluation.task import (
    MAJORITY_ANSWER,
    MODEL,
    NEAREST_CAPTION,
    NO_MEDIA,
    SHUFFLED_MEDIA,
    eval_mode,
    shuffle_media,
    without_media,
)
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import fingerprint_checkpoint
from bindllm.model.context.records import RecordReader
from bindllm.model.decoder import num_positions
from bindllm.parallel import SINGLE_PROCESS, Processes

CONTROL_SHARE = 4
"""One of so many units is asked in each control of the model."""

_SEED, _TEMPERATURE = 0, 0.7


@dataclass(frozen=True)
class Settings:
    """How a benchmark is measured; all of it is written into ``evaluation.json``.

    Args:
        limit: only about this many questions, chosen by hash; None: all.
        parser: name of the parser of answers; None: the default of the benchmark.
        unparsed: an answer that the parser cannot read is wrong, or a random option, as in the scripts of ScienceQA.
        seed: seed of random options.
        prompt: frame of a question, or the question about media with captions; None: that of the benchmark.
        prompts: instead of it, one for each language.
        tokenizer: splits captions into words: ``python``, or ``ptb`` as in published scores, which also have METEOR.
        spice: folder with the jars of Stanford CoreNLP 3.6.0, with which captions have SPICE and SPIDEr too; needs ptb.
        choose: a multiple choice is answered by text, or by the option with the highest log-likelihood.
        controls: measure the controls too.
        batch_size: answers generated at the same time; None: 32, or more if the prompts are short.
        max_new_tokens: longest answer; None: that of the benchmark.
        samples: sample so many answers, and keep the first with the most frequent parsed answer; None: greedy.
        temperature: temperature of the samples; None: 0.7.
        rationales: file of answers that are rationales, which are added to the questions of the same ids (QCMG-A).
    """

    limit: int | None = None
    parser: str | None = None
    unparsed: Literal["wrong", "random"] = "wrong"
    seed: int = 0
    prompt: str | None = None
    prompts: dict[str, str] | None = None
    choose: Literal["text", "likelihood"] = "text"
    tokenizer: Literal["python", "ptb"] = "python"
    spice: str | None = None
    controls: bool = True
    batch_size: int | None = None
    max_new_tokens: int | None = None
    samples: int | None = None
    temperature: float | None = None
    rationales: str | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The keywords of `read_items`."""
        own = {name: getattr(self, name) for name in ("prompts", "limit", "rationales")}
        return {"prompt": self.prompt or "", **own}

    def of(self, benchmark: Benchmark) -> Settings:
        """Return the settings with the defaults of a benchmark.

        Raises:
            InputError: a setting that the benchmark does not have.
        """
        check_choice("choice of unparsed", self.unparsed, ("wrong", "random"))
        check_choice("way to choose", self.choose, ("text", "likelihood"))
        check_choice("tokenizer", self.tokenizer, ("python", "ptb"))
        for name in ("unparsed", "choose"):
            if getattr(self, name) in ("random", "likelihood") and benchmark.format != "choice":
                raise InputError(
                    f"{name}={getattr(self, name)} needs options, and {benchmark.name} is not a multiple choice"
                )
        if self.spice and self.tokenizer != "ptb":
            raise InputError("spice needs the words of published scores: tokenizer=ptb")
        if self.tokenizer == "ptb":
            if benchmark.format != "caption":
                raise InputError(f"tokenizer=ptb is for captions, and {benchmark.name} has none")
            check_java(self.spice)
        if self.rationales and benchmark.format not in ("choice", "vqa"):
            raise InputError(f"rationales need questions, and {benchmark.name} has {benchmark.format}s")
        if self.samples and self.choose == "likelihood":
            raise InputError("samples are texts: leave samples out, or choose by text")
        if self.prompt is not None and self.prompts is not None:
            raise InputError("give prompt or prompts, not both")
        if self.temperature is not None and not self.samples:
            raise InputError("temperature needs samples: greedy answers have none")
        for name in ("limit", "batch_size", "max_new_tokens", "samples", "temperature"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"{name} is {value}, expected more than 0")
        return replace(
            self,
            temperature=(self.temperature or _TEMPERATURE) if self.samples else None,
            parser=benchmark.parser(self.parser)[0],
            prompt=benchmark.prompt if self.prompt is None and self.prompts is None else self.prompt,
            max_new_tokens=self.max_new_tokens or benchmark.max_new_tokens,
        )


def evaluate(
    model: BindLLM,
    benchmark: str | Benchmark,
    *,
    root: str | Path,
    output: str | Path | None = None,
    store: str | Path = "data/store",
    checkpoint: str = "",
    progress: bool = False,
    processes: Processes = SINGLE_PROCESS,
    **settings: Any,
) -> Evaluation:
    """Measure a model on a benchmark; an interrupted evaluation resumes.

    Args:
        model: the model.
        benchmark: name of a benchmark, or one of your own.
        root: folder with its published files; or a folder that has such a folder, called like the benchmark.
        output: folder of the evaluation; None: ``runs/eval/FINGERPRINT/BENCHMARK``.
        store: folder of the embedding stores.
        checkpoint: folder of the model, for the record.
        progress: show bars.
        processes: processes that share the batches, with equal arguments and a model on each device; rank 0 writes.
        **settings: fields of `Settings`.

    Raises:
        InputError: another layout, no encoder for a modality of the benchmark, or an output with another evaluation.
        StoreError: the store cannot be used.

    Examples:
        >>> evaluate(model, "pope", root="data/pope", limit=500)["accuracy"]  # doctest: +SKIP
        0.812
    """
    benchmark = find_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    started, chosen = time.perf_counter(), Settings(**settings).of(benchmark)
    root = Path(root, benchmark.name) if Path(root, benchmark.name).is_dir() else Path(root)
    found = read_items(benchmark, root, **chosen.reading)
    for modality in dict.fromkeys(media.modality for item in found.items for media in item.row.media):
        # Before the first item, not in the middle of an evaluation.
        encoder_for(modality, model.encoders)
    facts = {
        "format": FORMAT,
        "bindllm": __version__,
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "metric": benchmark.metric.name,
        "checkpoint": str(checkpoint),
        "checkpoint_fingerprint": fingerprint_checkpoint(model.describe(), model.trainable_state()),
        "data": str(root),
        "settings": {**asdict(chosen), **_choices(model, chosen)},
    }
    default = Path("runs/eval", facts["checkpoint_fingerprint"][:12], benchmark.name)
    folder = EvaluationFolder(Path(output or default))
    with ExitStack() as stack, eval_mode(model):
        known = processes.from_first(partial(_start, folder, facts, stack))
        embeddings = embed_items(model, found, store, progress, processes)
        run = _Run(model, benchmark, chosen, root, known, folder, processes)
        lines = run.measure(found, embeddings, progress)
        facts |= _results(run, lines, found, time.perf_counter() - started)
        return folder.close(facts, lines) if processes.is_first else Evaluation(facts, folder.place, lines)


def _start(folder: EvaluationFolder, facts: Mapping[str, Any], stack: ExitStack) -> list[Line]:
    """Lock a folder until the stack is closed, and return the lines that it has already."""
    stack.enter_context(folder.locked())
    return folder.resume(facts)


def _choices(model: BindLLM, settings: Settings) -> dict[str, Any]:
    """Return the choices of a caller that change the answers, and that the fingerprint of the model does not cover."""
    # Of samples, only the answer that the parser's votes have chosen is kept: another parser cannot read it again.
    return {**loaded_settings(model), "voted_by": settings.parser if settings.samples else None}


class _View(NamedTuple):
    """A variant of the model: positions of its questions, how it gets them, and their embeddings."""

    positions: list[int]
    samples: Sequence[Sample]
    lookup: Lookup


@dataclass
class _Run:
    """A benchmark, and the model and the folder of an evaluation."""

    model: BindLLM
    benchmark: Benchmark
    settings: Settings
    root: Path
    known: Sequence[Line]
    folder: EvaluationFolder
    processes: Processes
    notes: list[str] = field(default_factory=list)

    def measure(self, found: Items, embeddings: MediaEmbeddings, progress: bool) -> dict[str, list[Line]]:
        """Return the lines of each variant."""
        if self.model.cache:
            self.notes.append("measured without the visual cache of the model")
        if self.settings.tokenizer == "ptb":
            check_english(found.items)
        samples = self._samples(found)
        lookup = self._lookup(embeddings, samples)
        self.items: Sequence[Item] = found.items
        self.notes += found.long_answers(self.model.tokenizer, self.settings.max_new_tokens or 1)
        self._lines = {(line["variant"], line["id"]): line for line in self.known}
        self._score = self.benchmark.scorer(self.items)
        self._hashes = [
            prompt_sha256(self.model.tokenizer.decode(sample.input_ids[: sample.prompt_length]))
            | media_sha256(map(embeddings.key, item.row.media))
            for item, sample in zip(self.items, samples, strict=True)
        ]
        lines: dict[str, list[Line]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            for variant, (positions, own, view) in self._views(samples, lookup).items():
                task = bar.add_task(f"{self.benchmark.name}: {variant}", total=len(own))
                made = {n: line for n in positions if (line := self._known(variant, n))}
                bar.update(task, completed=len(made))
                for batch, texts in self._answers(own, positions, view, [n in made for n in positions]):
                    fresh = {
                        positions[n]: self._line(variant, positions[n], text)
                        for n, text in zip(batch, texts, strict=True)
                    }
                    if self.processes.is_first:
                        self.folder.append(fresh.values())
                    bar.advance(task, len(fresh.keys() - made.keys()))
                    made |= fresh
                lines[variant] = [made[n] for n in positions]
        if self.settings.controls and self.settings.rationales:
            self.notes.append("the controls keep the rationales, which may describe the right media")
        for name, texts in (self._baselines(samples, lookup) if self.settings.controls else {}).items():
            lines[name] = [self._line(name, n, text) for n, text in texts.items()]
        if self.settings.tokenizer == "ptb":
            score_as_published(lines.values(), self.items, self.settings.spice)
        if self.benchmark.format == "caption":
            self.notes.append(caption_note(self.settings.tokenizer, self.settings.spice))
        return lines

    def _samples(self, found: Items) -> list[Sample]:
        """Return the tokens of the items; those that do not fit into the decoder are dropped and counted."""
        made, failed = {}, {}
        tokenizer = self.model.tokenizer
        positions = num_positions(self.model.decoder.config)
        for item in found.items:
            try:
                # Never cut: a question without its end is another question.
                sample = made[item.id] = make_sample(item.row, tokenizer, sys.maxsize)
                if self._limit is not None and sample.prompt_length > self._limit:
                    raise InputError(f"a prompt longer than the {positions:,} positions of the decoder")
            except InputError as error:
                failed[item.id] = str(error)
        found.drop(failed)
        if not found.items:
            raise InputError(f"no question can be asked: {'; '.join(found.skipped.lines())}")
        return [made[item.id] for item in found.items]

    @property
    def _limit(self) -> int | None:
        """Tokens that a prompt may have."""
        positions = num_positions(self.model.decoder.config)
        return None if positions is None else positions - (self.settings.max_new_tokens or 1)

    def _lookup(self, embeddings: MediaEmbeddings, samples: Sequence[Sample]) -> Lookup:
        """Return the lookup of the model: of embeddings, and of records if it reads any."""
        model = self.model
        if model.datastore is None or model.context is None or not model.context.num_records:
            return embeddings
        reader = RecordReader(model.datastore, model.tokenizer, model.context.config.text_length)
        found = RetrievedRecords(embeddings, reader, model.context.num_records)
        found.retrieve(group for sample in samples for group in sample.conversation.media_groups)
        if own := found.itself + found.equal:
            self.notes.append(f"records that show the media of the questions were not read: {own:,}")
        return found

    def _views(self, samples: Sequence[Sample], lookup: Lookup) -> dict[str, _View]:
        """Return the questions of each variant of the model."""
        found = {MODEL: _View([*range(len(samples))], samples, lookup)}
        units = sorted({item.unit for item, sample in zip(self.items, samples, strict=True) if sample.media})
        if not self.settings.controls or not units:
            return found
        drawn = set(random.Random(_SEED).sample(units, max(1, len(units) // CONTROL_SHARE)))
        part = [n for n, item in enumerate(self.items) if item.unit in drawn and samples[n].media]
        own = [samples[n] for n in part]
        found[NO_MEDIA] = _View(part, without_media(own), lookup)
        try:
            found[SHUFFLED_MEDIA] = _View(part, own, shuffle_media(own, lookup))
        except InputError:
            self.notes.append(
                f"{SHUFFLED_MEDIA} was not measured: its {len(own):,} questions show the same media"
            )
        for name, change in support_variants(samples, lookup, self.model.tokenizer, self._limit).items():
            try:
                changed = {n: made for n in part if (made := change(samples[n]))}
            except InputError as error:
                self.notes.append(f"{name} was not measured: {error}")
                continue
            if changed:
                found[name] = _View([*changed], [*changed.values()], lookup)
        return found

    def _answers(
        self, samples: Sequence[Sample], positions: Sequence[int], lookup: Lookup, done: Sequence[bool]
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Yield positions and answers of the batches that miss one, in all processes those of all processes."""
        numbers = count()

        def skip(positions: Sequence[int]) -> bool:
            # The batches that are left are dealt to the processes in turn.
            return all(done[n] for n in positions) or (
                next(numbers) % self.processes.world_size != self.processes.rank
            )

        options: dict[str, Any] = {"batch_size": self.settings.batch_size, "is_done": skip}
        own: Answers | Choices
        if self.settings.choose == "likelihood":
            own = choice_batches(self.model, samples, lookup, **options)
        else:
            options |= {
                "max_new_tokens": self.settings.max_new_tokens or 1,
                "sampling": self._sampling(positions),
            }
            own = answer_batches(self.model, samples, lookup, **options)
        # A round: a batch of each process. The first processes have a batch in the last round, the others none.
        while (batches := self.processes.gather(next(own, None)))[0] is not None:
            yield from (batch for batch in batches if batch is not None)

    def _sampling(self, positions: Sequence[int]) -> Sampling | None:
        """Return how the questions at some positions are sampled; None: answers are greedy."""
        if not self.settings.samples:
            return None
        temperature = self.settings.temperature or _TEMPERATURE
        return Sampling(
            self.settings.samples, temperature, self.settings.seed, partial(self._vote, positions)
        )

    def _vote(self, positions: Sequence[int], n: int, texts: Sequence[str]) -> int:
        """Return which of several answers to a question is kept."""
        _, parse = self.benchmark.parser(self.settings.parser)
        parsed = (parse(text, self.items[positions[n]]) for text in texts)
        return vote([None if one is None else str(one) for one in parsed])

    def _known(self, variant: str, n: int) -> Line | None:
        """Return the line of a question that was answered before, scored by the parser of today.

        Raises:
            InputError: the question has changed.
        """
        line = self._lines.get((variant, self.items[n].id))
        if line is None:
            return None
        if words := changed_question(line, self._hashes[n]):
            raise InputError(
                f"{self.folder.place} holds an answer {words} for {line['id']!r}: the files of the benchmark have "
                "changed. Choose another output"
            )
        answer = line["answer"]
        return self._line(
            variant, n, Choice(answer, line["probability"]) if "probability" in line else answer
        )

    def _line(self, variant: str, n: int, answer: str | Sequence[Any]) -> Line:
        """Return the line of an answer, a text or the fields of a `Choice`, parsed and scored."""
        item, settings = self.items[n], self.settings
        answer, probability = (answer, None) if isinstance(answer, str) else answer
        name, parse = self.benchmark.parser(settings.parser)
        parsed = parse(answer, item)
        if parsed is None and settings.unparsed == "random":
            name += f", else random with seed {settings.seed}"
            letters = [answer_of(item.row.options, k) for k, text in enumerate(item.row.options) if text]
            # Drawn for each question by itself, so that an interruption changes nothing.
            chosen = random.Random(f"{settings.seed} {variant} {item.id}").choice(letters)
            scored = self._score(item, letter(chosen, item))
        else:
            scored = self._score(item, parsed)
        stats = {key: value for key, value in scored.items() if key != "score"}
        return {
            **line_of(item, home_of(self.root)),
            "variant": variant,
            **self._hashes[n],
            "parser": name,
            "answer": answer,
            "parsed": parsed,
            "score": scored["score"],
            **({"stats": stats} if stats else {}),
            # Rounded, so that a line that is read again stays the same.
            **({} if probability is None else {"probability": round(probability, 6)}),
        }

    def _baselines(self, samples: Sequence[Sample], lookup: Lookup) -> dict[str, dict[int, str]]:
        """Return the answers of the controls without a model, by the positions of their questions."""
        found = {}
        if self.benchmark.format != "caption":
            found[MAJORITY_ANSWER] = dict(enumerate(majority_answers(self.items)))
        elif any(texts := nearest_captions(self.items, lookup)):
            found[NEAREST_CAPTION] = dict(enumerate(texts))
        else:
            self.notes.append(f"{NEAREST_CAPTION} was not measured: all media are the same")
        # A question without shots has no answer to copy.
        asked = [n for n, sample in enumerate(samples) if len(sample.conversation.messages) > 2]
        for name, copied in copied_answers([samples[n] for n in asked]).items() if asked else ():
            found[name] = {n: answer.text for n, answer in zip(asked, copied(), strict=True)}
        return found


def _results(run: _Run, lines: Mapping[str, Sequence[Line]], found: Items, seconds: float) -> dict[str, Any]:
    """Return the parts of ``evaluation.json`` that are known at the end."""
    metric, own = run.benchmark.metric, lines[MODEL]
    return {
        "counts": {
            "total": found.num_total,
            "listed": found.num_listed,
            "items": len(own),
            "missing_media": sum(
                count
                for reason, count in found.skipped.counts.items()
                if reason in (NO_FILE, UNREADABLE) or reason.startswith("no such")
            ),
            "skipped": found.num_listed - len(own),
            "duplicate_ids": found.duplicates,
            "unparsed": sum(line["parsed"] is None for line in own),
        },
        "skipped": found.skipped.counts,
        "notes": [*run.benchmark.notes, *metric.notes(own), *run.notes],
        "scores": {name: intervals(part, metric) for name, part in lines.items()},
        "groups": by_group(own, metric),
        "media": media_sentence(lines, metric),
        "seconds": round(seconds, 2),
    }
