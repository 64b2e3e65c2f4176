"""docs/few-shot.md and docs/teach.md: commands are understood, the Python runs, tables name the choices of the code."""

import re
import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bindllm import BindLLM, Media
from bindllm.cli.arguments import read_command
from bindllm.cli.generate import NUM_SHOTS, generate
from bindllm.cli.index import datastore
from bindllm.cli.zero_shot import few_shot
from bindllm.evaluation import task
from bindllm.evaluation.support import POOL
from bindllm.model.generation import MAX_NEW_TOKENS
from bindllm.shots import ShotsBy
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
PAGE, TEACH = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("few-shot", "teach"))


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "line",
    [
        line
        for page in (PAGE, TEACH)
        for block in blocks("bash", page)
        for line in block.splitlines()
        if not line.startswith(("mkdir", "cp"))
    ],
)
def test_every_command_is_understood(line):
    program, command, *args = shlex.split(line)
    assert program == "bindllm"
    functions = {"generate": generate, "few_shot": few_shot, "datastore": datastore}
    read_command(command, functions[command], args)


def test_the_python_runs(decoder, monkeypatch):
    answers, generate = [], BindLLM.generate
    monkeypatch.setattr(BindLLM, "from_pretrained", lambda folder: tiny_model(decoder))
    monkeypatch.setattr(
        BindLLM, "generate", lambda *args, **options: answers.append(generate(*args, **options))
    )
    monkeypatch.setattr(Media, "image", lambda path: Media("image", np.zeros((8, 8, 3), np.uint8)))
    for block in blocks("python"):
        exec(block, {})
    # An answer, not a list: one prompt was asked.
    assert [type(answer) for answer in answers] == [str]


def names_in_table(head: str) -> list[str]:
    """The names in the first column of the table that starts with these words."""
    table = re.search(rf"^\| {head} .*\n(?:^\|.*\n)+", PAGE, flags=re.MULTILINE)[0]
    return re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()[1:]))


def test_the_tables_have_all_choices_and_all_variants():
    assert tuple(names_in_table("`--shots_by`")) == get_args(ShotsBy)
    assert names_in_table("variant") == [
        *(task.MODEL, task.NO_MEDIA, task.SHUFFLED_MEDIA),
        *(task.BLANK_SUPPORT, task.SHUFFLED_SUPPORT, task.WRONG_SUPPORT),
        *(task.NEAREST_CAPTION, task.MAJORITY_ANSWER, task.COPY_LAST, task.MAJORITY_SHOT),
    ]


def test_its_numbers_are_those_of_the_code():
    assert f"`max_new_tokens` ({MAX_NEW_TOKENS} by default)" in PAGE
    assert POOL == 10
    assert "among ten times as many shots" in PAGE
    assert NUM_SHOTS == 4
