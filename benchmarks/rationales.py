"""`python -m benchmarks.rationales`: questions about scenes, learned with and without rationales at equal cost.

All runs start from one model that has learned captions and no question (recipes/scenes.yaml, without its questions).
Then each learns to count things and to compare sizes, from the same rows, in one of four ways:

- direct: only the answer (QCM-A);
- one stage: the rationale, then the answer (QCM-LE-A). It lists the things of the question: "a large cat and a small
  owl", "a cat, an owl and a hat";
- wrong rationale: the same with the rationale of another row: the control for more tokens to learn;
- two stages: a model for the rationale (QCM-LE), and one for the answer that gets it with the question (QCMG-A). The
  latter learns gold rationales, and those that the former generated for other scenes.

Equal cost means as many tokens through the decoder in training: all tokens of prompts and answers, without padding. So
runs with short rows take more steps. Both stages together cost as much as one run. Rows of
benchmarks/results/rationales.json are not measured again, and complete runs are not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, run_bindllm
from bindllm import BindLLM
from bindllm.atomic import write_json
from bindllm.conversation import Conversation
from bindllm.data.answers import same_answer, stated_answer, vote
from bindllm.data.formats import read_row
from bindllm.data.formats.media import FolderResolver
from bindllm.data.formats.rationales import read_rationales
from bindllm.data.rows import make_sample
from bindllm.data.source_config import Rationale, SourceConfig
from bindllm.evaluation.answering.table import generate_table
from bindllm.quickstart.scenes import COUNTS, NEW_SCENES, with_article
from bindllm.quickstart.tables import write_rows

SCENES, FOLDER = Path("data/scenes"), Path("checkpoints/rationales")
ANSWERS = {"count": COUNTS, "comparison": ("larger", "smaller")}
# Sizes of compared things differ by at least 1.5, so that these words differ too.
_MEDIUM, _LARGE = 52, 66
_BATCH, _TOKENS, _SAMPLES, _TEMPERATURE = 40, 64, 5, 0.7

Row = dict[str, Any]


@dataclass(frozen=True)
class Tables:
    """Rows for the start, for training, for generated rationales, and for the test; no scene is in two of them."""

    start: list[Row]
    train: list[Row]
    generated: list[Row]
    test: list[Row]


def make_tables(num_start: int, num_train: int, num_generated: int, num_test: int) -> Tables:
    """Choose scenes in their order, and return their captions, or as many questions of each type."""
    described = _read(SCENES / "captions.jsonl")
    scenes = {row["image"]: row for row in described}
    found = []
    # Training scenes after those of the start; test scenes are of another table.
    files = ((SCENES / "train.jsonl", num_train), (None, num_generated), (SCENES / "test.jsonl", num_test))
    questions: list[Row] = []
    used = {row["image"] for row in described[:num_start]}
    for path, count in files:
        questions = questions if path is None else _read(path)
        rows: list[Row] = []
        for kind in ANSWERS:
            chosen = [
                {
                    **row,
                    "id": f"{row['image']} {row['question']}",
                    "rationale": rationale(row, scenes[row["image"]]),
                }
                for row in questions
                if row["type"] == kind
                and row["image"] not in used
                and row.get("subset", NEW_SCENES) == NEW_SCENES
            ][: count // len(ANSWERS)]
            rows += chosen
        used |= {row["image"] for row in rows}
        found.append(rows)
    return Tables(described[:num_start], *found)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rationale(row: Row, scene: Row) -> str:
    """Return the rationale of a question: the things that are counted, or the two that are compared, with sizes."""
    if row["type"] == "count":
        return f"{scene['caption'].rpartition(' on ')[0]}."
    compared = sorted(
        (thing for thing in scene["things"] if f"the {thing['name']} " in row["question"].replace("?", " ")),
        key=lambda thing: row["question"].index(thing["name"]),
    )
    return f"{' and '.join(with_article(_size(thing) + ' ' + thing['name']) for thing in compared)}."


def _size(thing: Row) -> str:
    return "small" if thing["size"] < _MEDIUM else "medium" if thing["size"] < _LARGE else "large"


def wrong(rows: Sequence[Row], *, own_things: bool = False) -> list[Row]:
    """Return rows with a rationale that has another answer, which is added as ``implied``.

    Args:
        rows: of all types.
        own_things: comparisons keep their things and exchange the sizes; else all rationales are of other rows.
    """
    draw, found = random.Random(0), []
    for row in rows:
        if own_things and row["type"] == "comparison":
            first, second = row["rationale"][:-1].split(" and ")
            sizes = [part.split()[1] for part in (first, second)]
            swapped = [
                with_article(" ".join([size, *part.split()[2:]]))
                for size, part in zip(sizes[::-1], (first, second), strict=True)
            ]
            (other,) = {*ANSWERS["comparison"]} - {row["answer"]}
            found.append({**row, "rationale": f"{' and '.join(swapped)}.", "implied": other})
            continue
        same = [one for one in rows if one["type"] == row["type"] and one["answer"] != row["answer"]]
        chosen = draw.choice(same)
        found.append({**row, "rationale": chosen["rationale"], "implied": chosen["answer"]})
    return found


def source_of(path: Path, kind: Rationale) -> dict[str, Any]:
    """Return the source of a table of questions, as a recipe writes it."""
    return {"path": str(path), "format": "vqa", "rationale": kind, "media": str(SCENES), "split": "train"}


def train(
    name: str, sources: Sequence[Mapping[str, Any]], steps: int, seed: int, *, start: Path | None = None
) -> Path:
    """Train a run unless its folder is complete, and return the folder."""
    output = FOLDER / name
    if (output / "seconds.json").is_file():
        return output
    began = time.perf_counter()
    options = ["--output", str(output), "--seed_everything", str(seed), "--trainer.logger", "false"]
    options += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", "null"]
    options += ["--trainer.limit_val_batches", "0", "--data.sources", json.dumps([*sources])]
    if start is not None:
        options += ["--model.init_from", str(start), "--model.bag_of_words", "0"]
    run_bindllm("fit", "--config", "recipes/scenes.yaml", *options)
    write_json(output / "seconds.json", time.perf_counter() - began)
    return output


def seconds_of(folder: Path) -> float:
    """Return the wall time of a training, with the start of its process and new embeddings."""
    return json.loads((folder / "seconds.json").read_text())


def prompts(rows: Iterable[Row], kind: Rationale, rationales: str | None = None) -> list[Conversation]:
    """Return the questions of rows without their answers, with their own rationales or generated ones."""
    config = SourceConfig(str(SCENES), format="vqa", rationale=kind, rationales=rationales)
    read = [read_row(row, config, FolderResolver(str(SCENES))) for row in rows]
    return [Conversation(row.conversation.messages[:-1]) for row in read]


def ask(
    model: BindLLM, rows: Sequence[Row], kind: Rationale, *, rationales: str | None = None, **options: Any
) -> list[list[str]]:
    """Return the texts of each row, one or several."""
    asked, found = prompts(rows, kind, rationales), []
    for first in range(0, len(asked), _BATCH):
        found += model.generate(asked[first : first + _BATCH], max_new_tokens=_TOKENS, **options)
    each = len(found) // len(rows)
    return [found[first : first + each] for first in range(0, len(found), each)]


def ask_voting(model: BindLLM, rows: Sequence[Row]) -> list[str]:
    """Return of several sampled texts of each row the one with the most frequent answer."""
    import torch

    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": _TEMPERATURE, "num_return_sequences": _SAMPLES}
    sampled = ask(model, rows, True, **options)
    return [texts[vote([stated_answer(text) for text in texts])] for texts in sampled]


def shuffled(rows: Sequence[Row]) -> list[Row]:
    """Return rows with their images exchanged inside each type."""
    found = []
    for kind in ANSWERS:
        own = [row for row in rows if row["type"] == kind]
        images = [row["image"] for row in own]
        random.Random(0).shuffle(images)
        found += [{**row, "image": image} for row, image in zip(own, images, strict=True)]
    return found


def score(rows: Sequence[Row], texts: Sequence[str], *, is_stated: bool) -> dict[str, float]:
    """Return the share of right answers by type, of unparsed ones, and of those that a wrong rationale implies."""
    answers = [stated_answer(text) if is_stated else text for text in texts]
    pairs = list(zip(rows, answers, strict=True))
    parsed = [answer is not None and same_answer(answer, ANSWERS[row["type"]]) for row, answer in pairs]
    found = {}
    for kind in ANSWERS:
        right = [same_answer(answer or "", [row["answer"]]) for row, answer in pairs if row["type"] == kind]
        found[kind] = sum(right) / len(right)
    found["unparsed"] = 1 - sum(parsed) / len(parsed)
    if "implied" in rows[0]:
        found["follows"] = sum(same_answer(a or "", [row["implied"]]) for row, a in pairs) / len(pairs)
    if is_stated:
        found["rationale"] = sum(
            t.partition("\n")[0] == row["rationale"] for row, t in zip(rows, texts, strict=True)
        )
        found["rationale"] /= len(rows)
    return found


class Plan:
    """Steps of each run, such that all cost as many tokens; and the files of the rows."""

    def __init__(self, model: BindLLM, tables: Tables, steps: int) -> None:
        self.tables, self._model = tables, model
        self.lengths = {kind: self._length(kind) for kind in (False, True, "only", "given")}
        self.tokens = steps * self.lengths[True]
        for name in ("start", "train", "generated", "test"):
            self.write(name, getattr(tables, name))
        self.write("wrong", wrong(tables.train))

    def _length(self, kind: Rationale) -> float:
        """Return the mean number of tokens of a training row."""
        config = SourceConfig(str(SCENES), format="vqa", rationale=kind)
        rows = [read_row(row, config, FolderResolver(str(SCENES))) for row in self.tables.train]
        lengths = [make_sample(row, self._model.tokenizer, 512).length for row in rows]
        return sum(lengths) / len(lengths)

    def steps(self, kind: Rationale, share: float = 1.0) -> int:
        """Return the steps of a run that has a share of the tokens."""
        return round(share * self.tokens / self.lengths[kind])

    def write(self, name: str, rows: Iterable[Row]) -> Path:
        """Write a table, and return its path."""
        path = FOLDER / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, list(rows))
        return path


def measure(name: str, seed: int, plan: Plan, start: Path) -> dict[str, Any]:
    """Train one run and return its row: steps, seconds of training, and scores by variant."""
    test = plan.tables.test
    if name == "two stages":
        return measure_two_stages(seed, plan, start)
    kind: Rationale = name != "direct"
    table = FOLDER / ("wrong.jsonl" if name == "wrong rationale" else "train.jsonl")
    folder = train(
        f"{name.replace(' ', '-')}-{seed}", [source_of(table, kind)], plan.steps(kind), seed, start=start
    )
    model, row = BindLLM.from_pretrained(folder), {"steps": plan.steps(kind), "seconds": seconds_of(folder)}
    for variant, rows in {"model": test, "shuffled media": shuffled(test)}.items():
        texts = [texts[0] for texts in ask(model, rows, kind)]
        row[variant] = score(rows, texts, is_stated=bool(kind))
        row.setdefault("examples", texts[:: len(texts) // 6])
    if name == "one stage":
        row["vote"] = score(test, ask_voting(model, test), is_stated=True)
    return row


def measure_two_stages(seed: int, plan: Plan, start: Path) -> dict[str, Any]:
    """Train both stages, each with half of the tokens."""
    gold, test = FOLDER / "train.jsonl", plan.tables.test
    steps = plan.steps("only", 0.5), plan.steps("given", 0.5)
    first = train(f"stage-1-{seed}", [source_of(gold, "only")], steps[0], seed, start=start)
    writer = BindLLM.from_pretrained(first)

    def write_rationales(name: str, rows: Sequence[Row]) -> str:
        path = FOLDER / f"{name}-{seed}.jsonl"
        source = SourceConfig(str(plan.write(name, rows)), format="vqa", media=str(SCENES))
        generate_table(writer, source, path, batch_size=_BATCH, max_new_tokens=_TOKENS)
        return str(path)

    generated = {"rationales": write_rationales("generated", plan.tables.generated)}
    # Half of the rows that are drawn have generated rationales.
    weight = len(plan.tables.train) / len(plan.tables.generated)
    generated |= {**source_of(FOLDER / "generated.jsonl", "given"), "weight": weight}
    sources = [source_of(gold, "given"), generated]
    second = train(f"stage-2-{seed}", sources, steps[1], seed, start=start)
    answerer = BindLLM.from_pretrained(second)
    row: dict[str, Any] = {"steps": list(steps), "seconds": seconds_of(first) + seconds_of(second)}
    mixed = shuffled(test)
    variants: dict[str, tuple[Sequence[Row], str | None]] = {
        "model": (test, write_rationales("test", test)),
        "shuffled media": (mixed, write_rationales("shuffled", mixed)),
        "gold rationale": (test, None),
        "wrong rationale": (wrong(test, own_things=True), None),
    }
    for variant, (rows, rationales) in variants.items():
        texts = ask(answerer, rows, "given", rationales=rationales)
        row[variant] = score(rows, [text[0] for text in texts], is_stated=False)
        if rationales is not None:
            written = read_rationales(rationales)
            row[variant]["rationale"] = sum(written[one["id"]] == one["rationale"] for one in rows) / len(
                rows
            )
    return row


RUNS = ("direct", "one stage", "two stages", "wrong rationale")


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the rows: for each run and variant the mean of the seeds, with the smallest and the largest."""
    table = Table("run", "variant", "steps", "seconds", *ANSWERS, "unparsed", "rationale", "follows")
    for name in RUNS:
        own = [row for row in rows if row["run"] == name]
        variants = [key for key in (own or [{}])[0] if isinstance(own[0][key], Mapping)] if own else []
        for variant in variants:
            cells = []
            for metric in (*ANSWERS, "unparsed", "rationale", "follows"):
                found = [row[variant][metric] for row in own if metric in row[variant]]
                mean = f"{sum(found) / len(found):.1%}" if found else ""
                cells.append(f"{mean} ({min(found):.0%} to {max(found):.0%})" if len(found) > 1 else mean)
            steps, spent = own[0]["steps"], sum(row["seconds"] for row in own) / len(own)
            table.add_row(name, variant, str(steps), f"{spent:.0f}", *cells)
    return table


def main() -> None:
    """Train and measure the missing runs, seed by seed, and print the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start_steps", type=int, default=200, help="steps of the start, on captions")
    parser.add_argument("--steps", type=int, default=90, help="steps of a run with rationale and answer")
    parser.add_argument("--questions", type=int, default=200, help="test questions, half of each type")
    parser.add_argument("--output", type=Path, default=RESULTS / "rationales.json")
    given = parser.parse_args()
    # Direct answers take about twice as many steps; a row is seen at most about once.
    tables = make_tables(16 * given.start_steps, 32 * given.steps, 4 * given.steps, given.questions)
    FOLDER.mkdir(parents=True, exist_ok=True)
    captions = [{**row, "split": "train"} for row in tables.start]
    write_rows(FOLDER / "start.jsonl", captions)
    source = {
        "path": str(FOLDER / "start.jsonl"),
        "format": "caption",
        "media": str(SCENES),
        "split": "train",
    }
    start = train("start", [source], given.start_steps, 0)
    plan = Plan(BindLLM.from_pretrained(start), replace(tables, start=captions), given.steps)
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    for seed in given.seeds:
        for name in RUNS:
            if any((row["run"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows.append(
                {
                    "run": name,
                    "seed": seed,
                    "tokens_per_row_of_a_batch": round(plan.tokens),
                    **measure(name, seed, plan, start),
                }
            )
            write_json(given.output, rows)
            print(json.dumps(rows[-1]), flush=True)
            Console(width=180).print(table_of(rows))


if __name__ == "__main__":
    main()
