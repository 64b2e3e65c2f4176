"""Answers to all rows of a table, whatever its format: ``bindllm generate --input``, and its twin in Python.

A row that cannot be read or answered is in the output with its error, in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bindllm import __version__
from bindllm.conversation import Conversation
from bindllm.data.formats.columns import Fields
from bindllm.data.formats.media import FolderResolver
from bindllm.data.formats.questions import read_question
from bindllm.data.report import Skipped
from bindllm.data.source_config import SourceConfig
from bindllm.data.tables import read_table
from bindllm.embeddings.embedder import RecentEmbeddings
from bindllm.errors import InputError, MediaError
from bindllm.evaluation.answering import loaded_settings
from bindllm.evaluation.answering.log import AnswerLog, Line, changed_question, media_sha256, prompt_sha256
from bindllm.media import MODALITIES
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import fingerprint_checkpoint
from bindllm.model.generation import check_options
from bindllm.parallel import Processes, RunContext, chunks

logger = logging.getLogger(__name__)

FORMAT = 1
BATCH_SIZE = 16
_WINDOW = 16
"""Batches whose rows are in memory and are sorted by length together; the media in rows may be large."""


class TableAnswers(NamedTuple):
    """Counts of a table.

    Args:
        errors: rows without an answer, with the reason in their line.
    """

    rows: int
    errors: int


class _Row(NamedTuple):
    """A row of the table: its number from 0, its first fields in the output, and its question or why it has none."""

    number: int
    line: Line
    question: Conversation | None


class _InOrder(Skipped):
    """Keeps the reason for each row that a reader skips until it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[str, str]] = []

    def add(self, reason: str, name: str) -> None:
        self.waiting.append((name, reason))


def generate_table(
    model: BindLLM,
    table: str | Path | SourceConfig | Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    prompt: str | None = None,
    batch_size: int = BATCH_SIZE,
    log_probability: bool = False,
    context: RunContext = RunContext(),  # noqa: B008
    **options: Any,
) -> TableAnswers:
    """Answer every row of a table; an interrupted call resumes.

    The output has one line of JSON for each row, in the order of the table: ``row`` (from 0), ``name``, ``id`` if the
    row has one, ``prompt`` (its last question), and ``answer``, or ``error`` if it has none. Facts about the run are in
    a file next to it.

    Args:
        model: answers.
        table: a table or dataset, as for `read_table`; a `SourceConfig` of one, for its columns; or rows.
        output: a file ending in .jsonl.
        prompt: the question of rows with media and without a text. In it, ``{question}`` is replaced by the question.
            None: the ``prompt`` of the `SourceConfig`, or its ``prompts`` by the language of each row.
        batch_size: questions answered at the same time.
        log_probability: also write ``log_probability`` of each answer, in nats.
        context: the processes that share the work, each with its own model.
        **options: as for `BindLLM.generate`. With ``seed``, each batch is seeded by it and by its first row.

    Raises:
        InputError: a table that cannot be read, wrong options, or an output with answers of another run.

    Examples:
        >>> generate_table(model, "questions.csv", "answers.jsonl", max_new_tokens=32)  # doctest: +SKIP
        TableAnswers(rows=1000, errors=2)
    """
    # How to read this: checks, then batches (each process takes its own), then all lines in their order.
    output, processes, config = Path(output), context.processes, _source(model, table, prompt)
    log = _log(output, processes, config)
    settings = {"batch_size": batch_size, "log_probability": log_probability, **check_options(options)}
    if log_probability:
        _check_scored(options)
    facts = _facts(model, config, {**settings, **loaded_settings(model), "cache": _cache(model)})
    with log.locked() if processes.is_first else nullcontext():
        if processes.is_first:
            log.start(facts)
        processes.barrier()
        # An error is tried again: its file may have been repaired.
        known = {line["row"]: line for line in log.known() if "error" not in line}
        run = _Run(model, batch_size, log_probability, options, known, log, processes)
        rows = None if isinstance(table, str | Path | SourceConfig) else table
        number = run.answer(_rows(config, rows), progress=context.progress)
        processes.barrier()
        if not processes.is_first:
            return TableAnswers(number, 0)
        lines = _joined(log.known(), number)
        errors = sum("error" in line for line in lines)
        log.finish({**facts, "rows": number, "errors": errors}, lines)
    return TableAnswers(number, errors)


def _check_scored(options: Mapping[str, Any]) -> None:
    """Refuse options with which a row does not have one answer of the model."""
    if (options.get("num_return_sequences") or 1) > 1:
        raise InputError("log_probability is that of one answer for each row: leave num_return_sequences out")
    if options.get("min_probability"):
        raise InputError("log_probability is not that of a replaced answer: leave min_probability out")


def _source(model: BindLLM, table: Any, prompt: str | None) -> SourceConfig:
    # Rows have no path; those in them start at the working directory.
    path = str(table) if isinstance(table, str | Path) else "rows"
    config = table if isinstance(table, SourceConfig) else SourceConfig(path)
    custom = (one for encoder in model.encoders for one in encoder.modalities if one not in MODALITIES)
    # The columns of media are called like their modalities.
    modality = next(custom, "image") if config.modality == "image" else config.modality
    return replace(config, prompt=config.prompt if prompt is None else prompt, modality=modality)


def _log(output: Path, processes: Processes, config: SourceConfig) -> AnswerLog:
    if output.suffix != ".jsonl" or output.absolute() == Path(config.path).absolute():
        raise InputError(
            f"the output is {output}; expected another file than the table, such as answers.jsonl"
        )
    facts = output.with_name(f"{output.name}.run.json")
    if output.exists() and not facts.exists():
        raise InputError(f"{output} exists already, and has no {facts.name}; choose another output")
    return AnswerLog(output, facts, output, ("table", "the table"), rank=processes.rank)


def _facts(model: BindLLM, config: SourceConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that decide on the answers."""
    settings = {"prompt": config.prompts or config.prompt, **settings}
    # Objects, such as a stopping criterion, count by their text.
    plain = {
        name: value if isinstance(value, str | int | float | list | None) else str(value)
        for name, value in settings.items()
    }
    return {
        "format": FORMAT,
        "bindllm": __version__,
        "table": config.path,
        "checkpoint_fingerprint": fingerprint_checkpoint(model.describe(), model.trainable_state()),
        "settings": plain,
    }


def _cache(model: BindLLM) -> str | None:
    """Return the visual cache of a model in words: its settings and its index, wherever that is; None: no cache."""
    if model.cache is None:
        return None
    info = model.cache.index.info
    content = getattr(info, "sha256", "") or f"{info.count} images"
    return f"{model.cache.settings}, encoder {info.fingerprint[:12]}, {content[:12]}"


def _joined(lines: Iterable[Line], number: int) -> list[Line]:
    """Return the line of each row; one with an answer wins over an earlier one with an error."""
    found: dict[int, Line] = {}
    for line in lines:
        if "error" not in line or "error" in found.get(line["row"], line):
            found[line["row"]] = line
    return [found[row] for row in range(number)]


def _rows(config: SourceConfig, rows: Iterable[Mapping[str, Any]] | None) -> Iterator[_Row]:
    """Yield the rows of a table, or the given ones, in order; also rows that cannot be read."""
    skipped, numbers, resolve = _InOrder(), count(), FolderResolver.of(config)
    if rows is None:
        records = read_table(config.path, (), skipped)
    else:
        records = ((f"row {n}", dict(record)) for n, record in enumerate(rows))

    def waiting() -> Iterator[_Row]:
        # Rows that the reader has skipped on its way.
        for name, reason in skipped.waiting:
            yield _Row(number := next(numbers), {"row": number, "name": name, "error": reason}, None)
        skipped.waiting.clear()

    for name, record in records:
        yield from waiting()
        yield _read(next(numbers), name, record, config, resolve)
    yield from waiting()


def _read(
    number: int, name: str, record: dict[str, Any], config: SourceConfig, resolve: FolderResolver
) -> _Row:
    line: Line = {"row": number, "name": name}
    if isinstance(record.get("id"), str | int | float):
        line["id"] = record["id"]
    try:
        question, remarks = read_question(Fields(record, config, resolve, name=name))
    except InputError as error:
        return _Row(number, {**line, "error": str(error)}, None)
    text = next((m.text for m in reversed(question.messages) if m.role == "user"), "")
    # The question that a line answers: a changed table must not mix two. The content of media is `_hashed` later.
    asked = repr([(m.role, m.content, *([m.fields] if m.fields else [])) for m in question.messages])
    asked += repr(question.tools) if question.tools else ""
    line |= prompt_sha256(asked)
    return _Row(number, {**line, "prompt": text, **({"notes": list(remarks)} if remarks else {})}, question)


def _hashed(row: _Row) -> _Row:
    """Return a row whose line has the hash of its media; media that cannot be read are an error when it is asked."""
    media = [item for message in row.question.messages for item in message.media] if row.question else ()
    with suppress(MediaError):
        return row._replace(line=row.line | media_sha256(item.content_hash() for item in media))
    return row


@dataclass
class _Run:
    """A model that answers the rows of a table, and the lines that are known already."""

    model: BindLLM
    batch_size: int
    log_probability: bool
    options: Mapping[str, Any]
    known: Mapping[int, Line]
    log: AnswerLog
    processes: Processes

    def answer(self, rows: Iterator[_Row], *, progress: bool) -> int:
        """Answer the rows of this process, and return the number of all rows."""
        number, batches, recent = 0, count(), RecentEmbeddings()
        columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("rows", total=None)
            for window in chunks(rows, self.batch_size * _WINDOW):
                number += len(window)
                for batch in self._batches(window):
                    # Batches depend only on the table, so a resumed run, or one of more processes, has the same.
                    is_own = next(batches) % self.processes.world_size == self.processes.rank
                    if is_own and not self._is_done(own := [*map(_hashed, batch)]):
                        self.log.append(self._lines(own, recent))
                    bar.advance(task, len(batch))
        return number

    def _batches(self, window: Sequence[_Row]) -> Iterator[list[_Row]]:
        yield [row for row in window if row.question is None]
        asked = [row for row in window if row.question is not None]
        # Questions of similar length share a batch, since each is padded to the longest.
        asked.sort(key=lambda row: sum(len(message.text) for message in row.question.messages))
        yield from chunks(asked, self.batch_size)

    def _is_done(self, batch: Sequence[_Row]) -> bool:
        """Return whether all rows have their line.

        Raises:
            InputError: a line answers another question.
        """
        for number, line, _ in batch:
            old = self.known.get(number)
            if old and (words := changed_question(old, line)):
                raise InputError(
                    f"{self.log.lines} holds an answer {words} for {line['name']}: the table or its media have "
                    "changed. Choose another output"
                )
        return all(row.number in self.known for row in batch)

    def _lines(self, batch: Sequence[_Row], recent: RecentEmbeddings) -> list[Line]:
        """Return the finished lines of a batch."""
        if not batch or batch[0].question is None:
            return [row.line for row in batch]
        options, size = dict(self.options), self.options.get("num_return_sequences") or 1
        if options.get("seed") is not None:
            options["seed"] += batch[0].number
        ask = partial(self.model.generate, recent=recent, **options)
        try:
            made = chunks(ask([row.question for row in batch]), size)
            answers = [{"answer": one if size > 1 else one[0]} for one in made]
        except (InputError, MediaError):
            # One bad row does not cost the others.
            answers = [self._alone(ask, row) for row in batch]
        lines = [{**row.line, **answer} for row, answer in zip(batch, answers, strict=True)]
        for row, line in zip(batch, lines, strict=True) if self.log_probability else ():
            if "answer" in line:
                found = self.model.log_probability(row.question, line["answer"], recent=recent)
                line["log_probability"] = round(found, 6)
        return lines

    def _alone(self, ask: partial, row: _Row) -> dict[str, Any]:
        try:
            return {"answer": ask(row.question)}
        except (InputError, MediaError) as error:
            return {"error": str(error)}
