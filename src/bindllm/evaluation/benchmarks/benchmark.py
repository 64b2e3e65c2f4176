"""A benchmark: a reader of its published layout, a parser of answers, and a metric; and its items.

A reader yields an `Entry` for each question. Its record is a row of a data source (docs/data.md), so the one parser of
rows makes the conversation, and a benchmark needs no prompt code of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.conversation.messages import RowError
from bindllm.data.answers import answer_words, option_letter
from bindllm.data.embeddings import MediaEmbeddings
from bindllm.data.formats import answer_of, read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.report import Skipped
from bindllm.data.rows import Row
from bindllm.data.source_config import Format, SourceConfig
from bindllm.data.tables import Record
from bindllm.errors import InputError, did_you_mean
from bindllm.evaluation.benchmarks.metrics import Line, Metric
from bindllm.evaluation.layouts.dataset import NO_FILE
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.parallel import Processes, RunContext
from bindllm.shots import Shot, add_shots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT = "{question}\nAnswer the question using a single word or phrase."
"""Prompt of the short answers of LLaVA-1.5 (https://arxiv.org/abs/2310.03744)."""


@dataclass(frozen=True)
class Entry:
    """One question, as the layout of a benchmark gives it.

    Args:
        id: name of the question; unique in a benchmark.
        record: a row of the benchmark's format. Its media are a path, bytes, or None for a file that does not exist.
        groups: labels of the question, each with its value, for scores by group.
        unit: questions of one unit count together; empty: the question is a unit of its own.
        shots: records of worked examples before the question.
        facts: further values for the parser or the metric.
        problem: reason why it cannot be asked; empty: it can.
        row: the conversation, if the reader makes it itself instead of a record.
    """

    id: str
    record: Record
    groups: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    shots: Sequence[Record] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    row: Row | None = None


@dataclass(frozen=True)
class Item:
    """One question that can be asked.

    Attributes:
        id: name of the question.
        row: the conversation with one of the true answers, all true answers, and the options of a multiple choice.
        groups, unit, facts: as in `Entry`.
    """

    id: str
    row: Row
    groups: Mapping[str, str]
    unit: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> tuple[str, ...]:
        """The true answers, as often as the benchmark gives them."""
        return self.row.references

    @property
    def letter(self) -> str | None:
        """Letter of the right option of a multiple choice."""
        return option_letter(self.references[0], self.row.choices) if self.row.choices else None

    @property
    def target(self) -> str | list[str]:
        """The right letter, the true answer, or all true answers."""
        several = len(self.references) > 1 or self.row.task == "caption"
        return self.letter or (list(self.references) if several else self.references[0])

    @property
    def media(self) -> tuple[Media, ...]:
        """Media of the question itself; those of its shots are not included."""
        return self.row.conversation.messages[-2].media


UNREADABLE, COPIED = "the media cannot be read", "the question is among its shots"
"""Why a question is not asked."""

Parser = Callable[[str, Item], Any]
"""Returns the answer that a text gives, JSON-able, or None if it gives none: it is counted as unparsed, and wrong."""
Score = Callable[[Item, Any], Mapping[str, float]]
"""Returns ``score`` of a parsed answer, and the further sums of the metric, if it has any."""


def right_or_wrong(is_right: Callable[[Item, Any], bool | float]) -> Callable[[Sequence[Item]], Score]:
    """Return the scorer of a benchmark that needs only an item and its parsed answer; an unparsed one is wrong."""

    def score(item: Item, parsed: Any) -> Mapping[str, float]:
        return {"score": 0.0 if parsed is None else float(is_right(item, parsed))}

    return lambda items: score


def is_target(item: Item, parsed: Any) -> bool:
    """Return whether a parsed answer is the target."""
    return parsed == item.target


TARGET = right_or_wrong(is_target)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        name: its name on the command line.
        title: its name in the literature, with a link to the paper.
        read: yields the entries of a folder in the published layout.
        parsers: parsers of answers by name; the first is the default.
        metric: makes numbers of the scores.
        scorer: returns the function that scores answers, for these items.
        format: format of the records: vqa, choice or caption.
        prompt: frame of a question, or the question about media with captions.
        max_new_tokens: longest answer.
        notes: remarks for the reader of the scores.
    """

    name: str
    title: str
    read: Callable[[Path], Iterable[Entry]]
    parsers: Mapping[str, Parser]
    metric: Metric
    scorer: Callable[[Sequence[Item]], Score] = TARGET
    format: Format = "vqa"
    prompt: str = "{question}"
    modality: str = "image"
    max_new_tokens: int = 16
    notes: Sequence[str] = ()

    def parser(self, name: str | None) -> tuple[str, Parser]:
        """Return a parser and its name; None: the default.

        Raises:
            InputError: the benchmark has no such parser.
        """
        name = next(iter(self.parsers)) if name is None else name
        if name not in self.parsers:
            raise InputError(f"{self.name} has no parser {name!r}. {did_you_mean(name, self.parsers)}")
        return name, self.parsers[name]


@dataclass
class Items:
    """The items of a benchmark, and the questions that cannot be asked.

    Attributes:
        num_total: questions of the benchmark.
        num_listed: those of them that were chosen by a limit.
        duplicates: ids that occurred before; ``#2`` was appended to the second one.
    """

    items: list[Item]
    skipped: Skipped
    num_total: int
    num_listed: int
    duplicates: int

    def drop(self, failed: Mapping[str, str]) -> None:
        """Remove items by id, and count them with their reasons."""
        for name, reason in failed.items():
            self.skipped.add(reason, name)
        # A unit with a part of its questions would be scored as if it were whole.
        units = {item.unit for item in self.items if item.id in failed}
        for item in self.items:
            if item.unit in units and item.id not in failed:
                self.skipped.add("another question of its unit cannot be asked", item.id)
        self.items = [item for item in self.items if item.unit not in units]

    def long_answers(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
        """Return a note if items have only true answers of more than ``longest`` tokens: these count as wrong."""
        # The letter of an option is an answer, too.
        items = [item for item in self.items if not item.letter]
        texts = [text for item in items for text in item.references]
        lengths = iter(map(len, tokenizer(texts, add_special_tokens=False).input_ids if texts else ()))
        cut = sum(min(next(lengths) for _ in item.references) > longest for item in items)
        note = f"{cut:,} true answers are longer than max_new_tokens={longest}, so no answer can match them"
        return [note] if cut else []


def read_items(
    benchmark: Benchmark,
    folder: Path,
    *,
    prompt: str,
    prompts: dict[str, str] | None = None,
    limit: int | None = None,
    rationales: str | None = None,
) -> Items:
    """Read the items of a benchmark.

    Args:
        folder: folder, or table, with its published files.
        limit: only this many questions, chosen by the hash of their units; None: all.
        rationales: file with rationales that are added to the questions, by id; a question without one is skipped.

    Raises:
        InputError: the folder has another layout, or none of its questions can be asked.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder with the files of {benchmark.name}")
    entries, duplicates = _named(_entries(benchmark, folder))
    chosen = entries if limit is None else _limited(entries, limit)
    found = Items([], Skipped(), len(entries), len(chosen), duplicates)
    config = SourceConfig(
        str(folder),
        format=benchmark.format,
        modality=benchmark.modality,
        prompt=prompt if prompts is None else SourceConfig.prompt,
        prompts=prompts,
        split="test",
        rationale=False if rationales is None else "given",
        rationales=rationales,
    )
    # Readers give whole paths, because files of one benchmark are in several folders.
    resolve, failed = FolderResolver(""), {}
    for entry in chosen:
        try:
            found.items.append(_item(entry, config, resolve))
        except InputError as error:
            failed[entry.id] = getattr(error, "reason", str(error))
            # It takes part in `drop` with its unit.
            found.items.append(Item(entry.id, _NO_ROW, entry.groups, entry.unit))
    found.drop(failed)
    if not found.items:
        raise InputError(
            f"{folder}: {benchmark.name} has no question that can be asked: "
            f"{'; '.join(found.skipped.lines()) or 'its files are empty'}"
        )
    return found


_NO_ROW: Any = None


def _named(entries: Iterable[Entry]) -> tuple[list[Entry], int]:
    """Return entries with unique ids, and the number of those that were repeated.

    They are kept, because published files repeat ids of different questions; counted, because results name them.
    """
    found, names, duplicates = [], set(), 0
    repeated: Counter[str] = Counter()
    for entry in entries:
        name = entry.id
        duplicates += name in names
        while name in names:
            repeated[entry.id] += 1
            name = f"{entry.id}#{repeated[entry.id] + 1}"
        names.add(name)
        found.append(replace(entry, id=name, unit=entry.unit or name, record={**entry.record, "id": name}))
    return found, duplicates


def _entries(benchmark: Benchmark, folder: Path) -> Iterator[Entry]:
    """Yield the entries of a folder; a file of the right name may still have other content."""
    last = "the first question"
    try:
        for entry in benchmark.read(folder):
            yield entry
            last = f"the question after {entry.id}"
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{folder}: {last} of {benchmark.name} has another form than in the published files ({error!r}); compare "
            "the file with docs/benchmarks.md"
        ) from error


def _item(entry: Entry, config: SourceConfig, resolve: FolderResolver) -> Item:
    def row(record: Record) -> Row:
        if record.get(config.modality, "") is None:
            raise RowError(NO_FILE)
        return read_row(record, config, resolve, name=entry.id)

    if entry.problem:
        raise InputError(entry.problem)
    if entry.row is not None and config.rationales:
        raise InputError("its reader makes the whole conversation, so no rationale can be added")
    made = row(entry.record) if entry.row is None else entry.row
    shots = [row(record).conversation.messages for record in entry.shots]
    examples = [Shot(question.text, answer.text, question.media) for question, answer in shots]
    made = replace(made, conversation=add_shots(made.conversation, examples))
    return Item(entry.id, made, entry.groups, entry.unit, entry.facts)


def _limited(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """Return about this many entries in their order, whole units chosen by hash: the same ones every time."""
    sizes = Counter(entry.unit for entry in entries)
    kept, total = set(), 0
    for unit in sorted(
        sizes, key=lambda unit: hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()
    ):
        if total >= limit:
            break
        kept.add(unit)
        total += sizes[unit]
    return [entry for entry in entries if entry.unit in kept]


def embed_items(
    model: BindLLM, found: Items, store: str | Path, progress: bool, processes: Processes
) -> MediaEmbeddings:
    """Embed all media once, and count those that cannot be read."""
    modalities = model.bind_config.token_modalities if model.bind.num_tokens > 1 else ()
    embeddings = MediaEmbeddings(model.encoders, store, token_modalities=modalities)
    context = RunContext(processes, model.device, progress=progress)
    media = [media for item in found.items for media in item.row.media]
    failed = embeddings.precompute(media, context).failed
    if processes.world_size > 1:
        # Now all of them are stored: each process only reads their keys.
        failed = embeddings.precompute(media, RunContext(device=model.device)).failed
    broken = {item.id: failed[media] for item in found.items for media in item.row.media if media in failed}
    found.drop(dict.fromkeys(broken, UNREADABLE))
    if not found.items:
        raise InputError(f"no media can be read: {'; '.join([*broken.values()][:3])}")
    copied = [item.id for item in found.items if _is_shown_twice(item, embeddings)]
    found.drop(dict.fromkeys(copied, COPIED))
    if not found.items:
        raise InputError(f"no question can be asked: {'; '.join(found.skipped.lines())}")
    return embeddings


def _is_shown_twice(item: Item, embeddings: MediaEmbeddings) -> bool:
    """Return whether the question shows media of one of its shots, whatever the file is called."""
    *shots, question = (
        {*map(embeddings.key, message.media)} for message in item.row.conversation.messages[:-1]
    )
    return any(not question.isdisjoint(shot) for shot in shots)


def majority_answers(items: Sequence[Item]) -> list[str]:
    """Return for each item the answer that is true for most items of its language, in its first spelling."""
    counts: dict[str, Counter[str]] = {}
    spelling: dict[str, str] = {}
    for item in items:
        texts = [answer_of(item.row.options, ord(item.letter) - ord("A"))] if item.letter else item.references
        # "No." and "no" are one answer, which counts once for an item.
        words = [" ".join(answer_words(text)) for text in texts]
        counts.setdefault(item.row.language, Counter()).update([*dict.fromkeys(words)])
        for one, text in zip(words, texts, strict=True):
            spelling.setdefault(one, text)
    most = {language: spelling[own.most_common(1)[0][0]] for language, own in counts.items()}
    return [most[item.row.language] for item in items]


def line_of(item: Item, root: Path) -> Line:
    """Return the part of a line of ``items.jsonl`` that does not depend on the answer."""
    return {
        "id": item.id,
        "question": item.row.conversation.messages[-2].text,
        "media": list(_media_names(item, root)),
        "target": item.target,
        "groups": dict(item.groups),
        "unit": item.unit,
        **({"options": list(item.row.options)} if item.row.options else {}),
    }


def _media_names(item: Item, root: Path) -> Iterator[str]:
    """Yield the paths of media, relative to the folder of the benchmark; bytes of a table have no name."""
    for media in item.media:
        if isinstance(media.source, str | Path) and media.modality != "text":
            path = Path(media.source)
            yield str(path.relative_to(root) if path.is_relative_to(root) else path)
