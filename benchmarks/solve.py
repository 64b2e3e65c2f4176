"""`python -m benchmarks.solve CHECKPOINT`: questions about several scenes, which need two steps, by kind of planner.

The checkpoint is trained on scenes (recipes/scenes.yaml) and looks at the images in all rows:

- direct: it answers the question at once, with all images in one media group;
- random: calls of random tools about random images, then a random answer: the floor;
- model: a small model plans and decides (--planner CHECKPOINT, by default the checkpoint itself);
- oracle: a script that knows the right plan: the ceiling for these eyes.

A planner that is a model makes a single plan. Results are in benchmarks/results/solve.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS
from bindllm import BindLLM, Media
from bindllm.atomic import write_json
from bindllm.reasoning.brain import Brain, LocalBrain, Reply
from bindllm.reasoning.eyes import model_tools, read_number
from bindllm.reasoning.measure import calculate
from bindllm.reasoning.solver import Budget, Solver

SCENES = Path("data/scenes")
SUBSET = "new scenes"
SEED = 0
COUNT, COLOR, WHAT = (
    "How many things are in the image?",
    "What color is the background?",
    "What is in the image?",
)

Steps = Generator[list[tuple[str, dict[str, Any]]], list[str], str]
"""Yields the calls of a round, gets their results, returns the answer."""


@dataclass(frozen=True)
class Question:
    """A question about several scenes.

    Args:
        kind: compare, total, same color, or find.
        text: the question.
        images: paths of the scenes.
        answer: the right one.
        candidates: all possible answers.
        thing: that is looked for; only of kind find.
    """

    kind: str
    text: str
    images: tuple[str, ...]
    answer: str
    candidates: tuple[str, ...]
    thing: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether an answer names the right candidate, and no other one."""
        if self.kind == "total":
            return str(read_number(answer)) == self.answer
        words = set(re.findall("[a-z]+", answer.lower()))
        return words & set(self.candidates) == {self.answer}


def make_questions(rows: Sequence[Mapping[str, Any]], count: int) -> list[Question]:
    """Draw ``count`` questions of each kind; the answers of a kind are balanced."""
    draw, found = random.Random(SEED), []
    image = lambda row: str(SCENES / row["image"])  # noqa: E731
    colors = tuple(sorted({row["background"] for row in rows}))
    single = [row for row in rows if len(row["things"]) == 1]
    for number in range(count):
        # Exchanged if needed, so that every second answer is `first`.
        pair = sorted(draw.sample(rows, 2), key=lambda row: -len(row["things"]))
        while len(pair[0]["things"]) == len(pair[1]["things"]):
            pair = sorted(draw.sample(rows, 2), key=lambda row: -len(row["things"]))
        pair, answer = (pair[::-1], "second") if number % 2 else (pair, "first")
        images = tuple(map(image, pair))
        text = "Which image has more things, the first or the second?"
        found.append(Question("compare", text, images, answer, ("first", "second")))
        total = str(sum(len(row["things"]) for row in pair))
        text = "How many things are in both images together?"
        found.append(Question("total", text, images, total, tuple(map(str, range(2, 11)))))
        first = draw.choice(rows)
        same = [
            row
            for row in rows
            if (row["background"] == first["background"]) == (number % 2 == 0) and row is not first
        ]
        images, answer = (image(first), image(draw.choice(same))), "no" if number % 2 else "yes"
        text = "Do both images have the same background color, yes or no?"
        found.append(Question("same color", text, images, answer, ("yes", "no")))
        three = draw.sample(single, 3)
        while len({row["things"][0]["name"] for row in three}) < 3:
            three = draw.sample(single, 3)
        wanted = draw.choice(three)
        thing = wanted["things"][0]["name"]
        text = f"What color is the background of the image with the {thing}?"
        found.append(Question("find", text, tuple(map(image, three)), wanted["background"], colors, thing))
    return found


def oracle(question: Question) -> Steps:
    """Plan as a person would."""
    handles = [f"image{n}" for n in range(1, len(question.images) + 1)]
    asked = {"compare": COUNT, "total": COUNT, "same color": COLOR, "find": WHAT}[question.kind]
    results = yield [("ask", {"media": handle, "question": asked}) for handle in handles]
    if question.kind == "same color":
        return "yes" if results[0] == results[1] else "no"
    if question.kind == "find":
        # The answer that has most words of the name; of several, the first.
        words = set(question.thing.split())
        shared = [len(words & set(result.split())) for result in results]
        handle = handles[shared.index(max(shared))]
        (color,) = yield [("ask", {"media": handle, "question": COLOR})]
        return color
    numbers = [read_number(result) or 0 for result in results]
    if question.kind == "total":
        return str(sum(numbers))
    return "first" if numbers[0] > numbers[1] else "second"


def at_random(question: Question) -> Steps:
    """Call at random as often as the oracle does, and answer at random."""
    draw = random.Random(f"{SEED} {question}")
    handles = [f"image{n}" for n in range(1, len(question.images) + 1)]
    for _ in range(1 + (question.kind == "find")):
        yield [
            draw.choice([
                ("ask", {"media": draw.choice(handles), "question": draw.choice((COUNT, COLOR, WHAT))}),
                ("describe", {"media": draw.choice(handles)}),
            ])
            for _ in handles
        ]  # fmt: skip
    return draw.choice(question.candidates)


class Program:
    """A brain that follows the steps of a script."""

    name = "script"

    def __init__(self, steps: Steps) -> None:
        self._steps, self._read = steps, 0

    def reply(self, messages: Sequence[Mapping[str, Any]], tools: Any, **_: Any) -> Reply:
        """Return the next step."""
        results = [m["content"].partition(": ")[2] for m in messages if m["role"] == "tool"]
        new, self._read = results[self._read :], len(results)
        try:
            return Reply("", tuple(self._steps.send(new if results else None)))
        except StopIteration as end:
            return Reply(end.value)


def measure(
    eyes: BindLLM, questions: Sequence[Question], brain: Callable[[Question], Brain] | None
) -> dict[str, Any]:
    """Return right answers by kind, failures by type, and calls, tokens and seconds of a question."""
    right, failures, calls, tokens, started = Counter(), Counter(), 0, 0, time.perf_counter()
    for question in questions:
        media = [Media.image(path) for path in question.images]
        if brain is None:
            answer: str | None = eyes.generate(question.text, media, max_new_tokens=24)
        else:
            tools = [*model_tools(eyes, max_new_tokens=24), calculate]
            planner = brain(question)
            # Two rounds for the script of `find`; a small model gets a single plan.
            budget = Budget(rounds=1 if isinstance(planner, LocalBrain) else 3, reply_tokens=256)
            solution = Solver(planner, tools, budget=budget).run(question.text, media)
            answer, calls, tokens = solution.answer, calls + solution.calls, tokens + solution.tokens
            failures.update([solution.failure] if solution.failure else [])
        right[question.kind] += answer is not None and question.is_right(answer)
    asked, number = Counter(question.kind for question in questions), len(questions)
    return {
        "questions": number,
        "accuracy": {kind: right[kind] / asked[kind] for kind in asked},
        "failures": dict(failures),
        "calls": calls / number,
        "tokens": tokens / number,
        "seconds": (time.perf_counter() - started) / number,
    }


def main() -> None:
    """Measure the four kinds of planners and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--planner", help="checkpoint that plans (default: the one that looks)")
    parser.add_argument("--count", type=int, default=25, help="questions of each kind")
    parser.add_argument(
        "--model_count", type=int, default=5, help="questions of each kind for the model, which is slow"
    )
    given = parser.parse_args()
    rows = [json.loads(line) for line in (SCENES / "captions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("subset") == SUBSET]
    questions = make_questions(rows, given.count)
    eyes = BindLLM.from_pretrained(given.checkpoint)
    planner = LocalBrain(eyes if given.planner is None else BindLLM.from_pretrained(given.planner))
    brains = {
        "direct": None,
        "oracle": lambda question: Program(oracle(question)),
        "model": lambda _: planner,
        "random": lambda question: Program(at_random(question)),
    }
    found: dict[str, Any] = {}
    for name, brain in brains.items():
        asked = questions[: 4 * given.model_count] if name == "model" else questions
        found[name] = measure(eyes, asked, brain)
        print(name, found[name], flush=True)
        # After each, since the model takes most of the time.
        write_json(RESULTS / "solve.json", {"planner": planner.name, "subset": SUBSET, "rows": found})
    kinds = [*found["direct"]["accuracy"]]
    table = Table("planner", "questions", *kinds, "failures", "calls", "tokens", "seconds")
    for name, row in found.items():
        shares = [f"{row['accuracy'][kind]:.0%}" for kind in kinds]
        ends = ", ".join(f"{count} {reason}" for reason, count in row["failures"].items())
        numbers = (f"{row[key]:.1f}" for key in ("calls", "tokens", "seconds"))
        table.add_row(name, str(row["questions"]), *shares, ends, *numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
