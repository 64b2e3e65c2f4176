"""docs/benchmarks.md: the table has every benchmark with its parsers, and commands and Python are understood."""

import json
import re
import shlex
from pathlib import Path

from benchmark_parts import image, write
from bindllm.cli.arguments import read_command
from bindllm.cli.evaluate import compare, evaluate
from bindllm.evaluation.benchmarks import BENCHMARKS
from bindllm.evaluation.benchmarks.benchmark import read_items

PAGE = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_table_has_every_benchmark_with_its_parsers():
    table = PAGE.partition("| name | files")[2].partition("\n\n")[0]
    rows = {}
    for row in table.splitlines():
        cells = row.split("|")
        for name in re.findall(r"`(\w+)`", cells[1]):
            rows[name] = re.findall(r"`(\w+)`", cells[4])
    assert rows == {name: list(benchmark.parsers) for name, benchmark in BENCHMARKS.items()}


def test_every_command_is_understood():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        _, command, *words = shlex.split(
            line.replace("torchrun --nproc_per_node 8 -m bindllm.cli", "bindllm")
        )
        read_command(command, {"evaluate": evaluate, "compare": compare}[command], words)


def test_the_benchmark_of_your_own_is_read(tmp_path):
    (block,) = (block for block in blocks("python") if "DOORS" in block)
    names = {}
    exec(compile(block, "docs/benchmarks.md", "exec"), names)
    image(tmp_path / "a.png")
    row = {"id": "1", "file": "a.png", "text": "Is it open?", "label": "yes", "kind": "door"}
    write(tmp_path / "questions.json", json.dumps([row]))
    (item,) = read_items(names["DOORS"], tmp_path, prompt="{question}").items
    assert (item.id, item.target, item.groups) == ("1", "yes", {"kind": "door"})
