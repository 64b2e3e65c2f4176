"""`python -m benchmarks.languages checkpoints/languages ...`: names by language, of runs of recipes/languages.yaml.

It reads the held-out answers of the reports, and asks the last checkpoint without media for the same names: "onion in
Spanish?" after eight worked examples. Its adapter serves media only, so this is the knowledge of the decoder itself.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bindllm import BindLLM
from bindllm.evaluation.benchmarks.bootstrap import interval_text, intervals
from bindllm.evaluation.benchmarks.metrics import ACCURACY
from bindllm.evaluation.captions import same_caption
from bindllm.evaluation.task import VARIANTS
from bindllm.quickstart.languages import ALL, ENGLISH, LANGUAGES
from bindllm.shots import Shot

DATA = Path("data/languages")
# How Unicode names the letters of each language.
SCRIPTS = {"en": ("LATIN",), "es": ("LATIN",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "zh": ("CJK",)}
IN_WORDS = {"es": "Spanish", "ja": "Japanese", "zh": "Chinese"}
SHOTS, TOKENS, BATCH = 8, 16, 32


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def in_script(text: str, language: str) -> bool:
    """Whether all letters of an answer are of a script of the language; no letters are of none."""
    scripts = [unicodedata.name(char, "") for char in text if char.isalpha()]
    return bool(scripts) and all(name.startswith(SCRIPTS[language]) for name in scripts)


def line(thing: str, unit: object, right: bool) -> dict[str, Any]:
    """Return an answer as `intervals` reads it; answers about one thing are not independent."""
    return {"media": [thing], "unit": str(unit), "score": float(right)}


def share(lines: Sequence[dict[str, Any]]) -> str:
    return interval_text(intervals(lines, ACCURACY).get("accuracy"))


def rows_of(runs: Iterable[Path], things: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each subset and language, over all runs."""
    answers = [
        {**row, "thing": things[Path(row["media"]).parent.name], "unit": f"{run} {n}"}
        for run in runs
        for n, row in enumerate(read(run / "report/captions.jsonl"))
    ]
    for subset in (ALL, ENGLISH):
        for language in LANGUAGES:
            own = [row for row in answers if (row["subset"], row["language"]) == (subset, language)]
            cells = [
                share(
                    [
                        line(row["thing"]["name"], row["unit"], same_caption(row[variant], row["references"]))
                        for row in own
                        if row[variant] is not None
                    ]
                )
                for variant in VARIANTS["captions"]
            ]
            said = [(row["model"], row["thing"]["names"]["en"]) for row in own]
            as_english = sum(same_caption(text, [english]) for text, english in said) / len(said)
            script = sum(in_script(text, language) for text, _ in said) / len(said)
            yield subset, language, str(len(own)), *cells, f"{as_english:.3f}", f"{script:.3f}"


def translations(checkpoint: Path, things: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield, for each language, how often the decoder translates the English name without media."""
    model = BindLLM.from_pretrained(checkpoint)
    known = [thing for thing in things if thing["subset"] == ALL][:SHOTS]
    asked = [thing for thing in things if thing["subset"] == ENGLISH]
    for language, word in IN_WORDS.items():
        ask = f"{{}} in {word}?"
        shots = [Shot(ask.format(thing["name"]), thing["names"][language]) for thing in known]
        texts: list[str] = []
        for start in range(0, len(asked), BATCH):
            prompts = [ask.format(thing["name"]) for thing in asked[start : start + BATCH]]
            texts += model.generate(prompts, shots=shots, max_new_tokens=TOKENS)
        lines = [
            line(thing["name"], n, same_caption(text, [thing["names"][language]]))
            for n, (thing, text) in enumerate(zip(asked, texts, strict=True))
        ]
        copied = sum(
            same_caption(text, [thing["name"]]) for thing, text in zip(asked, texts, strict=True)
        ) / len(asked)
        yield language, str(len(lines)), share(lines), f"{copied:.3f}"
    tokens = model.tokenizer
    for language in LANGUAGES:
        names = [thing["names"][language] for thing in things]
        counts = [len(ids) for ids in tokens(names, add_special_tokens=False).input_ids]
        letters = sum(map(len, names))
        yield (
            language,
            "tokens",
            f"{sum(counts) / len(counts):.1f} a name",
            f"{sum(counts) / letters:.2f} a character",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    runs, console = parser.parse_args().runs, Console(width=200)
    things = read(DATA / "names.jsonl")
    names = {thing["name"].replace(" ", "-"): thing for thing in things}
    table = Table("subset", "language", "n", *VARIANTS["captions"], "the English name", "in the script")
    for row in rows_of(runs, names):
        table.add_row(*row)
    console.print(table)
    table = Table("language", "n", "right translation without media", "the English name")
    for row in translations(runs[-1], things):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
