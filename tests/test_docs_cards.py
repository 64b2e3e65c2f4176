"""docs/cards.md and docs/lmms-eval.md: every command is one that the program reads."""

import re
import shlex
from pathlib import Path

import pytest

from bindllm.cli.arguments import read_command
from bindllm.cli.card import card
from bindllm.cli.evaluate import evaluate

PAGES = Path(__file__).parents[1] / "docs"
COMMANDS = {"card": card, "evaluate": evaluate}
LINES = [
    line
    for name in ("cards.md", "lmms-eval.md")
    for block in re.findall(
        r"^```bash\n(.*?)^```", (PAGES / name).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    for line in block.splitlines()
    if line.startswith("bindllm ")
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_is_read(line):
    _, name, *words = shlex.split(line)
    assert read_command(name, COMMANDS[name], words)


def test_the_pages_have_commands():
    assert len(LINES) >= 6
