"""Write the model card of a checkpoint: text, metadata of the Hub, results for leaderboards, bill of materials.

Every number comes from a file: of the checkpoint, or of an evaluation of the same weights.
https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, try_to_load_from_cache
from huggingface_hub import eval_result_entries_to_yaml as entries_to_dicts

from bindllm.atomic import atomic_file, write_json
from bindllm.card.bill import BILL_FILE, bill_of_materials
from bindllm.card.evidence import number_text
from bindllm.card.facts import CardOptions, Facts, read_facts
from bindllm.card.licenses import Combined, combine
from bindllm.card.text import END, card_text, license_lines
from bindllm.errors import BindLLMError, InputError, UsageError
from bindllm.evaluation.task import MODEL
from bindllm.model.card import encoder_folder

CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE.md"
RESULTS_FOLDER = ".eval_results"

_WRITTEN = "# Written by bindllm card\n"
# The task of the Hub for a model that reads texts and these media; the first one that was trained counts.
_TASKS = {"image": "image-text-to-text", "video": "video-text-to-text", "audio": "audio-text-to-text"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Written:
    """The result of `write_model_card`.

    Attributes:
        warnings: sentences about licenses, and results that no leaderboard can show.
        not_measured: the checks without a measurement, as in the card.
    """

    files: list[Path]
    warnings: list[str]
    not_measured: list[str]


def write_model_card(
    folder: str | Path,
    evaluations: Sequence[Path] = (),
    options: CardOptions | None = None,
    *,
    advance: Callable[[], Any] = lambda: None,
) -> Written:
    """Write the card of a checkpoint folder; an earlier one is replaced, and text of its owner is kept.

    Raises:
        CheckpointError: not a checkpoint folder.
        InputError: a damaged file, or an evaluation of other weights.
        UsageError: an option for a part or a benchmark that does not exist.
    """
    folder = Path(folder)
    try:
        facts = read_facts(folder, evaluations, options or CardOptions(), advance)
        combined, entries, unmeasured = combine(facts.rows), _leaderboard(facts), facts.not_measured()
        head, text = _metadata(facts, combined).to_yaml(), card_text(facts, combined, unmeasured)
        bill = bill_of_materials(facts.name, facts.manifest, facts.rows, combined)
    except BindLLMError:
        raise
    # Each file can be read, but its values may have any shape: the folder may come from someone else.
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise InputError(
            f"a file of {folder} or of an evaluation of it is damaged ({error!r}); write it again"
        ) from error
    # Everything was read and checked: from here on, files are written.
    write_json(folder / BILL_FILE, bill)
    _write(folder / LICENSE_FILE, "\n".join(["# License", "", *license_lines(facts.rows, combined)]) + "\n")
    files = _write_results(folder / RESULTS_FOLDER, entries)
    _write(folder / CARD_FILE, f"---\n{head}\n---\n\n{text}{_notes(folder / CARD_FILE)}")
    warnings = combined.warnings + [
        f"{one.name}: not in {RESULTS_FOLDER}, as its data set on the Hub is not named (--dataset {one.name}=ORG/NAME)."
        for one in facts.evaluations
        if one.name not in entries
    ]
    files = [folder / CARD_FILE, folder / LICENSE_FILE, folder / BILL_FILE, *files]
    return Written(files, warnings, unmeasured)


def _leaderboard(facts: Facts) -> dict[str, EvalResultEntry]:
    """Return the results that a leaderboard of the Hub can show, by benchmark."""
    known, found = {one.name: one for one in facts.evaluations}, {}
    for name, dataset in facts.options.datasets.items():
        hub_id, _, task = dataset.partition(":")
        if name not in known:
            raise UsageError(f"--dataset {name}: no evaluation of it; there are {', '.join(known) or 'none'}")
        if not _HUB_ID.fullmatch(hub_id):
            raise UsageError(f"--dataset {name}={dataset}: expected ORG/NAME or ORG/NAME:TASK")
        main = known[name].metric.main
        number = known[name].facts["scores"][MODEL][main]
        notes = f"bindllm; {main} {number_text(number)}, 95 % interval, {number['n']} items"
        found[name] = EvalResultEntry(hub_id, task or "default", number["value"], notes=notes)
    return found


def _metadata(facts: Facts, combined: Combined) -> ModelCardData:
    """Return the metadata of the Hub; a key without a fact is omitted."""
    task = next((task for name, task in _TASKS.items() if name in facts.modalities), None)
    names = [
        facts.manifest["decoder"]["name"],
        *(encoder_folder(entry["init_args"]) for entry in facts.manifest["encoders"]),
    ]
    # A local path may look like a name on the Hub; a decoder from there is in its cache.
    on_hub = [
        name
        for name in names
        if name and _HUB_ID.fullmatch(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    ]
    bases = list(facts.options.base_models) or on_hub
    hub_data = [
        source["path"].removeprefix("hf://") for source in facts.sources if source["path"].startswith("hf://")
    ]
    results = list(_results(facts, task or "text-generation"))
    values = {
        "language": list(facts.options.languages),
        **combined.hub,
        "library_name": "bindllm",
        "pipeline_tag": task,
        "tags": ["bindllm", *facts.modalities],
        "datasets": hub_data,
        "metrics": sorted({result.metric_type for result in results}),
        "base_model": bases,
        "base_model_relation": "adapter" if bases else None,
        "eval_results": results,
    }
    return ModelCardData(**{key: value for key, value in values.items() if value}, model_name=facts.name)


def _results(facts: Facts, task: str) -> Iterator[EvalResult]:
    """Yield all numbers of the model for ``model-index``."""
    tasks = facts.held_out.scores.items()
    found = {f"held-out {name}": (name, variants[MODEL]) for name, variants in tasks}
    values = {
        title: (f"held-out-{name}", {metric: (value, metric) for metric, value in own.items()})
        for title, (name, own) in found.items()
    }
    for one in facts.evaluations:
        dataset = facts.options.datasets.get(one.name, one.name).partition(":")[0]
        own = one.facts["scores"][MODEL].items()
        values[one.facts["title"]] = (
            dataset,
            {
                metric: (number["value"], f"{metric} {number_text(number)}, {number['n']} items")
                for metric, number in own
            },
        )
    for title, (dataset, metrics) in values.items():
        for metric, (value, words) in metrics.items():
            if value is not None:
                yield EvalResult(task, dataset, title, metric, value, metric_name=words)


def _notes(file: Path) -> str:
    """Return the text of the owner: below the last comment of an earlier card, or a whole page that is not ours."""
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if END in text:
        return text.partition(END)[2].lstrip("\n")
    return "" if "Trained parts of a [bindllm]" in text else text


def _write_results(folder: Path, entries: Mapping[str, EvalResultEntry]) -> list[Path]:
    """Write a file for each benchmark, and remove those of an earlier card."""
    files = []
    for name, entry in entries.items():
        folder.mkdir(exist_ok=True)
        files.append(folder / f"{name}.yaml")
        _write(files[-1], _WRITTEN + yaml.safe_dump(entries_to_dicts([entry]), sort_keys=False))
    for file in folder.glob("*.yaml"):
        # Results of another weight would be shown as those of this one.
        if file not in files and file.read_text(encoding="utf-8", errors="replace").startswith(_WRITTEN):
            file.unlink()
    return files


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        # Names of files may hold bytes that are not UTF-8.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
